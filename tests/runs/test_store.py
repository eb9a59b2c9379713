"""The store: what is written stays, and of many that want to change a state exactly one does."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chipviz.config import CutSpec, RunConfig
from chipviz.errors import JobError
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Progress
from chipviz.results.metrics import CurvePoint
from chipviz.runs.processes import my_mark
from chipviz.runs.store import ACTIVE, ENDED, STALLED_AFTER_S, Store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = RunConfig(backbone="smollm2-135m", data="/somewhere/bbc-news")
CUT = CutSpec(cut_layer=3, pooling="mean")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def point(n_train, layer=0, accuracy=0.5):
    return CurvePoint(n_train, Cut(layer, ChipKey.sound("last")), accuracy)


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_run_is_read_back_by_another_store_as_it_was_written(store):
    job = store.create_run(CONFIG)
    again = Store(store.home).get(job.job_id)
    assert again == job
    assert again.config == CONFIG
    assert (again.kind, again.run_id, again.state) == ("train", job.job_id, "queued")
    assert again.name == "bbc-news on smollm2-135m"


def test_a_bundle_job_belongs_to_its_run_and_keeps_its_cut(store):
    run = store.create_run(CONFIG)
    older, newer = store.create_bundle(run.run_id, CUT), store.create_bundle(run.run_id, CUT)
    assert store.bundles(run.run_id) == [newer, older]
    assert newer.cut == CUT
    assert store.runs() == [run]


def test_the_queue_is_served_in_the_order_of_joining_even_after_a_resume(store):
    first, second, third = (store.create_run(CONFIG).job_id for _ in range(3))
    store.move(first, expect={"queued"}, to="stopped")
    store.move(first, expect={"stopped"}, to="queued")
    assert [job.job_id for job in store.queue()] == [second, third, first]
    assert [job.job_id for job in store.runs()] == [third, second, first]


def test_states_are_waiting_working_or_ended():
    assert {"loading", "extracting", "fitting", "building", "verifying"} == ACTIVE
    assert {"done", "failed", "stopped", "interrupted"} == ENDED


def test_a_move_happens_only_from_an_expected_state(store):
    job_id = store.create_run(CONFIG).job_id
    assert not store.move(job_id, expect={"failed"}, to="queued")
    assert store.get(job_id).state == "queued"
    assert store.move(job_id, expect={"queued", "failed"}, to="stopped", message="why")
    assert (store.get(job_id).state, store.get(job_id).message) == ("stopped", "why")


def test_a_column_that_does_not_exist_is_never_put_into_a_statement(store):
    job_id = store.create_run(CONFIG).job_id
    with pytest.raises(AssertionError, match="no such columns"):
        store.move(job_id, expect={"queued"}, to="stopped", **{"name = 'x', message": "y"})


def test_of_eight_processes_that_claim_one_job_exactly_one_wins(store):
    race = """
import multiprocessing, sys
from pathlib import Path
from chipviz.runs.store import Store
fork = multiprocessing.get_context("fork")
barrier, wins = fork.Barrier(8), fork.Queue()
def claim():
    barrier.wait()
    store = Store(Path(sys.argv[1]))
    wins.put([store.claim(job_id) for job_id in sys.argv[2:]])
racers = [fork.Process(target=claim) for _ in range(8)]
[racer.start() for racer in racers]
claims = [wins.get(timeout=20) for _ in racers]
[racer.join() for racer in racers]
print([sum(column) for column in zip(*claims)])
"""
    job_ids = [store.create_run(CONFIG).job_id for _ in range(20)]
    process = run_python(race, store.home, *job_ids)
    assert process.communicate()[0].strip() == str([1] * 20)


def test_l3_eight_processes_may_open_a_fresh_home_and_write_at_once(tmp_path):
    write = """
import multiprocessing, sys
from pathlib import Path
from chipviz.keys import ChipKey, Cut
from chipviz.results.metrics import CurvePoint
from chipviz.runs.store import Store
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(8)
def write(worker):
    barrier.wait()
    store = Store(Path(sys.argv[1]))
    for n in range(50):
        store.add_points("run", [CurvePoint(n, Cut(worker, ChipKey.sound("last")), 0.5)])
writers = [fork.Process(target=write, args=(i,)) for i in range(8)]
[writer.start() for writer in writers]
[writer.join() for writer in writers]
print([writer.exitcode for writer in writers])
"""
    process = run_python(write, tmp_path / "fresh")
    assert process.communicate()[0].strip() == str([0] * 8)
    points = Store(tmp_path / "fresh").points("run")
    assert [(p.n_train, p.cut.layer) for p in points] == [
        (n, i) for n in range(50) for i in range(8)
    ]


def test_a_claimed_job_has_an_owner_and_forgets_how_it_ended_before(store):
    run = store.create_run(CONFIG)
    store.move(run.job_id, expect={"queued"}, to="queued", message="old", stop_at=1.0)
    assert store.claim(run.job_id)
    job = store.get(run.job_id)
    assert (job.state, job.message, job.stop_requested) == ("loading", "", False)
    assert job.pid is not None
    assert job.process == my_mark()
    assert store.active() == [job]
    assert not store.claim(run.job_id)


def test_a_claimed_bundle_is_building(store):
    job = store.create_bundle(store.create_run(CONFIG).run_id, CUT)
    assert store.claim(job.job_id)
    assert store.get(job.job_id).state == "building"


def test_a_run_made_for_the_command_line_is_never_in_the_queue(store):
    job = store.create_run(CONFIG, claim=True)
    assert job.state == "loading"
    assert store.queue() == []


def test_progress_moves_a_working_job_and_leaves_an_ended_one_alone(store):
    job = store.create_run(CONFIG, claim=True)
    progress = Progress("extracting", "reading 3 of 9", 3, 9, 120.0, 2.5)
    assert store.report_progress(job.job_id, progress)
    now = store.get(job.job_id)
    assert (now.state, now.label, now.done, now.total) == ("extracting", "reading 3 of 9", 3, 9)
    assert (now.rate, now.eta_s) == (120.0, 2.5)
    assert store.finish(job.job_id, "done", result="{}")
    assert not store.report_progress(job.job_id, progress)
    assert not store.beat(job.job_id)
    assert not store.finish(job.job_id, "failed", message="too late")
    assert (store.get(job.job_id).state, store.get(job.job_id).message) == ("done", "")


def test_a_queued_job_takes_no_progress(store):
    job = store.create_run(CONFIG)
    assert not store.report_progress(job.job_id, Progress("fitting", "x"))
    assert store.get(job.job_id).state == "queued"


def test_only_its_own_process_can_end_a_job_in_the_name_of_that_process(store):
    job = store.create_run(CONFIG, claim=True)
    assert job.pid is not None
    assert not store.finish(job.job_id, "interrupted", pid=job.pid + 1)
    assert store.finish(job.job_id, "interrupted", pid=job.pid)


def test_f4_a_working_job_without_heartbeat_is_stalled_and_with_one_is_back(store):
    job = store.create_run(CONFIG, claim=True)
    assert job.status == "loading"
    long_ago = time.time() - STALLED_AFTER_S - 1
    store.move(job.job_id, expect=ACTIVE, to="fitting", heartbeat=long_ago)
    assert store.get(job.job_id).status == "stalled"
    store.beat(job.job_id)
    assert store.get(job.job_id).status == "fitting"
    store.move(job.job_id, expect=ACTIVE, to="done", heartbeat=long_ago)
    assert store.get(job.job_id).status == "done"


def test_a_stop_is_remembered_with_the_time_of_its_first_request(store):
    job = store.create_run(CONFIG, claim=True)
    assert not store.stop_requested(job.job_id)
    assert store.request_stop(job.job_id)
    first = store.get(job.job_id).stop_at
    assert not store.request_stop(job.job_id)
    assert store.stop_requested(job.job_id)
    assert store.get(job.job_id).stop_at == first


def test_a_job_that_was_deleted_or_ended_counts_as_asked_to_stop(store):
    job = store.create_run(CONFIG, claim=True)
    store.finish(job.job_id, "interrupted")
    assert store.stop_requested(job.job_id)
    store.delete(job.run_id)
    assert store.stop_requested(job.job_id)


def test_l3_a_burst_of_two_thousand_points_arrives_whole_and_in_order(store):
    expected = [point(n, layer) for n in range(100) for layer in range(20)]
    for start in range(0, 2000, 10):
        store.add_points("run", list(reversed(expected[start : start + 10])))
    assert store.points("run") == expected


def test_a_point_written_again_is_replaced_not_doubled(store):
    store.add_points("run", [point(10, accuracy=0.1), point(20)])
    store.add_points("run", [point(10, accuracy=0.9)])
    assert store.points("run") == [point(10, accuracy=0.9), point(20)]
    assert store.points("another") == []


def test_f1_killing_a_writer_at_any_moment_loses_no_acknowledged_point(store):
    write = """
import sys
from pathlib import Path
from chipviz.keys import ChipKey, Cut
from chipviz.results.metrics import CurvePoint
from chipviz.runs.store import Store
store = Store(Path(sys.argv[1]))
for n in range(10**9):
    cuts = (Cut(i, ChipKey.sound("last")) for i in range(3))
    store.add_points(sys.argv[2], [CurvePoint(n, cut, 0.5) for cut in cuts])
    print(n, flush=True)
"""
    for attempt in range(2):
        process = run_python(write, store.home, attempt)
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(40 + 13 * attempt)][-1]
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.communicate()[0].split())])
        kept = store.points(str(attempt))
        assert len(kept) % 3 == 0, "a half-written batch is visible"
        assert kept[-1].n_train >= acknowledged
    with sqlite3.connect(store.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize(
    "run_id", ["", "..", "../x", "/etc", "20261121-235959-4f2a/..", "20261121-235959-4F2A", "a\0b"]
)
def test_no_path_is_made_from_what_is_not_a_run_id(store, run_id):
    with pytest.raises(JobError, match="not a run id"):
        store.folder(run_id)
    with pytest.raises(JobError, match="not a run id"):
        store.delete(run_id)


def test_run_ids_sort_by_time_and_lie_under_the_home(store):
    job = store.create_run(CONFIG)
    assert store.folder(job.run_id).path == store.home / "runs" / job.run_id
    assert job.run_id[:8].isdigit()


def test_an_unknown_run_is_refused_with_a_hint(store):
    with pytest.raises(JobError, match="There is no run 'nobody'") as caught:
        store.get("nobody")
    assert caught.value.hint


def test_deleting_a_run_takes_its_curve_its_bundles_and_its_folder_and_no_others(store):
    run, other = store.create_run(CONFIG), store.create_run(CONFIG)
    bundle = store.create_bundle(run.run_id, CUT)
    for job in (run, other):
        store.add_points(job.run_id, [point(1)])
        store.folder(job.run_id).path.mkdir(parents=True)
    store.delete(run.run_id)
    assert store.runs() == [other]
    assert store.points(run.run_id) == []
    assert store.points(other.run_id) == [point(1)]
    assert not store.folder(run.run_id).path.exists()
    assert store.folder(other.run_id).path.exists()
    with pytest.raises(JobError, match="There is no run"):
        store.get(bundle.job_id)


def test_a_folder_that_cannot_be_removed_is_named(store, monkeypatch):
    def refuse(_folder):
        raise PermissionError("not yours")

    run = store.create_run(CONFIG)
    store.folder(run.run_id).path.mkdir(parents=True)
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(JobError, match="not yours") as caught:
        store.delete(run.run_id)
    assert str(store.folder(run.run_id).path) in caught.value.hint


def test_a_run_at_work_or_with_a_bundle_at_work_is_not_deleted(store):
    run = store.create_run(CONFIG, claim=True)
    with pytest.raises(JobError, match="is at work"):
        store.delete(run.run_id)
    store.finish(run.job_id, "done")
    bundle = store.create_bundle(run.run_id, CUT)
    store.claim(bundle.job_id)
    with pytest.raises(JobError, match="is at work"):
        store.delete(run.run_id)
    store.finish(bundle.job_id, "failed")
    store.delete(run.run_id)


def test_f12_a_store_of_a_newer_chipviz_is_refused_and_left_alone(store):
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(JobError, match="schema 99") as caught:
        Store(store.home)
    assert "update chipviz" in caught.value.hint


def test_a_home_that_cannot_hold_a_store_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match="cannot be opened"):
        Store(tmp_path / "file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "chipviz.db").write_bytes(b"no database, " * 100)
    with pytest.raises(JobError, match="cannot be opened"):
        Store(tmp_path / "broken")
