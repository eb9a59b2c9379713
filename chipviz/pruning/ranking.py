"""Which blocks or units of a model matter least, measured on calibration text.

Sources: block influence, ShortGPT (arXiv:2403.03853). Angular distance, Gromov et al.
(arXiv:2403.17887). Greedy loss, SLEB (arXiv:2402.09025), and of single units BlockPruner
(arXiv:2406.10594).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from chipviz.backbones.language_model import LanguageModel, mean_loss, skipping, watch_blocks
from chipviz.progress import Progress, ProgressFn, silent

Unit = TypeVar("Unit", bound=Hashable)


def influence(model: LanguageModel, rows: Tensor) -> Tensor:
    """Block influence: 1 less the mean cosine, over all tokens, of what a block reads and gives.

    The last block is taken before the final norm, like every other.

    Args:
        model: The whole model.
        rows: Calibration text, shape (N, T).

    Returns:
        Shape (L,), float64.
    """
    total = torch.zeros(model.n_layers, dtype=torch.float64)

    def see(layer: int, before: Tensor, after: Tensor) -> None:
        cosines = cosine_similarity(before.float(), after.float(), dim=-1)
        total[layer] += cosines.double().sum().cpu()

    watch_blocks(model, rows, see)
    return 1 - total / rows.numel()


def least_influential(scores: Tensor, n_removed: int) -> list[int]:
    """Blocks of the lowest influence, in order of depth. Of equal ones the deeper goes first."""
    order = sorted(range(len(scores)), key=lambda layer: (float(scores[layer]), -layer))
    return sorted(order[:n_removed])


def angular(model: LanguageModel, rows: Tensor, n_removed: int) -> Tensor:
    """Angular distance over every run of `n_removed` blocks: between what it reads and gives.

    The angle of the two states of a row's last token, over pi, as a mean over all rows.

    Args:
        model: The whole model.
        rows: Calibration text, shape (N, T).
        n_removed: Blocks of a run, n.

    Returns:
        Distance by the run's first block, shape (L - n + 1,), float64.
    """
    n_layers = model.n_layers
    states: list[list[Tensor]] = [[] for _ in range(n_layers + 1)]

    def see(layer: int, before: Tensor, after: Tensor) -> None:
        if layer == 0:
            states[0].append(before[:, -1].double().cpu())
        states[layer + 1].append(after[:, -1].double().cpu())

    watch_blocks(model, rows, see)
    found = [torch.cat(parts) for parts in states]
    return torch.stack(
        [
            # Rounding may leave a cosine a little outside of what has an angle.
            cosine_similarity(found[first], found[first + n_removed], dim=-1)
            .clamp(-1, 1)
            .arccos()
            .mean()
            / torch.pi
            for first in range(n_layers - n_removed + 1)
        ]
    )


def nearest_run(distances: Tensor, n_removed: int) -> list[int]:
    """Blocks of the run of the smallest distance. Of equal ones the deeper."""
    first = max(range(len(distances)), key=lambda i: (-float(distances[i]), i))
    return list(range(first, first + n_removed))


def greedy(
    units: Sequence[Unit],
    n_removed: int,
    loss_without: Callable[[Sequence[Unit]], float],
    progress: ProgressFn = silent,
    enough: Callable[[Sequence[Unit]], bool] = lambda _: False,
) -> list[Unit]:
    """Take out one unit after the other, each time the one whose absence costs the least loss.

    Every loss is measured anew without those that are gone already. Of equal ones the last goes.

    Args:
        units: All units, from the input on.
        n_removed: Units to take out.
        loss_without: Mean loss of a token on the calibration text without some units.
        progress: Told every trial.
        enough: Whether the units that are gone suffice.

    Returns:
        The units in the order in which they go.
    """
    gone: list[Unit] = []
    total = sum(len(units) - i for i in range(n_removed))
    done = 0
    for _ in range(n_removed):
        best: tuple[float, int] | None = None
        for place, unit in enumerate(units):
            if unit in gone:
                continue
            loss = loss_without([*gone, unit])
            if loss != loss:  # a model that gives no number without it needs it
                loss = float("inf")
            best = min(best or (loss, -place), (loss, -place))
            done += 1
            label = f"trying unit {done:,} of {total:,}"
            progress(Progress("fitting", label, done, total))
        assert best is not None
        gone.append(units[-best[1]])
        if enough(gone):
            break
    return gone


def greedy_blocks(
    model: LanguageModel, rows: Tensor, n_removed: int, progress: ProgressFn = silent
) -> list[int]:
    """Blocks that the calibration text misses least, in the order in which they go."""

    def loss_without(blocks: Sequence[int]) -> float:
        with skipping(model, blocks):
            return mean_loss(model, rows)

    return greedy(range(model.n_layers), n_removed, loss_without, progress)
