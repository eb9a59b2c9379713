"""Linear chips: multinomial logistic regression with L2, to convergence.

Fitting happens in turned coordinates (`Turn`). What comes out is a plain weight that reads pooled
hidden states and needs no bias. Knows features and labels, not models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chipviz.chips.lbfgs import Numbers, minimise

STRENGTHS = (0.005, 0.02, 0.08, 0.32, 1.28)
"""Grid of scikit-learn's C: the penalty on the mean loss is |W|^2 / (2 C N). Ours: it spans what
validation chose on topic, intent and sentiment data."""

BIAS_SCALE = 10.0
"""Size of the nearly constant coordinate: its weight is penalised 100 times less than others."""

N_FLAT = 32
CURVATURE = 0.1
"""Leading directions that are flattened, and the p (1 - p) of a chip that is half fitted."""

CACHE_BYTES = {"cpu": 2 << 20, "cuda": 1 << 28}
"""Rows of one block, at most: on a CPU both products of a block find it in the cache."""
MEMORY_BYTES = 16 << 20
"""Centred features up to this size stay in memory. Larger ones are read anew for every step, which
costs a CPU a tenth more time and spares a worker's memory. On a GPU a third of what is free stays:
reading anew means a copy from the host, at a hundredth of the speed."""

TOLERANCE = 2e-6
"""See `chipviz.chips.lbfgs.minimise`."""

Read = Callable[[int, int], Tensor]
"""Rows `start` to `stop` of K layers' features, shape (K, stop - start, D)."""


@dataclass(frozen=True)
class Turn:
    """Coordinates in which a problem without bias is well conditioned, for each of K layers.

    A scaled feature is split into one coordinate along the mean, nearly constant, which plays the
    bias, and the rest, whose mean is exactly zero. For one layer, with b = `BIAS_SCALE`:

        h, mu, s         a feature, its mean and its scale (D);  c = h - mu
        u, m             direction and length of mu / s
        a                (h / s) . u, the part of a scaled feature along u
        z                (h / s - a u,  a b / m), the turned feature (D + 1)         `into`
        v = (v', v0)     weights of z, which are fitted and penalised
        w                (v' - (v' . u) u + v0 (b / m) u) / s, weights of h          `back`

    Then v . z = w . h = c . w + b v0, so logits need c and w alone, and z is never formed. A
    gradient is the sum of r z over rows with residuals r. It follows from the sums of r c and of r
    (`pull`), which cost one product as well.
    """

    mean: Tensor
    """Mean of the training features, shape (K, 1, D)."""
    scale: Tensor
    """Per-feature spread of the training features, shape (K, 1, D)."""
    direction: Tensor
    """Unit vector along the scaled mean, shape (K, D, 1)."""
    length: Tensor
    """Length of the scaled mean, shape (K, 1, 1)."""

    @classmethod
    def of(cls, read: Read, n_rows: int) -> "Turn":
        """Measure the training features, in two passes over blocks of rows."""
        mean, spread = mean_and_spread(read, n_rows)
        # A feature that hardly moves must not be blown up into the largest of all.
        floor = 1e-2 * (spread.square() + mean.square()).sqrt_()
        scale = torch.maximum(spread, floor).clamp_min(1e-12)
        scaled = mean / scale
        length = scaled.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return cls(mean, scale, (scaled / length).mT, length)

    def into(self, features: Tensor) -> Tensor:
        """Features (K, N, D) -> turned features (K, N, D + 1). The last column plays the bias."""
        scaled = features / self.scale
        along = scaled @ self.direction
        rest = scaled - along * self.direction.mT
        return torch.cat([rest, along * (BIAS_SCALE / self.length)], dim=-1)

    def back(self, turned: Tensor) -> Tensor:
        """Turned weights (K, R, D + 1) -> weights (K, R, D) on plain features."""
        rest, bias = turned[..., :-1], turned[..., -1:]
        within = rest - (rest @ self.direction) * self.direction.mT
        return (within + bias * (BIAS_SCALE / self.length) * self.direction.mT) / self.scale

    def forth(self, weight: Tensor) -> Tensor:
        """The inverse of `back`: weights (K, R, D) -> turned weights (K, R, D + 1)."""
        scaled = weight * self.scale
        along = scaled @ self.direction
        rest = scaled - along * self.direction.mT
        return torch.cat([rest, along * (self.length / BIAS_SCALE)], dim=-1)

    def pull(self, centred: Tensor, total: Tensor) -> Tensor:
        """Factors of rows, times the turned rows, from what they give with the centred ones.

        Args:
            centred: Factors times centred features, shape (K, R, D).
            total: The sum of the factors, shape (K, R, 1).

        Returns:
            Shape (K, R, D + 1).
        """
        scaled = centred / self.scale
        along = scaled @ self.direction
        last = BIAS_SCALE * (along / self.length + total)
        return torch.cat([scaled - along * self.direction.mT, last], dim=-1)


@dataclass(frozen=True)
class Problem:
    """K x G logistic regressions: on each of K layers, G penalties or weightings of its rows."""

    blocks: "Blocks"
    n_classes: int
    penalty: Tensor
    """Factor of |W|^2 / 2, shape (K, G)."""
    row_weight: Tensor | None = None
    """Weight per row, of sum 1 over the rows, shape (G, N). None weighs each row 1 / N."""

    def __call__(self, x: Tensor, columns: list[int]) -> tuple[Numbers, Tensor]:
        """Penalised mean log-loss of some of the G columns, and its gradient.

        Args:
            x: Weights, shape (K, G', C (D + 1)).
            columns: Their numbers among the G.

        Returns:
            Values, shape (K, G'), and gradients, shape (K, G', C (D + 1)).
        """
        k, g, _ = x.shape
        turned, turn = x.view(k, g * self.n_classes, -1), self.blocks.turn
        weight, bias = turn.back(turned), BIAS_SCALE * turned[..., -1:]
        centred, total = torch.zeros_like(weight), torch.zeros_like(bias)
        penalty = self.penalty[:, columns]
        value = 0.5 * penalty * x.square().sum(dim=-1)
        for block, labels, rows in self.blocks:
            # Classes beside rows: wide.
            logits = torch.baddbmm(bias, weight, block.mT).view(k, g, self.n_classes, -1)
            residual = logits.log_softmax(dim=2)
            where = labels.expand(k, g, 1, -1)
            gain = residual.gather(2, where)  # (K, G', 1, n)
            residual.exp_().scatter_(2, where, gain.expm1())
            share = 1 / self.blocks.n_rows
            if self.row_weight is not None:
                own = self.row_weight[columns, rows][:, None]  # (G', 1, n)
                gain, residual, share = gain * own, residual * own, 1.0
            value -= share * gain.sum(dim=(2, 3))
            flat = residual.view(k, g * self.n_classes, -1)
            centred.baddbmm_(flat, block, alpha=share)
            total.add_(flat.sum(dim=-1, keepdim=True), alpha=share)
        gradient = penalty[..., None] * x + turn.pull(centred, total).view_as(x)
        return value.cpu().numpy().astype(np.float64), gradient


class Blocks:
    """Centred features and labels in blocks of rows: kept where they fit, else read every time."""

    def __init__(self, read: Read, turn: Turn, labels: Tensor) -> None:
        self.labels = labels
        self.n_rows = len(labels)
        self.turn = turn
        self._read = read
        self._places = list(spans(read, self.n_rows))
        k, _, width = turn.mean.shape
        self._kept: Tensor | None = None
        limit = MEMORY_BYTES
        if turn.mean.is_cuda:
            limit = torch.cuda.mem_get_info(turn.mean.device)[0] // 3
        if 4 * k * self.n_rows * width <= limit:
            # One piece: many small ones would not go back to the system when they are freed.
            self._kept = turn.mean.new_empty(k, self.n_rows, width)
            for start, stop in self._places:
                torch.sub(read(start, stop), turn.mean, out=self._kept[:, start:stop])

    def spread(self, directions: Tensor) -> Tensor:
        """X'X / N of turned features times directions (K, D + 1, R), without forming it."""
        weight, bias = self.turn.back(directions.mT), BIAS_SCALE * directions[:, -1:].mT
        centred, total = torch.zeros_like(weight), torch.zeros_like(bias)
        for block, _, _ in self:
            along = torch.baddbmm(bias, weight, block.mT)
            centred.baddbmm_(along, block, alpha=1 / self.n_rows)
            total.add_(along.sum(dim=-1, keepdim=True), alpha=1 / self.n_rows)
        return self.turn.pull(centred, total).mT

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Blocks (K, n, D), their labels (n,) and which rows they are."""
        for start, stop in self._places:
            if self._kept is None:
                block = self._read(start, stop) - self.turn.mean
            else:
                block = self._kept[:, start:stop]
            yield block, self.labels[start:stop], slice(start, stop)


@dataclass(frozen=True)
class Flattened:
    """Coordinates V of the weights in which the features' steepest directions are flat.

    W = P V with P = H^(-1/2), H = 0.1 X'X / N + penalty I, X'X taken as its leading directions
    and a multiple of the identity. Where a few directions hold most of the spread, as in the first
    layers, the same minimum is reached in a fourth of the steps. P costs two thin products.

    Source: Halko, Martinsson and Tropp 2011, algorithm 4.4, for the directions.
    """

    directions: Tensor
    """Orthonormal, shape (K, D + 1, R)."""
    along: Tensor
    """Factor of P along each of them, shape (K, G, 1, R)."""
    across: Tensor
    """Factor of P across all of them, shape (K, G, 1, 1)."""

    @classmethod
    def of(cls, blocks: "Blocks", penalty: Tensor) -> "Flattened":
        """Find the directions of turned features, for penalties (K, G)."""
        k, _, width = blocks.turn.mean.shape
        width += 1
        n_kept = min(N_FLAT, width // 2)
        random = torch.Generator().manual_seed(0)
        probe = torch.randn(k, width, n_kept + 4, generator=random).to(blocks.turn.mean)
        basis = torch.linalg.qr(blocks.spread(probe)).Q
        spread, turn = torch.linalg.eigh(basis.mT @ blocks.spread(basis))
        directions = (basis @ turn)[..., -n_kept:]
        steep = CURVATURE * spread[:, None, None, -n_kept:].clamp_min(0)  # ascending
        across = (steep[..., :1] + penalty[..., None, None]).rsqrt()
        return cls(directions, (steep + penalty[..., None, None]).rsqrt(), across)

    def weights(self, x: Tensor, columns: list[int], *, inverse: bool = False) -> Tensor:
        """P times V (or a gradient), or back, of some columns: shape (K, G', C, D + 1)."""
        along, across = self.along[:, columns], self.across[:, columns]
        if inverse:
            along, across = 1 / along, 1 / across
        rows = x.view(*x.shape[:2], -1, self.directions.shape[1])
        steep = rows @ self.directions[:, None]
        return across * rows + (steep * (along - across)) @ self.directions.mT[:, None]


def mean_and_spread(read: Read, n_rows: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, both (K, 1, D): two passes over the rows."""
    total, square = 0.0, 0.0
    for start, stop in spans(read, n_rows):
        total = total + read(start, stop).sum(dim=1, keepdim=True, dtype=torch.float64)
    mean = torch.as_tensor(total / n_rows).float()
    for start, stop in spans(read, n_rows):
        block = read(start, stop) - mean
        square = square + block.square_().sum(dim=1, keepdim=True, dtype=torch.float64)
    return mean, torch.as_tensor(square / n_rows).float().sqrt_()


def spans(read: Read, n_rows: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of about `CACHE_BYTES`."""
    one = read(0, 1)
    n = max(1, CACHE_BYTES.get(one.device.type, CACHE_BYTES["cpu"]) // one.nbytes)
    return ((start, min(start + n, n_rows)) for start in range(0, n_rows, n))


def fit_linear(
    read: Read,
    labels: Tensor,
    n_classes: int,
    *,
    strengths: Sequence[float] | Tensor = STRENGTHS,
    row_weight: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = 500,
) -> Tensor:
    """Fit one chip for each layer and strength.

    Args:
        read: Pooled features of K layers.
        labels: Class indices, shape (N,).
        n_classes: C.
        strengths: scikit-learn's C, G of them (or K x G): they share every read of the features.
        row_weight: Weight per row, 1 on average, shape (N,) or (G, N). None weighs all the same.
        start: Weights to begin from, shape (K, C, D), or (K, G, C, D). None begins at zero.
        tolerance: See `chipviz.chips.lbfgs.minimise`.
        max_steps: See there.

    Returns:
        Weights on plain features, shape (K, G, C, D). No bias is needed.
    """
    n_rows = len(labels)
    turn = Turn.of(read, n_rows)
    like = turn.scale
    k, width = like.shape[0], like.shape[-1] + 1
    penalty = 1 / (torch.as_tensor(strengths, dtype=like.dtype, device=like.device) * n_rows)
    penalty = penalty.expand(k, -1)
    g = penalty.shape[1]
    if row_weight is not None:
        row_weight = (row_weight.to(like) / n_rows).expand(g, -1)
    blocks = Blocks(read, turn, labels.to(like.device))
    problem = Problem(blocks, n_classes, penalty, row_weight)
    flat, every = Flattened.of(blocks, penalty), list(range(g))

    def flattened(x: Tensor, columns: list[int]) -> tuple[Numbers, Tensor]:
        value, gradient = problem(flat.weights(x, columns).flatten(2), columns)
        return value, flat.weights(gradient, columns).flatten(2)

    begin = like.new_zeros(k, g, n_classes * width)
    if start is not None:
        start = start.to(like)
        rows = turn.forth(start.flatten(1, -2))  # (K, C or G C, D + 1)
        begin += rows.flatten(1)[:, None] if start.dim() == 3 else rows.view(k, g, -1)
        begin = flat.weights(begin, every, inverse=True).flatten(2)
    fitted = minimise(flattened, begin, tolerance=tolerance, max_steps=max_steps)
    weights = turn.back(flat.weights(fitted, every).flatten(1, 2))
    return weights.view(k, g, n_classes, width - 1)
