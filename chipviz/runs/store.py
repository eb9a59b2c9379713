"""Runs, bundle builds and live curves in one SQLite file: the only truth about what happened.

Knows states and who may change them, neither processes nor what a run computes. Every
change of state is a compare-and-set, so that a page, a worker and two servers can act at once.
"""

import os
import re
import secrets
import shutil
import sqlite3
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from filelock import FileLock
from pydantic import BaseModel

from chipviz.config import CutSpec, RunConfig
from chipviz.errors import JobError, Refusal, disk_full, is_disk_full
from chipviz.features import cache
from chipviz.files import bytes_below, replacing
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Progress
from chipviz.results.metrics import CurvePoint
from chipviz.results.models import Mark, ModelSpec
from chipviz.results.report import BundleReport, RunReport
from chipviz.results.run_folder import RunFolder
from chipviz.runs.processes import my_mark
from chipviz.runs.schema import prepare

Kind = Literal["train", "bundle", "model"]
State = Literal[
    "queued",
    "loading",
    "extracting",
    "fitting",
    "building",
    "verifying",
    "done",
    "failed",
    "stopped",
    "interrupted",
]
ENDED: frozenset[State] = frozenset({"done", "failed", "stopped", "interrupted"})
ACTIVE: frozenset[State] = frozenset(get_args(State)) - ENDED - {"queued"}
"""States in which a process computes the job."""

STALLED_AFTER_S = 15.0
"""Without a heartbeat for so long, a working job is shown as stalled."""

RESERVE_BYTES = 1 << 20
"""Size of a file that is given back where the disk is full, so that runs can end and be deleted."""
_BUSY_S = 30.0
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
_Record = TypeVar("_Record", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One row: a training run, the build of one bundle of a run, or the making of a model.

    Times are unix seconds.
    """

    job_id: str
    """Id of the job; a training run's is its run id. A model's is that of its folder under runs."""
    kind: Kind
    run_id: str
    """The run that a bundle belongs to; a training run's own id."""
    name: str
    created: float
    spec: str
    """JSON of a `RunConfig`, of a `CutSpec` for a bundle, or of a `ModelSpec` for a model."""
    state: State
    label: str = ""
    """What the job is doing, in words."""
    done: int = 0
    total: int = 0
    rate: float | None = None
    eta_s: float | None = None
    message: str = ""
    hint: str = ""
    """Why a job failed or was interrupted, and what to do. Empty otherwise."""
    fields: str = ""
    """Settings of `RunConfig` that the hint is about, parted by commas."""
    pid: int | None = None
    process: str | None = None
    """Process that computes it, as `processes.mark_of` tells it from others of its pid."""
    heartbeat: float | None = None
    finished: float | None = None
    result: str | None = None
    """JSON of a `BundleReport`, for a bundle. A run's report lies in its folder."""
    test_accuracy: float | None = None
    """Test accuracy in [0, 1] of a finished run's cut by rule *within*."""
    cut_layer: int | None = None
    """Where that rule cuts."""
    n_layers: int | None = None
    """Layers of the backbone."""
    parameter_ratio: float | None = None
    """Share of parameters, in [0, 1], that this cut removes."""
    stop_requested: bool = False
    stop_at: float | None = None
    """When the stop was asked for."""
    queued: float = 0.0
    """When it last joined the queue."""

    @property
    def refusal(self) -> Refusal:
        """Why it failed or was interrupted, and what to do."""
        return Refusal(self.message, self.hint, tuple(filter(None, self.fields.split(","))))

    @property
    def status(self) -> str:
        """The state, or `stalled` when the process that computes it gives no sign of life."""
        if self.state in ACTIVE and time.time() - (self.heartbeat or 0.0) > STALLED_AFTER_S:
            return "stalled"
        return self.state

    @property
    def config(self) -> RunConfig:
        """What a training run was asked to do.

        Raises:
            JobError: If the store was damaged.
        """
        return self._parse(RunConfig, self.spec)

    @property
    def cut(self) -> CutSpec:
        """Which cut a bundle job builds."""
        return self._parse(CutSpec, self.spec)

    @property
    def model(self) -> ModelSpec:
        """Which model a job makes."""
        return self._parse(ModelSpec, self.spec)

    @cached_property
    def bundle(self) -> BundleReport | None:
        """What a bundle job built. None before it is done."""
        return self._parse(BundleReport, self.result) if self.result else None

    def _parse(self, kind: type[_Record], text: str) -> _Record:
        try:
            return kind.model_validate_json(text)
        except ValueError:
            raise JobError(
                f"What the store holds of {self.job_id} is damaged.", "Delete it and start again."
            ) from None


_COLUMNS = tuple(field.name for field in fields(Job) if field.name != "stop_requested")


class Store:
    """All jobs under one home folder. Safe to use from many threads and processes at once."""

    def __init__(self, home: Path) -> None:
        """Open the store of `home`, or make a new one. An earlier version is migrated.

        Raises:
            JobError: If the folder cannot be written, or a newer chipviz wrote the store.
        """
        self.home = home
        self.path = home / "chipviz.db"
        self._reserve = home / "reserve"
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)  # texts of users lie here
            # SQLite does not wait its turn where one process prepares the file and others look.
            with FileLock(f"{self.path}.lock", timeout=_BUSY_S), self._open() as db:
                prepare(db, self.path, self.folder)
            # What SQLite needs beside the file is made by the first who opens it, and removed by
            # the last who closes it. While one stays open, a full disk can still be read.
            kept = self._connect()
            weakref.finalize(self, kept.close)
            self._keep_reserve()
        except (OSError, sqlite3.Error) as error:
            if is_disk_full(error, home):
                said = disk_full(home)
                raise JobError(said.message, "Free space, then try again.") from error
            raise JobError(
                f"The store {self.path} cannot be opened: {error}.",
                "Set CHIPVIZ_HOME to a folder on a local disk that you may write to.",
            ) from error

    def create_run(self, config: RunConfig, *, claim: bool = False) -> Job:
        """Add a training run: queued, or with `claim` already owned by this very process."""
        name = f"{Path(config.data).name or config.data} on {Path(config.backbone).name}"
        return self._insert("train", None, name, config.model_dump_json(), claim=claim)

    def create_bundle(self, run_id: str, cut: CutSpec) -> Job:
        """Queue the build of a bundle of a run."""
        name = f"layer-{cut.cut_layer}-{cut.pooling}-{cut.chip}"
        return self._insert("bundle", run_id, name, cut.model_dump_json(), claim=False)

    def create_model(self, spec: ModelSpec, *, claim: bool = False) -> Job:
        """Add the making of a model: queued, or with `claim` owned by this very process."""
        return self._insert("model", None, spec.name, spec.model_dump_json(), claim=claim)

    def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            JobError: If there is none.
        """
        for job in self._select("job_id = ?", (job_id,)):
            return job
        raise JobError(
            f"There is no run {job_id[:80]!r}.",
            "`python -m chipviz runs` and the home page list them.",
        )

    def run(self, run_id: str) -> Job:
        """The training run as it is now.

        Raises:
            JobError: If there is none of this id.
        """
        job = self.get(run_id)
        if job.kind == "bundle":
            raise JobError(
                f"{run_id} is a bundle of run {job.run_id}.", f"Give the run's id, {job.run_id}."
            )
        if job.kind == "model":
            raise JobError(f"{run_id} makes a model, and is no run.", "The page Models shows it.")
        return job

    def runs(self) -> list[Job]:
        """All training runs, newest first."""
        return self._select("kind = 'train' ORDER BY created DESC, rowid DESC")

    def models(self) -> list[Job]:
        """All jobs that make models, newest first."""
        return self._select("kind = 'model' ORDER BY created DESC, rowid DESC")

    def states(self) -> dict[str, State]:
        """Where every training run is, by its id, newest first. Cheaper than `runs`."""
        with self._open() as db:
            return dict(
                db.execute(
                    "SELECT run_id, state FROM jobs WHERE kind = 'train' "
                    "ORDER BY created DESC, rowid DESC"
                ).fetchall()
            )

    def bundles(self, run_id: str) -> list[Job]:
        """All bundle builds of a run, newest first."""
        return self._select(
            "kind = 'bundle' AND run_id = ? ORDER BY created DESC, rowid DESC", (run_id,)
        )

    def queue(self) -> list[Job]:
        """Jobs that wait, in the order they joined."""
        return self._select("state = 'queued' ORDER BY queued, rowid")

    def active(self) -> list[Job]:
        """Jobs that a process computes, or that died without saying so."""
        return self._select(f"state IN ({_marks(ACTIVE)}) ORDER BY queued, rowid", tuple(ACTIVE))

    def move(self, job_id: str, *, expect: Collection[State], to: State, **values: Any) -> bool:
        """Change the state if it still is one of `expect`, together with the given columns.

        Returns:
            Whether this call made the change. False means somebody else was faster.
        """
        values = {"state": to} | values
        if to == "queued":
            values["queued"] = time.time()
        where = f"job_id = ? AND state IN ({_marks(expect)})"
        return self._urgently(lambda: self._update(values, where, (job_id, *expect)))

    def claim(self, job_id: str) -> bool:
        """Take a queued job for this process. Exactly one of many that try hears True."""
        changed = self._update(
            _owned_by_this_process() | {"state": "loading"},
            "job_id = ? AND kind != 'bundle' AND state = 'queued'",
            (job_id,),
        )
        return changed or self._update(
            _owned_by_this_process() | {"state": "building"},
            "job_id = ? AND kind = 'bundle' AND state = 'queued'",
            (job_id,),
        )

    def report_progress(self, job_id: str, progress: Progress) -> bool:
        """Write where a working job is, and a heartbeat.

        Returns:
            False if the job is not working any more, so that its process can give up.
        """
        values = asdict(progress)
        values["state"] = values.pop("stage")
        values["heartbeat"] = time.time()
        return self._update_active(job_id, values)

    def beat(self, job_id: str) -> bool:
        """Say that the process of a working job is alive. False if the job works no more."""
        return self._update_active(job_id, {"heartbeat": time.time()})

    def request_stop(self, job_id: str) -> bool:
        """Ask a working job to stop. The first request's time stays."""
        values = {"stop_at": time.time()}
        return self._urgently(lambda: self._update_active(job_id, values, " AND stop_at IS NULL"))

    def stop_requested(self, job_id: str) -> bool:
        """Whether somebody asked this job to stop, or it works no more."""
        jobs = self._select("job_id = ?", (job_id,))
        return not jobs or jobs[0].stop_requested or jobs[0].state not in ACTIVE

    def finish(
        self,
        job_id: str,
        to: State,
        *,
        message: str = "",
        hint: str = "",
        fields: Sequence[str] = (),
        result: str | None = None,
        found: dict[str, Any] | None = None,
        pid: int | None = None,
    ) -> bool:
        """End a working job. False if it had already ended, or is not the job of `pid`.

        Args:
            job_id: The job.
            to: How it ended.
            message: Why, where it did not end well.
            hint: What to do then.
            fields: Settings of `RunConfig` that the hint is about.
            result: JSON of a `BundleReport`, for a bundle.
            found: `summary` of a run's report, for a run.
            pid: The process that ends it. None is somebody who may end any.
        """
        values: dict[str, Any] = {"state": to, "message": message, "hint": hint, "eta_s": None}
        values["fields"] = ",".join(fields)
        if result is not None:
            values["result"] = result
        values |= found or {}
        values["finished"] = time.time()
        owner = "" if pid is None else f" AND pid = {int(pid)}"
        ended = self._urgently(lambda: self._update_active(job_id, values, owner))
        self._keep_reserve()
        return ended

    def add_points(self, run_id: str, points: Sequence[CurvePoint]) -> None:
        """Add points to a live curve. One that is there already is replaced."""
        rows = [
            (
                run_id,
                point.n_train,
                point.cut.layer,
                point.cut.chip.vector.name,
                point.cut.chip.word,
                point.accuracy,
            )
            for point in points
        ]
        with self._open() as db, _transaction(db):
            db.executemany(
                "INSERT OR REPLACE INTO points (run_id, n_train, layer, pooling, chip, accuracy) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )

    def points(self, run_id: str, *, ends_only: bool = False) -> list[CurvePoint]:
        """The live curve, by number of training texts, then pooling, chip and layer.

        Args:
            run_id: The run.
            ends_only: Whether only the first and the last two states of each chip are wanted.
        """
        ranks = (
            "SELECT *, DENSE_RANK() OVER (PARTITION BY pooling, chip ORDER BY n_train) AS first, "
            "DENSE_RANK() OVER (PARTITION BY pooling, chip ORDER BY n_train DESC) AS last "
            "FROM points WHERE run_id = ?"
        )
        where = (
            f"({ranks}) WHERE first = 1 OR last <= 2" if ends_only else "points WHERE run_id = ?"
        )
        with self._open() as db:
            rows = db.execute(
                f"SELECT n_train, layer, pooling, chip, accuracy FROM {where} "
                "ORDER BY n_train, pooling, chip, layer",
                (run_id,),
            ).fetchall()
        return [
            CurvePoint(n_train, Cut(layer, ChipKey.named(vector, kind)), accuracy)
            for n_train, layer, vector, kind, accuracy in rows
        ]

    def points_mark(self, run_id: str) -> tuple[int, int, float]:
        """What changes whenever the live curve does: its points, their last texts, their sum."""
        with self._open() as db:
            return db.execute(
                "SELECT COUNT(*), COALESCE(MAX(n_train), 0), TOTAL(accuracy) FROM points "
                "WHERE run_id = ?",
                (run_id,),
            ).fetchone()

    def add_mark(self, job_id: str, mark: Mark) -> None:
        """Add a number to the live chart of a model's making. One of its step is replaced."""
        with self._open() as db:
            db.execute(
                "INSERT OR REPLACE INTO marks (job_id, name, step, n_tokens, value) "
                "VALUES (?, ?, ?, ?, ?)",
                (job_id, mark.name, mark.step, mark.n_tokens, mark.value),
            )

    def marks(self, job_id: str) -> list[Mark]:
        """The live chart of a model's making, by name and step."""
        with self._open() as db:
            rows = db.execute(
                "SELECT step, n_tokens, name, value FROM marks WHERE job_id = ? "
                "ORDER BY name, step",
                (job_id,),
            ).fetchall()
        return [Mark(*row) for row in rows]

    def report(self, run_id: str) -> RunReport:
        """What a finished run found. Parsed once for all who ask, as long as its file is the same.

        Raises:
            JobError: If it is not done, or its report is gone.
        """
        job = self.run(run_id)
        folder = self.folder(run_id)
        if job.state != "done":
            raise JobError(f"Run {run_id} is {job.status}, not done.", "Wait until it is done.")
        try:
            stat = folder.report.stat()
        except OSError:
            return folder.read_report()  # says so
        return _report(folder, stat.st_mtime_ns, stat.st_size)

    def folder(self, run_id: str) -> RunFolder:
        """The folder of a run, made or not.

        Raises:
            JobError: If the id has not the form of one: no path is made from foreign text.
        """
        if not _ID.fullmatch(run_id):
            raise JobError(
                f"{run_id[:80]!r} is not a run id.", "Run ids look like 20261121-235959-4f2a."
            )
        return RunFolder(self.home / "runs" / run_id)

    def exit_path(self, job: Job) -> Path:
        """Where a job's process writes, as its last act, how it ended."""
        return self.folder(job.run_id).exit_note(job.job_id if job.kind == "bundle" else None)

    def check(self) -> None:
        """Take and give back the write lock.

        Raises:
            sqlite3.Error: If nothing can be written now.
        """
        with self._open() as db, _transaction(db):
            db.execute("UPDATE jobs SET name = name WHERE job_id = ''")

    def delete(self, run_id: str) -> None:
        """Remove a run, its curve, its bundles, its folder, and features that it alone used.

        Raises:
            JobError: If there is no such run, it or one of its bundles is being computed, or a
                folder cannot be removed.
        """
        self.folder(run_id)  # refuses what is no id
        self.run(run_id)
        self._urgently(lambda: self._delete(run_id))
        self._keep_reserve()

    def forget_model(self, job_id: str) -> None:
        """Remove the record of a model's making and what it kept on the way. The model stays.

        Raises:
            JobError: If there is no such job, or it is at work.
        """
        self.folder(job_id)
        if self.get(job_id).kind != "model":
            raise JobError(f"{job_id} makes no model.", "Delete a run on the home page.")
        self._urgently(lambda: self._delete(job_id))
        self._keep_reserve()

    def _delete(self, run_id: str) -> None:
        """Folders first: on a full disk the rows cannot go before there is room for the change.

        Nobody can take the run meanwhile, since this is one transaction.
        """
        with self._open() as db, _transaction(db):
            busy = db.execute(
                f"SELECT 1 FROM jobs WHERE run_id = ? AND state IN ({_marks(ACTIVE)})",
                (run_id, *ACTIVE),
            ).fetchone()
            if busy:
                raise JobError(f"Run {run_id} is at work.", "Stop it first, then delete it.")
            self._remove_files(self.folder(run_id))
            db.execute("DELETE FROM points WHERE run_id = ?", (run_id,))
            db.execute("DELETE FROM marks WHERE job_id = ?", (run_id,))
            db.execute("DELETE FROM jobs WHERE run_id = ?", (run_id,))

    def _remove_files(self, run: RunFolder) -> None:
        folder, key = run.path, cache.used_by(run)
        try:
            if folder.exists():
                shutil.rmtree(folder)
            if key is not None:
                runs, folder = folder.parent, cache.folder_of(self.home, key)
                cache.drop(self.home, key, runs)
        except OSError as error:
            raise JobError(
                f"A folder of run {run.path.name} could not be removed: {error}.",
                f"Remove {folder} by hand, then delete the run again.",
            ) from error

    def bytes_of(self, run_id: str) -> int:
        """Bytes of the files that go when a run is deleted."""
        run = self.folder(run_id)
        key = cache.used_by(run)
        freed = bytes_below(run.path)
        if key is not None and cache.users(run.path.parent, key) == [run.path]:
            freed += bytes_below(cache.folder_of(self.home, key))
        return freed

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._connect()
        except sqlite3.OperationalError:
            if not self._give_reserve():
                raise
            db = self._connect()
        try:
            yield db
        finally:
            db.close()

    def _connect(self) -> sqlite3.Connection:
        """A connection that has looked into the file: what it needs beside it is there."""
        db = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def _keep_reserve(self) -> None:
        """Put some bytes by, where the disk has plenty."""
        with suppress(OSError):
            if not self._reserve.exists() and shutil.disk_usage(self.home).free > 4 * RESERVE_BYTES:
                with replacing(self._reserve) as part:
                    part.write_bytes(os.urandom(RESERVE_BYTES))  # no disk can make it smaller

    def _give_reserve(self) -> bool:
        """Give these bytes back. False if there are none."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    def _select(self, where: str, values: Sequence[object] = ()) -> list[Job]:
        with self._open() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(f"SELECT * FROM jobs WHERE {where}", values).fetchall()
        return [_job(row) for row in rows]

    def _update(self, values: dict[str, Any], where: str, where_values: Sequence[object]) -> bool:
        unknown = values.keys() - set(_COLUMNS)
        assert not unknown, f"no such columns: {unknown}"
        assignments = ", ".join(f"{column} = ?" for column in values)
        statement = f"UPDATE jobs SET {assignments} WHERE {where}"
        with self._open() as db:
            return db.execute(statement, (*values.values(), *where_values)).rowcount == 1

    def _urgently(self, write: Callable[[], T]) -> T:
        """Do what must be possible on a full disk too: how a job ends, and that it goes."""
        try:
            return write()
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if busy or not self._give_reserve():
                raise
            return write()

    def _update_active(self, job_id: str, values: dict[str, Any], also: str = "") -> bool:
        where = f"job_id = ? AND state IN ({_marks(ACTIVE)}){also}"
        return self._update(values, where, (job_id, *ACTIVE))

    def _insert(self, kind: Kind, run_id: str | None, name: str, spec: str, *, claim: bool) -> Job:
        now = time.time()
        values: dict[str, Any] = {"kind": kind, "name": name, "spec": spec, "created": now}
        values |= {"queued": now, "state": "loading" if claim else "queued"}
        if claim:
            values |= _owned_by_this_process()
        while True:
            job_id = _new_id(now)
            values |= {"job_id": job_id, "run_id": run_id or job_id}
            statement = (
                f"INSERT OR IGNORE INTO jobs ({', '.join(values)}) VALUES ({_marks(values)}) "
                "RETURNING *"  # read back at once: a scheduler may take it, a user delete it
            )
            with self._open() as db:
                db.row_factory = sqlite3.Row
                if row := db.execute(statement, tuple(values.values())).fetchone():
                    return _job(row)


@lru_cache(maxsize=16)
def _report(folder: RunFolder, _time: int, _size: int) -> RunReport:
    """A parsed report, by its file's time and size."""
    return folder.read_report()


def _job(row: sqlite3.Row) -> Job:
    return Job(**{name: row[name] for name in _COLUMNS}, stop_requested=row["stop_at"] is not None)


def _owned_by_this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "process": my_mark(),
        "heartbeat": time.time(),
        "message": "",
        "hint": "",
        "fields": "",
        "finished": None,
        "stop_at": None,
    }


def _new_id(now: float) -> str:
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
