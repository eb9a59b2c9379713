"""The paper's own recipe for its chips, to the letter: preset *published*.

Texts: raw last-token states, no normalisation, batches of one row, one epoch in the given order,
AdamW. Pictures: batches of 512, 500 epochs in the given order, MLP chips as wide as the model.
Two things of the public code are named and not repeated: its *validate* draws the validation rows
from the evaluation split, and its *optimal* layer is chosen on the test split (here: rule oracle).

Source: arXiv:2410.06541, sections 4.1 and 4.3, table 5. Betas, order, epochs and width are those of
its public code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import Read
from chipviz.chips.mlp import HIDDEN, initial, losses
from chipviz.config import PUBLISHED_MAX_TRAIN
from chipviz.keys import ChipKind

LEARNING_RATE = 1e-5
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
BLOCK_ROWS = 1_024
"""Maximum rows read at once. They are still trained on one by one."""
PICTURE_RATE = 1e-3
PICTURE_BATCH = 512
PICTURE_EPOCHS = 500
N_LOOKS = 8
"""Minimum number of parts in which the rows are read. The chip can be looked at after each."""


def fit_published(
    kind: ChipKind,
    read: Read,
    labels: Tensor,
    n_classes: int,
    *,
    seed: int,
    max_rows: int = PUBLISHED_MAX_TRAIN,
    block_rows: int = BLOCK_ROWS,
    on_rows: Callable[[int, Chip], None] = lambda _rows, _chip: None,
) -> Chip:
    """Train one chip on each of K layers, row by row, once.

    Args:
        kind: *linear*, or *mlp* with 256 hidden units.
        read: Raw last-token features of K layers.
        labels: Class indices, shape (N,). Rows beyond `max_rows` are not used.
        n_classes: C.
        seed: Seed of the initial weights (the public code leaves them to chance).
        max_rows: Maximum rows to train on.
        block_rows: Maximum rows read at once.
        on_rows: Told now and then how many rows are done, and the chips as they are, which go on
            changing. May raise to stop.

    Returns:
        A stack of K chips.
    """
    random = torch.Generator().manual_seed(seed)
    one = read(0, 1)
    hidden = HIDDEN if kind == "mlp" else 0
    parameters = initial(len(one), one.shape[-1], hidden, n_classes, random, one.device)
    for tensor in parameters:
        tensor.grad = torch.zeros_like(tensor)
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    n_rows = min(len(labels), max_rows)
    chip, size = Chip(*parameters[-2:], *parameters[:-2]), min(block_rows, -(-n_rows // N_LOOKS))
    for start in range(0, n_rows, size):
        stop = min(start + size, n_rows)
        block = read(start, stop)
        for row, label in enumerate(labels[start:stop].tolist()):
            _gradient(parameters, block[:, row], label)
            optimizer.step()
        on_rows(stop, chip)
    return chip


def fit_pictures(
    kind: ChipKind,
    read: Read,
    labels: Tensor,
    n_classes: int,
    *,
    seed: int,
    epochs: int = PICTURE_EPOCHS,
    on_epoch: Callable[[int], None] = lambda _epoch: None,
) -> Chip:
    """Train one chip on each of K layers as the paper does on pictures.

    Args:
        kind: *linear*, or *mlp* with as many hidden units as a state has numbers.
        read: Raw features of K layers.
        labels: Class indices, shape (N,).
        n_classes: C.
        seed: Seed of the initial weights.
        epochs: Passes over the rows, in the given order.
        on_epoch: Told the passes that are done. May raise to stop.

    Returns:
        A stack of K chips, as the last pass leaves them.
    """
    random = torch.Generator().manual_seed(seed)
    one = read(0, 1)
    hidden = one.shape[-1] if kind == "mlp" else 0
    parameters = initial(len(one), one.shape[-1], hidden, n_classes, random, one.device)
    for tensor in parameters:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        parameters, lr=PICTURE_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    chip = Chip(*parameters[-2:], *parameters[:-2])
    labels = labels.to(one.device)
    for epoch in range(epochs):
        for start in range(0, len(labels), PICTURE_BATCH):
            stop = min(start + PICTURE_BATCH, len(labels))
            found = losses(chip, read(start, stop), labels[start:stop])
            optimizer.zero_grad()
            found.mean(dim=1).sum().backward()
            optimizer.step()
        on_epoch(epoch + 1)
    return Chip(**{name: tensor.detach() for name, tensor in chip.tensors().items()})


def _gradient(parameters: list[Tensor], x: Tensor, label: int) -> None:
    """Write the gradient of one row's cross-entropy, x of shape (K, D): half the time of a tape."""
    *inner, weight, bias = parameters
    h = x
    if inner:
        h = torch.baddbmm(inner[1][..., None], inner[0], x[..., None])[..., 0].relu_()
    residual = torch.baddbmm(bias[..., None], weight, h[..., None])[..., 0].softmax(dim=-1)
    residual[:, label] -= 1
    torch.mul(residual[..., None], h[:, None], out=weight.grad)
    bias.grad = residual
    if inner:
        back = (residual[:, None] @ weight)[:, 0] * (h > 0)
        torch.mul(back[..., None], x[:, None], out=inner[0].grad)
        inner[1].grad = back
