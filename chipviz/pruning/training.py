"""Gradient descent on a model's own loss: steps, schedule, checkpoints, early stop.

What is fitted and on what is the caller's. A run that was killed goes on with the very next step
and ends with the very same numbers: order and dropout depend on the seed and the step alone.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from chipviz.features.distributed import ALONE, Team
from chipviz.files import replacing
from chipviz.progress import Meter, ProgressFn, silent
from chipviz.results.models import Mark

OptimizerName = Literal["adamw", "lion"]
Micro = Any
"""A batch that goes through the model at once. Several make a step."""

CLIP = 1.0
"""Largest norm of a step's gradient."""
CHECKPOINT_S = 60.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True)
class Plan:
    """How a model is fitted."""

    n_steps: int
    lr: float
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.05
    """Share of the steps in which the learning rate grows from 0."""
    floor: float = 0.0
    """Share of the learning rate that is left at the end of a linear decay."""
    validate_every: int = 0
    """Steps between two validations, 0 for none."""
    patience: int = 0
    """Validations without a better one after which it ends, 0 for never."""
    seed: int = 0
    bfloat16: bool = False
    """Whether products are computed in bfloat16. Weights and sums stay float32."""

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        n_warm = math.ceil(self.warmup * self.n_steps)
        if step < n_warm:
            return self.lr * (step + 1) / n_warm
        left = (self.n_steps - step) / max(1, self.n_steps - n_warm)
        return self.lr * (self.floor + (1 - self.floor) * left)


OnMark = Callable[[Mark], None]


@dataclass(frozen=True)
class Fitted:
    """How a fit ended. The parameters hold the best state that validation saw, or the last."""

    n_steps: int
    n_tokens: int
    loss: float
    """Mean loss of a token over the last tenth of the steps."""
    best: float | None
    """Lowest validation loss."""


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay. Source: arXiv:2302.06675."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float = 0.0) -> None:
        """Betas are the published 0.9 and 0.99."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        assert closure is None, "nobody here asks for a loss"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign())
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


def fit(
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    step_of: Callable[[int], Sequence[Micro]],
    loss_of: Callable[[Micro], tuple[Tensor, int]],
    *,
    validate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    name: str = "training",
    progress: ProgressFn = silent,
    on_mark: OnMark = lambda _: None,
    team: Team = ALONE,
) -> Fitted:
    """Fit parameters in place.

    Args:
        parameters: What is fitted, by name.
        plan: How.
        step_of: The batches of a step, from its number alone.
        loss_of: Sum of the losses of a batch's tokens, and how many tokens these are.
        validate: Mean loss of a token on texts that are not fitted on.
        checkpoint: File of the state on the way. Found there, the fit goes on from it.
        name: What it is called in progress reports.
        progress: Told every step.
        on_mark: Told the loss of every step, and of every validation.
        team: Others that find gradients of a part of each step, see `help_fit`. They are told when
            it ends.
    """
    fit_now = _Fit(parameters, plan, validate, checkpoint, on_mark, team)
    fit_now.resume()
    meter = Meter("fitting", plan.n_steps, progress)
    meter.skip(fit_now.step)
    while fit_now.step < plan.n_steps and not fit_now.patience_is_over:
        n_tokens = fit_now.take_step(step_of(fit_now.step), loss_of)
        label = f"{name}: step {fit_now.step:,} of {plan.n_steps:,}, loss {fit_now.losses[-1]:.3f}"
        meter.advance(1, label, n_tokens)
    team.share(None)
    return fit_now.end()


@dataclass(frozen=True)
class _Step:
    """What everybody must know of a step."""

    seed: int
    bfloat16: bool
    micros: Sequence[Micro]

    def gradients(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss_of: Callable[[Micro], tuple[Tensor, int]],
        team: Team,
    ) -> tuple[float, int]:
        """Write the gradient of the summed loss. Returns that sum and the tokens it is over.

        Every process takes its own batches; the leader has the whole at the end.
        """
        device = next(iter(parameters.values())).device
        torch.manual_seed(self.seed + team.rank)  # of dropout
        found = torch.zeros(2, dtype=torch.float64, device=device)
        for micro in self.micros[team.rank :: team.size]:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                loss, n = loss_of(micro)
            loss.backward()
            found += torch.tensor([float(loss.detach()), n], dtype=torch.float64, device=device)
        if team.size > 1:
            for parameter in parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            team.sum_up([found, *(p.grad for p in parameters.values() if p.grad is not None)])
        return float(found[0]), int(found[1])


def help_fit(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Micro], tuple[Tensor, int]],
    team: Team,
) -> None:
    """Find gradients for the leader of a `fit` until it ends. Takes its weights every step.

    Raises:
        JobError: If the leader is gone.
    """
    while (step := team.share()) is not None:
        team.spread(p.data for p in parameters.values())
        step.gradients(parameters, loss_of, team)
        for parameter in parameters.values():
            parameter.grad = None


class _Fit:
    """The state of a fit."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        validate: Callable[[], float] | None,
        checkpoint: Path | None,
        on_mark: OnMark,
        team: Team,
    ) -> None:
        self.parameters, self.plan, self._team = parameters, plan, team
        self.step, self.n_tokens = 0, 0
        self.losses: list[float] = []
        self.best: float | None = None
        self.worse = 0
        self._validate, self._checkpoint, self._on_mark = validate, checkpoint, on_mark
        self._best: dict[str, Tensor] = {}
        self._written = time.monotonic()
        groups = list(parameters.values())
        self._optimizer: torch.optim.Optimizer = (
            Lion(groups, plan.lr, plan.weight_decay)
            if plan.optimizer == "lion"
            else torch.optim.AdamW(groups, plan.lr, weight_decay=plan.weight_decay)
        )

    @property
    def patience_is_over(self) -> bool:
        return 0 < self.plan.patience <= self.worse

    def take_step(
        self, micros: Sequence[Micro], loss_of: Callable[[Micro], tuple[Tensor, int]]
    ) -> int:
        """One step of the optimizer. Returns the tokens whose loss it lowers."""
        plan, team = self.plan, self._team
        for group in self._optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step)
        now = _Step(plan.seed * 1_000_003 + self.step, plan.bfloat16, micros)
        team.share(now)
        team.spread(p.data for p in self.parameters.values())
        total, n_tokens = now.gradients(self.parameters, loss_of, team)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= n_tokens  # the mean over the step, however it was parted
        nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step, self.n_tokens = self.step + 1, self.n_tokens + n_tokens
        self.losses.append(total / n_tokens)
        self._on_mark(Mark(self.step, self.n_tokens, "loss", self.losses[-1]))
        if plan.validate_every and self.step % plan.validate_every == 0:
            self.look()
        if time.monotonic() - self._written > CHECKPOINT_S:
            self.save()
        return n_tokens

    def look(self) -> None:
        """Validate, and keep the state if it is the best so far."""
        if self._validate is None:
            return
        loss = self._validate()
        self._on_mark(Mark(self.step, self.n_tokens, "validation", loss))
        if self.best is None or loss < self.best:
            self.best, self.worse = loss, 0
            if self.plan.patience:
                self._best = {n: p.detach().clone() for n, p in self.parameters.items()}
        else:
            self.worse += 1

    def end(self) -> Fitted:
        """Take the best state."""
        for name, value in self._best.items():
            self.parameters[name].data.copy_(value)
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        loss = sum(tail) / len(tail) if tail else math.nan
        return Fitted(self.step, self.n_tokens, loss, self.best)

    def save(self) -> None:
        """Write the state to one file, whole or not at all."""
        if self._checkpoint is None:
            return
        tensors = {f"now/{n}": p.detach().contiguous() for n, p in self.parameters.items()}
        tensors |= {f"best/{n}": value for n, value in self._best.items()}
        for name, parameter in self.parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"state.{key}/{name}"] = value
        said = {
            "step": self.step,
            "n_tokens": self.n_tokens,
            "losses": self.losses,
            "best": self.best,
            "worse": self.worse,
        }
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._checkpoint) as part:
            save_file(tensors, part, metadata={"said": json.dumps(said)})
        self._written = time.monotonic()

    def resume(self) -> None:
        """Go on from the file, if there is one that fits."""
        if self._checkpoint is None or not self._checkpoint.exists():
            return
        try:
            with safe_open(self._checkpoint, framework="pt") as found:
                said = json.loads(found.metadata()["said"])
                tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
            fits = all(tensors[f"now/{n}"].shape == p.shape for n, p in self.parameters.items())
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            return  # begin anew: a damaged file is worth nothing
        if not fits:
            return
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"now/{name}"])
            state = {
                key.removeprefix("state."): value
                for kind, value in tensors.items()
                for key, _, owner in [kind.partition("/")]
                if key.startswith("state.") and owner == name
            }
            self._optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter) for key, value in state.items()
            }
        self._best = {
            key.removeprefix("best/"): value.to(self.parameters[key.removeprefix("best/")])
            for key, value in tensors.items()
            if key.startswith("best/")
        }
        self.step, self.n_tokens = said["step"], said["n_tokens"]
        self.losses, self.best, self.worse = said["losses"], said["best"], said["worse"]
