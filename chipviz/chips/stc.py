"""Sparsify, then classify: from the sparse chips of each layer to one classifier for every depth.

Of each layer's sparse chip the neurons that carry most of its weight are taken. The classifier of a
depth reads those of all layers up to it. Source: arXiv:2311.15983. What differs from its code: one
penalty a layer, chosen on validation, standardised features, any number of classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.judge import joined
from chipviz.chips.linear import Read
from chipviz.chips.rows import Rows
from chipviz.chips.sparse import TOLERANCE, Chosen, choose, solve_path
from chipviz.config import Importance
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Site, Split
from chipviz.results.neurons import Aggregate

ETAS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Shares of a layer's importance that its neurons must reach. Source: the paper's code."""
COARSE = (0.01, 0.1, 0.3, 0.6)
"""Those that are tried first."""
LOOSE = 0.3
"""Violation of the optimality conditions that will do while eta is chosen."""
SITES = get_args(Site)
"""A neuron's site is stored as its place among these."""


def importance(weight: Tensor, how: Importance = "squares") -> Tensor:
    """What each neuron carries: the sum over classes of its squared weight (..., C, D) -> (..., D).

    Weights are those of standardised features. Source: arXiv:2311.15983, section 3.2. *sizes* are
    weights without their sign, as in arXiv:2604.18519.
    """
    return (weight.square() if how == "squares" else weight.abs()).sum(dim=-2)


LEAST_WEIGHT = 0.1
"""Weight of the worst layer, where layers are weighted. Source: arXiv:2604.18519."""


def layer_weights(accuracies: Tensor) -> Tensor:
    """Weight of each layer's neurons, from the accuracy of its own chip: 1 for the best, (L,)."""
    low, high = accuracies.min(), accuracies.max()
    if high - low < 1e-9:
        return torch.ones_like(accuracies)
    return ((accuracies - low) / (high - low)).clamp_min(LEAST_WEIGHT)


def reached(carried: Tensor) -> Tensor:
    """The share of importance that stronger neurons hold before each one: (..., D) -> (..., D).

    The smallest set of neurons that reaches a share eta is those before which less than eta is
    held: the one that crosses eta is in it. A neuron that carries nothing is in no set (2).
    """
    order = carried.argsort(dim=-1, descending=True, stable=True)
    strongest = carried.gather(-1, order)
    total = strongest.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    before = (strongest.cumsum(dim=-1) - strongest) / total
    before = torch.where(strongest > 0, before, 2.0)
    return torch.empty_like(before).scatter_(-1, order, before)


@dataclass(frozen=True)
class Neurons:
    """All neurons that some eta selects, from the first layer to the last."""

    places: Tensor
    """Site (its place in `keys.Site`), layer and column of each, shape (U, 3), int32."""
    reached: Tensor
    """See `reached`, shape (U,)."""

    @classmethod
    def of(cls, probes: Mapping[Site, Chip], how: Importance = "squares") -> "Neurons":
        """The neurons of sparse chips, one stack a site, the embedding's first."""
        places, shares = [], []
        for site, stack in probes.items():
            share = reached(importance(stack.weight, how))  # (L + 1, D)
            row, column = (share < max(ETAS)).nonzero(as_tuple=True)
            number = torch.full_like(row, SITES.index(site))
            places.append(torch.stack([number, row + EMBEDDING_LAYER, column], dim=1))
            shares.append(share[row, column])
        both, share = torch.cat(places), torch.cat(shares)
        # By layer, so that the neurons of a depth are the first ones.
        order = (both[:, 1] * len(SITES) + both[:, 0]).argsort(stable=True)
        return cls(both[order].int(), share[order])

    def up_to(self, layer: int, eta: float) -> Tensor:
        """Which of them the classifier of a depth reads, shape (U,)."""
        return (self.places[:, 1] <= layer) & (self.reached < eta)


@dataclass(frozen=True)
class Aggregated:
    """The classifiers of every depth."""

    chip: Chip
    """L + 1 of them, the embedding's first."""
    strengths: list[float]
    refit: Chip | None
    tried: list[Aggregate]
    """What was looked at on the way, judged on validation."""


@dataclass(frozen=True)
class Aggregator:
    """Fits the classifiers of one curve."""

    rows: Rows
    key: ChipKey
    neurons: Neurons
    row_weight: Tensor | None = None
    column_weight: Tensor | None = None
    """Weight of each neuron's layer, shape (U,)."""

    def search(self, *, refit: bool) -> Aggregated:
        """Choose eta at a few depths, then fit every depth with it.

        Chosen by the mean log-loss on validation at a third, two thirds and all of the layers:
        first among `COARSE`, then among the neighbours in `ETAS` of the best of those.
        """
        n_layers = self.rows.features.n_layers
        depths = sorted({max(0, n_layers * i // 3 - 1) for i in (1, 2, 3)})
        tried: list[Aggregate] = []
        losses: dict[float, float] = {}
        for fine in (False, True):
            new = [eta for eta in (_beside(losses) if fine else COARSE) if eta not in losses]
            pairs = [(depth, eta) for eta in new for depth in depths]
            found = self.fit(pairs, LOOSE)
            tried += self._told(pairs, found)
            means = found.losses.view(len(new), len(depths)).mean(dim=1)
            losses |= dict(zip(new, means.tolist(), strict=True))
        eta = _best(losses)
        pairs = [(depth, eta) for depth in range(EMBEDDING_LAYER, n_layers)]
        found = self.fit(pairs)
        # In place of what the search made of the same depth and eta, less exactly.
        tried = [one for one in tried if one.eta != eta]
        tried += self._told(pairs, found, chosen=True)
        again = self._again(pairs, found) if refit else None
        strengths = 1 / (found.solution.penalty * len(self.rows.labels("train")))
        return Aggregated(self._chip(found), strengths.tolist(), again, tried)

    def fit(self, pairs: Sequence[tuple[int, float]], tolerance: float = TOLERANCE) -> Chosen:
        """The best classifier of each depth and eta, all together."""
        return choose(
            self._read("train"),
            self.rows.labels("train"),
            self._read("validation"),
            self.rows.labels("validation"),
            self.rows.task.n_classes,
            row_weight=self.row_weight,
            allowed=self._allowed(pairs),
            column_weight=self.column_weight,
            tolerance=tolerance,
        )

    def _allowed(self, pairs: Sequence[tuple[int, float]]) -> Tensor:
        masks = [self.neurons.up_to(depth, eta) for depth, eta in pairs]
        return torch.stack(masks).to(self.rows.device)

    def _read(self, split: Split) -> Read:
        values = self.rows.gather(split, self.key.pooling, self.neurons.places)
        values = values.to(self.rows.device)[None]
        return lambda start, stop: values[:, start:stop]

    def _again(self, pairs: Sequence[tuple[int, float]], found: Chosen) -> Chip:
        """The same classifiers on training and validation texts together."""
        train, validation = self.rows.labels("train"), self.rows.labels("validation")
        share = len(train) / (len(train) + len(validation))
        (solution,) = solve_path(
            joined(self._read("train"), self._read("validation"), len(train)),
            torch.cat([train, validation]),
            self.rows.task.n_classes,
            penalty=found.solution.penalty * share,
            start=found.solution,
            scaler=found.scaler,
            allowed=self._allowed(pairs),
        )
        return self._chip(Chosen(solution, found.scaler, found.losses, found.accuracies))

    def _chip(self, found: Chosen) -> Chip:
        n = len(found.solution.bias)
        return Chip(
            found.solution.weight,
            found.solution.bias,
            mean=found.scaler.mean[:, 0].expand(n, -1).cpu(),
            scale=found.scaler.scale[:, 0].expand(n, -1).cpu(),
            neurons=self.neurons.places.expand(n, -1, -1),
        )

    def _told(
        self, pairs: Sequence[tuple[int, float]], found: Chosen, *, chosen: bool = False
    ) -> list[Aggregate]:
        used = (found.solution.weight != 0).any(dim=1).sum(dim=1).tolist()
        selected = [int(self.neurons.up_to(*pair).sum()) for pair in pairs]
        losses, accuracies = found.losses.tolist(), found.accuracies.tolist()
        return [
            Aggregate(
                site=self.key.site,
                pooling=self.key.pooling,
                layer=depth,
                eta=eta,
                n_selected=selected[i],
                n_used=used[i],
                accuracy=accuracies[i],
                log_loss=losses[i],
                chosen=chosen,
            )
            for i, (depth, eta) in enumerate(pairs)
        ]


def _best(losses: Mapping[float, float]) -> float:
    """The eta of the lowest loss. Ties go to fewer neurons."""
    return min(losses, key=lambda eta: (losses[eta], eta))


def _beside(losses: Mapping[float, float]) -> tuple[float, ...]:
    best = ETAS.index(_best(losses))
    return ETAS[max(0, best - 2) : best + 3]
