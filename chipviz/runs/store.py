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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from filelock import FileLock

from chipviz.config import RECOMMENDED, CutSpec, RunConfig
from chipviz.errors import JobError, Refusal
from chipviz.features import cache
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Progress
from chipviz.results.metrics import CurvePoint
from chipviz.results.report import BundleReport, RunReport
from chipviz.results.run_folder import RunFolder

Kind = Literal["train", "bundle"]
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

SCHEMA_VERSION = 2
_BUSY_S = 30.0
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT PRIMARY KEY, kind TEXT NOT NULL, run_id TEXT NOT NULL, name TEXT NOT NULL,
    created REAL NOT NULL, spec TEXT NOT NULL, state TEXT NOT NULL, queued REAL NOT NULL,
    label TEXT NOT NULL DEFAULT '', done INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0, rate REAL, eta_s REAL,
    message TEXT NOT NULL DEFAULT '', hint TEXT NOT NULL DEFAULT '',
    fields TEXT NOT NULL DEFAULT '',
    pid INTEGER, pid_created REAL, heartbeat REAL, finished REAL, result TEXT, stop_at REAL,
    test_accuracy REAL, cut_layer INTEGER, n_layers INTEGER, parameter_ratio REAL
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_by_run ON jobs (run_id, kind);
CREATE TABLE IF NOT EXISTS points (
    run_id TEXT NOT NULL, n_train INTEGER NOT NULL, layer INTEGER NOT NULL,
    pooling TEXT NOT NULL, chip TEXT NOT NULL, accuracy REAL NOT NULL,
    PRIMARY KEY (run_id, n_train, pooling, chip, layer)
) STRICT, WITHOUT ROWID;
"""


_NEW_COLUMNS = {
    "test_accuracy": "REAL",
    "cut_layer": "INTEGER",
    "n_layers": "INTEGER",
    "parameter_ratio": "REAL",
    "fields": "TEXT NOT NULL DEFAULT ''",
}
"""Columns of version 2 that version 1 has not."""


def summary(report: RunReport) -> dict[str, Any]:
    """What the list of runs shows of a report: the choice of rule *within*."""
    chosen = report.selection[RECOMMENDED]
    return {
        "test_accuracy": chosen.test_accuracy,
        "cut_layer": chosen.cut_layer,
        "n_layers": report.backbone.n_layers,
        "parameter_ratio": chosen.parameter_ratio,
    }


@dataclass(frozen=True)
class Job:
    """One row: a training run, or the build of one bundle of a run. Times are unix seconds."""

    job_id: str
    """Id of the job; a training run's is its run id."""
    kind: Kind
    run_id: str
    """The run that a bundle belongs to; a training run's own id."""
    name: str
    created: float
    spec: str
    """JSON of a `RunConfig`, or of a `CutSpec` for a bundle."""
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
    pid_created: float | None = None
    """Process that computes it, with its creation time: a pid alone may be somebody else's."""
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
        """What a training run was asked to do."""
        return RunConfig.model_validate_json(self.spec)

    @property
    def cut(self) -> CutSpec:
        """Which cut a bundle job builds."""
        return CutSpec.model_validate_json(self.spec)

    @cached_property
    def bundle(self) -> BundleReport | None:
        """What a bundle job built. None before it is done."""
        return BundleReport.model_validate_json(self.result) if self.result else None


_COLUMNS = frozenset(field.name for field in fields(Job)) - {"stop_requested"}


class Store:
    """All jobs under one home folder. Safe to use from many threads and processes at once."""

    def __init__(self, home: Path) -> None:
        """Open the store of `home`, or make a new one. An earlier version is migrated.

        Raises:
            JobError: If the folder cannot be written, or a newer chipviz wrote the store.
        """
        self.home = home
        self.path = home / "chipviz.db"
        try:
            home.mkdir(parents=True, exist_ok=True)
            # SQLite does not wait its turn where one process prepares the file and others look.
            with FileLock(f"{self.path}.lock", timeout=_BUSY_S), self._open() as db:
                self._prepare(db)
        except (OSError, sqlite3.Error) as error:
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

    def runs(self) -> list[Job]:
        """All training runs, newest first."""
        return self._select("kind = 'train' ORDER BY created DESC, rowid DESC")

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
        return self._update(
            values, f"job_id = ? AND state IN ({_marks(expect)})", (job_id, *expect)
        )

    def claim(self, job_id: str) -> bool:
        """Take a queued job for this process. Exactly one of many that try hears True."""
        changed = self._update(
            _owned_by_this_process() | {"state": "loading"},
            "job_id = ? AND kind = 'train' AND state = 'queued'",
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
        return self._update_active(job_id, {"stop_at": time.time()}, " AND stop_at IS NULL")

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
        owner = "" if pid is None else f" AND pid = {int(pid)}"
        return self._update_active(job_id, values | {"finished": time.time()}, owner)

    def add_points(self, run_id: str, points: Sequence[CurvePoint]) -> None:
        """Add points to a live curve. One that is there already is replaced."""
        rows = [
            (
                run_id,
                point.n_train,
                point.cut.layer,
                point.cut.chip.vector.name,
                point.cut.chip.kind,
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

    def points(self, run_id: str) -> list[CurvePoint]:
        """The live curve, by number of training texts, then pooling, chip and layer."""
        with self._open() as db:
            rows = db.execute(
                "SELECT n_train, layer, pooling, chip, accuracy FROM points WHERE run_id = ? "
                "ORDER BY n_train, pooling, chip, layer",
                (run_id,),
            ).fetchall()
        return [
            CurvePoint(n_train, Cut(layer, ChipKey.named(vector, kind)), accuracy)
            for n_train, layer, vector, kind, accuracy in rows
        ]

    def report(self, run_id: str) -> RunReport:
        """What a finished run found. Parsed once for all who ask, as long as its file is the same.

        Raises:
            JobError: If it is not done, or its report is gone.
        """
        job = self.get(run_id)
        folder = self.folder(run_id)
        if job.state != "done":
            raise JobError(f"Run {run_id} is {job.status}, not done.", "Wait until it is done.")
        try:
            stat = folder.report.stat()
            return _report(folder, stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError):
            raise JobError(
                f"The report of run {run_id} cannot be read.",
                "Its folder was changed; delete the run and train again.",
            ) from None

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
        return self.folder(job.run_id).exit_note(None if job.kind == "train" else job.job_id)

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
        run = self.folder(run_id)
        self.get(run_id)
        folder, key = run.path, cache.used_by(run)
        with self._open() as db, _transaction(db):
            marks = _marks(ACTIVE)
            busy = db.execute(
                f"SELECT 1 FROM jobs WHERE run_id = ? AND state IN ({marks})", (run_id, *ACTIVE)
            ).fetchone()
            if busy:
                raise JobError(f"Run {run_id} is at work.", "Stop it first, then delete it.")
            db.execute("DELETE FROM points WHERE run_id = ?", (run_id,))
            db.execute("DELETE FROM jobs WHERE run_id = ?", (run_id,))
        try:
            if folder.exists():
                shutil.rmtree(folder)
            if key is not None:
                runs, folder = folder.parent, cache.folder_of(self.home, key)
                cache.drop(self.home, key, runs)
        except OSError as error:
            raise JobError(
                f"Run {run_id} is off the list, but a folder could not be removed: {error}.",
                f"Remove {folder} by hand.",
            ) from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=NORMAL")
            yield db
        finally:
            db.close()

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise JobError(
                f"The store {self.path} has schema {version}, this chipviz knows {SCHEMA_VERSION}.",
                "A newer chipviz wrote it: update chipviz, or set CHIPVIZ_HOME to another folder.",
            )
        if version == 1:
            self._move_reports(db)
        if version < SCHEMA_VERSION:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT"
            )

    def _move_reports(self, db: sqlite3.Connection) -> None:
        """Migrate a store of version 1: reports move to the run folders, new columns are filled.

        Killed at any moment, it is done again: a report is written before its row forgets it.
        """
        there = {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
        for column, kind in _NEW_COLUMNS.items():
            if column not in there:
                db.execute(f"ALTER TABLE jobs ADD COLUMN {column} {kind}")
        rows = db.execute(
            "SELECT run_id, result FROM jobs WHERE kind = 'train' AND result IS NOT NULL"
        ).fetchall()
        for run_id, result in rows:
            try:
                report = RunReport.model_validate_json(result)
            except ValueError:
                continue  # nobody could read it before either
            folder = self.folder(run_id)
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_report(report)
            values = summary(report) | {"result": None}
            assignments = ", ".join(f"{column} = ?" for column in values)
            db.execute(
                f"UPDATE jobs SET {assignments} WHERE run_id = ? AND kind = 'train'",
                (*values.values(), run_id),
            )

    def _select(self, where: str, values: Sequence[object] = ()) -> list[Job]:
        with self._open() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(f"SELECT * FROM jobs WHERE {where}", values).fetchall()
        return [_job(row) for row in rows]

    def _update(self, values: dict[str, Any], where: str, where_values: Sequence[object]) -> bool:
        unknown = values.keys() - _COLUMNS
        assert not unknown, f"no such columns: {unknown}"
        assignments = ", ".join(f"{column} = ?" for column in values)
        statement = f"UPDATE jobs SET {assignments} WHERE {where}"
        with self._open() as db:
            return db.execute(statement, (*values.values(), *where_values)).rowcount == 1

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
    return Job(**row, stop_requested=row["stop_at"] is not None)


def _owned_by_this_process() -> dict[str, Any]:
    me = psutil.Process(os.getpid())
    return {
        "pid": me.pid,
        "pid_created": me.create_time(),
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
