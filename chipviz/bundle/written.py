"""An export's files: written, and opened again as their place opens them."""

from dataclasses import replace
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
from chipviz.bundle import folders, graph, head, llama_cpp
from chipviz.bundle.asked import Ask
from chipviz.bundle.classifier import Classifier
from chipviz.bundle.pictures import PictureClassifier
from chipviz.bundle.targets import GGUF_FILE, Target
from chipviz.chips.chip import Chip


def write(
    bundle: Path,
    classifier: Classifier | PictureClassifier,
    target: Target,
    folder: Path,
    example: dict[str, Tensor],
    *,
    int8: bool,
) -> None:
    """Write a bundle for a place.

    Args:
        bundle: The bundle's folder.
        classifier: The same, loaded.
        target: The place.
        folder: Where to.
        example: A batch of several rows.
        int8: Round weights to 8 bits, of a graph.

    Raises:
        BundleError: If it cannot be converted.
    """
    if target in ("onnx", "openvino"):
        graph.write_graph(classifier, example, target, folder, exact=_exact(classifier), int8=int8)
        folders.write_config(bundle, classifier, folder)
        folders.copy_reader(bundle, folder)
        return
    assert isinstance(classifier, Classifier), "pictures go nowhere else"
    metadata = classifier.metadata
    if target == "vllm":
        folders.write_sequence(bundle, folder)
    elif target == "gguf":
        llama_cpp.write_gguf(bundle, classifier, folder)
    elif target == "head":
        head.write_head(folders.chip_of(classifier), classifier.tokenizer, metadata, folder)
    else:
        folders.write_embedder(bundle, classifier, folder)


def _exact(classifier: Classifier | PictureClassifier) -> list[Tensor]:
    """The matrices of a bundle's chip."""
    if isinstance(classifier, Classifier):
        chip = folders.chip_of(classifier)
    elif classifier.chip is not None:
        chip = classifier.chip.chip
    else:
        return [classifier.model.classifier.weight]
    return [weight for weight in (chip.weight, chip.hidden_weight) if weight is not None]


def told(classifier: Any) -> Ask:
    """What the bundle itself says."""
    if isinstance(classifier, PictureClassifier):
        return lambda batch: classifier.scores(batch).numpy()
    return lambda batch: classifier.scores(batch["input_ids"], batch["attention_mask"]).numpy()


def opened(target: Target, folder: Path, classifier: Any) -> Ask:
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
        kind = {"gguf_file": GGUF_FILE, "dtype": torch.float32} if target == "gguf" else {}
        base = AutoModel.from_pretrained(folder, **kind, **SAFE).eval()
        chip = Chip(**load_file(folder / "head" / head.WEIGHTS))

    def answer(batch: dict[str, Tensor]) -> NDArray[np.float32]:
        states = base(**batch).last_hidden_state
        return chip.logits(pool(states, batch["attention_mask"], pooling)).numpy()

    return answer
