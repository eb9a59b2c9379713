"""Tiny random models of many families, for the laws that must hold whatever the architecture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

_SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one architecture, and where its final norm is."""

    name: str
    norm: str | None
    """Attribute path of the final norm in the base model; None where there is none."""
    config: dict[str, Any]

    def build(self, folder: Path) -> Path:
        """Save a random model, in float32, and return its folder."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = AutoConfig.for_model(self.name, **{**_SMALL, **self.config})
            model = AutoModel.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name:  # all ones would hide a norm that is not used
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
            model.save_pretrained(folder)
        return folder


SEVEN = (
    Family("llama", "norm", {"num_key_value_heads": 2}),
    Family("qwen2", "norm", {"num_key_value_heads": 2}),
    Family("gemma3_text", "norm", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    Family("gpt2", "ln_f", {"n_inner": 64}),
    Family("gpt_neox", "final_layer_norm", {}),
    Family("opt", "decoder.final_layer_norm", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Family("bert", None, {}),
)
"""Those the paper's users meet most: six decoders and an encoder without a final norm."""
