"""What a model costs, dense and cut: parameters, bytes, FLOPs per token."""

from typing import Any

from torch import nn

from chipviz.backbone import Backbone
from chipviz.config import Pooling
from chipviz.report import CutCost, LayerCost

CHIP_BYTES = 4
"""A bundle keeps its chip in float32: rounding it would move the probabilities."""


def dense_cost(backbone: Backbone, max_length: int, stored_bytes: int) -> CutCost:
    """The published model, LM head included.

    Args:
        backbone: The frozen model.
        max_length: Tokens a prompt may have; attention grows with it.
        stored_bytes: Bytes of one stored weight.
    """
    config = backbone.config.get_text_config()
    head = 2 * config.vocab_size * backbone.hidden_size
    blocks = sum(_block_flops(block, config, max_length) for block in backbone.blocks)
    return CutCost(
        n_parameters=backbone.n_published,
        weight_bytes=backbone.n_published * stored_bytes,
        flops_per_token=blocks + head,
    )


def layer_cost(
    backbone: Backbone,
    layer: int,
    pooling: Pooling,
    n_classes: int,
    *,
    max_length: int,
    stored_bytes: int,
) -> LayerCost:
    """The bundle cut at `layer`, its chip included.

    Args:
        backbone: The frozen model.
        layer: The last block kept.
        pooling: A *mean* chip is kept as a token classifier, whose class has a bias (of zeros).
        n_classes: C.
        max_length: Tokens a prompt may have.
        stored_bytes: Bytes of one stored backbone weight.
    """
    n_layers, kept = backbone.n_layers, layer + 1
    whole = _count(backbone.model)
    removed = sum(_count(block) for block in backbone.blocks[kept:])
    chip = n_classes * backbone.hidden_size + (n_classes if pooling == "mean" else 0)
    n_parameters = whole - removed + chip
    config = backbone.config.get_text_config()
    blocks = sum(_block_flops(block, config, max_length) for block in backbone.blocks[:kept])
    return LayerCost(
        layer=layer,
        pooling=pooling,
        n_parameters=n_parameters,
        weight_bytes=(n_parameters - chip) * stored_bytes + chip * CHIP_BYTES,
        flops_per_token=blocks + 2 * n_classes * backbone.hidden_size,
        layer_ratio=(n_layers - kept) / n_layers,
        parameter_ratio=(backbone.n_published - n_parameters) / backbone.n_published,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _block_flops(block: nn.Module, config: Any, max_length: int) -> int:
    """Two for each matrix weight, and the two products of attention over `max_length` tokens."""
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * matrices + 4 * max_length * width
