"""DINOv2 ViT-S/14 from the ONNX file of a wheel: a plain model folder, its processor inside.

The tracer left matrices transposed, and named them after nothing; the products that read them have
the names of the layers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from chipviz.errors import SourceError
from chipviz.files import write_atomic

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What pictures are made into: 224 pixels, 16 x 16 patches, normed as ImageNet's are. As published
with the model."""


def convert(onnx_file: Path, folder: Path) -> None:
    """Write the model of an ONNX file as `save_pretrained` would.

    Args:
        onnx_file: DINOv2 with its head, traced.
        folder: Where config.json, model.safetensors and preprocessor_config.json go.

    Raises:
        SourceError: If the file holds another model.
    """
    weights = _read(onnx_file)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, dtype="float32"
    )
    tensors = {
        name.removeprefix("backbone."): value
        for name, value in weights.items()
        if name.startswith("backbone.")
    }
    try:
        positions = [weights[name] for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    except KeyError:
        raise _another(onnx_file) from None
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # class, then patches
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)  # of training alone
    kept = {name: value.contiguous() for name, value in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    _refuse_others(folder, onnx_file)
    write_atomic(folder / "preprocessor_config.json", json.dumps(PROCESSOR, indent=2))


def _read(onnx_file: Path) -> dict[str, Tensor]:
    """All weights by name. Matrices of products have the names of their products."""
    import onnx
    from onnx import numpy_helper

    model: Any = onnx.load(onnx_file)
    weights = {
        one.name: torch.from_numpy(np.array(numpy_helper.to_array(one)))
        for one in model.graph.initializer
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            where = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{where}.weight"] = weights[node.input[1]].T
    return weights


def _refuse_others(folder: Path, onnx_file: Path) -> None:
    """Refuse weights that are not exactly the model's."""
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    found = loaded[1]
    if any(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")):
        raise _another(onnx_file)


def _another(onnx_file: Path) -> SourceError:
    return SourceError(
        f"{onnx_file.name} does not hold DINOv2 ViT-S/14 as expected.",
        "Install the pinned version of its wheel.",
    )
