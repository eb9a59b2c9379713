"""Sparse chips: multinomial logistic regression with L1, many problems together.

Source of the method: Andrew and Gao 2007 (OWL-QN) for the minimum; working sets as in celer and
skglm. Knows features and labels, not models.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from chipviz.chips.linear import Read, mean_and_spread, spans

FRACTIONS = (0.4, 0.16, 0.06, 0.025)
"""Penalties tried, strong to weak, as shares of the smallest one at which all weights are zero."""
TOLERANCE = 0.02
"""Largest violation of the optimality conditions, as a share of the penalty."""
MAX_STEPS = 250
GROUP = 4
"""Problems that are solved side by side."""
NEAR = 0.9
"""Gradient, as a share of the penalty, from which on a column is looked at."""
NOTHING = 1e-5
"""A gradient below which a column says nothing: features that never move must not be blown up."""
MEMORY = 10
"""Pairs of steps and changes of the gradient that a search direction rests on."""


@dataclass(frozen=True)
class Scaler:
    """Mean and spread of K layers' features on the rows that chips are fitted on."""

    mean: Tensor
    """Shape (K, 1, D)."""
    scale: Tensor
    """Shape (K, 1, D). 1 where a feature never moves."""

    @classmethod
    def of(cls, read: Read, n_rows: int) -> "Scaler":
        """Measure them, in two passes over blocks of rows."""
        mean, spread = mean_and_spread(read, n_rows)
        still = spread <= 1e-6 * mean.abs().clamp_min(1e-6)
        return cls(mean, torch.where(still, 1.0, spread))

    def __call__(self, features: Tensor) -> Tensor:
        """Standardised features, shape (K, n, D)."""
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Solution:
    """Chips of K problems at one penalty each, on standardised features."""

    weight: Tensor
    """Shape (K, C, D)."""
    bias: Tensor
    """Not penalised. Shape (K, C)."""
    penalty: Tensor
    """Of |W|_1 beside the mean log-loss, shape (K,)."""
    violation: Tensor
    """Largest violation of the optimality conditions, as a share of the penalty, shape (K,)."""


def solve_path(
    read: Read,
    labels: Tensor,
    n_classes: int,
    *,
    fractions: Sequence[float] = FRACTIONS,
    penalty: Tensor | None = None,
    row_weight: Tensor | None = None,
    start: Solution | None = None,
    scaler: Scaler | None = None,
    allowed: Tensor | None = None,
    enough: Callable[[Solution], Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> list[Solution]:
    """Fit chips of K layers at each penalty, from strong to weak, each from the one before.

    At each penalty only those columns are looked at that carry weight or whose gradient is near the
    penalty. Then all are checked, and what was missed is let in.

    Args:
        read: Features of K layers.
        labels: Class indices, shape (N,).
        n_classes: C.
        fractions: Penalties, as shares of each layer's smallest one without weights.
        penalty: One penalty a layer in their place, shape (K,).
        row_weight: Weight per row, 1 on average, shape (N,). None weighs all the same.
        start: Where to begin. None begins without weights.
        scaler: Measured before. None measures the rows.
        allowed: Which columns each problem may use, shape (K, D), where all K problems read the
            same rows (1, n, D).
        enough: Asked after each solution which problems need no weaker penalty, shape (K,).
        tolerance: Largest violation of the optimality conditions, as a share of the penalty.

    Returns:
        One solution a penalty.
    """
    n_rows = len(labels)
    scaler = scaler or Scaler.of(read, n_rows)
    labels = labels.to(scaler.mean.device)
    rows = _Rows(read, labels, n_classes, row_weight, scaler, allowed)
    k, width = len(scaler.mean if allowed is None else allowed), scaler.mean.shape[2]
    bias = rows.prior().expand(k, -1).clone()
    weight = bias.new_zeros(k, n_classes, width)
    if penalty is not None:
        penalties = [penalty.to(weight)]
    else:
        strongest = rows.gradient(weight, bias).abs().amax(dim=(1, 2)).clamp_min(NOTHING)
        penalties = [strongest * fraction for fraction in fractions]
    if start is not None:
        weight, bias = start.weight.to(weight), start.bias.to(bias)
    solutions, before = [], penalties[0]
    done = torch.zeros(k, dtype=torch.bool, device=weight.device)
    for now in penalties:
        now = now.where(~done, before)
        weight, bias, violation = _solve_screened(rows, weight, bias, now, tolerance)
        solution = Solution(weight.cpu(), bias.cpu(), now.cpu(), violation.cpu())
        solutions.append(solution)
        if enough is not None:
            done |= enough(solution).to(done.device)
        if done.all():
            break
        before = now
    return solutions


@dataclass(frozen=True)
class _Rows:
    """Standardised features of K layers, read in blocks of rows."""

    read: Read
    labels: Tensor
    n_classes: int
    row_weight: Tensor | None
    scaler: Scaler
    allowed: Tensor | None = None

    @property
    def share(self) -> Tensor:
        """Weight of each row, of sum 1, shape (N,)."""
        n_rows = len(self.labels)
        if self.row_weight is None:
            return self.scaler.mean.new_full((n_rows,), 1 / n_rows)
        return (self.row_weight / self.row_weight.sum()).to(self.scaler.mean)

    def prior(self) -> Tensor:
        """The biases of chips without weights: logarithms of the classes' shares, shape (C,)."""
        counts = torch.zeros(self.n_classes, device=self.labels.device)
        counts.index_add_(0, self.labels, self.share)
        return counts.clamp_min(1e-6).log()

    def gradient(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Of the mean log-loss, for all columns: shape (K, C, D)."""
        total, share = torch.zeros_like(weight), self.share
        for start, stop in spans(self.read, len(self.labels)):
            block = self.scaler(self.read(start, stop))
            labels, weights = self.labels[start:stop], share[start:stop]
            if self.allowed is None:
                logits = torch.baddbmm(bias[..., None], weight, block.mT)
                total.baddbmm_(_residual(logits, labels, weights), block)
            else:  # one product for all problems: they read the same
                logits = (weight.flatten(0, 1) @ block[0].T).view(*bias.shape, -1) + bias[..., None]
                total += (_residual(logits, labels, weights).flatten(0, 1) @ block[0]).view_as(
                    total
                )
        return total if self.allowed is None else total.mul_(self.allowed[:, None])

    def columns(self, which: Tensor, problems: Tensor) -> Tensor:
        """Some standardised columns, (K', d), of some problems, (K',): shape (K', N, d)."""
        k, d = which.shape
        found = self.scaler.mean.new_empty(k, len(self.labels), d)
        for start, stop in spans(self.read, len(self.labels)):
            block = self.scaler(self.read(start, stop))
            block = block[problems] if self.allowed is None else block.expand(k, -1, -1)
            index = which[:, None].expand(-1, stop - start, -1)
            torch.gather(block, 2, index, out=found[:, start:stop])
        # What a problem may not use says nothing to it.
        return (
            found
            if self.allowed is None
            else found * self.allowed[problems].gather(1, which)[:, None]
        )


def _residual(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Gradient of the weighted log-loss in the logits (K, C, n)."""
    said = logits.softmax(dim=1)
    where = labels.expand(len(logits), 1, -1)
    said.scatter_add_(1, where, said.new_full((1, 1, 1), -1.0).expand_as(where))
    return said.mul_(share)


def _solve_screened(
    rows: _Rows, weight: Tensor, bias: Tensor, now: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One penalty of a path. Returns weights, biases and the violation over all columns."""
    weight, bias = weight.clone(), bias.clone()
    gradient = rows.gradient(weight, bias)
    steepest = gradient.abs().amax(dim=1)  # (K, D)
    inside = (steepest >= NEAR * now[:, None]) | (weight != 0).any(dim=1)
    violation = torch.zeros_like(now)
    for _ in range(10):
        looked = inside.clone()
        # Problems of like sizes together: each computes with as many columns as the largest.
        for some in inside.sum(dim=1).argsort().split(GROUP):
            d = max(1, int(inside[some].sum(dim=1).max()))
            # The columns inside first; where a problem has fewer, others keep them company.
            rank = inside[some].float() + steepest[some] / (1 + steepest.max())
            which = rank.topk(d, dim=1).indices
            at = which[:, None].expand(-1, weight.shape[1], -1)
            problem = Problem(rows.columns(which, some), rows.labels, rows.share, now[some])
            own, bias[some] = minimise_l1(
                problem, weight[some].gather(2, at), bias[some], tolerance=tolerance
            )
            weight[some] = torch.zeros_like(weight[some]).scatter_(2, at, own)
            looked[some] = looked[some].scatter(1, which, value=True)
        gradient = rows.gradient(weight, bias)
        violation = _violation(weight, gradient, now)
        steepest = gradient.abs().amax(dim=1)
        missed = (steepest > (1 + tolerance) * now[:, None]) & ~looked
        if not missed.any():
            break
        inside = missed | looked
    return weight, bias, violation


def _violation(weight: Tensor, gradient: Tensor, penalty: Tensor) -> Tensor:
    """Largest violation of the conditions of a minimum, as a share of the penalty: shape (K,)."""
    lam = penalty[:, None, None]
    at_zero = (gradient.abs() - lam).clamp_min(0)
    elsewhere = (gradient + lam * weight.sign()).abs()
    return torch.where(weight == 0, at_zero, elsewhere).amax(dim=(1, 2)) / penalty


@dataclass(frozen=True)
class Problem:
    """K problems on standardised columns that are in memory."""

    columns: Tensor
    """Shape (K, N, d)."""
    labels: Tensor
    share: Tensor
    """Weight of each row, of sum 1, shape (N,)."""
    penalty: Tensor
    """Shape (K,)."""

    def at(self, which: Tensor) -> "Problem":
        """Some of them."""
        return Problem(self.columns[which], self.labels, self.share, self.penalty[which])

    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean log-loss (K,) and its gradients in the weights and in the biases."""
        logits = torch.baddbmm(bias[..., None], weight, self.columns.mT)
        where = self.labels.expand(len(weight), 1, -1)
        gain = logits.log_softmax(dim=1).gather(1, where)[:, 0]
        residual = _residual(logits, self.labels, self.share)
        value = -(gain * self.share).sum(dim=1)
        return value, torch.bmm(residual, self.columns), residual.sum(dim=2)


def minimise_l1(
    problem: Problem,
    weight: Tensor,
    bias: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> tuple[Tensor, Tensor]:
    """Orthant-wise limited-memory quasi-Newton, all problems side by side.

    Problems that are done leave: the others do not compute for them.

    Args:
        problem: What to minimise, together with its penalty.
        weight: Where to begin, shape (K, C, d).
        bias: Shape (K, C).
        tolerance: Stop at this violation of the optimality conditions, as a share of the penalty.
        max_steps: Stop after so many steps in any case.
    """
    k, n_classes, d = weight.shape
    done = torch.cat([weight, bias[..., None]], dim=2).flatten(1)  # (K, P)
    search = _Search(problem, n_classes, done)
    left = torch.arange(k, device=weight.device)
    for _ in range(max_steps):
        going = search.violation() > tolerance
        if int(going.sum()) < 0.8 * len(left):
            done[left] = search.x
            left, search = left[going], search.at(going)
        if not len(left) or not search.step():
            break
    done[left] = search.x
    both = done.view(k, n_classes, d + 1)
    return both[..., :d].contiguous(), both[..., d].contiguous()


class _Search:
    """Where the search of some problems is, and what it knows of the way there."""

    def __init__(self, problem: Problem, n_classes: int, x: Tensor) -> None:
        self._problem, self._n_classes = problem, n_classes
        self.x = x.clone()
        self._lam = problem.penalty[:, None]
        penalised = torch.ones(n_classes, x.shape[1] // n_classes, dtype=torch.bool)
        penalised[:, -1] = False  # the biases
        self._penalised = penalised.flatten().to(x.device)
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        value, self._gradient = self._smooth(self.x)
        self._total = value + self._penalty(self.x)
        self._pseudo = self._steepest()

    def at(self, which: Tensor) -> "_Search":
        """The search of some of them."""
        some = copy(self)
        some._problem = self._problem.at(which)
        for name in ("x", "_lam", "_gradient", "_total", "_pseudo"):
            setattr(some, name, getattr(self, name)[which])
        some._pairs = [(s[which], y[which], rho[which]) for s, y, rho in self._pairs]
        return some

    def violation(self) -> Tensor:
        """Largest violation of the conditions of a minimum, as a share of the penalty."""
        return self._pseudo.abs().amax(dim=1) / self._lam[:, 0]

    def step(self) -> bool:
        """One step of all. False if no number is small enough for any of them any more."""
        direction = self._direction()
        direction = torch.where(direction * self._pseudo < 0, direction, 0.0)
        side = torch.where(self.x != 0, self.x.sign(), -self._pseudo.sign())
        size = torch.ones_like(self._total)
        if not self._pairs:
            size = (1 / self._pseudo.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)
        x, gradient, total = self.x, self._gradient, self._total
        left = torch.ones_like(size, dtype=torch.bool)
        for _ in range(20):
            trial = self.x + size[:, None] * direction
            # Nothing crosses zero: beyond it the penalty has another slope.
            trial = torch.where(self._penalised & (trial.sign() != side), 0.0, trial)
            value, slope = self._smooth(trial)
            value = value + self._penalty(trial)
            gain = 1e-4 * (self._pseudo * (trial - self.x)).sum(dim=1)
            good = left & (value <= self._total + gain)
            x = torch.where(good[:, None], trial, x)
            gradient = torch.where(good[:, None], slope, gradient)
            total = torch.where(good, value, total)
            left &= ~good
            if not left.any():
                break
            size = torch.where(left, size / 2, size)
        moved = bool((x != self.x).any())
        self._remember(x - self.x, gradient - self._gradient)
        self.x, self._gradient, self._total = x, gradient, total
        self._pseudo = self._steepest()
        return moved

    def _smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = x.view(len(x), self._n_classes, -1)
        value, in_weight, in_bias = self._problem(both[..., :-1], both[..., -1])
        return value, torch.cat([in_weight, in_bias[..., None]], dim=2).flatten(1)

    def _penalty(self, x: Tensor) -> Tensor:
        return self._lam[:, 0] * (x.abs() * self._penalised).sum(dim=1)

    def _steepest(self) -> Tensor:
        """The steepest way up, where |x| has a kink at zero."""
        at_zero = self._gradient.sign() * (self._gradient.abs() - self._lam).clamp_min(0)
        elsewhere = self._gradient + self._lam * self.x.sign()
        inside = torch.where(self.x == 0, at_zero, elsewhere)
        return torch.where(self._penalised, inside, self._gradient)

    def _remember(self, step: Tensor, change: Tensor) -> None:
        """A problem whose step shows no curvature leaves it out."""
        product = (step * change).sum(dim=1)
        enough = product > 1e-10 * change.square().sum(dim=1)
        rho = torch.where(enough, 1 / product.where(enough, torch.ones_like(product)), 0.0)
        self._pairs = [*self._pairs[-MEMORY + 1 :], (step, change, rho)]

    def _direction(self) -> Tensor:
        """Minus the gradient, in coordinates in which the past was round (two-loop recursion)."""
        q, alphas = self._pseudo.clone(), []
        for step, change, rho in reversed(self._pairs):
            alpha = rho * (step * q).sum(dim=1)
            alphas.append(alpha)
            q -= alpha[:, None] * change
        if self._pairs:
            step, change, rho = self._pairs[-1]
            latest = (step * change).sum(dim=1) / change.square().sum(dim=1).clamp_min(1e-30)
            q *= torch.where(rho > 0, latest, 1.0)[:, None]
        for (step, change, rho), alpha in zip(self._pairs, reversed(alphas), strict=True):
            beta = rho * (change * q).sum(dim=1)
            q += (alpha - beta)[:, None] * step
        return -q


# --- the choice of a penalty ----------------------------------------------------------------------

PATIENCE = 1
"""Penalties in a row that may do worse on the held-out texts before a path ends."""


@dataclass(frozen=True)
class Chosen:
    """Of K problems the solution that held-out texts prefer."""

    solution: Solution
    scaler: Scaler
    losses: Tensor
    """Mean log-loss on the held-out texts, shape (K,)."""
    accuracies: Tensor
    """Shape (K,)."""


def choose(
    read: Read,
    labels: Tensor,
    held: Read,
    held_labels: Tensor,
    n_classes: int,
    *,
    row_weight: Tensor | None = None,
    allowed: Tensor | None = None,
    column_weight: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Chosen:
    """Fit each penalty on the rows and keep the one with the lowest log-loss on the held-out ones.

    Ties go to the stronger. A path ends where every problem has done worse `PATIENCE` times.

    Args:
        read: Rows that chips are fitted on.
        labels: Class indices, shape (N,).
        held: Rows that choose.
        held_labels: Shape (N held,).
        n_classes: C.
        row_weight: See `solve_path`.
        allowed: See there.
        column_weight: What standardised columns are multiplied with, shape (D,): the larger, the
            less the penalty weighs on a column. None is 1.
        tolerance: See there.
    """
    scaler = Scaler.of(read, len(labels))
    if column_weight is not None:
        scaler = Scaler(scaler.mean, scaler.scale / column_weight.to(scaler.scale))
    best: list[tuple[Solution, Tensor, Tensor]] = []
    worse: list[Tensor] = [torch.zeros(1)]

    def enough(now: Solution) -> Tensor:
        loss, right = _judged(now, scaler, held, held_labels, shared=allowed is not None)
        if not best:
            best.append((now, loss, right))
            worse[0] = torch.zeros_like(loss)
            return worse[0] > 0
        before, low, accuracy = best[0]
        better = loss < low
        best[0] = (
            _where(better, now, before),
            loss.where(better, low),
            right.where(better, accuracy),
        )
        worse[0] = torch.where(better, 0, worse[0] + 1)
        return worse[0] >= PATIENCE

    solve_path(
        read,
        labels,
        n_classes,
        row_weight=row_weight,
        scaler=scaler,
        allowed=allowed,
        enough=enough,
        tolerance=tolerance,
    )
    solution, losses, accuracies = best[0]
    return Chosen(solution, scaler, losses, accuracies)


def _where(which: Tensor, one: Solution, other: Solution) -> Solution:
    """One solution for some problems, shape (K,), and another for the rest."""
    values = {
        f.name: torch.where(
            which.view(-1, *[1] * (getattr(one, f.name).dim() - 1)),
            getattr(one, f.name),
            getattr(other, f.name),
        )
        for f in fields(one)
    }
    return Solution(**values)


def _judged(
    solution: Solution, scaler: Scaler, held: Read, labels: Tensor, *, shared: bool
) -> tuple[Tensor, Tensor]:
    """Mean log-loss and accuracy on held-out rows, both of shape (K,)."""
    weight = solution.weight.to(scaler.mean)
    bias, labels = solution.bias.to(weight), labels.to(weight.device)
    loss, right = bias.new_zeros(len(bias)), bias.new_zeros(len(bias))
    for start, stop in spans(held, len(labels)):
        block = scaler(held(start, stop))
        if shared:
            logits = (weight.flatten(0, 1) @ block[0].T).view(*bias.shape, -1) + bias[..., None]
        else:
            logits = torch.baddbmm(bias[..., None], weight, block.mT)
        here = labels[start:stop]
        loss -= logits.log_softmax(dim=1).gather(1, here.expand(len(bias), 1, -1)).sum(dim=(1, 2))
        right += (logits.argmax(dim=1) == here).sum(dim=1)
    return (loss / len(labels)).cpu(), (right / len(labels)).cpu()
