"""Timing two ways of one work in turns, and the rows of the table. Knows no model."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

Better = Literal["higher", "lower", "near 1"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ratio: float | None
    """The figure held against `goal`, in `unit`: a median over repeats. None if not measured."""
    low: float | None
    high: float | None
    """Its smallest and largest value over the repeats."""
    goal: float | None
    holds: bool | None
    """None where there is no goal."""
    ours: float | None
    peer: float | None
    """Medians of both sides, in `measured_in`."""
    unit: str = "x"
    measured_in: str = "s"
    better: Better = "higher"
    repeats: int = 1
    note: str = ""


@dataclass(frozen=True)
class Ratio:
    """Seconds of two ways of one work, pair by pair."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def each(self) -> list[float]:
        """How many times faster ours was, pair by pair."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]

    def row(self, name: str, goal: float | None, *, right: bool = True, note: str = "") -> Row:
        """The line of this measurement.

        Args:
            name: What was done, against what.
            goal: How many times faster ours is meant to be. None where nothing is promised.
            right: Whether both sides also computed the same. A fast wrong answer never holds.
            note: What a reader must know to judge the figure.
        """
        return figure_row(
            name,
            self.each,
            goal,
            right=right,
            ours=median(self.ours),
            peer=median(self.peer),
            note=note,
        )


def figure_row(
    name: str,
    values: Sequence[float],
    goal: float | None,
    *,
    right: bool = True,
    better: Better = "higher",
    unit: str = "x",
    ours: float | None = None,
    peer: float | None = None,
    measured_in: str = "s",
    note: str = "",
) -> Row:
    """A line from one figure a repeat. See `Row` and `Ratio.row` for the rest."""
    value = median(values)
    if goal is None:
        holds = None
    elif better == "near 1":
        # Every value counts here, and too small is as far off as too large.
        holds = right and max(abs(v - 1) for v in values) <= abs(goal - 1)
    else:
        holds = right and (value >= goal if better == "higher" else value <= goal)
    return Row(
        name,
        value,
        min(values),
        max(values),
        goal,
        holds,
        ours,
        peer,
        unit=unit,
        measured_in=measured_in,
        better=better,
        repeats=len(values),
        note=note,
    )


def missing_row(name: str, goal: float | None, note: str) -> Row:
    """A line that could not be measured, and why. With a goal, it does not hold."""
    holds = None if goal is None else False
    return Row(name, None, None, None, goal, holds, None, None, repeats=0, note=note)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    between: Callable[[], object] = lambda: None,
) -> Ratio:
    """Time both in turns, so that a slow minute of the machine meets both. `between` is untimed."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        # Who goes first changes, so that a warm cache favours nobody.
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            between()
            times[side].append(seconds((ours, peer)[side]))
    return Ratio(tuple(times[0]), tuple(times[1]))


def matrix_rate(
    weights: Sequence[torch.Tensor], n_rows: int, passes: int = 5, floor_s: float = 0.05
) -> float:
    """FLOPs a second of this device on products with these weights: the best of several passes.

    Args:
        weights: Matrices (D_out, D_in) in the dtype and on the device to measure.
        n_rows: Rows of the other factor.
        passes: How often all products are done and timed.
        floor_s: A pass repeats its products until it took this long.
    """
    inputs = [torch.randn(n_rows, w.shape[1], device=w.device).to(w.dtype) for w in weights]
    flops = sum(2 * n_rows * w.numel() for w in weights)
    best = 0.0
    for _ in range(passes):
        _wait(weights[0].device)
        start, n_done = time.perf_counter(), 0
        while n_done == 0 or time.perf_counter() - start < floor_s:
            for x, w in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, w)
            _wait(weights[0].device)
            n_done += 1
        best = max(best, n_done * flops / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(ours: torch.Tensor, peer: torch.Tensor) -> float:
    """Largest difference of two stacks of states (L, N, D), relative to the size of its layer."""
    scale = peer.abs().amax(dim=(1, 2)).clamp_min(1e-12)
    return float(((ours - peer).abs().amax(dim=(1, 2)) / scale).max())


def machine(dtype: torch.dtype) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| what | figure | spread | goal | holds | ours | peer | note |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        signs = {"higher": ">=", "lower": "<=", "near 1": "within"}
        goal = "" if row.goal is None else f"{signs[row.better]} {row.goal:g} {row.unit}"
        holds = {None: "", True: "yes", False: "no"}[row.holds]
        spread = f"{_number(row.low)}-{_number(row.high)}" if row.repeats > 1 else ""
        figure = f"{_number(row.ratio)} {row.unit}" if row.ratio is not None else ""
        sides = [_side(row.ours, row.measured_in), _side(row.peer, row.measured_in)]
        note = row.note.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {' | '.join([row.name, figure, spread, goal, holds, *sides, note])} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _side(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}"
