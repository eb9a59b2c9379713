"""Hidden states of a text -> one vector: (B, T, D) and a mask -> (B, D)."""

import torch
from torch import Tensor

from chipviz.keys import Pooling

AT_ONE_TOKEN: tuple[Pooling, ...] = ("last", "first")
"""Poolings that need a single token, so that a norm need not be applied to all the others."""


def last_positions(mask: Tensor) -> Tensor:
    """Position of the last real token of each text.

    Args:
        mask: 1 where a token is real, padding on either side. Shape (B, T).

    Returns:
        Shape (B,), int64.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * positions).argmax(dim=1)


def first_positions(mask: Tensor) -> Tensor:
    """Position of the first real token of each text: shape (B,), int64."""
    return mask.argmax(dim=1)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling, patches: Tensor | None = None) -> Tensor:
    """Pool one layer's hidden states.

    Args:
        hidden: Shape (B, T, D).
        mask: 1 where a token is real. Shape (B, T).
        pooling: *last* takes the last real token, *first* the first, *mean* averages over the real
            tokens, *max* takes each dimension's largest value among them, *first+mean* is both.
        patches: 1 where a token is a patch of a picture, shape (B, T). Mean and maximum are over
            these alone.

    Returns:
        Shape (B, D), float32; (B, 2 D) of *first+mean*.
    """
    if pooling == "first+mean":
        parts: tuple[Pooling, Pooling] = ("first", "mean")
        return torch.cat([pool(hidden, mask, part, patches) for part in parts], dim=1)
    if pooling in AT_ONE_TOKEN:
        at = first_positions(mask) if pooling == "first" else last_positions(mask)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), at].float()
    mask = mask if patches is None else patches
    if pooling == "max":
        padding = mask[..., None] == 0
        return hidden.masked_fill(padding, float("-inf")).amax(dim=1).float()
    # A product with the mask sums without a (B, T, D) copy of the masked states.
    weights = mask.to(torch.float32)
    total = torch.bmm(weights[:, None, :], hidden.float())[:, 0]  # (B, D)
    return total / weights.sum(dim=1, keepdim=True)


def pool_so_far(states: Tensor, pooling: Pooling) -> Tensor:
    """What pooling gives for a text up to each of its tokens.

    Args:
        states: States of one text, without padding, shape (T, D).
        pooling: As in `pool`. Of *last* and *first* the states are returned as they are.

    Returns:
        Shape (T, D). The last row is what `pool` gives for the whole text, but for *first*.
    """
    assert pooling != "first+mean", "pictures have no order"
    if pooling == "max":
        return states.cummax(dim=0).values
    if pooling == "mean":
        counts = torch.arange(1, len(states) + 1, device=states.device)
        return states.cumsum(dim=0) / counts[:, None]
    return states
