"""How long a page takes to answer while a run computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.bench import ROOT, Bench
from benchmarks.measure import Row, figure_row
from benchmarks.runs import computing, example, state_of
from chipviz.errors import JobError
from chipviz.runs.store import ACTIVE

GOAL_MS = 150.0


def rerun_while_computing(bench: Bench) -> list[Row]:
    """The slider of the page of layers, moved while a worker reads texts."""
    run = example(bench)
    rounds, n_moves, states = [], bench.pick(100, 30), []
    for _ in range(bench.pick(3, 1)):
        with computing(bench, run.home, 20_000) as (store, job_id):
            rounds.append(_moves(run.home, run.run_id, n_moves))
            states.append(state_of(store, job_id))
    p95 = [float(np.quantile(times, 0.95)) for times in rounds]
    medians = [float(np.median(times)) for times in rounds]
    busy = all(state in ACTIVE for state in states)
    note = (
        f"{n_moves} moves a round through streamlit's AppTest: the script and its messages, no "
        f"browser; median {np.median(medians):.0f} ms; the run beside was "
        f"{'at work throughout' if busy else 'OVER BEFORE THE END: ' + ', '.join(states)}"
    )
    name = "a page rerun while a run computes, 95th percentile"
    return [
        figure_row(name, p95, GOAL_MS, right=busy, unit="ms", better="lower", note=note),
    ]


def _moves(home: Path, run_id: str, n_moves: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.moves", run_id, str(n_moves)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CHIPVIZ_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().split("\n") or [""])[-1]
        raise JobError(f"The page could not be measured: {last[:200]}", "Run its command by hand.")
    return json.loads(done.stdout.strip().split("\n")[-1])
