"""Queue, start, watch, stop and resume the processes that compute.

Any number of pages, servers and command lines may call this at once: the store decides.
"""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from chipviz.config import CutSpec, RunConfig
from chipviz.errors import ChipvizError, ConfigError, JobError
from chipviz.files import PROJECT
from chipviz.results.models import ModelSpec, place_of
from chipviz.runs.processes import how_it_ended, mark_of, out_of_memory_kills
from chipviz.runs.store import ACTIVE, ENDED, Job, Kind, Store

TICK_S = 1.0
KILL_AFTER_S = 10.0
"""A job that was asked to stop gets so long before its process is killed."""

LINES: tuple[tuple[Kind, ...], ...] = (("train", "model"), ("bundle",))
"""Kinds of jobs that wait for each other: two that compute on all cores would both be slow."""
LAST_THREAD_S = 1.0
"""Seconds that the threads of a process which has ended are waited for."""

EndFn = Callable[[int], str | None]

_log = logging.getLogger("chipviz")


def enqueue_run(store: Store, config: RunConfig) -> Job:
    """Queue a training run. The scheduler starts it when its turn comes."""
    return store.create_run(config)


def enqueue_bundle(store: Store, run_id: str, cut: CutSpec) -> Job:
    """Queue the build of a bundle. A second click returns the build that is under way.

    Raises:
        JobError: If the run is unknown or not done.
    """
    run = store.get(run_id)
    if run.kind != "train" or run.state != "done":
        raise JobError(f"Run {run_id} is {run.state}, not done.", "Let it finish, then cut.")
    for job in store.bundles(run_id):
        if job.state not in ENDED and job.cut == cut:
            return job
    return store.create_bundle(run_id, cut)


def enqueue_model(store: Store, spec: ModelSpec) -> Job:
    """Queue the making of a model.

    Raises:
        ConfigError: If a model of its name is there, or on its way.
    """
    place_of(store.home, spec.name)
    for job in store.models():
        if job.state not in ENDED and job.name == spec.name:
            raise ConfigError(
                f"A model {spec.name} is on its way already.", "Give another name.", "name"
            )
    return store.create_model(spec)


def resume(store: Store, run_id: str) -> Job:
    """Queue a run that ended too early. What it has on disk already is not computed again.

    Raises:
        JobError: If it is unknown, at work, waiting or done.
    """
    job = store.get(run_id)
    if job.kind == "bundle":
        raise JobError(f"{run_id} is the build of a bundle.", "Build the bundle again instead.")
    fresh = {"message": "", "hint": "", "label": "", "finished": None, "stop_at": None}
    if not store.move(run_id, expect=ENDED - {"done"}, to="queued", **fresh):
        raise JobError(
            f"Run {run_id} is {store.get(run_id).state}.",
            "Only a stopped, failed or interrupted run can be resumed.",
        )
    return store.get(run_id)


def stop(store: Store, job_id: str) -> None:
    """Ask a job to stop and return at once. One that has ended is left alone.

    The process gets a request to stop, and is killed after `KILL_AFTER_S` by whoever reconciles.

    Raises:
        JobError: If there is no such job.
    """
    store.get(job_id)
    if store.move(job_id, expect={"queued"}, to="stopped", finished=time.time()):
        return
    store.request_stop(job_id)
    job = store.get(job_id)
    if job.state in ACTIVE:
        _signal(job, signal.SIGTERM)


def reconcile(
    store: Store, *, kill_after_s: float = KILL_AFTER_S, end_of: EndFn = lambda _pid: None
) -> None:
    """Bring the store in line with the processes that really live.

    A working job without its process ends as the process wrote with its last act. Without such
    a note it is *interrupted*, or *stopped* if somebody had asked for that.

    Args:
        store: The jobs.
        kill_after_s: Seconds after which a job that does not stop is killed.
        end_of: Says how the process of a pid ended, in words. None if it does not know.
    """
    for job in store.active():
        if not _lives(job):
            _bury(store, job, end_of(job.pid) if job.pid else None)
        elif job.stop_at is not None and time.time() - job.stop_at > kill_after_s:
            _signal(job, signal.SIGKILL)


def _bury(store: Store, job: Job, end: str | None) -> None:
    note = _exit_note(store, job)
    if note is not None:
        store.finish(
            job.job_id,
            note["state"],
            message=note["message"],
            hint=note["hint"],
            fields=note["fields"],
            result=note["result"],
            found=note["found"],
            pid=job.pid,
        )
    elif job.stop_requested:
        store.finish(job.job_id, "stopped", pid=job.pid)
    else:
        again = "Build it again" if job.kind == "bundle" else "Resume it"
        end = end or how_it_ended(None, short_of_memory=False)
        short = "memory" in end
        store.finish(
            job.job_id,
            "interrupted",
            message=f"The process that computed it {end} while {job.state}.",
            hint=f"{again}, with fewer or shorter texts."
            if short
            else f"{again}; {store.folder(job.run_id).log} may say more.",
            pid=job.pid,
        )


def _exit_note(store: Store, job: Job) -> dict[str, Any] | None:
    """The last words of exactly this job's process. None if it left none, or torn ones."""
    try:
        note = json.loads(store.exit_path(job).read_text("utf-8"))
        same = (note["pid"], note["process"]) == (job.pid, job.process)
        whole = all(key in note for key in ("message", "hint", "fields", "result", "found"))
        return note if same and whole and note["state"] in ENDED else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(job: Job) -> bool:
    """Whether the very process that took the job is alive. Another of its pid does not count."""
    return job.pid is not None and job.process is not None and mark_of(job.pid) == job.process


def _signal(job: Job, number: signal.Signals) -> None:
    """Signal a job's process and, where it leads one, its group. But never this very process."""
    if job.pid is None or job.pid == os.getpid() or not _lives(job):
        return
    try:
        if os.getpgid(job.pid) == job.pid:
            os.killpg(job.pid, number)
        else:
            os.kill(job.pid, number)
    except (ProcessLookupError, PermissionError) as error:
        _log.warning("process %d does not take signal %s: %s", job.pid, number.name, error)


def worker_command(store: Store, job: Job) -> list[str]:
    """The command line of the process that computes a job."""
    return [sys.executable, "-m", "chipviz.runs.worker", "--home", str(store.home), job.job_id]


def start(store: Store, job: Job) -> subprocess.Popen[bytes]:
    """Start the process of a queued job, in its own session: it outlives this server.

    Raises:
        OSError: If the run folder cannot be written or no process can be started.
    """
    folder = store.folder(job.run_id)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.log.open("ab") as log:
        return subprocess.Popen(
            worker_command(store, job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=PROJECT,
        )


@dataclass(frozen=True)
class _Child:
    job_id: str
    queued: float
    process: subprocess.Popen[bytes]
    kills: int
    """Processes that had been ended for want of memory when it began."""

    @property
    def end(self) -> str:
        """How it ended, in words."""
        short = out_of_memory_kills() > self.kills
        return how_it_ended(self.process.returncode, short_of_memory=short)


class Scheduler:
    """A thread that starts queued jobs: at a time one run or model, and one bundle.

    Only one of several servers on one home schedules, the one that holds a lock. When it goes,
    another takes over within a second or two.
    """

    def __init__(self, store: Store, *, tick_s: float = TICK_S) -> None:
        """A scheduler that looks at the queue every `tick_s` seconds, once it is started."""
        self.store, self._tick_s = store, tick_s
        self.leads = False
        """Whether this scheduler holds the lock."""
        self._lock = FileLock(store.home / "scheduler.lock")
        self._closing = threading.Event()
        self._children: list[_Child] = []
        self._complaint = ""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to look after the queue."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking. Processes at work go on, and the next server finds them."""
        self._closing.set()
        if self.alive:
            self._thread.join()

    def tick(self) -> None:
        """Look once: bury the dead, start what may start."""
        reconcile(self.store, end_of=self._end_of)
        self._reap()
        waiting, active = self.store.queue(), self.store.active()
        for kinds in LINES:
            line = [job for job in waiting if job.kind in kinds]
            free = not any(job.kind in kinds for job in active)
            if line and free and not any(self._is_starting(job) for job in line):
                self._start(line[0])

    def _loop(self) -> None:
        try:
            while not self._closing.is_set():
                if self.leads or self._take_lock():
                    self._tick_safely()
                self._closing.wait(self._tick_s)
        finally:
            self.leads = False
            self._lock.release()

    def _take_lock(self) -> bool:
        try:
            self._lock.acquire(blocking=False)
        except (Timeout, OSError):  # another server schedules, or the folder takes no lock now
            return False
        self.leads = True
        _log.info("this server schedules the jobs of %s", self.store.home)
        return True

    def _tick_safely(self) -> None:
        try:
            self.tick()
        except (OSError, sqlite3.Error, ChipvizError) as error:
            said = f"the queue could not be looked after, the next try follows: {error}"
            if said != self._complaint:  # once, not every second
                _log.warning("%s", said)
            self._complaint = said
        else:
            self._complaint = ""

    def _start(self, job: Job) -> None:
        try:
            process = start(self.store, job)
        except OSError as error:
            self._cannot_start(job.job_id, f"The {job.kind} process cannot start: {error}.")
            return
        self._children.append(_Child(job.job_id, job.queued, process, out_of_memory_kills()))

    def _is_starting(self, job: Job) -> bool:
        return any(
            (child.job_id, child.queued) == (job.job_id, job.queued) for child in self._children
        )

    def _end_of(self, pid: int) -> str | None:
        """How a process that was started here ended."""
        for child in self._children:
            if child.process.pid == pid:
                with suppress(subprocess.TimeoutExpired):
                    # Its first thread may be gone a moment before the last one is.
                    child.process.wait(timeout=LAST_THREAD_S)
                    return child.end
        return None

    def _reap(self) -> None:
        """Let go of processes that ended, and fail the jobs of those that never took them."""
        ended = [child for child in self._children if child.process.poll() is not None]
        self._children = [child for child in self._children if child not in ended]
        untaken = {(job.job_id, job.queued) for job in self.store.queue()}
        for child in ended:
            if (child.job_id, child.queued) in untaken:
                status = child.process.returncode
                self._cannot_start(child.job_id, f"Its process ended at once, status {status}.")

    def _cannot_start(self, job_id: str, message: str) -> None:
        folder = self.store.folder(self.store.get(job_id).run_id)
        self.store.move(
            job_id,
            expect={"queued"},
            to="failed",
            message=message,
            hint=f"See {folder.log}, then resume.",
            finished=time.time(),
        )
