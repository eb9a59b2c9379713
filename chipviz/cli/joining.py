"""The command that puts several bundles on one backbone."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chipviz.cli import options, printing


def join(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one backbone.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    name: Annotated[
        list[str] | None, typer.Option(help="Name of a task; one to each bundle.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Put the chips of several tasks on one backbone, cut at the deepest of them."""
    from chipviz.bundle import join as joining

    done = joining.join(
        bundles,
        out.expanduser().absolute(),
        home=context.obj,
        progress=printing.printer(),
        names=name or (),
    )
    printing.end_progress()
    if as_json:
        printing.print_json(asdict(done))
        return
    alone = sum(task.n_parameters for task in done.tasks)
    printing.show(
        f"{done.path}: {len(done.tasks)} tasks on layers 0 to {done.cut_layer}, "
        f"{done.n_parameters:,} parameters instead of {alone:,}; "
        f"{done.n_passes} pass{'es' if done.n_passes > 1 else ''} a text."
    )
    for task in done.tasks:
        printing.show(
            f"  {task.name}: layer {task.cut_layer}, {100 * task.test_accuracy:.1f} % on test"
        )
    printing.show(f"{done.n_checked} rows compared, largest difference {done.max_difference:.1e}.")


def add_to(app: typer.Typer) -> None:
    """Give this command to the command line."""
    app.command()(join)
