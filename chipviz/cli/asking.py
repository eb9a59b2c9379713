"""Commands that ask: a bundle about texts or pictures, a run about every token or patch."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from chipviz.bundle.metadata import read_metadata
from chipviz.cli import inputs, options, printing
from chipviz.config import RECOMMENDED
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError
from chipviz.keys import Cut
from chipviz.runs.questions import ReadPatches, ReadTokens
from chipviz.runs.store import Store


def predict(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(help="A second text; one to each --text.")
    ] = None,
    choices: Annotated[
        list[str] | None, typer.Option(help="Options of a question, as 'one|two|three'.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="One text a line, or a table with the run's columns.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture, or a folder of them; may be repeated.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Of a chip alone: the backbone that it reads.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write one JSON object a line here.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Classify texts or pictures with a bundle, or with a chip alone and its backbone."""
    if image:
        if file or text or text_pair or choices:
            raise ConfigError("Texts and pictures are given.", "Give either.")
        _predict_pictures(bundle, image, out, as_json)
        return
    if file and (text or text_pair or choices):
        raise ConfigError("Texts are given twice.", "Give either --file or --text.")
    if not file and not text:
        raise ConfigError("There is nothing to classify.", "Give --text, --file or --image.")
    given = (
        inputs.from_file(file, context.obj)
        if file
        else inputs.from_options(text or [], text_pair, choices)
    )
    printing.print_notices(given.notices)
    if backbone:
        from chipviz.bundle.head import load_head

        alone = load_head(bundle, backbone, home=context.obj, progress=printing.printer())
        printing.end_progress()
        texts, pairs = inputs.in_fields(given, alone.info.task, alone.info.preset)
        found = alone.predict(texts, pairs)
    else:
        metadata = read_metadata(bundle)
        refuse_kind(metadata.task.kind, "text")
        texts, pairs = inputs.in_fields(given, metadata.task, metadata.preset)
        from chipviz.bundle import load

        found = load(bundle).predict(texts, pairs)
    seconds = pairs or [""] * len(texts)
    shown = [
        " / ".join(" ".join(given.split())[:50] for given in row if given)
        for row in zip(texts, seconds, strict=True)
    ]
    printing.predictions([{"label": p.label, "score": p.score} for p in found], shown, out, as_json)


def _predict_pictures(bundle: Path, image: list[Path], out: Path | None, as_json: bool) -> None:
    files = inputs.pictures(image)
    refuse_kind(read_metadata(bundle).task.kind, "image")
    from chipviz.bundle import load

    found = load(bundle).predict([str(file) for file in files])
    lines = [
        {"file": str(file), "label": p.label, "score": p.score}
        for file, p in zip(files, found, strict=True)
    ]
    printing.predictions(lines, [file.name for file in files], out, as_json)


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
    """Give these commands to the command line."""
    for command in (predict, tokens):
        app.command()(command)
