"""Commands that take a bundle elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.bundle.targets import Target
from chipviz.cli import inputs, options, printing
from chipviz.errors import ConfigError

_TARGETS = ", ".join(get_args(Target))


def export(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    to: Annotated[str, typer.Option(help=f"{_TARGETS}.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights of 8 bits, if labels stay what they are.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(help="Texts to compare on, as predict takes them. Else those of the run."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a bundle for another place, checked by running it there."""
    target: Target | None = next((t for t in get_args(Target) if t == to), None)
    if target is None:
        raise ConfigError(f"There is no target {to!r}.", f"Give one of {_TARGETS}.")
    metadata = read_metadata(bundle)
    rows = _rows(file, metadata, context.obj) if file else None
    from chipviz.bundle import asked
    from chipviz.bundle import export as exporting

    done = exporting.export(
        bundle,
        target,
        out.expanduser().absolute(),
        rows=rows or asked.rows_of_run(metadata, context.obj),
        progress=printing.printer(),
        int8=int8,
    )
    printing.end_progress()
    if as_json:
        printing.print_json(asdict(done))
        return
    printing.show(f"{done.path}: {done.n_bytes / 1e6:,.1f} MB for {done.target}.")
    printing.show(
        f"{done.n_agree} of {done.n_checked} {metadata.task.rows} get the bundle's own label, "
        f"largest difference {done.max_difference:.1e}. README.md has the lines that run it."
    )


def _rows(file: Path, metadata: Metadata, home: Path) -> list[tuple[str, str | None]]:
    """Texts of a file, or pictures of a folder."""
    if metadata.task.kind == "image":
        return [(str(path), None) for path in inputs.pictures([file])]
    given = inputs.from_file(file, home)
    printing.print_notices(given.notices)
    texts, pairs = inputs.in_fields(given, metadata.task, metadata.preset)
    return list(zip(texts, pairs or [None] * len(texts), strict=True))


def push(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or an export.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="As owner/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is for its owner alone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Send a bundle or an export to a model hub. The token is read from HF_TOKEN alone."""
    from chipviz.bundle import push as pushing

    done = pushing.push(folder, repo_id, private=private, dry_run=dry_run)
    if as_json:
        printing.print_json(asdict(done))
        return
    for name, n_bytes in done.files.items():
        printing.show(f"{n_bytes:>14,}  {name}")
    printing.show(done.address or f"Nothing was sent to {repo_id}: this was a dry run.")


def add_to(app: typer.Typer) -> None:
    """Give these commands to the command line."""
    for command in (export, push):
        app.command()(command)
