"""Every text family that transformers can build tiny from its configuration alone.

`outcome` says what becomes of one; `EXPECTED` in `test_sweep.py` says what must. This prints it:

    python -m tests.backbones.sweep [NAME ...]
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from chipviz.backbones.backbone import Backbone, load_backbone
from chipviz.backbones.model_folder import open_folder
from chipviz.errors import BackboneError
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector
from chipviz.pruning.cut import cut_config, cut_weights, impossible_cuts

LAYERS = 4
MOST = 20_000_000
"""Parameters of a tiny model at most."""
IDS = [[5, 9, 30, 31, 32, 33, 34, 35, 36, 37, 38], [7, 8, 20], [60, 61, 62, 63, 64]]
VECTORS = [Vector.named("last"), Vector.named("mean")]

_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 300),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "sliding_window", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # wide enough that layers differ
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Given to every family that knows the setting."""
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "dots1": {"n_shared_experts": 1},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        **_MIXED,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "laurel_rank": 8,
    },
    "gemma4_text": {**_MIXED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {**_MIXED, "num_kv_shared_layers": 0},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"] * 2,
        "is_decoder": True,
    },
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "xlnet": {"d_head": 8, "n_head": 4, "d_inner": 64},
    "zaya": {"num_experts_per_tok": 1},
}
_NOT: dict[str, tuple[str, ...]] = {
    "dots3_note_text": ("num_attention_heads", "num_key_value_heads"),
    "embedding_gemma2_text": ("num_key_value_heads",),
    "falcon": ("head_dim",),
    "gemma4_text": ("head_dim",),
    "gemma4_unified_text": ("head_dim",),
    "neomme": ("sliding_window", "head_dim"),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
}
"""What a family cannot be given."""
_LATENT = ("head_dim", "num_key_value_heads")
"""What families with latent attention compute themselves."""


def families() -> Iterator[str]:
    """Model types that read text and nothing else."""
    for name in sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}):
        if name in CONFIG_MAPPING_NAMES:
            try:
                config = AutoConfig.for_model(name)
                reads = MODEL_MAPPING[type(config)].main_input_name
                whole = config.get_text_config() is config
            except Exception:  # noqa: BLE001 - not to be had here: a library or a part is missing
                continue
            if reads == "input_ids" and whole and getattr(config, "vocab_size", None):
                yield name


def tiny_model(name: str) -> nn.Module:
    """A small random model of a family.

    Raises:
        Exception: Whatever the family has against it.
    """
    plain = AutoConfig.for_model(name)
    known = {*plain.to_dict(), *plain.attribute_map}
    dropped = {*_NOT.get(name, ()), *(_LATENT if "kv_lora_rank" in known else ())}
    values = {key: value for key, value in _SMALL.items() if key in known - dropped}
    config = AutoConfig.for_model(name, **{**values, **_OWN.get(name, {})})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"it has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModel.from_config(config, dtype=torch.float32)
        for part, parameter in model.named_parameters():
            if any(word in part.lower() for word in ("norm", "ln_")):
                # all ones would hide a norm that is not used
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def outcome(name: str, folder: Path) -> str:
    """`right`, `refused: why`, or what is wrong with which cut.

    A cut is right if the family's own class, loaded from disk, has the states that chips are fitted
    on. A batch is right if each text has the states that it has alone.
    """
    tiny_model(name).save_pretrained(folder / "whole")
    try:
        found = open_folder(folder / "whole", name)
        backbone = load_backbone(found, dtype=torch.float32, device="cpu")
        no_cut = impossible_cuts(backbone)
    except BackboneError as error:
        return f"refused: {error.message}"
    alone = [forward_pooled(backbone, [ids], 2, VECTORS) for ids in IDS]
    for layer in sorted(set(range(LAYERS)) - set(no_cut)):
        cut = _from_disk(backbone, layer, folder / f"cut{layer}")
        for ids, (last, mean) in zip(IDS, alone, strict=True):
            one = torch.tensor([ids])
            with torch.inference_mode():
                states = cut(input_ids=one, attention_mask=torch.ones_like(one)).last_hidden_state
            gap = max(
                _gap(states[0, -1], last[layer + 1, 0]),
                _gap(states[0].mean(dim=0), mean[layer + 1, 0]),
            )
            if not gap < 1e-4:
                return f"wrong: layer {layer} differs by {gap:.1g}"
    if backbone.padded:
        together = forward_pooled(backbone, IDS, 2, VECTORS)
        gap = max(
            _gap(batch, torch.cat(rows, dim=1))
            for batch, rows in zip(together, zip(*alone, strict=True), strict=True)
        )
        if not gap < 1e-3:
            return f"wrong: a batch differs by {gap:.1g}"
    but = f" but for cuts after {sorted(no_cut)}" if no_cut else ""
    return f"right{but}{'' if backbone.padded else ', one length a batch'}"


def _from_disk(backbone: Backbone, layer: int, folder: Path) -> Any:
    kind = type(backbone.model)
    with torch.device("meta"):
        empty: Any = kind(cut_config(backbone, layer))
    empty.save_pretrained(folder, state_dict=cut_weights(backbone, layer))
    model, loading = kind.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not loading["missing_keys"], loading
    return model.eval()


def _gap(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1))


def said(name: str) -> str:
    """The outcome of a family, or why it is not built here."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return outcome(name, Path(scratch))
        except Exception as error:  # noqa: BLE001 - a table of whatever happens
            return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


if __name__ == "__main__":
    for one in sys.argv[1:] or families():
        print(f"{one}: {said(one)}", flush=True)  # noqa: T201
