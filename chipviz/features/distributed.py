"""The processes of one run: several under `accelerate launch`, one alone otherwise.

The leader (rank 0) owns the run: its folder, the store, the chips. The others only help reading
texts through the backbone. Values travel between processes of one launch, which trust each other.
"""

import os
from dataclasses import dataclass
from typing import Any

from chipviz.errors import JobError


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


ALONE = Team()
"""A run in one process."""


def is_helper() -> bool:
    """Whether a launcher started this process beside a leader, by the environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def join() -> Team:
    """Meet the other processes of this launch: gloo on CPUs, NCCL on GPUs, as accelerate is set."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    from accelerate import PartialState

    state = PartialState()
    return Team(state.process_index, state.num_processes)


def _broken(error: RuntimeError) -> JobError:
    reason = " ".join(str(error).split())[:160]
    return JobError(
        f"Another process of this run is gone: {reason}",
        "See what it printed last; start the run again, finished chunks are kept.",
    )
