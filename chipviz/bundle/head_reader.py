"""A chip alone at work: beside the whole backbone that it was fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chipviz.backbones.backbone import Backbone, load_backbone
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.find import find_model
from chipviz.bundle.head import WEIGHTS, HeadInfo, read_head, with_prompt
from chipviz.chips.chip import Chip
from chipviz.data.prompt import encode, load_tokenizer, segment_break
from chipviz.data.task import check_fields
from chipviz.errors import BundleError, ChipvizError
from chipviz.features.forward import forward_pooled
from chipviz.progress import ProgressFn
from chipviz.results.answers import Prediction


@dataclass(frozen=True)
class Head:
    """A chip and the whole backbone that it reads."""

    info: HeadInfo
    backbone: Backbone
    tokenizer: Any
    chip: Chip

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts, as the bundle of this chip does.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
            BackboneError: If the tokenizer has more tokens than the model.
        """
        task, vector = self.info.task, self.info.cut.key.vector
        if not texts:
            return []
        check_fields("{text_pair}" in task.template, texts, pairs)
        ids = encode(self.tokenizer, texts, pairs)["input_ids"]
        self.backbone.refuse_unknown_token(max(map(max, ids)))
        names, found = dict(enumerate(task.label_names)), dict[int, Prediction]()
        budget = batch_tokens(self.backbone.device)
        for rows in batches([len(row) for row in ids], budget, padded=self.backbone.padded):
            part, pad_id = [ids[i] for i in rows], self.tokenizer.pad_token_id
            pooled = forward_pooled(self.backbone, part, pad_id, [vector])[0]
            said = self.chip.to(pooled.device).probabilities(pooled[self.info.cut.cut_layer + 1])
            for i, row in zip(rows, said.tolist(), strict=True):
                found[i] = Prediction.of(names, row)
        return [found[i] for i in range(len(ids))]


def load_head(path: Path, source: str, *, home: Path, progress: ProgressFn) -> Head:
    """A chip alone, beside the backbone that it was fitted on.

    Args:
        path: Its folder.
        source: The backbone, as `train` takes it.
        home: The folder that holds `backbones/`.
        progress: Told what is fetched.

    Raises:
        BundleError: If the backbone or its tokenizer is another one than the chip's.
        ChipvizError: If the backbone cannot be had or loaded.
    """
    info = read_head(path)
    folder = find_model(source, home, progress)
    if folder.fingerprint != info.backbone["fingerprint"]:
        raise BundleError(
            f"{source} is another model than the one that this chip was fitted on.",
            f"Give {str(info.backbone.get('name'))[:120]}, as it was then.",
        )
    try:
        tokenizer = with_prompt(load_tokenizer(folder.path, folder.n_positions), info.prompt)
        chip = Chip(**load_file(path / WEIGHTS))
    except ChipvizError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library has no kind of its own
        said = " ".join(str(error).split())[:160]
        raise BundleError(f"{path.name} cannot be read: {said}", "Export it again.") from None
    backbone = load_backbone(
        folder,
        dtype=torch.float32,
        blocks_path=info.backbone.get("blocks"),
        sep=segment_break(tokenizer),
    )
    width = (chip.weight if chip.hidden_weight is None else chip.hidden_weight).shape[-1]
    if width != backbone.hidden_size or len(chip.weight) != len(info.task.label_names):
        raise BundleError(f"{WEIGHTS} does not fit the backbone or the labels.", "Export it again.")
    return Head(info, backbone, tokenizer, chip)
