"""A bundle -> what another place runs, checked by running it there before it gets its name."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from chipviz.bundle import targets, written
from chipviz.bundle.asked import Batches, rows_of_run
from chipviz.bundle.check import Row
from chipviz.bundle.classifier import load
from chipviz.bundle.metadata import Metadata, read_metadata, refuse_in_the_way
from chipviz.bundle.targets import GRAPHS, NOTE, Exported, Target
from chipviz.bundle.verify import TOLERANCE
from chipviz.errors import BundleError, ConfigError
from chipviz.files import bytes_below, publish
from chipviz.progress import Progress, ProgressFn, silent

MIN_AGREEMENT = 0.99
"""Share of labels that must stay where weights are rounded to 8 bits."""
MIN_ROWS = 100
"""Rows that such a share is counted on, at the least."""


def export_beside(bundle: Path, target: Target, home: Path, *, int8: bool) -> Exported:
    """Write a bundle for another place beside it, compared on the rows of its run.

    Args:
        bundle: The bundle's folder.
        target: The place.
        home: The folder that may hold the run.
        int8: Round weights to 8 bits, of a graph.

    Raises:
        ChipvizError: As `export` does.
    """
    rows = rows_of_run(read_metadata(bundle), home)
    out = targets.place_of(bundle, target)
    return export(bundle, target, out, rows=rows, progress=silent, int8=int8)


def export(
    bundle: Path,
    target: Target,
    out: Path,
    *,
    rows: Sequence[Row],
    progress: ProgressFn,
    int8: bool = False,
) -> Exported:
    """Write a bundle for another place, and compare what it says there.

    Args:
        bundle: The bundle's folder.
        target: The place.
        out: The folder to write. Must not exist, or be an older export.
        rows: Texts to compare on (and second texts), or references of pictures.
        progress: Told each step.
        int8: Round weights to 8 bits, of a graph.

    Raises:
        ConfigError: If the place cannot take this bundle.
        BundleError: If it cannot be converted, or says something else there. Nothing is left at
            `out` then.
    """
    metadata = read_metadata(bundle)
    if (why := targets.refusal(target, metadata)) is not None:
        raise ConfigError(f"No export for {target}: {why}", "Use the bundle itself.")
    if int8 and target not in GRAPHS:
        raise ConfigError(f"There are no 8-bit weights for {target}.", "Leave out --int8.")
    if bundle.resolve() in [out.resolve(), *out.resolve().parents]:  # which holds no folder
        raise BundleError(f"{out} is inside the bundle.", "Give a folder beside it.")
    refuse_in_the_way(out, NOTE, "export")
    progress(Progress("building", f"loading {bundle.name}"))
    classifier = load(bundle)
    asked = Batches.of(classifier, rows)
    if int8 and len(asked) < MIN_ROWS:
        raise ConfigError(
            f"Rounded weights are compared on {MIN_ROWS} rows or more, and there are {len(asked)}.",
            "Give --file with texts of the kind that it will read.",
        )
    with publish(out) as folder:
        progress(Progress("building", f"writing for {target}"))
        written.write(bundle, classifier, target, folder, asked.example, int8=int8)
        progress(Progress("verifying", f"asking it about {len(asked)} {metadata.task.rows}"))
        found = asked.ask(written.opened(target, folder, classifier))
        expected = asked.ask(written.told(classifier))
        n_agree = int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
        difference = float(np.abs(_softmax(found) - _softmax(expected)).max())
        _refuse_other_answers(target, n_agree / len(asked), difference, int8=int8)
        said = Exported(str(out), target, int8, len(asked), n_agree, difference, 0)
        (folder / "README.md").write_text(_readme(said, metadata), "utf-8")
        said = replace(said, n_bytes=bytes_below(folder))
        (folder / NOTE).write_text(json.dumps(said.note(bundle)), "utf-8")
    return said


def _refuse_other_answers(target: Target, agreement: float, worst: float, *, int8: bool) -> None:
    """Refuse an export that says something else than its bundle.

    Raises:
        BundleError: Naming by how much.
    """
    if int8 and agreement < MIN_AGREEMENT:
        raise BundleError(
            f"Weights of 8 bits keep {100 * agreement:.1f} % of the labels, "
            f"and {100 * MIN_AGREEMENT:.0f} % are wanted.",
            "Export without --int8; nothing was written.",
        )
    if not int8 and not worst <= TOLERANCE:
        raise BundleError(
            f"What was written for {target} differs from the bundle by {worst:.3g}.",
            "This is a fault of chipviz or of the converter; it was not kept.",
        )


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.from_numpy(scores).float().softmax(dim=1).numpy()


def _readme(said: Exported, metadata: Metadata) -> str:
    """What lies here, how to run it, and how its check went."""
    rounded = " with weights of 8 bits" if said.int8 else ""
    lines = [
        f"# {targets.TITLES[said.target]}",
        "",
        f"{targets.WHAT[said.target][:1].upper()}{targets.WHAT[said.target][1:]}{rounded}. "
        "Made of a chipviz bundle.",
        "",
        f"```{'bash' if said.target in ('vllm', 'head') else 'python'}",
        targets.use(said.target, metadata),
        "```",
        "",
        f"Checked: {said.n_agree} of {said.n_checked} rows get the bundle's own label, the largest "
        f"difference of a probability is {said.max_difference:.1e}.",
    ]
    lines += [f"\n{note}" for note in targets.notes(said.target, metadata)]
    return "\n".join(lines) + "\n"
