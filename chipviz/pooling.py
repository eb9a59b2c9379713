"""Hidden states of a text -> one vector: (B, T, D) and a mask -> (B, D)."""

import torch
from torch import Tensor

from chipviz.config import Pooling


def last_positions(mask: Tensor) -> Tensor:
    """Position of the last real token of each text.

    Args:
        mask: 1 where a token is real, padding on either side; shape (B, T).

    Returns:
        Shape (B,), int64.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * positions).argmax(dim=1)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling, *, last: Tensor | None = None) -> Tensor:
    """Pool one layer's hidden states.

    Args:
        hidden: Shape (B, T, D).
        mask: 1 where a token is real; shape (B, T).
        pooling: *last* takes the last real token, *mean* averages over the real tokens.
        last: `last_positions(mask)`, where the caller pools many layers with one mask.

    Returns:
        Shape (B, D), float32.
    """
    if pooling == "last":
        at = last_positions(mask) if last is None else last
        return hidden[torch.arange(len(hidden), device=hidden.device), at].float()
    # A product with the mask sums without a (B, T, D) copy of the masked states.
    weights = mask.to(torch.float32)
    total = torch.bmm(weights[:, None, :], hidden.float())[:, 0]  # (B, D)
    return total / weights.sum(dim=1, keepdim=True)
