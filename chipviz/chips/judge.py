"""What held-out texts say of linear chips: those of the validation split, or every fold of all."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as fn
from torch import Tensor

from chipviz.chips.linear import STRENGTHS, TOLERANCE, Read, fit_linear, spans

STEP = 4.0
"""Ratio of one strength to the next."""
MOST_STEPS = 5
"""Maximum strengths beyond an end of the grid, a factor of 1,000 altogether."""
FOLD_TOLERANCE = 1e-4
"""Of chips that answer for their fold and are thrown away."""


@dataclass(frozen=True)
class Verdict:
    """Chips of K layers, one strength each, and what the texts that they have not seen make of it.

    A chip has F versions: one, or one a fold.
    """

    weights: Tensor
    """Shape (K, F, C, D)."""
    strengths: Tensor
    """scikit-learn's C, shape (K,)."""
    losses: Tensor
    """Mean log-loss on the held-out texts, shape (K,)."""
    said: Tensor
    """Probabilities of the held-out texts, shape (K, N, C)."""

    def where(self, which: Tensor, other: "Verdict") -> "Verdict":
        """This verdict for some layers, shape (K,), and another one for the rest."""
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Verdict(
            **{
                name: torch.where(which.view(-1, *[1] * (one.dim() - 1)), one, two)
                for name, (one, two) in both.items()
            }
        )


@dataclass(frozen=True)
class Judge:
    """Fits chips on some rows and asks them about others.

    With folds, chips of every fold are more problems of the same fit. Their turned coordinates are
    those of all rows, which needs no label.
    """

    read: Read
    """Rows that chips are fitted on."""
    labels: Tensor
    n_classes: int
    row_weight: Tensor | None
    """Weight per row, 1 on average, shape (F, N). None weighs all the same, in one fold."""
    share: Tensor
    """Share of the rows that a fold is fitted on, shape (F,)."""
    held: Read
    """Rows that chips are asked about."""
    held_labels: Tensor
    fold: Tensor
    """The chip that is asked, by row, shape (N held,)."""

    @classmethod
    def of_split(
        cls,
        read: Read,
        labels: Tensor,
        held: Read,
        held_labels: Tensor,
        n_classes: int,
        *,
        balanced: bool,
    ) -> "Judge":
        """Chips of the training rows, asked about the validation rows."""
        weights = None
        if balanced:
            weights = balanced_weights(labels, torch.ones_like(labels).bool(), n_classes)[None]
        fold = torch.zeros(len(held_labels), dtype=torch.int64)
        return cls(read, labels, n_classes, weights, torch.ones(1), held, held_labels, fold)

    @classmethod
    def of_folds(
        cls, read: Read, labels: Tensor, fold: Tensor, n_classes: int, *, balanced: bool
    ) -> "Judge":
        """Chips of all folds but one, asked about that one, for every fold of the rows, (N,)."""
        inside = fold[None] != torch.arange(int(fold.max()) + 1)[:, None]  # (F, N)
        share = inside.float().mean(dim=1)
        weights = inside.float() / share[:, None]
        if balanced:
            weights = torch.stack([balanced_weights(labels, row, n_classes) for row in inside])
        return cls(read, labels, n_classes, weights, share, read, labels, fold)

    def choose(self) -> Verdict:
        """The strength of each layer with the lowest held-out log-loss.

        Ties go to the stronger penalty. The grid goes on beyond its end for layers that choose it
        there, each new strength from the weights of the last.
        """
        grid = torch.tensor(STRENGTHS)
        tried = self.ask(grid[None])
        chosen = tried[0]
        for verdict in tried[1:]:
            chosen = verdict.where(verdict.losses < chosen.losses, chosen)
        for step, end in ((1 / STEP, grid[0]), (STEP, grid[-1])):
            moving = chosen.strengths == end
            for _ in range(MOST_STEPS):
                if not moving.any():
                    break
                strengths = torch.where(moving, chosen.strengths * step, chosen.strengths)
                (further,) = self.ask(strengths[:, None], chosen.weights)
                moving = moving & (further.losses < chosen.losses)
                chosen = further.where(moving, chosen)
        return chosen

    def ask(self, strengths: Tensor, start: Tensor | None = None) -> list[Verdict]:
        """Fit at each strength and ask.

        Args:
            strengths: scikit-learn's C, G of them for all layers or for each: (1 or K, G).
            start: Weights to begin from, shape (K, F, C, D). None begins at zero.

        Returns:
            A verdict for each of the G, on the host.
        """
        k, (_, g), f = len(self.read(0, 1)), strengths.shape, len(self.share)
        # A fold sees fewer rows, and C multiplies their sum: as if it were fitted alone.
        each = (strengths[:, :, None] * self.share).expand(k, g, f).flatten(1)
        fitted = fit_linear(
            self.read,
            self.labels,
            self.n_classes,
            strengths=each,
            row_weight=None if self.row_weight is None else self.row_weight.repeat(g, 1),
            start=None if start is None else start.repeat(1, g, 1, 1),
            tolerance=TOLERANCE if f == 1 else FOLD_TOLERANCE,
        ).unflatten(1, (g, f))
        logits = self._answers(fitted)
        losses = fn.cross_entropy(
            logits.permute(0, 1, 3, 2).flatten(0, 1),
            self.held_labels.expand(k * g, -1),
            reduction="none",
        )
        losses, said, fitted = losses.mean(dim=1).view(k, g), logits.softmax(dim=-1), fitted.cpu()
        strengths = strengths.expand(k, g)
        return [Verdict(fitted[:, i], strengths[:, i], losses[:, i], said[:, i]) for i in range(g)]

    def _answers(self, fitted: Tensor) -> Tensor:
        """Logits of the held-out rows, each by the chip of its fold: (K, G, N, C), on the host."""
        k, g, _, n_classes, _ = fitted.shape
        said = torch.empty(k, g, len(self.held_labels), n_classes)
        for first, stop in spans(self.held, len(self.held_labels)):
            states, fold = self.held(first, stop), self.fold[first:stop]
            for one in fold.unique().tolist():
                rows = (fold == one).nonzero()[:, 0]
                here = states[:, rows.to(states.device)]
                logits = torch.einsum("knd,kgcd->kgnc", here, fitted[:, :, one])
                said[:, :, first + rows] = logits.cpu()
        return said


def balanced_weights(labels: Tensor, inside: Tensor, n_classes: int) -> Tensor:
    """Weight per row, 1 on average: of the rows inside, each class weighs the same. Shape (N,)."""
    counts = torch.bincount(labels[inside], minlength=n_classes).float()
    weights = inside / counts.clamp_min(1)[labels]
    return weights * (len(labels) / weights.sum())


def with_constant(read: Read) -> Read:
    """The same rows with a column of ones at their end, whose weight is a bias."""

    def widened(start: int, stop: int) -> Tensor:
        return fn.pad(read(start, stop), (0, 1), value=1.0)

    return widened


def joined(first: Read, second: Read, n_first: int) -> Read:
    """The rows of one reader, `n_first` of them, and then those of another."""

    def read(start: int, stop: int) -> Tensor:
        parts = []
        if start < n_first:
            parts.append(first(start, min(stop, n_first)))
        if stop > n_first:
            parts.append(second(max(start, n_first) - n_first, stop - n_first))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return read
