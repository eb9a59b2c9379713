"""One process computes one job: `python -m chipviz.runs.worker --home HOME JOB_ID`.

Whatever happens here ends as a state, a sentence and a hint in the store, and never elsewhere.
"""

import argparse
import errno
import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from chipviz.config import home_dir
from chipviz.errors import ChipvizError, JobError, disk_full, is_disk_full, panics_as_errors
from chipviz.files import write_atomic
from chipviz.progress import Cancelled, Progress, ProgressFn, silent
from chipviz.results.run_folder import RunFolder
from chipviz.runs.schema import summary
from chipviz.runs.store import Job, State, Store

BEAT_EVERY_S = 2.0
POLL_EVERY_S = 0.5
WRITE_EVERY_S = 0.25
NOT_QUEUED = 3
"""Exit status of a worker whose job somebody else has taken, stopped or deleted."""

_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad allocation", "std::bad_alloc")

_log = logging.getLogger("chipviz")


@dataclass(frozen=True)
class _Ending:
    state: State
    message: str = ""
    hint: str = ""
    fields: tuple[str, ...] = ()
    result: str | None = None
    """JSON of a bundle's report, or of a model's record."""
    found: dict[str, Any] | None = None
    """What the list of runs shows of a run's report."""


class _Reporter:
    """Passes progress on to the store, now and then, and stops the work when asked to."""

    def __init__(self, store: Store, job_id: str, stop: threading.Event, watch: ProgressFn) -> None:
        self._store = store
        self._job_id = job_id
        self._stop = stop
        self._watch = watch
        self._stage: str | None = None
        self.loading = False
        """Whether nothing would be lost if the work broke off at any instruction."""
        self.broken_off = False
        """Whether it did."""
        self._written = self._polled = -float("inf")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._polled >= POLL_EVERY_S:
            self._polled = now
            if self._store.stop_requested(self._job_id):
                self._stop.set()
        if self._stop.is_set():
            raise Cancelled
        if progress.stage != self._stage:
            _log.info("%s: %s", progress.stage, progress.label)
            self.loading = progress.stage == "loading"
        if progress.stage != self._stage or now - self._written >= WRITE_EVERY_S:
            self._stage, self._written = progress.stage, now
            self._store.report_progress(self._job_id, progress)
        self._watch(progress)


def work(store: Store, job: Job, *, watch: ProgressFn = silent) -> Job:
    """Compute a job that this process has claimed, in this process.

    Args:
        store: Where the job lives.
        job: A working job owned by this process (`Store.claim`, or `create_run(claim=True)`).
        watch: Hears every progress report too. The command line draws its bar with it.

    Returns:
        The job as it ended: done, failed or stopped. Errors are in its message and hint.

    Raises:
        KeyboardInterrupt: After the run was left readable, as *stopped*.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait by spinning halve the speed of whatever else runs, the browser included, and
    # with it their own: 2.4x on two cores shared with one other process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The matrix library keeps the programs of 1,024 shapes, and every batch has its own: 0.7 GB.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    folder = store.folder(job.run_id)
    stop = threading.Event()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        store.exit_path(job).unlink(missing_ok=True)
        report = _Reporter(store, job.job_id, stop, watch)
        with _logging_to(folder.log), _heartbeat(store, job, stop), _sigterm_sets(stop, report):
            ending = _attempt(store, job, folder, report)
    except OSError as error:
        ending = _explain(error, folder)
    except KeyboardInterrupt:
        _end(store, job, _Ending("stopped"))
        raise
    _end(store, job, ending)
    return store.get(job.job_id)


def _attempt(store: Store, job: Job, folder: RunFolder, report: _Reporter) -> _Ending:
    _log.info("%s %s started, process %d", job.kind, job.job_id, os.getpid())
    try:
        work = {"train": _train, "bundle": _build, "model": _make}[job.kind]
        with panics_as_errors():
            ending = work(store, job, folder, report)
    except Cancelled:
        ending = _Ending("stopped")
    except Exception as error:  # noqa: BLE001 - the one place where every failure gets its words
        if report.broken_off:  # a library put words of its own around it
            ending = _Ending("stopped")
        else:
            if not isinstance(error, ChipvizError):
                _log.exception("the job failed")
            ending = _explain(error, folder)
    finally:
        report.loading = False
    _log.info("%s %s %s %s", job.kind, job.job_id, ending.state, ending.message)
    return ending


def _train(store: Store, job: Job, folder: RunFolder, report: _Reporter) -> _Ending:
    report(Progress("loading", "starting"))
    from chipviz import experiment

    found = experiment.run(
        job.config,
        home=store.home,
        run_id=job.run_id,
        folder=folder,
        progress=report,
        on_points=partial(store.add_points, job.run_id),
    )
    return _Ending("done", found=summary(found))


def _build(store: Store, job: Job, folder: RunFolder, report: _Reporter) -> _Ending:
    report(Progress("building", "starting"))
    run = store.get(job.run_id)
    if run.state != "done":
        raise JobError(f"Run {run.run_id} is {run.state}, not done.", "Let it finish, then cut.")
    from chipviz import experiment

    out = folder.bundles / f"{job.name}-{job.job_id}"
    try:
        built = experiment.build(folder, job.cut, home=store.home, out=out, progress=report)
        return _Ending("done", result=built.model_dump_json())
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _make(store: Store, job: Job, folder: RunFolder, report: _Reporter) -> _Ending:
    report(Progress("loading", "starting"))
    from chipviz.pruning.make import make

    record = make(
        job.model,
        home=store.home,
        scratch=folder.scratch,
        progress=report,
        on_mark=partial(store.add_mark, job.job_id),
    )
    return _Ending("done", result=record.model_dump_json())


def _explain(error: Exception, folder: RunFolder) -> _Ending:
    """Find the words for what went wrong."""
    if isinstance(error, ChipvizError):
        return _Ending("failed", error.message, error.hint, error.fields)
    if _is_out_of_memory(error):
        return _Ending(
            "failed",
            "The job ran out of memory.",
            "Lower the length limit or the number of texts, take a smaller backbone, "
            "or close other programs, then resume.",
        )
    if is_disk_full(error):
        said = disk_full(folder.path.parent)
        return _Ending("failed", said.message, f"{said.hint} Then resume.")
    return _Ending(
        "failed",
        f"Unexpected {type(error).__name__}: {str(error)[:300]}",
        f"See {folder.log} for where it happened.",
    )


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in str(error) for words in _NO_MEMORY)
    )


def _end(store: Store, job: Job, ending: _Ending) -> None:
    """Say how it ended: in the store, and last in the run folder, if the store took no note."""
    try:
        store.finish(
            job.job_id,
            ending.state,
            message=ending.message,
            hint=ending.hint,
            fields=ending.fields,
            result=ending.result,
            found=ending.found,
            pid=os.getpid(),
        )
    except sqlite3.Error:
        _log.exception("the store does not take the end of %s", job.job_id)
    owner = {"pid": os.getpid(), "process": job.process}
    with suppress(OSError):  # the store knows already; a full disk must not hide what it knows
        write_atomic(store.exit_path(job), json.dumps(asdict(ending) | owner))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Append the log and all warnings of this process to a file, with timestamps."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), _log.level
    root.addHandler(handler)
    _log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        _log.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _heartbeat(store: Store, job: Job, stop: threading.Event) -> Iterator[None]:
    """Tell the store every two seconds that this process lives."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_EVERY_S):
            with suppress(sqlite3.Error):  # a missed beat is no reason to die
                if not store.beat(job.job_id):
                    stop.set()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _sigterm_sets(stop: threading.Event, report: _Reporter) -> Iterator[None]:
    """Let a signal stop the work: at the next report, or at once while it only loads.

    Imports, downloads and the reading of weights take seconds without a report.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone; the store is asked anyway
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        if report.loading:
            report.loading, report.broken_off = False, True
            raise Cancelled

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Claim one queued job and compute it.

    Returns:
        0 when it is done or was stopped, 1 when it failed, `NOT_QUEUED` when it was not there to
        take.
    """
    parser = argparse.ArgumentParser(prog="python -m chipviz.runs.worker")
    parser.add_argument("--home")
    parser.add_argument("job_id")
    options = parser.parse_args(arguments)
    if hasattr(os, "nice"):
        os.nice(5)  # all cores compute here: the server and the browser go first
    try:
        store = Store(home_dir(options.home))
        if not store.claim(options.job_id):
            return NOT_QUEUED
        job = work(store, store.get(options.job_id))
    except ChipvizError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 1
    return 0 if job.state in ("done", "stopped") else 1


if __name__ == "__main__":
    sys.exit(main())
