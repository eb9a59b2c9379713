"""The cut backbone as a GGUF file, which llama.cpp embeds texts with, and the chip beside it.

The file holds no vocabulary: texts become token ids by the bundle's own tokenizer, which knows the
template and the length limit. llama.cpp applies the final norm and pools by itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.surgery import SURGERY
from chipviz.bundle import folders
from chipviz.bundle.classifier import Classifier
from chipviz.bundle.head import write_head
from chipviz.bundle.targets import GGUF_FAMILIES, GGUF_FILE
from chipviz.errors import BundleError

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
assert tuple(_ARCHITECTURES) == GGUF_FAMILIES
_STORED: dict[torch.dtype, gguf.GGMLQuantizationType] = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_gguf(bundle: Path, classifier: Classifier, folder: Path) -> None:
    """Write the cut backbone, the bundle's tokenizer, and the chip in `head/`.

    Raises:
        BundleError: If llama.cpp computes something else for its configuration.
    """
    if (bundle / SURGERY).exists():
        raise BundleError("Modules of its backbone were replaced.", "Use the bundle itself.")
    weights = folders.base_weights(bundle, classifier.model)
    write_file(classifier.model.config, weights, folder)
    folders.copy_reader(bundle, folder)
    chip = folders.chip_of(classifier)
    write_head(chip, classifier.tokenizer, classifier.metadata, folder / "head")


def write_file(config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model of one of `GGUF_FAMILIES` as one file.

    Args:
        config: Its configuration.
        weights: Without an LM head, by the base model's own names.
        folder: Where to.

    Raises:
        BundleError: If llama.cpp computes something else for its configuration.
    """
    _refuse_other_sums(config)
    architecture = _ARCHITECTURES[config.model_type]
    turns = architecture is gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(folder / GGUF_FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    for name, value in weights.items():
        place = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        if place is None:
            raise BundleError(f"llama.cpp has no place for {name}.", "Give --to onnx.")
        values, kind = _as_stored(_turned(name, value, config) if turns else value)
        writer.add_tensor(place, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refuse_other_sums(config: Any) -> None:
    """Refuse settings that llama.cpp's own code of the family does not know.

    Raises:
        BundleError: Naming the setting.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    odd = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"positions of kind {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        "a sliding window": getattr(config, "sliding_window", None) is not None
        and any("sliding" in kind for kind in getattr(config, "layer_types", None) or ["sliding"]),
    }
    if found := [what for what, there in odd.items() if there]:
        raise BundleError(f"This backbone has {found[0]}, which is not written.", "Give --to onnx.")


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp must know of the model."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _turned(name: str, value: Tensor, config: Any) -> Tensor:
    """Queries and keys in the order in which llama.cpp turns pairs of neighbours."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return value
    half = value.shape[0] // heads // 2
    parts = value.reshape(heads, 2, half, *value.shape[1:])
    return parts.transpose(1, 2).reshape(value.shape)


def _as_stored(value: Tensor) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    """A tensor's numbers as the file holds them: vectors in float32, matrices as in the bundle."""
    kind = _STORED[torch.float32 if value.dim() == 1 else value.dtype]
    numbers = value.float().contiguous().numpy()
    return np.ascontiguousarray(gguf.quants.quantize(numbers, kind)), kind
