"""Many independent convex problems minimised side by side, each with its own step size.

Knows functions and gradients only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMORY = 10
"""Pairs of steps and gradient changes that are remembered."""
_MAX_BACKTRACKS = 12

Numbers = NDArray[np.float64]
"""One number, or small matrix, a problem: kept beside the processor whatever the device."""


def minimise(
    value_and_gradient: Callable[[Tensor, list[int]], tuple[Numbers, Tensor]],
    start: Tensor,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 500,
) -> Tensor:
    """Minimise K x G problems by L-BFGS with Armijo backtracking.

    Args:
        value_and_gradient: Maps points (K, G', n) and the numbers of the G' columns they belong to
            to values (K, G') and gradients (K, G', n). A column whose K problems have all converged
            is not asked again.
        start: Shape (K, G, n).
        tolerance: A problem has converged when two steps in a row gain less than this share of its
            value.
        max_steps: Steps at most.

    Returns:
        Shape (K, G, n).

    Source: Nocedal and Wright, Numerical Optimization, section 7.2. Directions in the compact form
    of Byrd, Nocedal and Schnabel 1994, theorem 2.2: two products with the whole memory instead of
    forty with its vectors.
    """
    found = start.clone()
    columns = list(range(start.shape[1]))
    x = start
    value, gradient = value_and_gradient(x, columns)
    memory = _Memory.empty(x)
    idle = np.zeros(value.shape, dtype=np.int64)
    x_new, value_new, gradient_new = x, value, gradient
    for _ in range(max_steps):
        done = idle >= 2
        if done.all():
            break
        if done.all(axis=0).any():
            found[:, columns] = x
            kept = np.flatnonzero(~done.all(axis=0)).tolist()
            columns = [columns[i] for i in kept]
            x, gradient = x[:, kept], gradient[:, kept]
            value, idle, done = value[:, kept], idle[:, kept], done[:, kept]
            memory = memory.keep(kept)
        direction = memory.direction(gradient)
        slope = (gradient * direction).sum(dim=-1).cpu().numpy().astype(np.float64)
        step = np.where(done, 0.0, 1.0)
        for _ in range(_MAX_BACKTRACKS):
            x_new = torch.addcmul(x, _like(step[..., None], x), direction)
            value_new, gradient_new = value_and_gradient(x_new, columns)
            # The logits are float32: a smaller gain than the last term cannot be resolved.
            enough = value_new <= value + 1e-4 * step * slope + 3e-7 * np.abs(value)
            if (enough | done).all():
                break
            step = np.where(enough | done, step, 0.4 * step)
        memory.add(x_new, x, gradient_new, gradient)
        idle = np.where(value - value_new < tolerance * np.abs(value_new), idle + 1, 0)
        idle[done] = 2
        x, value, gradient = x_new, value_new, gradient_new
    found[:, columns] = x
    return found


@dataclass
class _Memory:
    """The last steps and gradient changes of all problems, and their inner products."""

    pairs: Tensor
    """Steps, then gradient changes: shape (K, G, 2 M, n)."""
    step_change: Numbers
    """step_i . change_j, shape (K, G, M, M). Zero where a pair has no curvature."""
    change_change: Numbers
    """change_i . change_j, shape (K, G, M, M)."""
    along: Numbers
    """Every pair . the newest gradient, shape (K, G, 2 M)."""
    scale: Numbers
    """Length of a step without memory, shape (K, G, 1)."""
    n_added: int = 0

    @classmethod
    def empty(cls, x: Tensor) -> "_Memory":
        k, g, n = x.shape
        inner = np.zeros((k, g, MEMORY, MEMORY))
        along = np.zeros((k, g, 2 * MEMORY))
        pairs = x.new_zeros(k, g, 2 * MEMORY, n)
        return cls(pairs, inner, inner.copy(), along, np.ones((k, g, 1)))

    def keep(self, columns: list[int]) -> "_Memory":
        """The memory of some columns of problems."""
        return _Memory(
            self.pairs[:, columns],
            self.step_change[:, columns],
            self.change_change[:, columns],
            self.along[:, columns],
            self.scale[:, columns],
            self.n_added,
        )

    def add(self, x: Tensor, x_before: Tensor, gradient: Tensor, gradient_before: Tensor) -> None:
        """Remember a step and what it did to the gradient. The oldest pair goes."""
        slot = self.n_added % MEMORY
        self.n_added += 1
        step, change = self.pairs[:, :, slot], self.pairs[:, :, MEMORY + slot]
        torch.sub(x, x_before, out=step)
        torch.sub(gradient, gradient_before, out=change)
        new = torch.stack([step, change, gradient], dim=2)
        products = (new @ self.pairs.mT).cpu().numpy().astype(np.float64)
        with_step, with_change, self.along = np.moveaxis(products, 2, 0)
        curvature = with_step[..., MEMORY + slot]
        flat = curvature <= 1e-12 * with_step[..., slot]
        if flat.any():  # a pair that says nothing: all its products vanish
            where = torch.from_numpy(flat)
            step[where], change[where] = 0.0, 0.0
            with_step, with_change = with_step.copy(), with_change.copy()
            with_step[flat], with_change[flat] = 0.0, 0.0
            self.along[flat, slot] = self.along[flat, MEMORY + slot] = 0.0
        self.step_change[:, :, slot] = with_step[..., MEMORY:]
        self.step_change[:, :, :, slot] = with_change[..., :MEMORY]
        changes = with_change[..., MEMORY:]
        self.change_change[:, :, slot] = self.change_change[:, :, :, slot] = changes
        ratio = curvature / np.maximum(changes[..., slot], 1e-300)
        self.scale = np.where(flat, self.scale[..., 0], ratio)[..., None]

    def direction(self, gradient: Tensor) -> Tensor:
        """Where to go from here: minus the inverse Hessian's estimate times the gradient."""
        if self.n_added == 0:  # nothing is known of the curvature yet: go one unit downhill
            return -gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        n_kept = min(self.n_added, MEMORY)
        oldest = self.n_added % MEMORY if self.n_added > MEMORY else 0
        order = (oldest + np.arange(n_kept)) % n_kept
        square = np.ix_(order, order)
        inner = self.step_change[..., square[0], square[1]]
        curvature = np.diagonal(inner, axis1=-2, axis2=-1)
        upper = np.triu(inner) + np.eye(n_kept) * (curvature == 0)[..., None]
        u = np.linalg.solve(upper, self.along[..., order, None])
        changes = self.change_change[..., square[0], square[1]] @ u
        w = curvature[..., None] * u
        w += self.scale[..., None] * (changes - self.along[..., MEMORY + order, None])
        v = np.linalg.solve(np.swapaxes(upper, -1, -2), w)
        shares = np.zeros_like(self.along)
        shares[..., order] = -v[..., 0]
        shares[..., MEMORY + order] = self.scale * u[..., 0]
        combined = (_like(shares[..., None, :], gradient) @ self.pairs)[..., 0, :]
        return combined.addcmul_(_like(-self.scale, gradient), gradient)


def _like(numbers: Numbers, tensor: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(tensor)
