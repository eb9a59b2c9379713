"""Faults: what dies, fills up or is damaged meanwhile costs no finished work and is said in words.

The letter and number in a test's name are those of the list that these tests go through.
"""

import gc
import hashlib
import json
import re
import shutil
import sqlite3
from contextlib import closing

import pytest

from chipviz import experiment
from chipviz.config import CutSpec, RunConfig
from chipviz.errors import JobError, SourceError
from chipviz.features.storage import Features, Writer
from chipviz.keys import ChipKey, Cut, Vector
from chipviz.progress import silent
from chipviz.results.metrics import CurvePoint
from chipviz.results.models import ModelRecord, ModelSpec
from chipviz.results.neurons import SparsifyReport
from chipviz.results.report import BundleReport, RunReport
from chipviz.results.run_folder import RunFolder
from chipviz.runs.scheduler import Scheduler, reconcile, stop
from chipviz.runs.schema import SCHEMA_VERSION
from chipviz.runs.store import RESERVE_BYTES, Store
from tests.page_driver import button, open_page, text_of
from tests.withstand.disks import fill

CONFIG = RunConfig(backbone="smollm2-135m", data="bbc-news")


def with_runs(home, n=2, n_bytes=1 << 20):
    """A home with finished runs that take some room."""
    store = Store(home)
    for _ in range(n):
        run = store.create_run(CONFIG, claim=True)
        store.add_points(
            run.run_id, [CurvePoint(n, Cut(0, ChipKey.sound("last")), 0.5) for n in range(50)]
        )
        store.folder(run.run_id).path.mkdir(parents=True)
        (store.folder(run.run_id).path / "chips.safetensors").write_bytes(bytes(n_bytes))
        store.finish(run.run_id, "failed", message="so that its page needs no report")
    return store


def test_f6_without_a_free_byte_runs_are_listed_and_deleted(small_disk):
    store = with_runs(small_disk)
    first, second = (run.run_id for run in store.runs())
    fill(small_disk)
    assert len(Store(small_disk).points(first)) == 50
    assert store.bytes_of(first) == 1 << 20
    store.delete(first)
    assert [run.run_id for run in Store(small_disk).runs()] == [second]
    assert not store.folder(first).path.exists()


def test_f6_a_server_that_starts_on_a_full_disk_lists_and_deletes_too(small_disk):
    with_runs(small_disk)
    gc.collect()
    assert not (small_disk / "chipviz.db-wal").exists()  # closed: SQLite's own files are gone
    fill(small_disk)
    store = Store(small_disk)
    store.delete(store.runs()[0].run_id)
    assert len(Store(small_disk).runs()) == 1


def test_f6_a_run_without_files_is_ended_stopped_and_deleted_from_the_reserve(small_disk):
    store = Store(small_disk)
    runs = [store.create_run(CONFIG, claim=True) for _ in range(2)]
    fill(small_disk)
    assert store.finish(runs[0].run_id, "failed", message="the disk is full")
    stop(store, runs[1].run_id)
    assert store.get(runs[1].run_id).stop_requested
    store.finish(runs[1].run_id, "stopped")
    for run in runs:
        store.delete(run.run_id)
    assert store.runs() == []


def test_f6_the_reserve_comes_back_when_there_is_room(tmp_path):
    store = with_runs(tmp_path)
    reserve = tmp_path / "reserve"
    assert reserve.stat().st_size == RESERVE_BYTES
    reserve.unlink()
    store.delete(store.runs()[0].run_id)
    assert reserve.stat().st_size == RESERVE_BYTES


def test_f6_pages_show_runs_on_a_full_disk_and_delete_them(small_disk, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(small_disk))
    store = with_runs(small_disk)
    run_id = store.runs()[0].run_id
    fill(small_disk)
    at = open_page("runs")
    assert not at.error
    button(at, f"delete_{run_id}").click().run()
    assert not at.error
    assert run_id not in [run.run_id for run in store.runs()]


def test_f6_what_a_full_disk_does_not_take_is_said_with_the_bytes_that_are_free(
    small_disk, monkeypatch
):
    monkeypatch.setenv("CHIPVIZ_HOME", str(small_disk))
    store = with_runs(small_disk)
    fill(small_disk)
    at = open_page("runs")
    assert not at.error, store
    button(at, "try_it").click().run()
    said = text_of(at).replace("\\", "")
    assert "The disk is full: 0.0 MiB are free" in said
    assert "Delete runs" in said


def test_f6_a_queue_on_a_full_disk_complains_once(small_disk, caplog):
    store = with_runs(small_disk, n=1)
    job = store.create_run(CONFIG, claim=True)
    store.move(job.job_id, expect={"loading"}, to="extracting", pid=2**22 + 1, process="gone")
    (small_disk / "reserve").unlink()
    fill(small_disk)
    scheduler = Scheduler(store)
    with caplog.at_level("WARNING"):
        for _ in range(20):
            scheduler._tick_safely()
    assert len(caplog.records) == 1


def test_f6_states_that_cannot_fit_are_refused_with_their_bytes_before_a_text_is_read(small_disk):
    sizes = {"train": 30_000, "validation": 100, "test": 100}
    features = Features(
        small_disk / "features", (Vector("block", "mean"),), 4, {"block": 32}, sizes
    )
    with pytest.raises(SourceError, match=r"and 18\.4 MiB are needed") as caught:
        Writer(features, {})
    assert caught.value.fields == ("max_train",)
    assert not list(features.folder.glob("*.npy"))


# --- files that change on disk ------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tiny_backbone_folder, toy_csv, tmp_path_factory):
    """A finished run of a tiny backbone, and its home."""
    home = tmp_path_factory.mktemp("sealed")
    config = RunConfig.checked(
        backbone=str(tiny_backbone_folder), data=str(toy_csv), poolings=("last",), max_length=24
    )
    folder = RunFolder(home / "runs" / "20261127-000000-0000")
    folder.path.mkdir(parents=True)
    told = {"progress": silent, "on_points": lambda _points: None}
    experiment.run(config, home=home, run_id=folder.path.name, folder=folder, **told)
    return home, folder


def sealed_files(folder):
    return sorted(json.loads(folder.sums.read_text()))


def flip(path):
    """Change one byte so that the file still has its form: what no parser sees."""
    content = bytearray(path.read_bytes())
    place = next(i for i in reversed(range(len(content))) if chr(content[i]).isdigit())
    content[place] ^= 1  # 0 and 1, 2 and 3, ... 8 and 9 change places
    path.write_bytes(content)


def test_f7_every_file_that_a_finished_run_is_read_from_is_sealed(sealed):
    _, folder = sealed
    read = {"config.json", "report.json", "chips.safetensors", "predictions.safetensors"}
    read |= {"examples.jsonl", "checked.jsonl", "prompt/tokenizer.json"}
    assert read <= set(sealed_files(folder))


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_f7_no_changed_file_of_a_run_is_read_and_each_is_named(sealed, tmp_path, how):
    home, original = sealed
    spec = CutSpec.at(Cut(1, ChipKey.sound("last")), "manual")
    for number, name in enumerate(sealed_files(original)):
        folder = RunFolder(tmp_path / f"{how}{number}")
        shutil.copytree(original.path, folder.path)
        path = folder.path / name
        if how == "flipped":
            flip(path)
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
        with pytest.raises(JobError, match=f"{re.escape(name)} of run .* is (damaged|gone)"):
            folder.whole(path)
        if name not in ("examples.jsonl", "predictions.safetensors"):  # which no bundle needs
            with pytest.raises(JobError, match=re.escape(name)):
                experiment.build(folder, spec, home=home, out=tmp_path / "out", progress=silent)
            assert not (tmp_path / "out").exists()


def test_f7_two_swapped_tokens_never_become_a_bundle(sealed, tmp_path):
    home, original = sealed
    folder = RunFolder(tmp_path / "swapped")
    shutil.copytree(original.path, folder.path)
    words = folder.prompt / "tokenizer.json"
    said = json.loads(words.read_text("utf-8"))
    vocabulary = said["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    words.write_text(json.dumps(said), "utf-8")
    spec = CutSpec.at(Cut(1, ChipKey.sound("last")), "manual")
    with pytest.raises(JobError, match=r"prompt/tokenizer\.json of run swapped is damaged"):
        experiment.build(folder, spec, home=home, out=tmp_path / "out", progress=silent)


def test_f7_a_run_that_begins_anew_is_not_held_to_what_it_was(sealed, tmp_path):
    _, original = sealed
    folder = RunFolder(tmp_path / "again")
    shutil.copytree(original.path, folder.path)
    folder.write_config(original.read_config().model_copy(update={"seed": 7}))
    assert folder.read_config().seed == 7


# --- stores of other versions -------------------------------------------------------------------

STORED = (
    RunConfig,
    CutSpec,
    RunReport,
    SparsifyReport,
    BundleReport,
    ModelSpec,
    ModelRecord,
)
RECORDS = {
    3: "115b4a49f63c7262",
    4: "9bf530a146657ff8",
    5: "722f077efa81fb1a",
    6: "50fc04ecce09a48f",
    7: "20ccf2ada746b2ec",
}
"""Schema version -> digest of the names in its records. A record that changes moves the number:
otherwise an older chipviz would call what a newer one wrote damaged."""


def test_f12_records_do_not_change_while_the_schema_number_stays():
    names = sorted(
        (found["title"], sorted(found["properties"]))
        for kind in STORED
        for found in [kind.model_json_schema(), *kind.model_json_schema().get("$defs", {}).values()]
        if "properties" in found
    )
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    assert digest[:16] == RECORDS[SCHEMA_VERSION]


def as_version_2(store):
    """Give a store the columns that it had when processes were known by their creation time."""
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("ALTER TABLE jobs DROP COLUMN process")
        db.execute("ALTER TABLE jobs ADD COLUMN pid_created REAL")
        db.execute("PRAGMA user_version = 2")
        db.commit()


def test_f12_a_store_of_version_2_is_migrated_with_a_backup(tmp_path):
    store = Store(tmp_path)
    done, working = (store.create_run(CONFIG, claim=True) for _ in range(2))
    store.finish(done.run_id, "done")
    cut = Cut(0, ChipKey.sound("last"))
    store.add_points(done.run_id, [CurvePoint(10, cut, 0.5)])
    as_version_2(store)
    new = Store(tmp_path)
    assert {run.run_id: run.state for run in new.runs()} == {
        done.run_id: "done",
        working.run_id: "loading",
    }
    assert [point.accuracy for point in new.points(done.run_id)] == [0.5]
    reconcile(new)  # nobody can say whose process it is
    assert new.get(working.run_id).state == "interrupted"
    with closing(sqlite3.connect(f"{store.path}.v2")) as backup:
        assert backup.execute("SELECT count(*) FROM jobs").fetchone() == (2,)
        assert backup.execute("PRAGMA user_version").fetchone() == (2,)
        assert "pid_created" in {row[1] for row in backup.execute("PRAGMA table_info(jobs)")}


def test_f12_a_migration_that_was_broken_off_is_done_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    run = store.create_run(CONFIG)
    as_version_2(store)
    with monkeypatch.context() as broken:
        broken.setattr("chipviz.runs.schema._SCHEMA", "CREATE nonsense;")
        with pytest.raises(JobError):
            Store(tmp_path)
    assert Store(tmp_path).get(run.run_id).state == "queued"
    with closing(sqlite3.connect(f"{store.path}.v2")) as backup:  # of before it was broken off
        assert "pid_created" in {row[1] for row in backup.execute("PRAGMA table_info(jobs)")}
