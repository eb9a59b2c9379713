"""A pruned classifier as a folder: write it, and verify it in a fresh process.

Only safetensors and JSON, a tokenizer, a card and checksums. Nothing in it is ever run. Two kinds
are stock classes of `transformers`, which loads them without chipviz. The third holds what those
cannot: other poolings, chips with more than one matrix, families whose class has layers of its own.
"""

import json
from collections.abc import Sequence
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
from chipviz.bundle import card, vision
from chipviz.bundle.metadata import CHIP_FILE, describe, write_metadata
from chipviz.bundle.verify import compare, in_fresh_process, write_sums
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, pad_ends_prompts
from chipviz.errors import BundleError
from chipviz.files import publish
from chipviz.keys import Vector, fields_of
from chipviz.pruning.cut import (
    as_stored,
    cut_config,
    cut_weights,
    last_kept,
    write_cut_surgery,
)
from chipviz.results.report import BundleKind, BundleReport, RunReport

MAX_SHARD = "5GB"
SELF_TEST = (
    ("The match ended two to one after extra time.", "Was there extra time?"),
    ("Shares rose as the central bank kept its rate.", "Did the bank change its rate?"),
    ("I would not watch this film again.", "The film was a joy."),
)
"""Texts, with a second text where one is read, whose probabilities stand in every bundle, so that
`verify` needs nothing else."""
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


def save(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    cut: CutSpec,
    report: RunReport,
    out: Path,
    check: Sequence[tuple[str, str | None]],
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
    _refuse_in_the_way(out)
    kind = kind_of(backbone, prompt, cut.key.vector, chip)
    chip = as_stored(chip, cut.cut, kind)
    with publish(out) as folder:
        _write_model(backbone, prompt, chip, cut, report, kind, folder)
        metadata = describe(cut, report, kind)
        write_metadata(folder, metadata)  # our own kind is loaded by it
        own = _self_test(prompt)
        found = in_fresh_process(folder, kind, [*check, *own])
        difference = compare(check, found[: len(check)], expected)
        metadata["verification"] = {"n_texts": len(check), "max_difference": difference}
        metadata["self_test"] = [
            {"text": text, "text_pair": pair, "probabilities": row}
            for (text, pair), row in zip(own, found[len(check) :], strict=True)
        ]
        write_metadata(folder, metadata)
        text = card.model_card(cut, report, kind, len(check), difference)
        (folder / "README.md").write_text(text, "utf-8")
        write_sums(folder)
        cost = report.cost_at(cut.cut)
        files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    return BundleReport(
        path=str(out),
        kind=kind,
        cut_layer=cut.cut_layer,
        **fields_of(cut.key),
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        folder_bytes=sum(files.values()),
        n_verified=len(check),
        max_difference=difference,
        files=files,
    )


def _self_test(prompt: Reader) -> list[tuple[str, str | None]]:
    """Texts or pictures that anyone can ask a bundle about."""
    if not isinstance(prompt, Prompt):
        return [(name, None) for name in vision.MADE]
    return [(text, pair if prompt.takes_pair else None) for text, pair in SELF_TEST]


def _write_model(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    cut: CutSpec,
    report: RunReport,
    kind: BundleKind,
    folder: Path,
) -> None:
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
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Stored as published, computed in float32 unless the user asks otherwise: rounding the chip's
    # logits to bfloat16 would move probabilities by a percent.
    written = json.loads((folder / "config.json").read_text("utf-8"))
    written |= {"dtype": "float32", "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False), "utf-8")
    write_cut_surgery(backbone, last, folder)
    prompt.save(folder)


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


def _refuse_in_the_way(out: Path) -> None:
    """A folder that is neither empty nor a bundle belongs to somebody."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "chip.json").exists()):
        raise BundleError(
            f"{out} exists and is no bundle.", "Give another folder; nothing was overwritten."
        )
