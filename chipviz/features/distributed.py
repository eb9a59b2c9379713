"""The processes of one job: several under `torchrun` or `accelerate launch`, one alone otherwise.

The leader (rank 0) owns the job: its folder, the store, the chips, the optimizer. The others only
help: they read texts through the backbone, or find gradients of a part of each step. Values travel
between processes of one launch, which trust each other.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chipviz.errors import JobError

if TYPE_CHECKING:  # pages import this module, and open without torch
    from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process's place among those of its run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process owns the run."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Give the leader's value to everybody. Every process calls it at the same place.

        Raises:
            JobError: If another process of the run is gone.
        """
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        try:
            distributed.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise _broken(error) from None
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collect everybody's value at the leader, by rank. The others get an empty list.

        Raises:
            JobError: If another process of the run is gone.
        """
        if self.size == 1:
            return [value]
        from torch import distributed

        box: list[Any] | None = [None] * self.size if self.leads else None
        try:
            distributed.gather_object(value, box, dst=0)
        except RuntimeError as error:
            raise _broken(error) from None
        return box or []

    def sum_up(self, tensors: "Iterable[Tensor]") -> None:
        """Add everybody's tensors up, in the leader's own. Those of the others are used up.

        Raises:
            JobError: If another process of the run is gone.
        """
        self._each(tensors, "reduce")

    def spread(self, tensors: "Iterable[Tensor]") -> None:
        """Write the values of the leader's tensors into everybody's.

        Raises:
            JobError: If another process of the run is gone.
        """
        self._each(tensors, "broadcast")

    def _each(self, tensors: "Iterable[Tensor]", how: str) -> None:
        if self.size == 1:
            return
        from torch import distributed

        try:
            for tensor in tensors:
                getattr(distributed, how)(tensor, 0)
        except RuntimeError as error:
            raise _broken(error) from None


ALONE = Team()
"""A run in one process."""


def is_helper() -> bool:
    """Whether a launcher started this process beside a leader, by the environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def join() -> Team:
    """Meet the other processes of this launch: gloo on CPUs, NCCL on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    import torch
    from accelerate import PartialState

    # Without being told it takes a machine without a GPU for one of a single process.
    state = PartialState(cpu=not torch.cuda.is_available())
    return Team(state.process_index, state.num_processes)


def _broken(error: RuntimeError) -> JobError:
    reason = " ".join(str(error).split())[:160]
    return JobError(
        f"Another process of this run is gone: {reason}",
        "See what it printed last; start the run again, finished chunks are kept.",
    )
