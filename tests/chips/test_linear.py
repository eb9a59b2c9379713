"""Linear chips: equal to scikit-learn on the same objective, whatever the blocks and layers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips import linear
from chipviz.chips.linear import (
    STRENGTHS,
    Blocks,
    Flattened,
    Problem,
    Turn,
    fit_linear,
    spans,
)


def rows_of(features):
    """Features (K, N, D) in memory, as the fits read them."""
    return lambda start, stop: features[:, start:stop]


def drawn(n, width, n_classes, seed):
    """Far from centred features with unequal scales, as language models make them."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(n) % n_classes)
    centres = random.normal(size=(n_classes, width))
    scale = np.exp(random.normal(size=width))
    features = (random.normal(size=(n, width)) + 0.6 * centres[labels] + 3.0) * scale
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


@pytest.fixture(params=[(300, 20, 2), (120, 160, 5), (400, 30, 12), (300, 16, 77)], ids=str)
def problem(request):
    n, width, n_classes = request.param
    features, labels = drawn(n, width, n_classes, seed=n)
    return features[None], labels, n_classes


def objective(turned, labels, weight, penalty):
    """The penalised mean log-loss, re-computed plainly in float64."""
    nll = torch.nn.functional.cross_entropy(turned.double() @ weight.double().T, labels)
    return (nll + 0.5 * penalty * weight.double().square().sum()).item()


def peer(turned, labels, strength, n_classes):
    """scikit-learn's weights for the same objective, shape (C, D + 1)."""
    fitted = LogisticRegression(C=strength, fit_intercept=False, tol=1e-6, max_iter=5000)
    fitted.fit(turned.double().numpy(), labels.numpy())
    found = torch.tensor(fitted.coef_)
    # For two classes it keeps one row; its symmetric form has half of it each.
    return torch.cat([-found, found]) / 2 if n_classes == 2 else found


def test_linear_chips_reach_scikit_learns_objective_in_the_same_coordinates(problem):
    features, labels, n_classes = problem
    turn = Turn.of(rows_of(features), len(labels))
    turned = turn.into(features)[0]
    weights = fit_linear(rows_of(features), labels, n_classes)[0]
    for strength, weight in zip(STRENGTHS, weights, strict=True):
        penalty = 1 / (strength * len(labels))
        ours = objective(turned, labels, turn.forth(weight[None])[0], penalty)
        theirs = objective(turned, labels, peer(turned, labels, strength, n_classes), penalty)
        assert ours <= theirs * (1 + 1e-3)


def test_the_gradient_is_the_derivative_of_the_objective(problem, monkeypatch):
    features, labels, n_classes = problem
    monkeypatch.setattr(linear, "CACHE_BYTES", {"cpu": 50 * features[0, 0].nbytes})
    turn = Turn.of(rows_of(features), len(labels))
    turned = turn.into(features)[0]
    row_weight = torch.rand(3, len(labels))
    penalty = torch.tensor([[0.1, 1.0, 0.01]])
    weight = (0.01 * torch.randn(3, n_classes, turned.shape[1])).requires_grad_()
    nll = torch.nn.functional.cross_entropy(
        torch.einsum("nd,gcd->gcn", turned, weight), labels.expand(3, -1), reduction="none"
    )
    truth = (nll * row_weight).sum(1) + 0.5 * penalty[0] * weight.square().sum(dim=(1, 2))
    (expected,) = torch.autograd.grad(truth.sum(), weight)
    blocks = Blocks(rows_of(features), turn, labels)
    assert len(list(blocks)) > 2
    asked = Problem(blocks, n_classes, penalty, row_weight)
    value, gradient = asked(weight.detach().flatten(1)[None], [0, 1, 2])
    np.testing.assert_allclose(value[0], truth.detach().numpy(), rtol=1e-4)
    torch.testing.assert_close(gradient[0].view_as(expected), expected, rtol=1e-3, atol=1e-4)
    one, _ = asked(weight.detach().flatten(1)[None, 1:2], [1])
    np.testing.assert_allclose(one[0, 0], value[0, 1], rtol=1e-6)


def test_turning_there_and_back_changes_no_logit(problem):
    features, labels, n_classes = problem
    turn = Turn.of(rows_of(features), len(labels))
    turned = turn.into(features)
    # The turned features have one direction too many: only the part within them counts.
    back = turn.back(torch.randn(1, n_classes, features.shape[-1] + 1))
    torch.testing.assert_close(
        features @ back.mT, turned @ turn.forth(back).mT, rtol=1e-3, atol=1e-3
    )
    assert turned[0, :, :-1].mean(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(turned[0, :, -1].mean().item(), 10.0, rtol=1e-4, atol=0)


def test_flattened_coordinates_are_the_inverse_root_of_the_curvature(problem):
    """With all directions kept, P P (0.1 X'X / N + penalty I) is the identity on them."""
    features, labels, _ = problem
    blocks = Blocks(rows_of(features), Turn.of(rows_of(features), len(labels)), labels)
    penalty = torch.tensor([[0.3, 0.02]])
    flat = Flattened.of(blocks, penalty)
    turned = blocks.turn.into(features)[0].double()
    width, n_kept = turned.shape[1], flat.directions.shape[-1]
    inner = flat.directions[0].T @ flat.directions[0]
    torch.testing.assert_close(inner, torch.eye(n_kept), atol=1e-4, rtol=0)
    spread = turned.T @ turned / len(labels)
    for g in range(2):
        curvature = 0.1 * spread + penalty[0, g] * torch.eye(width, dtype=torch.float64)
        top = flat.directions[:, :, -1].view(1, 1, width)  # the steepest direction
        once = flat.weights(top, [g])
        twice = flat.weights(once.flatten(2), [g]).view(-1).double()
        torch.testing.assert_close(curvature @ twice, top.view(-1).double(), atol=0.05, rtol=0)
        back = flat.weights(once.flatten(2), [g], inverse=True)
        torch.testing.assert_close(back.view(-1), top.view(-1), atol=1e-4, rtol=0)


def test_layers_fitted_side_by_side_equal_layers_fitted_alone():
    parts = [drawn(200, 24, 3, seed)[0] for seed in range(4)]
    labels = drawn(200, 24, 3, 0)[1]
    together = fit_linear(rows_of(torch.stack(parts)), labels, 3, tolerance=1e-7)
    for k, features in enumerate(parts):
        alone = fit_linear(rows_of(features[None]), labels, 3, tolerance=1e-7)[0]
        difference = (features @ together[k].mT).softmax(-1) - (features @ alone.mT).softmax(-1)
        assert difference.abs().max() < 0.02


def test_blocks_that_are_read_anew_give_the_weights_of_blocks_that_are_kept(problem, monkeypatch):
    features, labels, n_classes = problem
    kept = fit_linear(rows_of(features), labels, n_classes)
    monkeypatch.setattr(linear, "CACHE_BYTES", {"cpu": 70 * features[0, 0].nbytes})
    monkeypatch.setattr(linear, "MEMORY_BYTES", 0)
    reads = []

    def read(start, stop):
        reads.append(stop - start)
        return features[:, start:stop]

    streamed = fit_linear(read, labels, n_classes)
    assert max(reads) <= 70
    assert len(reads) > 20 * len(list(spans(read, len(labels))))
    difference = (features @ kept[0].mT).softmax(-1) - (features @ streamed[0].mT).softmax(-1)
    assert difference.abs().max() < 0.02


def test_counting_a_row_twice_equals_having_it_twice(problem):
    features, labels, n_classes = problem
    counts = torch.randint(0, 3, (len(labels),), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(len(labels)).repeat_interleave(counts)
    turn = Turn.of(rows_of(features), len(labels))
    turned = turn.into(features[:, rows])[0]
    strength, scale = 0.32, len(labels) / counts.sum()
    weight = fit_linear(
        rows_of(features), labels, n_classes, strengths=[strength], row_weight=counts * scale
    )
    penalty = 1 / (strength * len(labels))
    ours = objective(turned, labels[rows], turn.forth(weight[:, 0])[0], penalty)
    same = strength * len(labels) / len(rows)  # its penalty is on the sum of losses
    theirs = peer(turned, labels[rows], same, n_classes)
    if len(theirs) == n_classes:  # every class was drawn
        assert ours <= objective(turned, labels[rows], theirs, penalty) * (1 + 1e-3)


def test_a_warm_start_ends_where_a_cold_one_does(problem):
    features, labels, n_classes = problem
    read, half = rows_of(features), len(labels) // 2
    fine = {"strengths": [0.08], "tolerance": 1e-7}
    cold = fit_linear(read, labels, n_classes, **fine)[:, 0]
    early = fit_linear(read, labels[:half], n_classes, strengths=[0.08])[:, 0]
    warm = fit_linear(read, labels, n_classes, start=early, **fine)[:, 0]
    difference = (features @ cold.mT).softmax(-1) - (features @ warm.mT).softmax(-1)
    assert difference.abs().max() < 0.02


def test_the_same_features_give_the_same_weights(problem):
    features, labels, n_classes = problem
    fits = [fit_linear(rows_of(features), labels, n_classes) for _ in range(2)]
    assert torch.equal(*fits)


def test_strengths_fitted_together_equal_strengths_fitted_alone(problem):
    features, labels, n_classes = problem
    together = fit_linear(rows_of(features), labels, n_classes, tolerance=1e-7)[0]
    for i, strength in enumerate(STRENGTHS):
        alone = fit_linear(
            rows_of(features), labels, n_classes, strengths=[strength], tolerance=1e-7
        )[0, 0]
        difference = (features[0] @ together[i].T).softmax(1) - (features[0] @ alone.T).softmax(1)
        assert difference.abs().max() < 0.02


def test_features_that_never_move_do_not_break_the_fit():
    features = torch.ones(1, 40, 6)
    features[0, :, 0] = torch.arange(40) % 2
    labels = (torch.arange(40) % 2).long()
    weights = fit_linear(rows_of(features), labels, 2)[0]
    assert weights.isfinite().all()
    assert ((features[0] @ weights[-1].T).argmax(1) == labels).all()


def test_constant_features_give_the_class_shares():
    labels = torch.tensor([0] * 30 + [1] * 10)
    weights = fit_linear(rows_of(torch.full((1, 40, 3), 2.0)), labels, 2)[0]
    probabilities = (torch.full((1, 3), 2.0) @ weights[-1].T).softmax(1)
    assert probabilities[0, 0].item() == pytest.approx(0.75, abs=0.02)
