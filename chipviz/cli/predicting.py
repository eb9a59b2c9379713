"""The command that asks a bundle, or a chip alone, about texts or pictures."""

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from chipviz.bundle import bulk
from chipviz.bundle.fields import fields_of
from chipviz.bundle.metadata import read_metadata
from chipviz.bundle.rows_out import Said, columns_of
from chipviz.cli import inputs, options, printing
from chipviz.cli.asked import Asked, Fields, in_words, look_at
from chipviz.data import streaming
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
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Give every class its probability.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="Of a chip alone: the backbone that it reads.")
    ] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Let texts leave at the bundle's early exits.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write here: one JSON object a line, of a table also .csv or .parquet."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Classify texts or pictures with a bundle, or with a chip alone and its backbone."""
    if image:
        if file or text or text_pair or choices:
            raise ConfigError("Texts and pictures are given.", "Give either.")
        if backbone or adaptive:
            raise ConfigError(
                "A chip alone and early exits read texts.",
                "Leave out --image, or --backbone and --adaptive.",
            )
        _predict_pictures(bundle, image, out, as_json, probabilities=probabilities)
        return
    if backbone and adaptive:
        raise ConfigError("A chip alone has no early exits.", "Leave out --adaptive.")
    if file and (text or text_pair or choices):
        raise ConfigError("Texts are given twice.", "Give either --file or --text.")
    if not file and not text:
        raise ConfigError("There is nothing to classify.", "Give --text, --file or --image.")
    if file and inputs.is_table(file) and (out or streaming.is_large(file)):
        if out is None:
            _refuse_in_memory(file)
        else:
            asked = look_at(bundle, backbone, context.obj, adaptive=adaptive)
            source = bulk.source_mark(file, bundle)
            wanted = bulk.Wanted(out, probabilities, f"{source} {backbone} {adaptive}")
            _predict_table(asked, file, wanted, context.obj, as_json)
        return
    given = (
        inputs.from_file(file, context.obj)
        if file
        else inputs.from_options(text or [], text_pair, choices)
    )
    printing.print_notices(given.notices)
    asked = look_at(bundle, backbone, context.obj, adaptive=adaptive)
    fields: dict[str, Fields] = {
        name: inputs.in_fields(given, task, preset) for name, (task, preset) in asked.tasks.items()
    }
    found = asked.load()(fields)
    texts, pairs = next(iter(fields.values()))
    seconds = pairs or [""] * len(texts)
    shown = [
        " / ".join(" ".join(given.split())[:50] for given in row if given)
        for row in zip(texts, seconds, strict=True)
    ]
    lines = [columns_of(said, probabilities=probabilities, flat=False) for said in found]
    words = [f"{in_words(said)}  {name}" for said, name in zip(found, shown, strict=True)]
    printing.predictions(lines, words, out, as_json)


def _predict_table(
    asked: Asked, file: Path, wanted: bulk.Wanted, home: Path, as_json: bool
) -> None:
    """Write predictions of all rows beside their columns."""
    if streaming.is_large(file):
        chunks, n_rows = streaming.stream_rows(file, bulk.CHUNK), 0
    else:
        given = inputs.from_file(file, home)
        printing.print_notices(given.notices)
        rows, n_rows = given.rows, len(given.rows)
        _fields(asked, rows)  # a bad row is said before the first pass
        starts = range(0, n_rows, bulk.CHUNK)
        chunks = (rows.iloc[start : start + bulk.CHUNK] for start in starts)
    model = asked.load()

    def answer(rows: pd.DataFrame) -> list[Said]:
        return model(_fields(asked, rows))

    done = bulk.predict_table(chunks, answer, wanted, printing.printer(), n_rows)
    printing.end_progress()
    if as_json:
        said = {"path": str(wanted.out), "rows": done.n_rows, "rows_before": done.n_before}
        printing.print_json(said)
        return
    before = f", {done.n_before:,} of them by an earlier call" if done.n_before else ""
    printing.show(f"{wanted.out}: {done.n_rows:,} rows{before}.", sys.stderr)


def _refuse_in_memory(file: Path) -> None:
    """Refuse to print what is too large to print.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        f"{file.name} has {file.stat().st_size:,} bytes, which are read some rows at a time.",
        "Give --out: predictions are written there beside the table's columns.",
    )


def _fields(asked: Asked, rows: pd.DataFrame) -> dict[str, Fields]:
    """The texts of every task, from a table with the columns of its run."""
    return {name: fields_of(rows, task, preset) for name, (task, preset) in asked.tasks.items()}


def _predict_pictures(
    bundle: Path, image: list[Path], out: Path | None, as_json: bool, *, probabilities: bool
) -> None:
    files = inputs.pictures(image)
    refuse_kind(read_metadata(bundle).task.kind, "image")
    from chipviz.bundle import load

    found = load(bundle).predict([str(file) for file in files])
    lines = [
        {"file": str(file)} | columns_of({"": p}, probabilities=probabilities, flat=False)
        for file, p in zip(files, found, strict=True)
    ]
    words = [f"{in_words({'': p})}  {file.name}" for file, p in zip(files, found, strict=True)]
    printing.predictions(lines, words, out, as_json)


def add_to(app: typer.Typer) -> None:
    """Give this command to the command line."""
    app.command()(predict)
