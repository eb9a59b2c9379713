"""Whole runs: the embedded example, a second run, and one that computes beside something else."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.bench import Bench
from benchmarks.measure import Row, figure_row
from chipviz import experiment
from chipviz.config import RunConfig
from chipviz.errors import JobError
from chipviz.progress import silent
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder
from chipviz.runs import scheduler as jobs
from chipviz.runs.store import ENDED, State, Store

POLL_S = 0.05


@dataclass(frozen=True)
class Started:
    """One run as a user sees it who presses Start and waits."""

    home: Path
    run_id: str
    first_point_s: float
    total_s: float


def against_first_run(bench: Bench) -> list[Row]:
    """A second run with other chips: what it spends on features, against the first."""
    ours, peer, whole = [], [], []
    sizes = {"max_train": bench.pick(1000, 200), "max_validation": 200, "max_test": 200}
    for i in range(bench.pick(3, 1)):
        home = bench.fresh_home()
        first = _run(bench.config(template=bench.template, **sizes), home, f"first-{i}")
        other = bench.config(template=bench.template, class_weight="balanced", **sizes)
        second = _run(other, home, f"second-{i}")
        ours.append(second.timing.extract_s)
        peer.append(first.timing.extract_s)
        whole.append(first.timing.total_s / second.timing.total_s)
    note = (
        "seconds spent on features (the second run only checks their hashes); other chips: "
        f"balanced class weights; whole runs {sorted(whole)[len(whole) // 2]:.1f} x"
    )
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    name = "second run, same backbone and task, other chips, against the first"
    return [
        figure_row(
            name,
            ratios,
            20.0,
            ours=sorted(ours)[len(ours) // 2],
            peer=sorted(peer)[len(peer) // 2],
            note=note,
        )
    ]


def _run(config: RunConfig, home: Path, run_id: str) -> RunReport:
    folder = RunFolder(home / "runs" / run_id)
    folder.path.mkdir(parents=True)
    return experiment.run(
        config,
        home=home,
        run_id=run_id,
        folder=folder,
        progress=silent,
        on_points=lambda _points: None,
    )


def embedded_example(bench: Bench) -> list[Row]:
    """From Start to the first point of the curve, and to the end. Backbone and data cached."""
    runs = [start_and_wait(bench) for _ in range(bench.pick(2, 0))] + [example(bench)]
    first, total = [run.first_point_s for run in runs], [run.total_s for run in runs]
    return [
        figure_row("first curve point after Start", first, 20.0, unit="s", better="lower"),
        figure_row("whole embedded example", total, 120.0, unit="s", better="lower"),
    ]


@functools.cache
def example(bench: Bench) -> Started:
    """One finished run of the embedded example, shared by the rows that need one."""
    return start_and_wait(bench)


def start_and_wait(bench: Bench) -> Started:
    """Queue the example in a fresh home as the page does, and watch the store.

    Raises:
        JobError: If the run does not end well.
    """
    home = bench.fresh_home()
    store = Store(home)
    scheduler = jobs.Scheduler(store)  # as in the server: it looks at its queue once a second
    scheduler.start()
    try:
        start, first = time.perf_counter(), None
        job = jobs.enqueue_run(store, RunConfig.checked(**dict(bench.example)))
        while (job := store.get(job.job_id)).state not in ENDED:
            if first is None and store.points(job.run_id):
                first = time.perf_counter() - start
            time.sleep(POLL_S)
        total = time.perf_counter() - start
        while job.pid and psutil.pid_exists(job.pid):  # until the scheduler has seen it go
            time.sleep(POLL_S)
    finally:
        scheduler.close()
    if job.state != "done":
        raise JobError(f"The embedded example ended as {job.state}: {job.message}", job.hint)
    return Started(home, job.run_id, total if first is None else first, total)


@contextmanager
def computing(bench: Bench, home: Path, n_texts: int) -> Iterator[tuple[Store, str]]:
    """A worker that reads `n_texts` texts as long as the block lasts. Gives its store and job.

    Raises:
        JobError: If it ends before it begins to read.
    """
    store = Store(home)
    job = jobs.enqueue_run(store, bench.config(max_train=n_texts))
    process = jobs.start(store, job)
    try:
        while (state := store.get(job.job_id).state) != "extracting":
            if process.poll() is not None:
                raise JobError(
                    f"The run that was to compute beside ended as {state}.",
                    f"See {store.folder(job.run_id).log}.",
                )
            time.sleep(POLL_S)
        yield store, job.job_id
    finally:
        jobs.stop(store, job.job_id)
        process.wait()


def state_of(store: Store, job_id: str) -> State:
    """Where a job is now."""
    return store.get(job_id).state
