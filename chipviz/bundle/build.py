"""A finished run + a cut -> a verified bundle."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.opening import reopen
from chipviz.bundle import save
from chipviz.chips.chip import Chip, Chips
from chipviz.config import CutSpec
from chipviz.data.prompt import Prompt
from chipviz.errors import ConfigError
from chipviz.features.forward import forward_pooled
from chipviz.progress import Progress, ProgressFn
from chipviz.results.report import BundleReport, Example
from chipviz.results.run_folder import RunFolder


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
    progress(Progress("building", f"loading {report.backbone.name}"))
    backbone, prompt = reopen(config, report, home=home, folder=folder, stored=True)
    chip = Chips.load(folder.chips, backbone.folder.fingerprint).at(spec.cut)
    rows = folder.read_examples("validation")
    progress(Progress("verifying", f"asking the dense model about {len(rows)} texts"))
    expected = _expected(backbone, prompt, chip, spec, rows)
    progress(Progress("building", f"cutting after layer {spec.cut_layer}, writing and verifying"))
    check = [(row.text, row.text_pair) for row in rows]
    return save.save(backbone, prompt, chip, spec, report, out, check, expected)


def _expected(
    backbone: Backbone, prompt: Prompt, chip: Chip, spec: CutSpec, rows: Sequence[Example]
) -> Tensor:
    """What the run's own chip says, read from the dense model by hooks, in float32."""
    stored = backbone.dtype
    texts = [row.text for row in rows]
    pairs = [row.text_pair or "" for row in rows] if prompt.takes_pair else None
    backbone.model.float()  # exact, and so is the way back
    try:
        states = [
            forward_pooled(backbone, [ids], prompt.tokenizer.pad_token_id, [spec.key.vector])
            for ids in prompt.encode(texts, pairs)
        ]
    finally:
        backbone.model.to(stored)
    pooled = torch.cat([state[0][spec.cut_layer + 1] for state in states])  # (N, D)
    return chip.probabilities(pooled)
