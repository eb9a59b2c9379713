"""The command that asks a run about every token of a text, or every patch of a picture."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from chipviz.cli import inputs, options, printing
from chipviz.config import RECOMMENDED
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError
from chipviz.keys import Cut
from chipviz.runs.questions import ReadPatches, ReadTokens
from chipviz.runs.store import Store


def tokens(
    context: typer.Context,
    run: options.RunId,
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture to read.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Options of a question, as 'one|two|three'.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Defaults to rule within's layer.")] = None,
    pooling: options.PoolingName = None,
    chip: options.ChipName = None,
    recipe: options.RecipeName = None,
    site: options.SiteName = None,
    single: Annotated[
        bool, typer.Option("--single", help="Ask about each token alone, not the text so far.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what a layer's chip reads at each token of a text, or at each patch of a picture."""
    report = Store(context.obj).report(run)
    named: dict[str, Any] = {"layer": layer, "pooling": pooling, "chip": chip}
    named |= {"recipe": recipe, "site": site}
    chosen = report.select(RECOMMENDED if layer is None else "manual", **named)
    if image is not None:
        _patches(context.obj, run, image, chosen.cut, as_json)
        return
    if text is None:
        raise ConfigError("There is nothing to read.", "Give --text or --image.")
    refuse_kind(report.task.kind, "text")
    given = inputs.from_options([text], text_pair and [text_pair], choices and [choices])
    texts, pairs = inputs.in_fields(given, report.task, report.preset)
    from chipviz.runs.model_process import Answerer

    question = ReadTokens(run, texts[0], pairs[0] if pairs else None, chosen.cut, single)
    reading = Answerer(context.obj).read_tokens(question)
    if as_json:
        printing.print_json(asdict(reading))
        return
    for token, row in zip(reading.tokens, reading.at_cut, strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        printing.show(f"{token.text!r:<24} {reading.label_names[best]:<20} {row[best]:.3f}")


def _patches(home: Path, run: str, image: Path, cut: Cut, as_json: bool) -> None:
    from chipviz.runs.model_process import Answerer

    (file,) = inputs.pictures([image], single=True)
    reading = Answerer(home).read_patches(ReadPatches(run, str(file), cut))
    if as_json:
        printing.print_json(asdict(reading))
        return
    names = reading.label_names
    rows, columns = reading.grid
    labels, shares = reading.label_index[cut.layer], reading.confidence[cut.layer]
    for row in range(rows):
        own = range(row * columns, (row + 1) * columns)
        printing.show("  ".join(f"{names[labels[i]][:10]:<10} {shares[i]:.2f}" for i in own))
    said = reading.by_layer[cut.layer]
    best = max(range(len(said)), key=said.__getitem__)
    printing.show(
        f"the picture: {names[best]} {said[best]:.3f}, settled at layer {reading.settled_layer}"
    )


def add_to(app: typer.Typer) -> None:
    """Give this command to the command line."""
    app.command()(tokens)
