"""Tidying removes what nothing uses, says so first, and touches nothing else."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from chipviz.config import RunConfig
from chipviz.data.pictures import Pictures
from chipviz.results.report import Example
from chipviz.runs import tidy
from chipviz.runs.store import Store
from tests.example_run import finished_run
from tests.page_driver import button, open_page, text_of
from tests.seeing import as_bytes, picture

DEAD = 2**22 + 1
"""A number that no process has: the kernel counts to 2^22."""


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    return Store(tmp_path)


def aged(path, content=b"x" * 100):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return path


def litter(store):
    """One of each kind of leftover, and beside each what must stay."""
    home, run = store.home, finished_run(store)
    folder = store.folder(run.run_id)
    used, unused = "a" * 24, "b" * 24
    folder.note_features(used)
    for key in (used, unused):
        (home / "features" / key).mkdir(parents=True)
        (home / "features" / key / "states.npy").write_bytes(b"y" * 1_000)
    upload = aged(home / "data" / "uploads" / "mine-0123456789abcdef.csv")
    mine = store.create_run(RunConfig(backbone="smollm2-135m", data=str(upload)))
    store.move(mine.run_id, expect={"queued"}, to="stopped")
    unknown = home / "runs" / "20200101-000000-aaaa"
    aged(unknown / "log.txt")
    os.utime(unknown, (1, 1))
    gone = [
        aged(folder.path / f"config.json.{DEAD}.part"),
        home / "features" / unused,
        aged(home / "data" / "uploads" / "old-fedcba9876543210.csv"),
        aged(home / "features" / f"{'c' * 24}.lock", b""),
        unknown,
        aged(home / "drafts" / "0123456789ab.json"),
    ]
    drafted = aged(home / "data" / "uploads" / "drafted-0123456789abcdef.csv")
    (home / "drafts" / "ba9876543210.json").write_text(json.dumps({"data_path": str(drafted)}))
    (home / "drafts" / "fa9876543210.json").write_text("[]")
    aged(folder.path / f"report.json.{os.getpid()}.part")  # its process lives
    aged(home / "features" / f"{used}.lock", b"")
    held = FileLock(aged(home / "backbones" / "being-fetched.lock", b""))
    held.acquire()
    os.utime(held.lock_file, (1, 1))
    return {str(path) for path in gone}, held


def everything(home):
    return {str(path) for path in home.rglob("*")}


def test_what_nothing_uses_is_listed_and_removed_and_nothing_else(store):
    gone, held = litter(store)
    before = everything(store.home)
    found = tidy.leftovers(store)
    assert {left.path for left in found} == gone
    assert everything(store.home) == before  # looking changes nothing
    sizes = {left.path: left.n_bytes for left in found}
    assert sorted(sizes.values()) == [0, 100, 100, 100, 100, 1_000]
    assert tidy.remove(store, found) == sum(sizes.values())
    left = before - everything(store.home)
    assert all(any(path == one or path.startswith(f"{one}/") for one in gone) for path in left)
    assert gone <= left
    assert not tidy.leftovers(store)
    held.release()


def test_pictures_stay_for_as_long_as_a_run_shows_one(store):
    run = finished_run(store)
    kept = Pictures(store.home / "data" / "pictures")
    reference, _ = kept.add(as_bytes(picture((9, 99, 9), 1)))
    os.utime(kept.folder, (1, 1))
    assert str(kept.folder) in {left.path for left in tidy.leftovers(store)}
    folder = store.folder(run.run_id)
    before = folder.read_examples("test")
    folder.write_examples("test", [Example(text=reference, label=0)])
    assert str(kept.folder) not in {left.path for left in tidy.leftovers(store)}
    folder.write_examples("test", before)
    tidy.remove(store, tidy.leftovers(store))
    assert not kept.has(reference)


def test_hidden_states_stay_while_a_run_is_at_work(store):
    gone, held = litter(store)
    held.release()
    store.create_run(RunConfig(backbone="smollm2-135m", data="bbc-news"), claim=True)
    features = {path for path in gone if path.endswith("b" * 24)}
    assert not features & {left.path for left in tidy.leftovers(store)}


def test_the_command_looks_first_and_removes_with_yes(store):
    gone, held = litter(store)

    def run(*options):
        command = [sys.executable, "-m", "chipviz", "--home", str(store.home), "tidy", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    said = json.loads(run("--json"))
    assert {left["path"] for left in said["leftovers"]} == gone
    assert said["n_bytes"] == 1_400
    assert not said["removed"]
    assert "tidy --yes" in run()
    assert "1,400 bytes are free again" in run("--yes")
    assert "Nothing is left over" in run()
    held.release()


def test_the_page_looks_first_and_removes_when_told(store):
    gone, held = litter(store)
    at = open_page("runs")
    button(at, "tidy_look").click().run()
    assert "hidden states that no run uses" in text_of(at)
    button(at, "tidy_remove").click().run()
    assert not gone & everything(store.home)
    held.release()


def test_a_server_that_starts_sweeps_what_crashes_left_and_nothing_else(store):
    part = aged(store.home / "runs" / "x" / f"report.json.{DEAD}.part")
    wheel = store.home / "backbones" / ".wheel.abcd_123"
    aged(wheel / "parts" / "pip-unpack" / "model.whl", b"z" * 5_000)
    build = store.home / "runs" / "x" / "bundle" / ".layer-3.abcdefgh"
    aged(build / "model.safetensors", b"z" * 3_000)
    for folder in (wheel, build):
        os.utime(folder, (1, 1))
    fresh = store.home / "data" / ".wheel.abcdefgh"
    fresh.mkdir(parents=True)
    upload = aged(store.home / "data" / "uploads" / "mine-0123456789abcdef.csv")
    assert tidy.sweep(store) == 8_100
    assert not any(path.exists() for path in (part, wheel, build))
    assert fresh.exists()  # somebody may be filling it
    assert upload.exists()
    assert tidy.sweep(store) == 0
