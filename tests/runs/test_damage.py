"""A flipped byte or a lost file of a run is named in a sentence, wherever it is read."""

import sqlite3
from contextlib import suppress

import pytest

from chipviz.chips.chip import Chips
from chipviz.errors import ChipvizError
from chipviz.runs.store import Store
from tests.example_run import finished_run
from tests.here import answered_here
from tests.page_driver import open_page

FILES = (
    "config.json",
    "report.json",
    "examples.jsonl",
    "checked.jsonl",
    "predictions.safetensors",
    "chips.safetensors",
    "features.txt",
)
HARMS = {
    "gone": None,
    "empty": b"",
    "a list": b"[]",
    "no text": b"\xff\xfe\x00\x01" * 9,
}


@pytest.fixture(autouse=True)
def here():
    """Whoever answers the pages reads the damaged files in this process."""
    with answered_here():
        yield


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    return Store(tmp_path)


def harm(path, how):
    path.unlink(missing_ok=True)
    if HARMS[how] is not None:
        path.write_bytes(HARMS[how])


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_f7_every_reader_of_a_damaged_run_gives_a_sentence(store, name, how):
    job = finished_run(store)
    folder = store.folder(job.run_id)
    harm(folder.path / name, how)
    readers = (
        folder.read_config,
        folder.read_report,
        lambda: store.report(job.run_id),
        lambda: folder.read_examples("test"),
        lambda: folder.read_examples("validation"),
        folder.read_predictions,
        lambda: Chips.load(folder.whole(folder.chips), ""),
    )
    for read in readers:
        with suppress(ChipvizError):
            read()
    for page in ("runs", "layers", "tokens", "bundle"):
        open_page(page, run=job.run_id)  # which sees that nothing unexpected is shown
    store.delete(job.run_id)


@pytest.mark.parametrize("column", ["spec", "result", "label", "name"])
def test_a_damaged_row_of_the_store_breaks_no_page(store, column):
    job = finished_run(store)
    with sqlite3.connect(store.path) as db:
        db.execute(f"UPDATE jobs SET {column} = ?", ("{\x00\ufffd",))
    db.close()
    for page in ("runs", "train", "layers", "tokens", "bundle"):
        open_page(page, run=job.run_id)


def test_what_is_not_whole_is_not_shown(store):
    """The sentence itself: which file of which run, and what to do."""
    job = finished_run(store)
    harm(store.folder(job.run_id).report, "a list")
    with pytest.raises(ChipvizError, match=f"report.json of run {job.run_id} is damaged") as caught:
        store.report(job.run_id)
    assert "train again" in caught.value.hint
