"""The command that asks a bundle, or a chip alone, about texts or pictures."""

from pathlib import Path
from typing import Annotated

import typer

from chipviz.bundle.metadata import read_metadata
from chipviz.cli import inputs, options, printing
from chipviz.data.task import refuse_kind
from chipviz.errors import ConfigError


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
        from chipviz.bundle.head_reader import load_head

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


def add_to(app: typer.Typer) -> None:
    """Give this command to the command line."""
    app.command()(predict)
