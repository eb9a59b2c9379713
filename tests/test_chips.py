"""Chips: equal to scikit-learn on the same objective, whatever the block, and safe on disk."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips import STRENGTHS, Chips, Turn, choose_strength, fit_linear, objective
from chipviz.errors import SourceError


@pytest.fixture(params=[(300, 20, 2), (120, 160, 5), (400, 30, 12)], ids=str)
def problem(request):
    """Far from centred features with unequal scales, as language models make them."""
    n, width, n_classes = request.param
    random = np.random.default_rng(n)
    labels = random.integers(0, n_classes, n)
    centres = random.normal(size=(n_classes, width))
    scale = np.exp(random.normal(size=width))
    features = (random.normal(size=(n, width)) + 0.6 * centres[labels] + 3.0) * scale
    return (
        torch.tensor(features, dtype=torch.float32),
        torch.tensor(labels),
        n_classes,
    )


def test_linear_chips_reach_scikit_learns_objective_in_the_same_coordinates(problem):
    features, labels, n_classes = problem
    turn = Turn.of(features)
    turned = turn.into(features)
    onehot = torch.nn.functional.one_hot(labels, n_classes).float()
    weights = fit_linear(features, labels, n_classes)
    for strength, weight in zip(STRENGTHS, weights, strict=True):
        peer = LogisticRegression(C=strength, fit_intercept=False, tol=1e-8, max_iter=5000)
        peer.fit(turned.double().numpy(), labels.numpy())
        coefficients = torch.tensor(peer.coef_)
        if n_classes == 2:  # scikit-learn keeps one row; its symmetric form has half of it each
            coefficients = torch.cat([-coefficients, coefficients]) / 2

        penalty = torch.tensor([1 / (strength * len(labels))], dtype=torch.float64)
        ours, _ = objective(
            turned.double(), onehot.double(), turn.forth(weight)[None].double(), penalty
        )
        theirs, _ = objective(turned.double(), onehot.double(), coefficients[None], penalty)
        assert ours.item() <= theirs.item() * (1 + 1e-3)


def test_the_gradient_is_the_derivative_of_the_objective(problem):
    features, labels, n_classes = problem
    onehot = torch.nn.functional.one_hot(labels, n_classes).double()
    weight = (
        0.01 * torch.randn(3, n_classes, features.shape[1], dtype=torch.float64)
    ).requires_grad_()
    penalty = torch.tensor([0.1, 1.0, 0.01], dtype=torch.float64)
    logits = torch.einsum("nd,gcd->gnc", features.double(), weight)
    truth = torch.stack(
        [torch.nn.functional.cross_entropy(one, labels) for one in logits]
    ) + 0.5 * penalty * weight.square().sum(dim=(1, 2))
    (expected,) = torch.autograd.grad(truth.sum(), weight)
    value, gradient = objective(features.double(), onehot, weight.detach(), penalty)
    torch.testing.assert_close(value, truth.detach())
    torch.testing.assert_close(gradient, expected)


def test_turning_there_and_back_changes_no_logit(problem):
    features, _, n_classes = problem
    turn = Turn.of(features)
    turned_weight = torch.randn(n_classes, features.shape[1] + 1)
    # The turned features have one direction too many: only the part within them counts.
    back = turn.back(turned_weight)
    torch.testing.assert_close(
        features @ back.T, turn.into(features) @ turn.forth(back).T, rtol=1e-3, atol=1e-3
    )
    within = turn.into(features)[:, :-1]
    assert within.mean(dim=0).abs().max() < 1e-4
    along = turn.into(features)[:, -1]
    torch.testing.assert_close(along.mean().item(), 10.0, rtol=1e-4, atol=0)


def test_a_warm_start_ends_where_a_cold_one_does(problem):
    features, labels, n_classes = problem
    cold = fit_linear(features, labels, n_classes, strengths=[0.08], tolerance=1e-7)[0]
    half = len(labels) // 2
    early = fit_linear(features[:half], labels[:half], n_classes, strengths=[0.08])[0]
    warm = fit_linear(features, labels, n_classes, strengths=[0.08], start=early, tolerance=1e-7)[0]
    difference = (features @ cold.T).softmax(1) - (features @ warm.T).softmax(1)
    assert difference.abs().max() < 0.02


def test_the_same_features_give_the_same_weights(problem):
    features, labels, n_classes = problem
    assert torch.equal(
        fit_linear(features, labels, n_classes), fit_linear(features, labels, n_classes)
    )


def test_strengths_fitted_together_equal_strengths_fitted_alone(problem):
    features, labels, n_classes = problem
    together = fit_linear(features, labels, n_classes, tolerance=1e-7)
    for i, strength in enumerate(STRENGTHS):
        alone = fit_linear(features, labels, n_classes, strengths=[strength], tolerance=1e-7)[0]
        difference = (features @ together[i].T).softmax(1) - (features @ alone.T).softmax(1)
        assert difference.abs().max() < 0.02


def test_features_that_never_move_do_not_break_the_fit():
    features = torch.ones(40, 6)
    features[:, 0] = torch.arange(40) % 2
    labels = (torch.arange(40) % 2).long()
    weights = fit_linear(features, labels, 2)
    assert weights.isfinite().all()
    assert ((features @ weights[-1].T).argmax(1) == labels).all()


def test_constant_features_give_the_class_shares():
    labels = torch.tensor([0] * 30 + [1] * 10)
    weights = fit_linear(torch.full((40, 3), 2.0), labels, 2)
    probabilities = (torch.full((1, 3), 2.0) @ weights[-1].T).softmax(1)
    assert probabilities[0, 0].item() == pytest.approx(0.75, abs=0.02)


def test_the_strength_is_chosen_by_validation_loss_alone():
    weights = torch.stack(
        [torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0], [1.0]])]
    )
    features, labels = torch.tensor([[2.0], [3.0]]), torch.tensor([0, 0])
    assert choose_strength(weights, features, labels) == 1


def test_chips_come_back_from_disk_as_they_were_and_only_for_their_backbone(tmp_path):
    chips = Chips(
        {("linear", "last"): torch.randn(4, 3, 5)}, {("linear", "last"): [1.0, 2.0, 0.1, 4.0]}
    )
    path = tmp_path / "chips.safetensors"
    chips.save(path, "abc")
    again = Chips.load(path, "abc")
    assert torch.equal(again.weight(-1, "last"), chips.weights["linear", "last"][0])
    assert again.strengths == chips.strengths
    with pytest.raises(SourceError, match="another backbone"):
        Chips.load(path, "abd")
    with pytest.raises(IndexError, match="-1 to 2"):
        chips.weight(3, "last")
