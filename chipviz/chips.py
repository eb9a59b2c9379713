"""Linear chips: multinomial logistic regression with L2 on every layer, to convergence.

Fitting happens in turned coordinates (`Turn`); what is kept is a plain weight per layer that reads
final-normed, pooled hidden states and needs no bias. Knows features and labels, not models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as fn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chipviz.config import ChipKind, Pooling
from chipviz.errors import SourceError

STRENGTHS = (0.005, 0.02, 0.08, 0.32, 1.28)
"""Grid of scikit-learn's C: the penalty on the mean loss is |W|^2 / (2 C N). Ours: it spans what
validation chose on topic, intent and sentiment data."""

BIAS_SCALE = 10.0
"""Size of the nearly constant coordinate: its weight is penalised 100 times less than others."""

FORMAT = "1"
_MEMORY = 10
"""Pairs that L-BFGS remembers."""


@dataclass(frozen=True)
class Turn:
    """Coordinates in which a problem without bias is well conditioned.

    Features are scaled by `scale`, then split into one coordinate along their mean, nearly
    constant, which plays the bias; and the rest, whose mean is exactly zero.
    """

    scale: Tensor
    """Per-feature spread of the training features, shape (D,)."""
    direction: Tensor
    """Unit vector along the scaled mean, shape (D,)."""
    length: Tensor
    """Length of the scaled mean, a scalar."""

    @classmethod
    def of(cls, features: Tensor) -> "Turn":
        """Measure training features, shape (N, D)."""
        mean = features.mean(dim=0)
        spread = features.sub(mean).square_().mean(dim=0).sqrt_()
        # A feature that hardly moves must not be blown up into the largest of all.
        floor = 1e-2 * features.square().mean(dim=0).sqrt_()
        scale = torch.maximum(spread, floor).clamp_min(1e-12)
        scaled = mean / scale
        length = scaled.norm().clamp_min(1e-12)
        return cls(scale, scaled / length, length)

    def into(self, features: Tensor) -> Tensor:
        """Features (N, D) -> turned features (N, D + 1); the last column plays the bias."""
        scaled = features / self.scale
        along = scaled @ self.direction
        rest = scaled.addr_(along, self.direction, alpha=-1.0)
        return torch.cat([rest, (along * (BIAS_SCALE / self.length))[:, None]], dim=1)

    def back(self, turned: Tensor) -> Tensor:
        """Turned weights (..., C, D + 1) -> weights (..., C, D) on plain features."""
        rest, bias = turned[..., :-1], turned[..., -1:]
        within = rest - (rest @ self.direction)[..., None] * self.direction
        return (within + bias * (BIAS_SCALE / self.length) * self.direction) / self.scale

    def forth(self, weight: Tensor) -> Tensor:
        """The inverse of `back`: weights (C, D) -> turned weights (C, D + 1)."""
        scaled = weight * self.scale
        along = (scaled @ self.direction)[..., None]
        rest = scaled - along * self.direction
        return torch.cat([rest, along * (self.length / BIAS_SCALE)], dim=-1)


def objective(
    features: Tensor, onehot: Tensor, weight: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Penalised mean log-loss of G problems that share features, and its gradient.

    Args:
        features: Shape (N, D).
        onehot: Shape (N, C).
        weight: Shape (G, C, D).
        penalty: Factor of |W|^2 / 2, shape (G,).

    Returns:
        Values, shape (G,), and gradients, shape (G, C, D).
    """
    n_problems, n_classes, width = weight.shape
    logits = (features @ weight.reshape(-1, width).T).view(-1, n_problems, n_classes)  # (N, G, C)
    normaliser = logits.logsumexp(dim=-1)
    nll = normaliser - (logits * onehot[:, None]).sum(dim=-1)
    value = nll.mean(dim=0) + 0.5 * penalty * weight.square().sum(dim=(1, 2))
    residual = logits.sub_(normaliser[..., None]).exp_().sub_(onehot[:, None]).div_(len(features))
    gradient = (residual.view(len(features), -1).T @ features).view_as(weight)
    return value, gradient.add_(penalty[:, None, None] * weight)


def minimise(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 500,
) -> Tensor:
    """Minimise G independent convex problems side by side: L-BFGS, a step size for each.

    Args:
        value_and_gradient: Maps (G, C, D) to values (G,) and gradients (G, C, D).
        start: Shape (G, C, D).
        tolerance: A problem has converged when two steps in a row gain less than this share of
            its value.
        max_steps: Steps at most.

    Returns:
        Shape (G, C, D).

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4, with Armijo backtracking.
    """
    x = start
    value, gradient = value_and_gradient(x)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    idle = torch.zeros_like(value)
    x_new, value_new, gradient_new = x, value, gradient
    for _ in range(max_steps):
        done = idle >= 2
        if bool(done.all()):
            break
        direction = _lbfgs_direction(gradient, pairs)
        direction[done] = 0
        slope = _dot(gradient, direction)
        step = torch.ones_like(value)
        for _ in range(12):
            x_new = x + step[:, None, None] * direction
            value_new, gradient_new = value_and_gradient(x_new)
            # Float32 sums cannot resolve a smaller gain than the last term.
            enough = value_new <= value + 1e-4 * step * slope + 3e-7 * value.abs()
            if bool((enough | done).all()):
                break
            step = torch.where(enough | done, step, 0.4 * step)
        moved, changed = x_new - x, gradient_new - gradient
        curvature = _dot(changed, moved)
        inverse = torch.where(curvature > 1e-12 * _dot(moved, moved), 1 / curvature, 0.0)
        pairs = [*pairs[-_MEMORY + 1 :], (moved, changed, inverse.nan_to_num(0.0, 0.0, 0.0))]
        small = value - value_new < tolerance * value_new.abs()
        idle = torch.where(small, idle + 1, 0 * idle)
        x, value, gradient = x_new, value_new, gradient_new
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2))


def _lbfgs_direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    if not pairs:  # nothing is known of the curvature yet: go one unit downhill
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        return -gradient / length[:, None, None]
    q = gradient.clone()
    shares = []
    for moved, changed, inverse in reversed(pairs):
        share = inverse * _dot(moved, q)
        q -= share[:, None, None] * changed
        shares.append(share)
    _, changed, inverse = pairs[-1]
    scale = 1 / (inverse * _dot(changed, changed)).clamp_min(1e-20)
    q *= torch.where(inverse > 0, scale, 1.0)[:, None, None]
    for (moved, changed, inverse), share in zip(pairs, reversed(shares), strict=True):
        back = inverse * _dot(changed, q)
        q += (share - back)[:, None, None] * moved
    return -q


def fit_linear(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    start: Tensor | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 500,
) -> Tensor:
    """Fit one chip for each strength on one layer's features.

    Args:
        features: Final-normed and pooled, shape (N, D), float32.
        labels: Class indices, shape (N,).
        n_classes: C.
        strengths: scikit-learn's C, G of them; they share every read of the features.
        start: Weights to begin from, shape (C, D); None begins at zero.
        tolerance: See `minimise`.
        max_steps: See `minimise`.

    Returns:
        Weights on plain features, shape (G, C, D); no bias is needed.
    """
    turn = Turn.of(features)
    turned = turn.into(features)
    onehot = fn.one_hot(labels, n_classes).to(turned.dtype)
    penalty = 1 / (torch.tensor(strengths, dtype=turned.dtype, device=turned.device) * len(labels))
    if start is None:
        begin = turned.new_zeros(len(strengths), n_classes, turned.shape[1])
    else:
        begin = turn.forth(start).expand(len(strengths), -1, -1).clone()
    fitted = minimise(
        lambda weight: objective(turned, onehot, weight, penalty),
        begin,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return turn.back(fitted)


def choose_strength(weights: Tensor, features: Tensor, labels: Tensor) -> int:
    """The strength whose chip has the lowest validation log-loss; ties to the stronger penalty.

    Args:
        weights: Shape (G, C, D), strongest penalty first.
        features: Validation features, shape (N, D).
        labels: Shape (N,).
    """
    logits = torch.einsum("nd,gcd->gnc", features, weights)
    losses = [fn.cross_entropy(one, labels).item() for one in logits]
    return losses.index(min(losses))


@dataclass(frozen=True)
class Chips:
    """The fitted chips of all layers."""

    weights: dict[tuple[ChipKind, Pooling], Tensor]
    """Shape (L + 1, C, D) each, float32; row 0 reads the embedding output."""
    strengths: dict[tuple[ChipKind, Pooling], list[float]]
    """The chosen strength by layer, embedding first."""

    def weight(self, layer: int, pooling: Pooling, chip: ChipKind = "linear") -> Tensor:
        """The chip of one layer, shape (C, D); layer -1 reads the embedding output.

        Raises:
            IndexError: If there is no such layer.
        """
        stacked = self.weights[chip, pooling]
        if not -1 <= layer < len(stacked) - 1:
            raise IndexError(f"layer {layer} is outside of -1 to {len(stacked) - 2}")
        return stacked[layer + 1]

    def probabilities(
        self, features: Tensor, layer: int, pooling: Pooling, chip: ChipKind = "linear"
    ) -> Tensor:
        """Class probabilities of pooled features (N, D): shape (N, C)."""
        return (features @ self.weight(layer, pooling, chip).T).softmax(dim=-1)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: The final name.
            fingerprint: Of the backbone the chips belong to.
        """
        tensors = {}
        for (chip, pooling), weight in self.weights.items():
            tensors[f"{chip}.{pooling}.weight"] = weight.contiguous()
            strengths = torch.tensor(self.strengths[chip, pooling], dtype=torch.float64)
            tensors[f"{chip}.{pooling}.strength"] = strengths
        temporary = path.with_suffix(".tmp")
        # One key: safetensors writes several in any order, and equal chips are to be equal bytes.
        save_file(tensors, temporary, {"chipviz": f"{FORMAT} {fingerprint}"})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Chips":
        """Read what `save` wrote.

        Raises:
            SourceError: If the file belongs to another backbone or another format.
        """
        weights: dict[tuple[ChipKind, Pooling], Tensor] = {}
        strengths: dict[tuple[ChipKind, Pooling], list[float]] = {}
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("chipviz") != f"{FORMAT} {fingerprint}":
                raise SourceError(
                    f"{path.name} was trained on another backbone than the one at hand.",
                    "The backbone's folder changed since the run; train again.",
                )
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                chip, pooling, what = name.split(".")
                if what == "weight":
                    weights[chip, pooling] = file.get_tensor(name)  # type: ignore[index]
                else:
                    strengths[chip, pooling] = file.get_tensor(name).tolist()  # type: ignore[index]
        return cls(weights, strengths)
