"""Which class holds a chip, and the model of that class as a folder.

Four kinds. Three are stock classes of `transformers`, which loads them without chipviz: a decoder's
last token, a decoder's mean, a vision encoder's pooled states. The fourth holds what those cannot:
other poolings, chips with more than one matrix, families whose class has layers of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from chipviz.backbones.backbone import Backbone
from chipviz.bundle import vision
from chipviz.bundle.metadata import CHIP_FILE
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, pad_ends_prompts
from chipviz.keys import Vector
from chipviz.pruning.cut import as_stored, cut_config, cut_weights, last_kept, write_cut_surgery
from chipviz.results.report import BundleKind, RunReport

MAX_SHARD = "5GB"
_STOCK: dict[Vector, BundleKind] = {
    Vector("block", "last"): "sequence",
    Vector("block", "mean"): "token",
}


def kind_of(backbone: Backbone, prompt: Reader, vector: Vector, chip: Chip) -> BundleKind:
    """Which class can hold a chip: the stock one that computes the same, else our own.

    Args:
        backbone: What is cut. Its family may have no such class, or one with layers of its own.
        prompt: Baked for the task.
        vector: What the chip reads.
        chip: One chip, or a stack of them.
    """
    if chip.neurons is None:
        chip = chip.folded()
    if not {"weight"} <= set(chip.tensors()) <= {"weight", "bias"}:
        return "chipviz"
    if not isinstance(prompt, Prompt):
        fits = vector.site == "block" and vision.holds(backbone, vector.pooling, chip)
        return "image" if fits else "chipviz"
    kind = _STOCK.get(vector)
    if kind is None:
        return "chipviz"
    if backbone.folder.surgery is not None:
        return "chipviz"
    if not backbone.causal or _has_tokenizer_of_its_own(backbone.config):
        return "chipviz"
    if kind == "sequence" and pad_ends_prompts(prompt.tokenizer, pairs=prompt.takes_pair):
        return "chipviz"
    last = backbone.n_layers - 1  # which every family can be cut after
    model = _empty_model(backbone, cut_config(backbone, last), kind)
    if model is None or set(model.state_dict()) != set(_stock_weights(model, backbone, last, chip)):
        return "chipviz"
    return kind


@dataclass(frozen=True)
class Cutting:
    """What a bundle is made of."""

    backbone: Backbone
    """In the dtype its weights are stored in."""
    prompt: Reader
    """The run's own."""
    chip: Chip
    """What reads the last layer kept."""
    cut: CutSpec
    """What to keep."""
    report: RunReport
    """The run the chip comes from."""

    @property
    def kind(self) -> BundleKind:
        """Which class holds it."""
        return kind_of(self.backbone, self.prompt, self.cut.key.vector, self.chip)


def write_model(made_of: Cutting, kind: BundleKind, folder: Path) -> None:
    """Write weights, configuration and tokenizer or processor of a bundle.

    Args:
        made_of: What it is made of.
        kind: Which class holds it.
        folder: Where to.
    """
    backbone, prompt, cut, report = made_of.backbone, made_of.prompt, made_of.cut, made_of.report
    chip = as_stored(made_of.chip, cut.cut, kind)
    last = last_kept(chip, cut.cut_layer, report.backbone.no_cut)
    config = cut_config(backbone, last)
    config.id2label = dict(enumerate(report.task.label_names))
    config.label2id = {name: i for i, name in enumerate(report.task.label_names)}
    if kind != "chipviz":
        if isinstance(prompt, Prompt):
            config.get_text_config().pad_token_id = prompt.pad_id
        config.problem_type = "single_label_classification"
    model = _empty_model(backbone, config, kind)
    if kind == "chipviz":
        weights = cut_weights(backbone, last)
        tensors = {name: value.contiguous() for name, value in chip.tensors().items()}
        save_file(tensors, folder / CHIP_FILE)
    elif kind == "image":
        weights = vision.stock_weights(model, backbone, last, chip)
    else:
        weights = _stock_weights(model, backbone, last, chip)
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    mend_config(folder, model)
    write_cut_surgery(backbone, last, folder)
    prompt.save(folder)


def mend_config(folder: Path, model: Any) -> None:
    """Say of a folder that `save_pretrained` wrote how it is computed, and by which class.

    Stored as published, computed in float32 unless the user asks otherwise: rounding the chip's
    logits to bfloat16 would move probabilities by a percent.
    """
    path = folder / "config.json"
    said = json.loads(path.read_text("utf-8"))
    said |= {"dtype": "float32", "architectures": [type(model).__name__]}
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False), "utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)


def _empty_model(backbone: Backbone, config: Any, kind: BundleKind) -> Any:
    """A model of this kind without its weights. None where the family has no such class."""
    if kind == "image":
        return vision.stock_model(config)
    family: Any = {
        "sequence": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "chipviz": {type(config): type(backbone.model)},
    }[kind].get(type(config), None)
    if family is None:
        return None
    with torch.device("meta"):
        return family(config)


def _stock_weights(model: Any, backbone: Backbone, cut_layer: int, chip: Chip) -> dict[str, Tensor]:
    """A stock classifier's weights under the names it would have for them."""
    kept = cut_weights(backbone, cut_layer)
    weights = {f"{model.base_model_prefix}.{name}": value for name, value in kept.items()}
    weights["score.weight"] = chip.weight
    if chip.bias is not None:
        weights["score.bias"] = chip.bias
    elif "score.bias" in model.state_dict():  # the class for tokens insists on a bias
        weights["score.bias"] = torch.zeros(len(chip.weight))
    return weights


def _has_tokenizer_of_its_own(config: Any) -> bool:
    """Whether stock code takes the family's class of tokenizers, whatever a folder asks for.

    It builds its steps anew, and so would drop the length limit and the space before a text.
    """
    own = TOKENIZER_MAPPING_NAMES.get(config.model_type) or ""
    distrusted = config.model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    return distrusted and own not in ("", "TokenizersBackend", "PreTrainedTokenizerFast")
