"""A pruned classifier as a folder: write it, and verify it in a fresh process.

Only safetensors and JSON, a tokenizer or a processor, a card and checksums. Nothing in it is ever
run.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from chipviz.backbones.backbone import Backbone
from chipviz.bundle import card
from chipviz.bundle.check import Row, self_test
from chipviz.bundle.kinds import kind_of, write_model
from chipviz.bundle.metadata import METADATA, describe, refuse_in_the_way, write_metadata
from chipviz.bundle.verify import compare, in_fresh_process, write_sums
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.files import publish
from chipviz.results.report import BundleReport, RunReport


def save(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    cut: CutSpec,
    report: RunReport,
    out: Path,
    check: Sequence[Row],
    expected: Tensor,
) -> BundleReport:
    """Write a bundle, verify it in a fresh process, and only then give it its name.

    Args:
        backbone: In the dtype its weights are stored in.
        prompt: The run's own.
        chip: What reads the last layer kept.
        cut: What to keep.
        report: The run the chip comes from.
        out: The bundle's folder. Must not exist, or be an older bundle.
        check: Validation texts (and second texts).
        expected: Probabilities of the run's own chip for them, in float32, shape (N, C).

    Raises:
        BundleError: If `out` is in the way, or the verification finds a difference. Nothing is left
            at `out` then.
    """
    refuse_in_the_way(out, METADATA, "bundle")
    kind = kind_of(backbone, prompt, cut.key.vector, chip)
    with publish(out) as folder:
        write_model(backbone, prompt, chip, cut, report, kind, folder)
        metadata = describe(cut, report, kind)
        metadata["backbone"]["fingerprint"] = backbone.folder.fingerprint
        write_metadata(folder, metadata)  # our own kind is loaded by it
        own = self_test(prompt)
        found = in_fresh_process(folder, kind, [*check, *own])
        difference = compare(check, found[: len(check)], expected)
        metadata["verification"] = {"n_texts": len(check), "max_difference": difference}
        metadata["self_test"] = [
            {"text": text, "text_pair": pair, "probabilities": row}
            for (text, pair), row in zip(own, found[len(check) :], strict=True)
        ]
        write_metadata(folder, metadata)
        card.write_card(cut, report, kind, len(check), difference, folder)
        write_sums(folder)
        cost = report.cost_at(cut.cut)
        files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    return BundleReport(
        path=str(out),
        kind=kind,
        cut_layer=cut.cut_layer,
        **cut.model_dump(include={"recipe", "site", "pooling", "chip"}),
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        folder_bytes=sum(files.values()),
        n_verified=len(check),
        max_difference=difference,
        files=files,
    )
