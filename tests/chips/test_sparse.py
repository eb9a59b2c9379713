"""Sparse chips: the minimum that scikit-learn finds, its conditions, and what a penalty leaves."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips import sparse
from chipviz.chips.sparse import TOLERANCE, Scaler, choose, solve_path


def rows_of(features):
    return lambda start, stop: features[:, start:stop]


def problem(n_classes, k=2, n=300, width=60, seed=0):
    """Correlated columns of unequal scale, a few of which tell the class."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.2 * torch.randn(width, width, generator=random)
    features = torch.randn(k, n, width, generator=random) @ mix
    features[..., 0] *= 300
    tell = features[0, :, 5 : 5 + n_classes] / features[0, :, 5 : 5 + n_classes].std(0)
    labels = (tell + torch.randn(n, n_classes, generator=random)).argmax(1)
    return features + 3, labels


def objective(weight, bias, standardised, labels, penalty):
    logits = standardised.double() @ weight.double().T + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return float(loss + penalty * weight.double().abs().sum())


@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_objective_is_sagas_within_a_thousandth(n_classes):
    features, labels = problem(n_classes)
    scaler = Scaler.of(rows_of(features), len(labels))
    standardised = scaler(features)
    for solution in solve_path(rows_of(features), labels, n_classes, fractions=(0.5, 0.12, 0.03)):
        for k in range(2):
            penalty = float(solution.penalty[k])
            peer = LogisticRegression(
                C=1 / (penalty * len(labels)), l1_ratio=1, solver="saga", tol=1e-6, max_iter=20_000
            ).fit(standardised[k].numpy().astype(np.float64), labels.numpy())
            weight, bias = torch.tensor(peer.coef_), torch.tensor(peer.intercept_)
            if n_classes == 2:  # one row of weights is the difference of two
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            theirs = objective(weight, bias, standardised[k], labels, penalty)
            ours = objective(solution.weight[k], solution.bias[k], standardised[k], labels, penalty)
            assert ours <= theirs * (1 + 1e-3)


def test_the_conditions_of_a_minimum_hold_as_far_as_is_said():
    features, labels = problem(4)
    standardised = Scaler.of(rows_of(features), len(labels))(features).double()
    for solution in solve_path(rows_of(features), labels, 4):
        weight = solution.weight.double().requires_grad_()
        logits = standardised @ weight.mT + solution.bias.double()[:, None]
        loss = sum(torch.nn.functional.cross_entropy(one, labels) for one in logits)
        (gradient,) = torch.autograd.grad(loss, weight)
        penalty = solution.penalty[:, None, None].double()
        at_zero = (gradient.abs() - penalty).clamp_min(0)
        elsewhere = (gradient + penalty * weight.sign()).abs()
        worst = (torch.where(weight == 0, at_zero, elsewhere) / penalty).amax(dim=(1, 2))
        assert (worst <= TOLERANCE * 1.1).all()
        torch.testing.assert_close(worst.float(), solution.violation, atol=2e-3, rtol=0.1)


def test_at_the_strongest_penalty_nothing_is_left_and_weaker_ones_leave_more():
    features, labels = problem(3)
    path = solve_path(rows_of(features), labels, 3, fractions=(1.0, 0.5, 0.25, 0.1))
    counts = [int((solution.weight != 0).any(dim=1).sum()) for solution in path]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert 0 < counts[1] < counts[-1] < features.shape[0] * features.shape[2]
    shares = torch.bincount(labels).float() / len(labels)
    torch.testing.assert_close(path[0].bias[0].softmax(0), shares, atol=1e-3, rtol=0)


def test_rows_that_count_twice_are_rows_that_stand_there_twice():
    features, labels = problem(3)
    twice = torch.cat([features, features[:, :100]], dim=1), torch.cat([labels, labels[:100]])
    weights = torch.ones(len(labels))
    weights[:100] = 2
    scaler = Scaler.of(rows_of(features), len(labels))
    penalty = torch.tensor([0.02, 0.02])
    (one,) = solve_path(
        rows_of(features), labels, 3, penalty=penalty, row_weight=weights, scaler=scaler
    )
    (other,) = solve_path(rows_of(twice[0]), twice[1], 3, penalty=penalty, scaler=scaler)
    for k in range(2):
        values = [
            objective(s.weight[k], s.bias[k], scaler(twice[0])[k], twice[1], 0.02)
            for s in (one, other)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_columns_that_are_not_allowed_have_no_weight_and_change_nothing():
    features, labels = problem(3, k=1)
    allowed = torch.zeros(3, features.shape[2], dtype=torch.bool)
    allowed[0, :10], allowed[1, :40], allowed[2] = True, True, True
    read = rows_of(features)
    path = solve_path(read, labels, 3, allowed=allowed, fractions=(0.3, 0.05))
    for solution in path:
        assert (solution.weight[~allowed[:, None].expand_as(solution.weight)] == 0).all()
    for k, width in enumerate((10, 40)):
        own = rows_of(features[:, :, :width])
        for solution, alone in zip(
            path, solve_path(own, labels, 3, fractions=(0.3, 0.05)), strict=True
        ):
            assert float(solution.penalty[k]) == pytest.approx(float(alone.penalty[0]), rel=1e-4)
            standardised = Scaler.of(own, len(labels))(features[:, :, :width])[0]
            values = [
                objective(w[:, :width], b, standardised, labels, float(alone.penalty[0]))
                for w, b in (
                    (solution.weight[k], solution.bias[k]),
                    (alone.weight[0], alone.bias[0]),
                )
            ]
            assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_features_that_never_move_get_no_weight_and_no_numbers_break():
    features, labels = problem(3)
    features[0] = 7.0  # a layer that says nothing
    features[1, :, 3] = -2.0
    found = choose(rows_of(features), labels, rows_of(features), labels, 3)
    assert (found.solution.weight[0] == 0).all()
    assert (found.solution.weight[1, :, 3] == 0).all()
    assert found.losses.isfinite().all()
    shares = torch.bincount(labels).float() / len(labels)
    torch.testing.assert_close(found.solution.bias[0].softmax(0), shares, atol=1e-3, rtol=0)


def test_the_penalty_that_held_out_rows_prefer_is_kept(monkeypatch):
    features, labels = problem(3)
    held, truth = problem(3, seed=1)
    monkeypatch.setattr(sparse, "PATIENCE", 99)
    found = choose(rows_of(features), labels, rows_of(held), truth, 3)
    scaler = Scaler.of(rows_of(features), len(labels))
    path = solve_path(rows_of(features), labels, 3)
    for k in range(2):
        losses = []
        for solution in path:
            logits = scaler(held)[k] @ solution.weight[k].T + solution.bias[k]
            losses.append(float(torch.nn.functional.cross_entropy(logits, truth)))
        best = int(np.argmin(losses))
        assert float(found.losses[k]) == pytest.approx(losses[best], rel=1e-4)
        assert float(found.solution.penalty[k]) == float(path[best].penalty[k])


def test_problems_beside_each_other_do_not_see_one_another():
    features, labels = problem(3, k=6)
    together = choose(rows_of(features), labels, rows_of(features), labels, 3)
    alone = choose(rows_of(features[4:5]), labels, rows_of(features[4:5]), labels, 3)
    assert float(together.losses[4]) == pytest.approx(float(alone.losses[0]), rel=1e-3)
