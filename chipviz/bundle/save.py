"""A pruned classifier as a folder: write it, and verify it in a fresh process.

Only safetensors and JSON, a tokenizer or a processor, a card and checksums. Nothing in it is ever
run.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from chipviz.bundle import card
from chipviz.bundle.check import Row, self_test
from chipviz.bundle.drift import look_again
from chipviz.bundle.extras import NOTHING, Extras
from chipviz.bundle.kinds import Cutting, write_model
from chipviz.bundle.metadata import METADATA, describe, refuse_in_the_way, write_metadata
from chipviz.bundle.verify import compare, in_fresh_process, write_sums
from chipviz.files import publish
from chipviz.results.report import BundleReport


def save(
    made_of: Cutting,
    out: Path,
    check: Sequence[Row],
    expected: Tensor,
    extras: Extras = NOTHING,
) -> BundleReport:
    """Write a bundle, verify it in a fresh process, and only then give it its name.

    Args:
        made_of: Backbone, prompt, chip and cut, and the run they come from.
        out: The bundle's folder. Must not exist, or be an older bundle.
        check: Validation texts (and second texts).
        expected: Probabilities of the run's own chip for them, in float32, shape (N, C).
        extras: What else it has.

    Raises:
        BundleError: If `out` is in the way, or the verification finds a difference. Nothing is left
            at `out` then.
    """
    refuse_in_the_way(out, METADATA, "bundle")
    cut, report, kind = made_of.cut, made_of.report, made_of.kind
    if cut.dtype is not None:
        report = report.stored_in(cut.cut, made_of.backbone.dtype.itemsize)
    with publish(out) as folder:
        write_model(made_of, kind, folder)
        metadata = describe(cut, report, kind, extras.plan, extras.threshold)
        metadata["backbone"]["fingerprint"] = made_of.backbone.folder.fingerprint
        write_metadata(folder, metadata)  # our own kind is loaded by it
        extras.write(folder)
        own = self_test(made_of.prompt)
        found = in_fresh_process(folder, kind, [*check, *own])
        difference = compare(check, found[: len(check)], expected)
        metadata["verification"] = {"n_texts": len(check), "max_difference": difference}
        metadata["drift"] = [asdict(one) for one in look_again(folder, check, expected, extras)]
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
