"""Linear chips of all layers and strengths: chipviz against a scikit-learn loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.bench import Bench, Work
from benchmarks.measure import Row, alternate
from chipviz.chips.linear import STRENGTHS, Read, Turn, fit_linear
from chipviz.chips.rows import Rows
from chipviz.features.storage import Features
from chipviz.keys import Split, Vector
from chipviz.parallel import Pool

SOLVERS = {"newton-cholesky": 10.0, "lbfgs": None}
"""Solvers of scikit-learn with their goals. The goal is held against the fastest one."""
SAME_OBJECTIVE = 1e-3
SAME_ACCURACY = 0.003
TOLERANCE = 1e-4
"""scikit-learn's default `tol`: a stricter one only slows it down, the objectives agree at this."""
MAX_STEPS = 10_000
GROUP = 6
"""Layers between which the sides change."""
VECTOR = Vector.named("last")
CPU = torch.device("cpu")


@dataclass
class Fits:
    """Both sides on the same stored features. Weights are kept in turned coordinates."""

    features: Features
    work: Work
    layers: Sequence[int]
    pool: Pool
    solver: str = "lbfgs"
    """Solver of scikit-learn's side."""
    turns: dict[int, Turn] = field(default_factory=dict)
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Turned training features of each layer, (N, D + 1): made before the clock starts."""
    ours: dict[int, Tensor] = field(default_factory=dict)
    peer: dict[int, Tensor] = field(default_factory=dict)
    """Turned weights of each layer, (G, C, D + 1)."""

    def __post_init__(self) -> None:
        for layer in self.layers:
            read = self._read("train", layer)
            turn = self.turns[layer] = Turn.of(read, len(self.labels))
            self.rows[layer] = turn.into(read(0, len(self.labels)))[0].numpy()

    @property
    def labels(self) -> Tensor:
        """Class indices of the training texts, (N,)."""
        return self._stored.labels("train")

    def fit_ours(self, layers: Sequence[int]) -> None:
        """As `chips.training` does on a CPU: from disk, turning included, layers side by side."""

        def fit(layer: int) -> Tensor:
            weights = fit_linear(self._read("train", layer), self.labels, self.work.task.n_classes)
            turned = self.turns[layer].forth(weights[0].flatten(0, 1)[None])[0]
            return turned.unflatten(0, weights.shape[1:3])

        self.ours |= dict(zip(layers, self.pool.map(fit, layers), strict=True))

    def fit_peer(self, layers: Sequence[int]) -> None:
        """One LogisticRegression after another, on features that lie in memory, turned."""
        for layer in layers:
            weights = [self._peer(self.rows[layer], strength) for strength in STRENGTHS]
            self.peer[layer] = torch.stack(weights)

    def _peer(self, rows: NDArray[np.float32], strength: float) -> Tensor:
        two = self.work.task.n_classes == 2
        # Of two classes scikit-learn fits one weight w; ours are -w / 2 and w / 2, whose penalty
        # is half as large: the same objective at twice the C.
        model = LogisticRegression(
            C=2 * strength if two else strength,
            fit_intercept=False,
            solver=self.solver,
            tol=TOLERANCE,
            max_iter=MAX_STEPS,
        ).fit(rows, self.labels.numpy())
        weight = torch.from_numpy(np.asarray(model.coef_, dtype=np.float32))
        return torch.cat([-weight / 2, weight / 2]) if two else weight

    def gap(self) -> float:
        """Largest relative difference of the two sides' objectives."""
        gaps = []
        for layer in self.layers:
            ours, peer = (self._objective(layer, side[layer]) for side in (self.ours, self.peer))
            gaps.append(float(((ours - peer).abs() / peer).max()))
        return max(gaps)

    def _objective(self, layer: int, weights: Tensor) -> Tensor:
        """Mean log-loss + |W|^2 / (2 C N) in float64, of every strength: (G,)."""
        n = len(self.labels)
        rows = torch.from_numpy(self.rows[layer]).double()
        logits = rows @ weights.double().mT  # (G, N, C)
        target = self.labels.expand(len(weights), -1)
        loss = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none").mean(dim=1)
        penalty = weights.double().square().sum(dim=(1, 2)) / (2 * n * torch.tensor(STRENGTHS))
        return loss + penalty

    def accuracy_gap(self) -> float:
        """Largest difference of test accuracy between the two sides, in [0, 1]."""
        labels = self._stored.labels("test")
        gaps = []
        for layer in self.layers:
            rows = self.turns[layer].into(self._read("test", layer)(0, len(labels)))[0]
            right = [
                ((rows @ side[layer].mT).argmax(dim=-1) == labels).double().mean(dim=1)
                for side in (self.ours, self.peer)
            ]
            gaps.append(float((right[0] - right[1]).abs().max()))
        return max(gaps)

    @property
    def _stored(self) -> Rows:
        return Rows(self.features, self.work.task, CPU)

    def _read(self, split: Split, layer: int) -> Read:
        return self._stored.reader(split, VECTOR, [layer])


def against_scikit_learn(bench: Bench) -> list[Row]:
    """All layers, all strengths, the same objective in the same coordinates, by two solvers."""
    work = bench.open(
        template=bench.template,
        max_train=bench.pick(2000, 400),
        max_validation=16,
        max_test=bench.pick(1800, 400),
    )
    with work.extracted((VECTOR,)) as found, Pool(CPU) as pool:
        layers = range(0, found.features.n_layers, bench.pick(1, 6))
        return [
            _against(Fits(found.features, work, layers, pool, solver), goal)
            for solver, goal in SOLVERS.items()
        ]


def _against(fits: Fits, goal: float | None) -> Row:
    """Each layer is fitted once by each side, a few layers in turns: a repeat is such a group."""
    n = len(fits.layers)
    parts = [fits.layers[start : start + GROUP] for start in range(0, n, GROUP)]
    groups = iter([part for part in parts for _side in range(2)])
    ratio = alternate(
        lambda: fits.fit_ours(next(groups)),
        lambda: fits.fit_peer(next(groups)),
        len(parts),
    )
    gap, accuracy = fits.gap(), fits.accuracy_gap()
    note = (
        f"{n} layers x {len(STRENGTHS)} strengths, {len(fits.labels):,} texts; ours reads "
        f"from disk and turns, scikit-learn gets turned features in memory; largest relative "
        f"gap of the objectives {gap:.0e}, of test accuracy {100 * accuracy:.2f} points"
    )
    right = gap <= SAME_OBJECTIVE and accuracy <= SAME_ACCURACY
    name = f"linear chips against a scikit-learn loop, {fits.solver}"
    return ratio.row(name, goal, right=right, note=note)
