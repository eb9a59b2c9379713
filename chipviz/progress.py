"""How long work tells what it is doing and hears that it should stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["loading", "extracting", "fitting", "building", "verifying"]


@dataclass(frozen=True)
class Progress:
    """One report from a running stage."""

    stage: Stage
    """Which step of the line is at work. Also the state of its job."""
    label: str
    """The step in words, for people: `reading 640 of 1,400 texts`."""
    done: int = 0
    total: int = 0
    """Units of work done and in all. A total of 0 means the length is not known."""
    rate: float | None = None
    """Tokens a second (extracting) or bytes a second (fetching), where it is known."""
    eta_s: float | None = None
    """Seconds left in this stage, where it is known."""


ProgressFn = Callable[[Progress], None]
"""Called often by long work. Raising `Cancelled` from it stops the work at a safe point."""


class Cancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The user asked to stop. What is on disk stays readable."""


def silent(_: Progress) -> None:
    """Report to nobody."""


class Meter:
    """Counts units of one stage and reports rate and time left."""

    def __init__(self, stage: Stage, total: int, report: ProgressFn) -> None:
        self.stage: Stage = stage
        self.total = total
        self.done = 0
        self._report = report
        self._start = time.monotonic()
        self._worked = 0
        self._weight = 0

    def skip(self, units: int) -> None:
        """Count units that were already done earlier: they say nothing about the speed."""
        self.done += units

    def advance(self, units: int, label: str, weight: int = 0) -> None:
        """Count `units` of work done now. `weight` is what the rate counts (tokens, bytes)."""
        self.done += units
        self._worked += units
        self._weight += weight
        elapsed = time.monotonic() - self._start
        pace = self._worked / elapsed if elapsed > 0 else 0.0
        self._report(
            Progress(
                stage=self.stage,
                label=label,
                done=self.done,
                total=self.total,
                rate=self._weight / elapsed if self._weight and elapsed > 0 else None,
                eta_s=(self.total - self.done) / pace if pace > 0 else None,
            )
        )
