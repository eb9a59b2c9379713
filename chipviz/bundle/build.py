"""A finished run + a cut -> a verified bundle."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.opening import reopen
from chipviz.bundle import save, vision
from chipviz.chips.chip import Chip, Chips
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, hard_endings
from chipviz.errors import ConfigError
from chipviz.features.forward import forward_neurons, forward_pooled
from chipviz.progress import Progress, ProgressFn
from chipviz.results.report import BundleReport, RunReport
from chipviz.results.run_folder import RunFolder
from chipviz.results.selection import refuse_layer


def build(
    folder: RunFolder, spec: CutSpec, *, home: Path, out: Path, progress: ProgressFn
) -> BundleReport:
    """Cut a finished run's backbone and write the verified bundle to `out`.

    Args:
        folder: The run's folder.
        spec: Where to cut, and the rule that chose it.
        home: The folder that holds `backbones/`.
        out: The bundle's folder. Must not exist, or be an older bundle.
        progress: Told each step.

    Raises:
        ChipvizError: If the cut does not exist, the backbone is gone or is another one now, or the
            bundle fails its verification.
    """
    config, report = folder.read_config(), folder.read_report()
    if spec.cut_layer >= report.backbone.n_layers:
        raise ConfigError(
            f"Layer {spec.cut_layer} does not exist, the last is {report.backbone.n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    refuse_layer(spec.cut_layer, report.backbone.no_cut)
    progress(Progress("building", f"loading {report.backbone.name}"))
    backbone, prompt = reopen(config, report, home=home, folder=folder, stored=True)
    chip = Chips.load(folder.whole(folder.chips), backbone.folder.fingerprint).at(spec.cut)
    rows = folder.read_examples("validation")
    check: list[tuple[str, str | None]] = [(row.text, row.text_pair) for row in rows]
    if isinstance(prompt, Prompt):
        hard = hard_endings(prompt.tokenizer)
        check += [(text, text if prompt.takes_pair else None) for text in hard]
        return _built(backbone, prompt, chip, spec, report, out, check, progress)
    with vision.as_files(prompt, [row.text for row in rows]) as files:
        shown = [(str(file), None) for file in files]
        return _built(backbone, prompt, chip, spec, report, out, shown, progress)


def _built(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    spec: CutSpec,
    report: RunReport,
    out: Path,
    check: Sequence[tuple[str, str | None]],
    progress: ProgressFn,
) -> BundleReport:
    what = "texts" if report.task.kind == "text" else "pictures"
    progress(Progress("verifying", f"asking the dense model about {len(check)} {what}"))
    expected = _expected(backbone, prompt, chip, spec, check)
    progress(Progress("building", f"cutting after layer {spec.cut_layer}, writing and verifying"))
    return save.save(backbone, prompt, chip, spec, report, out, check, expected)


def _expected(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    spec: CutSpec,
    check: Sequence[tuple[str, str | None]],
) -> Tensor:
    """What the run's own chip says, read from the dense model by hooks, in float32."""
    stored = backbone.dtype
    texts = [text for text, _ in check]
    pairs = [pair or "" for _, pair in check] if prompt.takes_pair else None
    backbone.model.float()  # exact, and so is the way back
    pad_id, vector = prompt.pad_id, spec.key.vector
    try:
        pooled = [
            forward_neurons(backbone, [ids], pad_id, vector.pooling, chip.neurons)
            if chip.neurons is not None
            else forward_pooled(backbone, [ids], pad_id, [vector])[0][spec.cut_layer + 1]
            for ids in prompt.encode(texts, pairs)
        ]
    finally:
        backbone.model.to(stored)
    return chip.probabilities(torch.cat(pooled))  # of (N, D)
