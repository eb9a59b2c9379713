"""Peak memory against the number of texts, each measured in a process of its own.

As a program (`python -m benchmarks.memory HOME BACKBONE DATA N`) it extracts the features of N
texts and ends. `benchmarks.peak` asks the system how much memory it ever held.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench import ROOT, Bench
from benchmarks.measure import Row, figure_row
from chipviz.config import RunConfig
from chipviz.errors import JobError
from chipviz.runs import scheduler
from chipviz.runs.store import Store
from chipviz.sources import DATA_WHEELS

GOAL = 1.1
MIB = 2**20

Peak = Callable[[Bench, int], int]
"""Number of texts -> bytes held at most."""


def flat_memory(bench: Bench) -> list[Row]:
    """Ten times the texts: the extraction alone, and the whole worker."""
    many, few = bench.pick(20_000, 2_000), bench.pick(2_000, 200)
    if bench.data in DATA_WHEELS:  # the embedded set has no 2,000 training texts
        many, few = 1_500, 150
    return [
        _row(bench, "extraction", many, few, of_extraction),
        _row(bench, "the whole worker", many, few, of_worker),
    ]


def _row(bench: Bench, what: str, many: int, few: int, peak: Peak) -> Row:
    small, large = peak(bench, few), peak(bench, many)
    return figure_row(
        f"peak memory of {what}, {many:,} texts against {few:,}",
        [large / small],
        GOAL,
        better="lower",
        ours=large / MIB,
        peer=small / MIB,
        measured_in="MiB",
        note="largest resident size of a fresh process, libraries and model included",
    )


def of_extraction(bench: Bench, n_texts: int) -> int:
    """Bytes a process held at most that extracts the features of so many training texts."""
    home = str(bench.fresh_home())
    arguments = [home, bench.backbone, bench.data, str(n_texts)]
    return peak_of([sys.executable, "-m", "benchmarks.memory", *arguments])


def of_worker(bench: Bench, n_texts: int) -> int:
    """Bytes the worker of a run on so many training texts held at most, chips and all."""
    store = Store(bench.fresh_home())
    job = scheduler.enqueue_run(store, _config(bench, n_texts))
    peak = peak_of(scheduler.worker_command(store, job))
    if (state := store.get(job.job_id).state) != "done":
        raise JobError(f"The run of {n_texts:,} texts ended as {state}.", "See its log.")
    return peak


def peak_of(command: Sequence[str]) -> int:
    """Largest resident size of a program, in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        raise JobError(f"{command[2]} ended with {done.returncode}.", "Run it by hand.")
    return int(done.stdout)


def _config(bench: Bench, n_texts: int) -> RunConfig:
    return bench.config(max_train=n_texts, max_validation=200, max_test=200)


def main(home: str, backbone: str, data: str, n_texts: int) -> None:
    """Extract, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(home), Path(scratch), backbone=backbone, data=data)
        work = bench.open(max_train=n_texts, max_validation=200, max_test=200)
        work.compute(work.config.vectors)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
