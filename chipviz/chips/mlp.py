"""MLP chips: one hidden layer of 256, AdamW, stopped early by validation. K layers at once.

Knows features and labels, not models.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as fn
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import Read

HIDDEN = 256
"""Source: arXiv:2410.06541, section 4.1."""
BATCH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
PATIENCE = 6
"""Epochs without a better validation log-loss after which a layer is done."""
MAX_EPOCHS = 60
BLOCK_ROWS = 16_384
"""Maximum rows held in memory at once. More are shuffled block by block."""


def fit_mlp(
    read: Read,
    labels: Tensor,
    read_validation: Read,
    validation: Tensor,
    n_classes: int,
    *,
    seed: int,
    row_weight: Tensor | None = None,
    patience: int = PATIENCE,
    block_rows: int = BLOCK_ROWS,
    on_epoch: Callable[[], None] = lambda: None,
) -> Chip:
    """Fit one MLP chip on each of K layers.

    Args:
        read: Pooled training features of K layers.
        labels: Class indices, shape (N,).
        read_validation: Pooled validation features of the same layers.
        validation: Class indices, shape (M,).
        n_classes: C.
        seed: Seed of the initial weights and of the order of rows.
        row_weight: Weight per row, 1 on average, shape (N,). None weighs all the same.
        patience: Epochs without a better validation loss after which a layer is done.
        block_rows: Maximum rows held in memory at once.
        on_epoch: Called after every epoch. May raise to stop.

    Returns:
        A stack of K chips that read plain features: the scaling inside is folded into them.
    """
    random = torch.Generator().manual_seed(seed)
    mean, scale = _standard(read, len(labels), block_rows)
    parameters = initial(mean.shape[0], mean.shape[-1], HIDDEN, n_classes, random, mean.device)
    for tensor in parameters:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    best = [tensor.detach().clone() for tensor in parameters]
    best_loss = mean.new_full((len(mean),), torch.inf)
    since = torch.zeros(len(mean), dtype=torch.int64, device=mean.device)
    held_out = (read_validation(0, len(validation)) - mean) / scale
    for _ in range(MAX_EPOCHS):
        for start in _shuffled(range(0, len(labels), block_rows), random):
            stop = min(start + block_rows, len(labels))
            block = (read(start, stop) - mean) / scale
            for rows in torch.randperm(stop - start, generator=random).split(BATCH):
                where = (rows + start).to(labels.device)
                found = losses(_chip(parameters), block[:, rows], labels[where])
                if row_weight is not None:
                    found = found * row_weight[where].to(found)
                optimizer.zero_grad()
                found.mean(dim=1).sum().backward()
                optimizer.step()
        with torch.no_grad():
            loss = losses(_chip(parameters), held_out, validation).mean(dim=1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            since = torch.where(better, 0, since + 1)
            for kept, tensor in zip(best, parameters, strict=True):
                kept[better] = tensor[better]
        on_epoch()
        if bool((since >= patience).all()):
            break
    return _unscaled(_chip(best), mean, scale)


def initial(
    k: int,
    width: int,
    hidden: int,
    n_classes: int,
    random: torch.Generator,
    device: torch.device,
) -> list[Tensor]:
    """V, c, W, b of K chips as `torch.nn.Linear` begins. `hidden` 0 gives W and b alone."""

    def uniform(fan_in: int, *shape: int) -> Tensor:
        bound = fan_in**-0.5
        values = torch.empty(k, *shape).uniform_(-bound, bound, generator=random)
        return values.to(device)

    inner = [uniform(width, hidden, width), uniform(width, hidden)] if hidden else []
    fan_in = hidden or width
    return [*inner, uniform(fan_in, n_classes, fan_in), uniform(fan_in, n_classes)]


def _chip(parameters: list[Tensor]) -> Chip:
    hidden_weight, hidden_bias, weight, bias = parameters
    return Chip(weight, bias, hidden_weight, hidden_bias)


def losses(chip: Chip, features: Tensor, labels: Tensor) -> Tensor:
    """Log-loss of every row, shape (K, n)."""
    logits = chip.logits(features)
    target = labels.to(logits.device).expand(len(logits), -1)
    return fn.cross_entropy(logits.mT, target, reduction="none")


def _standard(read: Read, n_rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Mean and spread of the training features, each (K, 1, D)."""
    total, square, n = 0.0, 0.0, float(n_rows)
    for start in range(0, n_rows, block_rows):
        total = total + read(start, min(start + block_rows, n_rows)).double().sum(1, keepdim=True)
    mean = torch.as_tensor(total / n).float()
    for start in range(0, n_rows, block_rows):
        block = read(start, min(start + block_rows, n_rows)) - mean
        square = square + block.square_().sum(1, keepdim=True)
    return mean, torch.as_tensor(square / n).sqrt().clamp_min(1e-6)


def _shuffled(starts: range, random: torch.Generator) -> list[int]:
    return [starts[i] for i in torch.randperm(len(starts), generator=random).tolist()]


def _unscaled(chip: Chip, mean: Tensor, scale: Tensor) -> Chip:
    """The same answers from plain features."""
    assert chip.hidden_weight is not None
    assert chip.hidden_bias is not None
    weight = chip.hidden_weight / scale
    shift = (weight @ mean.mT)[..., 0]
    return Chip(chip.weight, chip.bias, weight, chip.hidden_bias - shift)
