"""A run that version 1 of the store kept still opens: its report, its chips, its predictions.

`tests/stored_run` was written by the last code of that version: preset *published*, a Llama of two
layers, 42 training texts.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from safetensors import safe_open

from chipviz.chips.chip import Chips
from chipviz.keys import ChipKey, Cut
from chipviz.runs.schema import SCHEMA_VERSION
from chipviz.runs.store import Store
from tests.cli.test_cli import chipviz
from tests.page_driver import html_of, open_page

STORED = Path(__file__).resolve().parents[1] / "stored_run"
LAST, LINEAR, MLP = ChipKey.sound("last"), ChipKey.published("linear"), ChipKey.published("mlp")


@pytest.fixture
def stored(home):
    """A home as version 1 left it, and the run's id and report as they stood in its store."""
    home.mkdir()
    with closing(sqlite3.connect(home / "chipviz.db")) as db:
        db.executescript((STORED / "store.sql").read_text("utf-8"))
        db.execute("PRAGMA user_version = 1")
        run_id, result = db.execute("SELECT run_id, result FROM jobs").fetchone()
    shutil.copytree(STORED, home / "runs" / run_id, ignore=shutil.ignore_patterns("*.sql"))
    return home, run_id, json.loads(result)


def key_of(chip, pooling):
    """The version's own names: the published recipe was a pooling called raw."""
    return ChipKey.named(pooling, chip)


def test_the_report_says_what_it_said(stored):
    home, run_id, before = stored
    report = Store(home).report(run_id)
    assert set(report.chips) == {LAST, LINEAR, MLP}
    for old in before["scores"]:
        cut = Cut(old["layer"], key_of(old["chip"], old["pooling"]))
        new = report.score_at(cut, old["split"]).model_dump()
        assert {name: new[name] for name in old if name not in ("pooling", "repeats")} == {
            name: value for name, value in old.items() if name not in ("pooling", "repeats")
        }
    for rule, old in before["selection"].items():
        new = report.selection[rule]
        assert (new.cut_layer, new.key) == (old["cut_layer"], key_of(old["chip"], old["pooling"]))
        assert new.why == old["why"]
    assert report.choices(Store(home).folder(run_id).read_predictions().correct).keys() == (
        before["selection"].keys()
    )


def test_the_list_knows_it_and_the_store_is_of_this_version(stored):
    home, run_id, before = stored
    (job,) = Store(home).runs()
    assert (job.run_id, job.state, job.result) == (run_id, "done", None)
    assert job.test_accuracy == before["selection"]["within"]["test_accuracy"]
    assert job.n_layers == before["backbone"]["n_layers"]
    with closing(sqlite3.connect(home / "chipviz.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_the_curve_the_chips_and_the_predictions_are_there(stored):
    home, run_id, before = stored
    folder = Store(home).folder(run_id)
    points = Store(home).points(run_id)
    assert {point.cut.chip for point in points} == {LAST, LINEAR, MLP}
    with safe_open(folder.chips, "pt") as file:
        fingerprint = file.metadata()["chipviz"].split()[1]
    chips = Chips.load(folder.chips, fingerprint)
    assert set(chips.stacks) == {LAST, LINEAR, MLP}
    assert chips.at(Cut(1, MLP)).hidden_weight.shape == (256, 4)
    predictions = folder.read_predictions()
    for key in (LAST, LINEAR, MLP):
        right = predictions.at(Cut(1, key), "test") == predictions.labels["test"]
        assert right.mean() == Store(home).report(run_id).score_at(Cut(1, key), "test").accuracy
    assert len(folder.read_examples("test")) == before["task"]["n_test"]


def test_the_command_line_and_the_pages_show_it(stored):
    home, run_id, _ = stored
    assert chipviz(home, "show", run_id, "--json").json["run_id"] == run_id
    assert "as published" in chipviz(home, "show", run_id).out
    assert "Cut at layer" in html_of(open_page("layers", run=run_id))
