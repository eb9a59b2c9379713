"""Commands about models made from models: tune, prune, models, evaluate."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from chipviz import sources
from chipviz.cli import options, printing
from chipviz.config import RunConfig
from chipviz.errors import ChipvizError, ConfigError, JobError
from chipviz.features import distributed
from chipviz.results import models as made
from chipviz.results.models import Fit, ModelSpec
from chipviz.runs import worker
from chipviz.runs.store import Job, Store

Backbone = Annotated[
    str, typer.Option(help="Embedded name, made model, Hub id, folder or GGUF file.")
]
Data = Annotated[str | None, typer.Option(help="Data of the task: embedded name, file or Hub id.")]
Name = Annotated[str, typer.Option(help="Name of the new backbone.")]
Text = Annotated[str | None, typer.Option(help="Text column. Guessed if not named.")]
Label = Annotated[str | None, typer.Option(help="Label column. Guessed if not named.")]
Template = Annotated[str | None, typer.Option(help="Prompt around {text}.")]
MaxLength = Annotated[int, typer.Option(help="Maximum tokens of a prompt.")]
Most = Annotated[int | None, typer.Option(help="Maximum texts of the split.")]
Preset = Annotated[str, typer.Option(help="sound or published.")]
Rate = Annotated[
    str | None, typer.Option(help="Learning rate: a number, paper (1e-5) or code (5e-5).")
]
Batch = Annotated[int, typer.Option(help="Texts of a step.")]
Seed = Annotated[int, typer.Option(help="Seed of orders and first weights.")]
METHODS = ", ".join(made.PRUNING)


def tune(
    context: typer.Context,
    backbone: Backbone,
    data: Annotated[str, typer.Option(help="Data of the task.")],
    name: Name,
    template: Template = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = 256,
    max_train: Most = None,
    max_validation: Most = None,
    preset: Preset = "sound",
    epochs: Annotated[int, typer.Option(help="Maximum epochs.")] = 3,
    lr: Rate = None,
    batch: Batch = 16,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fit LoRA on a task and merge it: a new backbone under a name."""
    task = _task(
        context.obj,
        backbone=backbone,
        data=data,
        template=template,
        text=text,
        label=label,
        max_length=max_length,
        max_train=max_train,
        max_validation=max_validation,
        seed=seed,
    )
    fit = Fit.checked(preset=preset, epochs=epochs, lr=_rate(lr), batch=batch)
    spec = ModelSpec.checked(
        name=name, backbone=task.backbone, method="lora", task=task, fit=fit, seed=seed
    )
    _make(context.obj, spec, as_json)


def prune(
    context: typer.Context,
    backbone: Backbone,
    name: Name,
    method: Annotated[str, typer.Option(help=f"{METHODS}.")],
    layers: Annotated[int | None, typer.Option(help="Blocks to take out.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the parameters to take out, such as 0.25.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="Data whose texts calibrate, heal and measure.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row of that text.")] = 256,
    heal: Annotated[str | None, typer.Option(help="replaceme, lora or pretrain.")] = None,
    data: Data = None,
    template: Template = None,
    max_length: MaxLength = 256,
    max_train: Most = None,
    preset: Preset = "sound",
    tokens: Annotated[int, typer.Option(help="Tokens that healing on text reads.")] = 1_000_000,
    optimizer: Annotated[str, typer.Option(help="adamw or lion.")] = "adamw",
    epochs: Annotated[int, typer.Option(help="Maximum epochs of lora.")] = 3,
    lr: Rate = None,
    batch: Batch = 16,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Take blocks out of a model, and heal it: a new backbone under a name."""
    task = None
    if data is not None:
        task = _task(
            context.obj,
            backbone=backbone,
            data=data,
            template=template,
            max_length=max_length,
            max_train=max_train,
            seed=seed,
        )
    fit = Fit.checked(
        preset=preset,
        epochs=epochs,
        tokens=tokens,
        lr=_rate(lr),
        optimizer=optimizer,
        batch=batch,
    )
    spec = ModelSpec.checked(
        name=name,
        backbone=options.backbone_named(backbone, context.obj),
        method=method,
        layers=layers,
        ratio=ratio,
        calibrate=calibrate and sources.absolute(calibrate, sources.DATA_WHEELS),
        length=length,
        heal=heal,
        task=task,
        fit=fit,
        seed=seed,
    )
    _make(context.obj, spec, as_json)


def models(
    context: typer.Context,
    delete: Annotated[str | None, typer.Option(help="Remove the model of this name.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the models made here, with their lineage."""
    home: Path = context.obj
    if delete is not None:
        n_bytes = made.delete_model(home, delete)
        printing.show(f"{delete} is deleted, {n_bytes:,} bytes are free again.")
        return
    found = made.made_models(home)
    if as_json:
        printing.print_json({"models": [record.to_dict(folder) for folder, record in found]})
        return
    for _, record in found:
        printing.show(
            f"{record.name}  {record.method} of {record.parent}, {record.n_layers} layers, "
            f"{record.n_parameters:,} parameters{_perplexities(record)}"
        )
    if not found:
        printing.show("No models yet. Make one with `python -m chipviz prune` or `tune`.")


def evaluate(
    context: typer.Context,
    backbone: Backbone,
    data: Data = None,
    perplexity: Annotated[
        str | None, typer.Option(help="Data whose held-out texts are measured instead.")
    ] = None,
    template: Template = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = 256,
    max_test: Most = None,
    length: Annotated[int, typer.Option(help="Tokens of a row of text.")] = 256,
    max_rows: Annotated[int, typer.Option(help="Maximum rows of text.")] = 64,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Ask a model itself: its accuracy on a task, or its perplexity on texts."""
    if (data is None) == (perplexity is None):
        raise ConfigError("Give either --data or --perplexity.", "For example --data bbc-news.")
    from chipviz.pruning import evaluate as evaluating

    progress = printing.printer()
    if perplexity is not None:
        found = evaluating.evaluate_text(
            options.backbone_named(backbone, context.obj),
            sources.absolute(perplexity, sources.DATA_WHEELS),
            length=length,
            max_rows=max_rows,
            home=context.obj,
            progress=progress,
        )
        said = "perplexity {perplexity:.2f} on {n_tokens:,} tokens, rows of {length}"
    else:
        config = _task(
            context.obj,
            backbone=backbone,
            data=data,
            template=template,
            text=text,
            label=label,
            max_length=max_length,
            max_test=max_test,
            seed=seed,
        )
        found = evaluating.evaluate_answers(config, context.obj, progress).to_dict()
        said = (
            "accuracy {accuracy:.1%} ({accuracy_low:.1%} to {accuracy_high:.1%}) on {n:,} test "
            "texts, {accuracy_normalised:.1%} by likelihood per token"
        )
    printing.end_progress()
    if as_json:
        printing.print_json(found)
    else:
        printing.show(said.format(**found))


def add_to(app: typer.Typer) -> None:
    """Give these commands to the command line."""
    for command in (tune, prune, models, evaluate):
        app.command()(command)


def _task(home: Path, **given: Any) -> RunConfig:
    values = {name: value for name, value in given.items() if value is not None}
    values["backbone"] = options.backbone_named(values["backbone"], home)
    values["data"] = sources.absolute(values["data"], sources.DATA_WHEELS)
    return RunConfig.checked(**values)


def _rate(given: str | None) -> Any:
    """A learning rate as a number where it is one."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def _perplexities(record: made.ModelRecord) -> str:
    stages = (record.perplexity_before, record.perplexity_pruned, record.perplexity_after)
    shown = [f"{value:,.1f}" for value in stages if value is not None]
    return f", perplexity {' -> '.join(shown)}" if shown else ""


def _make(home: Path, spec: ModelSpec, as_json: bool) -> None:
    if distributed.is_helper():
        from chipviz.pruning.helping import help_leader

        with suppress(ChipvizError):  # the leader reports what goes wrong
            help_leader(spec, home=home)
        return
    store = Store(home)
    made.place_of(home, spec.name)
    finish(store, store.create_model(spec, claim=True), as_json)


def finish(store: Store, job: Job, as_json: bool) -> None:
    """Make a claimed model here, and end as it ends.

    Raises:
        JobError: If it was not made.
    """
    ended = worker.work(store, job, watch=printing.printer())
    printing.end_progress()
    if ended.state != "done":
        raise JobError(
            ended.message or f"The making of {job.name} is {ended.state}.",
            ended.hint or f"Go on with `python -m chipviz resume {job.job_id}`.",
            *ended.refusal.fields,
        )
    folder = made.made_folder(store.home, job.name)
    record = folder and made.read_record(folder)
    if folder is None or record is None:
        raise JobError(f"The model {job.name} is gone.", "Make it again.")
    if as_json:
        printing.print_json(record.to_dict(folder))
        return
    printing.show(
        f"{record.name}: {record.method} of {record.parent}, {record.n_layers} layers, "
        f"{record.n_parameters:,} parameters{_perplexities(record)}"
    )
    printing.show(f"`python -m chipviz train --backbone {record.name} --data ...` probes it.")
