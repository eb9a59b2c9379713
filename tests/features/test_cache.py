"""Runs share features: the last one that used them takes them along, and nobody else."""

import pytest

from chipviz.config import RunConfig
from chipviz.features import cache
from chipviz.results.run_folder import RunFolder
from chipviz.runs.store import Store

KEY, OTHER = "0123456789abcdef01234567", "f" * 24
CONFIG = RunConfig.checked(backbone="tiny", data="toy")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def run_on(store, key):
    run_id = store.create_run(CONFIG).run_id
    store.folder(run_id).path.mkdir(parents=True)
    store.folder(run_id).note_features(key)
    return run_id


def features_of(store, key):
    folder = cache.folder_of(store.home, key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-last.npy").write_bytes(b"numbers")
    return folder


def test_the_last_run_that_used_features_takes_them_along(store):
    shared, others = features_of(store, KEY), features_of(store, OTHER)
    first, second, third = run_on(store, KEY), run_on(store, KEY), run_on(store, OTHER)
    store.delete(first)
    assert (shared / "train-last.npy").exists()
    store.delete(second)
    assert not shared.exists()
    assert (others / "train-last.npy").exists()
    store.delete(third)
    assert not others.exists()


def test_features_that_somebody_writes_stay(store):
    folder, run_id = features_of(store, KEY), run_on(store, KEY)
    with cache.lock_of(folder):
        store.delete(run_id)
    assert (folder / "train-last.npy").exists()


def test_a_run_that_came_to_no_features_is_deleted_alone(store):
    folder, run_id = features_of(store, KEY), store.create_run(CONFIG).run_id
    store.delete(run_id)
    assert folder.exists()


@pytest.mark.parametrize(
    "note", ["", "../../home", f"{KEY}/..", "F" * 24, "\udcff" * 24, KEY + "0"]
)
def test_a_note_that_is_no_key_leads_nowhere(tmp_path, note):
    run = RunFolder(tmp_path)
    run.features_note.write_text(note, "utf-8", "surrogatepass")
    assert cache.used_by(run) is None
