"""The minimiser: scipy's answer for every problem, whoever is fitted beside it."""

import numpy as np
import torch
from scipy.optimize import minimize

from chipviz.chips.lbfgs import minimise


def quadratics(k, g, n, seed=0):
    """K x G convex quadratics of very different condition, and their minima."""
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(k, g, n, n, generator=random) / n**0.5
    spread = torch.logspace(0, 1.5, g).view(1, g, 1, 1)
    hessian = root @ root.mT * spread + 0.05 * torch.eye(n)
    centre = torch.randn(k, g, n, generator=random)

    def value_and_gradient(x, columns):
        off = (x - centre[:, columns])[..., None]
        pull = hessian[:, columns] @ off
        value = 1 + 0.5 * (off * pull).sum(dim=(-2, -1))
        return value.numpy().astype(np.float64), pull[..., 0]

    return value_and_gradient, centre


def test_quadratics_of_all_conditions_end_at_their_minimum():
    function, centre = quadratics(3, 4, 20)
    found = minimise(function, torch.zeros_like(centre), tolerance=1e-7)
    value, gradient = function(found, [0, 1, 2, 3])
    assert value.max() < 1 + 1e-4
    assert gradient.abs().max() < 0.02


def test_a_problem_that_is_not_quadratic_ends_where_scipy_ends():
    def rosenbrock(x, _):
        a, b = x[..., 0], x[..., 1]
        value = 1 + (1 - a) ** 2 + 5 * (b - a**2) ** 2
        gradient = torch.stack([2 * (a - 1) - 20 * a * (b - a**2), 10 * (b - a**2)], dim=-1)
        return value.numpy().astype(np.float64), gradient

    truth = minimize(lambda p: 1 + (1 - p[0]) ** 2 + 5 * (p[1] - p[0] ** 2) ** 2, [-1.0, 1.0]).x
    found = minimise(rosenbrock, torch.tensor([[[-1.0, 1.0]]]), tolerance=1e-9)
    np.testing.assert_allclose(found[0, 0].numpy(), truth, atol=0.02)


def test_a_problem_is_solved_alike_alone_and_beside_others():
    function, centre = quadratics(2, 3, 12)
    together = minimise(function, torch.zeros_like(centre), tolerance=1e-8)
    for g in range(3):
        alone = minimise(lambda x, _, g=g: function(x, [g]), torch.zeros(2, 1, 12), tolerance=1e-8)
        torch.testing.assert_close(together[:, g], alone[:, 0], atol=0.02, rtol=0)


def test_converged_columns_are_not_asked_again():
    function, centre = quadratics(1, 4, 30)
    asked = []

    def watched(x, columns):
        asked.append(tuple(columns))
        return function(x, columns)

    minimise(watched, torch.zeros_like(centre))
    sizes = [len(columns) for columns in asked]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 4


def test_a_start_at_the_minimum_stays_there():
    function, centre = quadratics(2, 2, 5)
    found = minimise(function, centre)
    torch.testing.assert_close(found, centre, atol=1e-4, rtol=0)
