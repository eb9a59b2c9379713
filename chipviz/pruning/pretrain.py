"""Pretraining goes on: all weights, the language-model loss on any text.

Source: Just CHOP (arXiv:2305.14864), which takes blocks out and trains on, without a teacher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from chipviz.backbones.language_model import BATCH_TOKENS, LanguageModel, mean_loss, token_losses
from chipviz.features.distributed import ALONE, Team
from chipviz.progress import ProgressFn, silent
from chipviz.pruning.training import Fitted, OnMark, Plan, fit, help_fit
from chipviz.pruning.tune import in_order


def n_steps(n_tokens: int, batch: int, length: int) -> int:
    """Steps of so many rows that read so many tokens."""
    return max(1, round(n_tokens / (batch * length)))


def row_loss(model: Any, rows: Tensor) -> tuple[Tensor, int]:
    """Sum of the losses of all tokens of a batch but each row's first, and how many these are."""
    logits = model(input_ids=rows, use_cache=False).logits.float()
    losses = token_losses(logits, rows)
    return losses.sum(), losses.numel()


def pretrain(
    model: LanguageModel,
    rows: Tensor,
    held_out: Tensor,
    plan: Plan,
    batch: int,
    *,
    checkpoint: Path | None = None,
    progress: ProgressFn = silent,
    on_mark: OnMark = lambda _: None,
    team: Team = ALONE,
) -> Fitted:
    """Fit all weights of a model in place.

    Args:
        model: In float32.
        rows: Text to fit on, shape (N, T). It is read again, in another order, if it is too short.
        held_out: Text whose loss is measured on the way, shape (M, T).
        plan: How.
        batch: Rows of a step.
        checkpoint: File of the state on the way.
        progress: Told every step.
        on_mark: Told every loss.
        team: Processes that share the rows of each step.
    """
    network = model.model.requires_grad_(True).train()
    rows_of = in_order(len(rows), batch, plan.seed)
    # As many as fit at once, and something to do for everybody.
    at_once = max(1, min(BATCH_TOKENS // rows.shape[1], batch // team.size))

    def step_of(step: int) -> Sequence[Tensor]:
        return rows[rows_of(step)].split(at_once)

    def validate() -> float:
        network.eval()
        loss = mean_loss(model, held_out)
        network.train()
        return loss

    fitted = fit(
        dict(network.named_parameters()),
        plan,
        step_of,
        lambda some: row_loss(network, some.to(model.device)),
        validate=validate,
        checkpoint=checkpoint,
        name="pretraining",
        progress=progress,
        on_mark=on_mark,
        team=team,
    )
    network.eval().requires_grad_(False)
    return fitted


def help_leader(model: LanguageModel, team: Team) -> None:
    """Take a part of every step of a pretraining that another process leads.

    Args:
        model: Of the shape that is fitted. Its weights come from the leader.
        team: This process's place.

    Raises:
        JobError: If the leader is gone.
    """
    network = model.model.requires_grad_(True).train()
    help_fit(
        dict(network.named_parameters()),
        lambda some: row_loss(network, some.to(model.device)),
        team,
    )
