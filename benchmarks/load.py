"""How long a tick of a live page takes when 50 people look at it."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from benchmarks.bench import ROOT, Bench
from benchmarks.measure import Row, figure_row
from chipviz.config import RunConfig
from chipviz.errors import JobError
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Progress
from chipviz.results.metrics import CurvePoint
from chipviz.runs.store import Store

GOAL_MS, GOAL_RUNS_MS = 500.0, 40.0
N_SESSIONS, N_LAYERS, N_RUNS, STEP = 50, 30, 500, 40
CHIPS = (ChipKey.named("last", "linear"), ChipKey.named("mean", "linear"))


def fifty_sessions(bench: Bench) -> list[Row]:
    """Fifty tabs that watch one run grow, and one tab with a list of 500 runs."""
    home = bench.fresh_home()
    store, config = Store(home), RunConfig.checked(**dict(bench.example))
    for _ in range(bench.pick(N_RUNS, 30)):
        ended = store.create_run(config, claim=True)
        store.finish(ended.job_id, "stopped")
    job = store.create_run(config, claim=True)
    n_sessions, n_ticks = bench.pick(N_SESSIONS, 2), bench.pick(15, 2)
    rounds, memory = [], []
    with growing(store, job.job_id), _serving(home) as (port, server):
        for _ in range(bench.pick(3, 1)):
            before = _rss(server)
            rounds.append(_tick(port, "train", f"run={job.run_id}", n_sessions, n_ticks))
            memory.append((_rss(server) - before) / 2**20)
        _tick(port, "", "", 1, 1)  # opens the page, which a tick is not
        opened = _cpu_s(server)
        _tick(port, "", "", 1, 1)
        before = _cpu_s(server)
        alone = _tick(port, "", "", 1, n_ticks)
        spent_ms = 1000 * (_cpu_s(server) - before - (before - opened)) / (n_ticks - 1)
    p95 = [float(np.quantile(r["ms"], 0.95)) for r in rounds]
    medians = [float(np.median(r["ms"])) for r in rounds]
    note = (
        f"median {np.median(medians):.0f} ms, {rounds[-1]['bytes'] / 1024:.0f} KiB a tick; driver "
        f"and server share the cores; the server grew by {max(memory):.0f} MiB at most"
    )
    name = f"{n_sessions} sessions that watch one run, one tick a second each, 95th percentile"
    runs = f"the list of {bench.pick(N_RUNS, 30)} runs and one at work, one tick, one session"
    return [
        figure_row(name, p95, GOAL_MS, unit="ms", better="lower", note=note),
        figure_row(
            runs,
            [spent_ms],
            GOAL_RUNS_MS,
            unit="ms",
            better="lower",
            note=f"the server's own time; {alone['bytes'] / 1024:.0f} KiB a tick",
        ),
    ]


@contextmanager
def growing(store: Store, job_id: str) -> Iterator[None]:
    """A run that gets points once in two seconds, and progress twice a second."""
    ticks = itertools.count()

    def grow() -> None:
        tick = next(ticks)
        n_train = STEP * (1 + tick // 4)
        if tick % 4 == 0:
            points = [
                CurvePoint(n_train, Cut(layer, chip), 0.4 + 0.5 * layer / N_LAYERS)
                for chip in CHIPS
                for layer in range(N_LAYERS)
            ]
            store.add_points(job_id, points)
        words = f"reading {n_train:,} of 100,000 texts"
        store.report_progress(
            job_id, Progress("extracting", words, n_train + tick, 100_000, 1900.0, 60.0)
        )

    with repeating(0.5, grow):
        yield


@contextmanager
def repeating(every_s: float, work: Callable[[], object]) -> Iterator[None]:
    """Do something once in so many seconds, beside the block."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _serving(home: Path) -> Iterator[tuple[int, psutil.Process]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    environment = {**os.environ, "CHIPVIZ_HOME": str(home)}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet) as server:
        try:
            for _ in range(600):
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).close()
                    break
                time.sleep(0.1)
            yield port, psutil.Process(server.pid)
        finally:
            server.terminate()


def _tick(port: int, page: str, query: str, n_sessions: int, n_ticks: int) -> dict:
    words = [str(port), page, query, str(n_sessions), str(n_ticks)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sessions", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().split("\n") or [""])[-1]
        raise JobError(f"Sessions could not be measured: {last[:200]}", "Run its command by hand.")
    return json.loads(done.stdout)


def _cpu_s(server: psutil.Process) -> float:
    return sum(server.cpu_times()[:2])


def _rss(server: psutil.Process) -> int:
    return server.memory_info().rss
