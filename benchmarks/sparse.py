"""Sparse chips of some layers and all penalties: chipviz against scikit-learn's saga."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.measure import Row, alternate
from chipviz.chips.rows import Rows
from chipviz.chips.sparse import Scaler, Solution, solve_path
from chipviz.keys import Vector

GOAL = 10.0
SAME_OBJECTIVE = 1e-3
VECTOR = Vector.named("mean")
MAX_STEPS = 20_000
TOLERANCE = 1e-4
"""scikit-learn's default `tol`, at which its objective is no better than ours."""


def against_saga(bench: Bench) -> list[Row]:
    """The same objective, every penalty of the path, on every fifth layer."""
    work = bench.open(
        template=bench.template, max_train=bench.pick(800, 200), max_validation=16, max_test=16
    )
    with work.extracted((VECTOR,)) as found:
        rows = Rows(found.features, work.task, torch.device("cpu"))
        layers = range(4, found.features.n_layers, 5) if found.features.n_layers > 4 else [0]
        read, labels = rows.reader("train", VECTOR, list(layers)), rows.labels("train")
        n_classes, n = work.task.n_classes, len(labels)
        standardised = Scaler.of(read, n)(read(0, n))
        ours: list[Solution] = []
        theirs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def fit_ours() -> None:
            ours[:] = solve_path(read, labels, n_classes)

        fit_ours()

        def fit_theirs() -> None:
            for step, solution in enumerate(ours):
                for k, penalty in enumerate(solution.penalty.tolist()):
                    model = LogisticRegression(
                        C=1 / (penalty * n),
                        l1_ratio=1,
                        solver="saga",
                        tol=TOLERANCE,
                        max_iter=MAX_STEPS,
                    ).fit(standardised[k].numpy(), labels.numpy())
                    weight, bias = map(np.asarray, (model.coef_, model.intercept_))
                    if n_classes == 2:
                        weight, bias = (np.concatenate([-a, a]) / 2 for a in (weight, bias))
                    theirs[step, k] = torch.from_numpy(weight), torch.from_numpy(bias)

        ratio = alternate(fit_ours, fit_theirs, bench.pick(3, 1))
        gap = max(
            _objective(s.weight[k], s.bias[k], standardised[k], labels, s.penalty[k])
            / _objective(*theirs[step, k], standardised[k], labels, s.penalty[k])
            - 1
            for step, s in enumerate(ours)
            for k in range(len(s.bias))
        )
    note = (
        f"{len(list(layers))} layers, {len(ours)} penalties, {n} texts; our objective at most "
        f"{gap:.0e} above saga's at tol {TOLERANCE:g}"
    )
    return [
        ratio.row(
            "sparse chips, every penalty, against saga", GOAL, right=gap < SAME_OBJECTIVE, note=note
        )
    ]


def _objective(
    weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor, penalty: Tensor
) -> float:
    """Mean log-loss + penalty |W|_1 in float64."""
    logits = rows.double() @ weight.double().T + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return float(loss + penalty * weight.double().abs().sum())
