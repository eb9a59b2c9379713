"""The tables of the store, and how those of an earlier version become those of this one."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from chipviz.config import RECOMMENDED
from chipviz.errors import JobError
from chipviz.files import replacing
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder

FolderFn = Callable[[str], RunFolder]

SCHEMA_VERSION = 7
"""Moves with the tables and with every record that is kept: code reads the stores it knows."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT PRIMARY KEY, kind TEXT NOT NULL, run_id TEXT NOT NULL, name TEXT NOT NULL,
    created REAL NOT NULL, spec TEXT NOT NULL, state TEXT NOT NULL, queued REAL NOT NULL,
    label TEXT NOT NULL DEFAULT '', done INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0, rate REAL, eta_s REAL,
    message TEXT NOT NULL DEFAULT '', hint TEXT NOT NULL DEFAULT '',
    fields TEXT NOT NULL DEFAULT '',
    pid INTEGER, process TEXT, heartbeat REAL, finished REAL, result TEXT, stop_at REAL,
    test_accuracy REAL, cut_layer INTEGER, n_layers INTEGER, parameter_ratio REAL
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_by_run ON jobs (run_id, kind);
CREATE TABLE IF NOT EXISTS points (
    run_id TEXT NOT NULL, n_train INTEGER NOT NULL, layer INTEGER NOT NULL,
    pooling TEXT NOT NULL, chip TEXT NOT NULL, accuracy REAL NOT NULL,
    PRIMARY KEY (run_id, n_train, pooling, chip, layer)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (
    job_id TEXT NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL, n_tokens INTEGER NOT NULL,
    value REAL NOT NULL, PRIMARY KEY (job_id, name, step)
) STRICT, WITHOUT ROWID;
"""
_NEW_COLUMNS = {
    "test_accuracy": "REAL",
    "cut_layer": "INTEGER",
    "n_layers": "INTEGER",
    "parameter_ratio": "REAL",
    "fields": "TEXT NOT NULL DEFAULT ''",
    "process": "TEXT",
}
"""Columns that earlier versions have not."""


def prepare(db: sqlite3.Connection, path: Path, folder_of: FolderFn) -> None:
    """Make the tables of a new store, or bring an earlier version up to date.

    Args:
        db: A connection to the store, which nobody else prepares.
        path: Its file.
        folder_of: The folder of a run, by its id.

    Raises:
        JobError: If a newer chipviz wrote it.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise JobError(
            f"The store {path} has schema {version}, this chipviz knows {SCHEMA_VERSION}.",
            "A newer chipviz wrote it: update chipviz, or set CHIPVIZ_HOME to another folder.",
        )
    if 0 < version < SCHEMA_VERSION:
        _migrate(db, path, folder_of, version)
    if version < SCHEMA_VERSION:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT")


def _migrate(db: sqlite3.Connection, path: Path, folder_of: FolderFn, version: int) -> None:
    """Bring an earlier version up to date. What it was is kept beside it.

    Killed at any moment, it is done again.
    """
    kept = path.with_name(f"{path.name}.v{version}")
    if not kept.exists():  # what a broken migration left half done is no backup
        with replacing(kept) as part, closing(sqlite3.connect(part)) as backup:
            db.backup(backup)
    there = {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
    for column, kind in _NEW_COLUMNS.items():
        if column not in there:
            db.execute(f"ALTER TABLE jobs ADD COLUMN {column} {kind}")
    if version == 1:
        _move_reports(db, folder_of)
    if "pid_created" in there:  # whoever is at work now counts as interrupted, and is resumed
        db.execute("ALTER TABLE jobs DROP COLUMN pid_created")


def _move_reports(db: sqlite3.Connection, folder_of: FolderFn) -> None:
    """Move the reports of version 1 to the run folders.

    A report is written before its row forgets it.
    """
    rows = db.execute(
        "SELECT run_id, result FROM jobs WHERE kind = 'train' AND result IS NOT NULL"
    ).fetchall()
    for run_id, result in rows:
        try:
            report = RunReport.model_validate_json(result)
        except ValueError:
            continue  # nobody could read it before either
        folder = folder_of(run_id)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_report(report)
        values = summary(report) | {"result": None}
        assignments = ", ".join(f"{column} = ?" for column in values)
        db.execute(
            f"UPDATE jobs SET {assignments} WHERE run_id = ? AND kind = 'train'",
            (*values.values(), run_id),
        )


def summary(report: RunReport) -> dict[str, Any]:
    """What the list of runs shows of a report: the choice of rule *within*."""
    chosen = report.selection[RECOMMENDED]
    return {
        "test_accuracy": chosen.test_accuracy,
        "cut_layer": chosen.cut_layer,
        "n_layers": report.backbone.n_layers,
        "parameter_ratio": chosen.parameter_ratio,
    }
