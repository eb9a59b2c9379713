"""Folders that other loaders read, made of a bundle: for vLLM, for sentence-transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from chipviz.backbones.surgery import SURGERY
from chipviz.backbones.vetting import SAFE
from chipviz.bundle.classifier import Classifier
from chipviz.bundle.head import write_head
from chipviz.bundle.kinds import MAX_SHARD, mend_config
from chipviz.bundle.metadata import CHIP_FILE, METADATA, SUMS, Metadata
from chipviz.chips.chip import Chip
from chipviz.errors import BundleError
from chipviz.keys import Pooling

_OWN = {METADATA, CHIP_FILE, SUMS, "README.md", "curve.png"}
_OWN |= {"config.json", "generation_config.json"}
"""Files of a bundle that no other loader wants, or that are written anew."""
_MODES: dict[Pooling, str] = {
    "last": "lasttoken",
    "first": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
}
"""Names of poolings in sentence-transformers."""


def copy_reader(bundle: Path, folder: Path) -> None:
    """Copy the files of a bundle's tokenizer or processor."""
    for file in sorted(bundle.iterdir()):
        if file.name not in _OWN and not file.name.startswith("model"):
            shutil.copyfile(file, folder / file.name)


def chip_of(classifier: Classifier) -> Chip:
    """The chip of a loaded bundle of texts, wherever its kind keeps it."""
    if classifier.reader is not None:
        return classifier.reader.chip
    score = classifier.model.score
    bias = getattr(score, "bias", None)
    return Chip(score.weight.detach(), bias.detach() if bias is not None else None)


def write_embedder(bundle: Path, classifier: Classifier, folder: Path) -> None:
    """Write the cut backbone as sentence-transformers reads it, with the chip in `head/`.

    Raises:
        BundleError: If stock code cannot read the backbone.
    """
    if (bundle / SURGERY).exists():
        raise BundleError(
            "Modules of its backbone were replaced, which no stock class can hold.",
            "Use the bundle itself.",
        )
    model, metadata = classifier.model, classifier.metadata
    weights = base_weights(bundle, model)
    base = model.base_model
    base.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    mend_config(folder, base)
    copy_reader(bundle, folder)
    limit = classifier.tokenizer.model_max_length
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pooling = metadata.cut.pooling
    width = model.config.get_text_config().hidden_size
    mode = {f"pooling_mode_{name}": pooling == own for own, name in _MODES.items()}
    kind = "sentence_transformers.models"
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        ],
        "sentence_bert_config.json": {
            "max_seq_length": limit if limit < 10**9 else places,
            "do_lower_case": False,
        },
        "1_Pooling/config.json": {"word_embedding_dimension": width} | mode,
    }
    (folder / "1_Pooling").mkdir()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2), "utf-8")
    write_head(chip_of(classifier), classifier.tokenizer, metadata, folder / "head")


def base_weights(bundle: Path, model: Any) -> dict[str, Tensor]:
    """Weights of a bundle's backbone as its files hold them, under the backbone's own names."""
    weights = stored(bundle)
    if model.base_model is model:
        return weights
    prefix = f"{model.base_model_prefix}."
    inside = {name: value for name, value in weights.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in inside.items()}


def write_sequence(bundle: Path, folder: Path) -> None:
    """Write a stock sequence classifier whose pooling the server is told: for vLLM.

    Raises:
        BundleError: If the chip has a bias, for which such classes have no place, or the family has
            no such class.
    """
    weights = stored(bundle)
    bias = weights.pop("score.bias", None)
    if bias is not None and bias.any():
        raise BundleError(
            "Its chip has a bias, and vLLM's classifiers have none.", "Cut elsewhere."
        )
    config = AutoConfig.from_pretrained(bundle, **SAFE)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise BundleError(
            f"Family {config.model_type} has no stock class for sequences.", "Give --to onnx."
        ) from None
    if set(model.state_dict()) != set(weights):
        raise BundleError(
            f"The stock class of family {config.model_type} has layers of its own.",
            "Give --to onnx.",
        )
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    mend_config(folder, model)
    copy_reader(bundle, folder)


def write_config(bundle: Path, classifier: Any, folder: Path) -> None:
    """Write the configuration beside a graph, as text-embeddings-inference wants it."""
    model = classifier.model
    said = json.loads((bundle / "config.json").read_text("utf-8"))
    text = model.config.get_text_config()
    wanted = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "pad_token_id")
    for name in wanted:
        if said.get(name) is None and getattr(text, name, None) is not None:
            said[name] = getattr(text, name)
    if classifier.metadata.task.kind == "text":
        said["pad_token_id"] = classifier.tokenizer.pad_token_id
    labels = classifier.metadata.task.label_names
    said["id2label"] = {str(i): name for i, name in enumerate(labels)}
    said["label2id"] = {name: i for i, name in enumerate(labels)}
    said["architectures"] = [_classifier_name(type(model).__name__, classifier.metadata)]
    (folder / "config.json").write_text(json.dumps(said, indent=2, ensure_ascii=False), "utf-8")


def _classifier_name(name: str, metadata: Metadata) -> str:
    """A class name that servers take for a classifier of whole texts: pooling is in the graph."""
    what = "ImageClassification" if metadata.task.kind == "image" else "SequenceClassification"
    return f"{name.partition('For')[0].removesuffix('Model')}For{what}"


def stored(bundle: Path) -> dict[str, Tensor]:
    """The weights of a bundle as its files hold them."""
    weights: dict[str, Tensor] = {}
    for file in sorted(bundle.glob("model*.safetensors")):
        weights |= load_file(file)
    return weights
