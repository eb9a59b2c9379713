"""A bundle -> what another place runs, checked by running it there before it gets its name."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from chipviz.backbones.pooling import pool
from chipviz.backbones.vetting import SAFE
from chipviz.bundle import folders, graph, head, targets
from chipviz.bundle.asked import Ask, Batches
from chipviz.bundle.check import Row
from chipviz.bundle.classifier import Classifier, load
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.bundle.pictures import PictureClassifier
from chipviz.bundle.targets import GRAPHS, Target
from chipviz.bundle.verify import TOLERANCE
from chipviz.chips.chip import Chip
from chipviz.errors import BundleError, ConfigError
from chipviz.files import bytes_below, publish
from chipviz.progress import Progress, ProgressFn

NOTE = "export.json"
"""What an export says of itself."""
MIN_AGREEMENT = 0.99
"""Share of labels that must stay where weights are rounded to 8 bits."""
MIN_ROWS = 100
"""Rows that such a share is counted on, at the least."""


@dataclass(frozen=True)
class Exported:
    """What was written for another place, and how its check went."""

    path: str
    target: Target
    int8: bool
    n_checked: int
    """Rows that both the bundle and the export were asked."""
    n_agree: int
    """Rows with the same label."""
    max_difference: float
    """Largest probability difference."""
    n_bytes: int


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
    _refuse_in_the_way(out)
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
        _write(bundle, classifier, target, folder, asked, int8=int8)
        progress(Progress("verifying", f"asking it about {len(asked)} {metadata.task.rows}"))
        found = asked.ask(_opened(target, folder, classifier))
        expected = asked.ask(_told(classifier))
        n_agree = int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
        difference = float(np.abs(_softmax(found) - _softmax(expected)).max())
        _refuse_other_answers(target, n_agree / len(asked), difference, int8=int8)
        said = Exported(str(out), target, int8, len(asked), n_agree, difference, 0)
        (folder / "README.md").write_text(_readme(said, metadata), "utf-8")
        (folder / NOTE).write_text(
            json.dumps(asdict(said) | {"path": None, "run_id": metadata.everything["run_id"]}),
            "utf-8",
        )
        n_bytes = bytes_below(folder)
    return Exported(str(out), target, int8, len(asked), n_agree, difference, n_bytes)


def _write(
    bundle: Path,
    classifier: Classifier | PictureClassifier,
    target: Target,
    folder: Path,
    asked: Batches,
    *,
    int8: bool,
) -> None:
    if target in ("onnx", "openvino"):
        graph.write_graph(classifier, asked.example, target, folder, int8=int8)
        folders.write_config(bundle, classifier, folder)
        folders.copy_reader(bundle, folder)
        return
    assert isinstance(classifier, Classifier), "pictures go nowhere else"
    metadata = classifier.metadata
    if target == "vllm":
        folders.write_sequence(bundle, folder)
    elif target == "head":
        head.write_head(folders.chip_of(classifier), classifier.tokenizer, metadata, folder)
    else:
        folders.write_embedder(bundle, classifier, folder)


def _told(classifier: Any) -> Ask:
    """What the bundle itself says."""
    if isinstance(classifier, PictureClassifier):
        return lambda batch: classifier.scores(batch).numpy()
    return lambda batch: classifier.scores(batch["input_ids"], batch["attention_mask"]).numpy()


def _opened(target: Target, folder: Path, classifier: Any) -> Ask:
    """What was written, read from its files as its place reads them."""
    if target in ("onnx", "openvino"):
        run = graph.open_graph(folder, target)
        return lambda batch: run({name: value.numpy() for name, value in batch.items()})
    pooling = classifier.metadata.cut.pooling
    if target == "vllm":
        whole: Any = AutoModelForSequenceClassification.from_pretrained(folder, **SAFE).eval()
        base, chip = whole.base_model, Chip(whole.score.weight.detach())
    elif target == "head":
        base, chip = classifier.model.base_model, Chip(**load_file(folder / head.WEIGHTS))
        if (reader := classifier.reader) is not None:
            read = replace(reader, chip=chip).scores
            return lambda batch: read(batch["input_ids"], batch["attention_mask"]).numpy()
    else:
        base, chip = AutoModel.from_pretrained(folder, **SAFE).eval(), folders.chip_of(classifier)

    def answer(batch: dict[str, Tensor]) -> NDArray[np.float32]:
        states = base(**batch).last_hidden_state
        return chip.logits(pool(states, batch["attention_mask"], pooling)).numpy()

    return answer


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


def _refuse_in_the_way(out: Path) -> None:
    """A folder that is neither empty nor an export belongs to somebody."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / NOTE).exists()):
        raise BundleError(
            f"{out} exists and is no export.", "Give another folder; nothing was overwritten."
        )
