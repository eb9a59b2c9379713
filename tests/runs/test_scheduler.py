"""Jobs: each starts once, none is shown alive that is dead, and no stranger is ever signalled."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from chipviz.config import CutSpec, RunConfig
from chipviz.errors import JobError
from chipviz.runs import scheduler as jobs
from chipviz.runs.processes import how_it_ended, mark_of, my_mark
from chipviz.runs.scheduler import Scheduler, reconcile, resume, stop
from chipviz.runs.store import ACTIVE, Store

CUT = CutSpec(cut_layer=3, pooling="mean")
FAKE_WORKER = """
import sys, time, types
from chipviz.progress import Progress

WITHIN = types.SimpleNamespace(test_accuracy=0.5, cut_layer=1, parameter_ratio=0.5)
REPORT = types.SimpleNamespace(
    selection={"within": WITHIN}, backbone=types.SimpleNamespace(n_layers=4)
)

def run(config, *, home, run_id, progress, **_):
    if config.data == "deaf": progress(Progress("extracting", "reading", 0, 1))
    with (home / "starts.txt").open("a") as file: file.write(run_id + "\\n")
    if config.data == "deaf": time.sleep(60)  # no longer loading, where any instruction can stop
    for n in range(config.max_length):
        if config.data == "waits" and (home / "go").exists(): break
        progress(Progress("extracting", "reading", n, config.max_length))
        time.sleep(0.02)
    with (home / "ends.txt").open("a") as file: file.write(run_id + "\\n")
    return REPORT

experiment = types.ModuleType("chipviz.experiment")
experiment.run = run
sys.modules["chipviz.experiment"] = experiment
from chipviz.runs.worker import main
sys.exit(main(sys.argv[1:]))
"""


def toy(steps=1, data="toy"):
    return RunConfig(backbone="tiny", data=data, max_length=steps)


ENDLESS = toy(steps=100_000)
UNTIL_GO = toy(steps=100_000, data="waits")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def fake_worker(monkeypatch):
    """Workers that compute nothing, in real processes; none survives the test."""
    started = []

    def command(store, job):
        return [sys.executable, "-c", FAKE_WORKER, "--home", str(store.home), job.job_id]

    def remembering_start(store, job):
        started.append(start(store, job))
        return started[-1]

    start = jobs.start
    monkeypatch.setattr(jobs, "worker_command", command)
    monkeypatch.setattr(jobs, "start", remembering_start)
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def stranger():
    """A process that has nothing to do with chipviz."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.kill()
    process.communicate()


def until(is_true, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (value := is_true()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
    return value


def working(store, process, config=ENDLESS):
    """A job that this process of another program is said to compute."""
    job = store.create_run(config, claim=True)
    store.move(job.job_id, expect=ACTIVE, to="extracting", **process)
    store.folder(job.run_id).path.mkdir(parents=True)
    return store.get(job.job_id)


def owner(process):
    return {"pid": process.pid, "process": mark_of(process.pid)}


def state(store, job):
    return store.get(job.job_id).state


def start_and_wait(store, config):
    """A fake worker at work."""
    job = store.create_run(config)
    process = jobs.start(store, job)
    until(lambda: state(store, job) == "extracting")
    return job, process


@pytest.mark.usefixtures("fake_worker")
def test_f1_a_worker_killed_at_work_leaves_an_interrupted_run_that_can_be_resumed(store):
    job, process = start_and_wait(store, ENDLESS)
    reconcile(store)
    assert state(store, job) == "extracting"
    process.send_signal(signal.SIGKILL)
    until(lambda: reconcile(store) or state(store, job) == "interrupted")
    ended = store.get(job.job_id)
    assert "while extracting" in ended.message
    assert "Resume" in ended.hint
    again = resume(store, job.run_id)
    assert (again.state, again.message, again.hint) == ("queued", "", "")
    scheduler = Scheduler(store)
    scheduler.tick()
    until(lambda: state(store, job) == "extracting")


def test_a_process_that_nobody_has_collected_yet_counts_as_dead(store):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    who = owner(psutil.Process(process.pid))
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    job = working(store, who)
    reconcile(store)
    assert state(store, job) == "interrupted"
    process.wait()


def test_f3_a_pid_that_another_program_has_now_is_neither_taken_for_the_worker_nor_signalled(
    store, stranger
):
    who = {"pid": stranger.pid, "process": "another boot:1"}
    job = working(store, who)
    stop(store, job.job_id)
    reconcile(store)
    assert state(store, job) == "stopped"
    other = working(store, who)
    reconcile(store)
    assert state(store, other) == "interrupted"
    assert stranger.is_running()
    assert stranger.status() != psutil.STATUS_ZOMBIE


def test_f3_a_clock_that_steps_changes_nothing_about_who_is_alive(store, stranger, monkeypatch):
    job = working(store, owner(stranger))
    # What psutil makes of the boot time when somebody sets the clock forward by an hour.
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: time.time() + 3600)
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    reconcile(store)
    assert state(store, job) == "extracting"


def test_a_process_that_has_ended_has_no_mark(stranger):
    mark = mark_of(stranger.pid)
    assert mark == mark_of(stranger.pid) != my_mark()
    stranger.kill()
    until(lambda: mark_of(stranger.pid) is None)


@pytest.mark.parametrize(
    ("status", "short", "words"),
    [
        (None, False, "ended without a word"),
        (-signal.SIGKILL, False, "was killed from outside"),
        (-signal.SIGKILL, True, "no memory left"),
        (-signal.SIGSEGV, True, "crashed (SIGSEGV)"),
        (1, True, "status 1"),
    ],
)
def test_f5_memory_is_blamed_only_where_the_system_says_so(status, short, words):
    said = how_it_ended(status, short_of_memory=short)
    assert words in said
    assert ("memory" in said) == ("memory" in words)


@pytest.mark.usefixtures("fake_worker")
def test_a_worker_that_crashes_says_by_which_signal(store):
    job, process = start_and_wait(store, ENDLESS)
    scheduler = Scheduler(store)
    scheduler._children.append(jobs._Child(job.job_id, job.queued, process, 0))
    process.send_signal(signal.SIGSEGV)
    until(lambda: scheduler.tick() or state(store, job) == "interrupted")
    ended = store.get(job.job_id)
    assert "crashed (SIGSEGV) while extracting" in ended.message
    assert "memory" not in ended.message + ended.hint


def test_a_queued_job_stops_at_once_and_never_starts(store, fake_worker):
    job = jobs.enqueue_run(store, toy())
    stop(store, job.job_id)
    assert state(store, job) == "stopped"
    Scheduler(store).tick()
    assert fake_worker == []


@pytest.mark.usefixtures("fake_worker")
def test_f10_a_job_at_work_that_is_stopped_ends_as_stopped_with_its_last_words(store):
    job, process = start_and_wait(store, ENDLESS)
    stop(store, job.job_id)
    assert process.wait(timeout=30) == 0
    ended = store.get(job.job_id)
    assert (ended.state, ended.message) == ("stopped", "")
    assert json.loads(store.exit_path(job).read_text())["state"] == "stopped"


@pytest.mark.usefixtures("fake_worker")
def test_f10_a_job_that_does_not_listen_is_killed_and_counts_as_stopped(store):
    job = store.create_run(toy(data="deaf"))
    process = jobs.start(store, job)
    until((store.home / "starts.txt").exists)
    stop(store, job.job_id)
    reconcile(store)
    assert process.poll() is None
    reconcile(store, kill_after_s=0.0)
    assert process.wait(timeout=30) == -signal.SIGKILL
    reconcile(store)
    assert state(store, job) == "stopped"


def test_stopping_what_has_ended_is_no_error_and_changes_nothing(store):
    job = store.create_run(toy(), claim=True)
    store.finish(job.job_id, "done")
    stop(store, job.job_id)
    assert state(store, job) == "done"
    with pytest.raises(JobError, match="There is no run"):
        stop(store, "nobody")


def test_stopping_a_job_of_this_very_process_only_asks(store):
    job = store.create_run(toy(), claim=True)
    stop(store, job.job_id)
    assert store.get(job.job_id).stop_requested


@pytest.mark.parametrize("ending", ["done", "failed", "stopped"])
def test_a_dead_worker_ends_as_it_wrote_with_its_last_act(store, ending):
    job = working(store, {"pid": 2**22 + 1, "process": "boot:1"})
    note = {
        "state": ending,
        "message": "m",
        "hint": "h",
        "fields": [],
        "result": None,
        "found": None,
    }
    store.exit_path(job).write_text(json.dumps(note | {"pid": job.pid, "process": "boot:1"}))
    reconcile(store)
    ended = store.get(job.job_id)
    assert (ended.state, ended.message, ended.hint) == (ending, "m", "h")


WORDS = '"message": "", "hint": "", "fields": [], "result": null, "found": null'


@pytest.mark.parametrize(
    "note",
    [
        "",
        '{"state": "done", "mess',
        "[]",
        '{"state": "done", %s, "pid": 1, "process": "boot:1"}',
        '{"state": "fine", %s, "pid": %d, "process": "boot:1"}',
        '{"state": "done", "pid": %d, "process": "boot:1"}',
    ],
)
def test_f8_a_torn_foreign_or_odd_note_never_makes_a_dead_worker_done(store, note):
    job = working(store, {"pid": 2**22 + 1, "process": "boot:1"})
    store.exit_path(job).write_text(note.replace("%d", str(job.pid)).replace("%s", WORDS))
    reconcile(store)
    assert state(store, job) == "interrupted"


@pytest.mark.parametrize("ended", ["interrupted", "stopped", "failed"])
def test_what_ended_too_early_can_be_resumed(store, ended):
    job = store.create_run(toy(), claim=True)
    store.finish(job.job_id, ended, message="why", hint="so")
    assert resume(store, job.run_id).state == "queued"
    assert [waiting.job_id for waiting in store.queue()] == [job.job_id]


def test_what_is_done_waiting_or_at_work_is_not_resumed(store):
    waiting, at_work, done = (store.create_run(toy()) for _ in range(3))
    for job in (at_work, done):
        store.claim(job.job_id)
    store.finish(done.job_id, "done")
    for job in (waiting, at_work, done):
        with pytest.raises(JobError, match=f"is {state(store, job)}"):
            resume(store, job.run_id)


def test_a_bundle_is_queued_only_for_a_run_that_is_done_and_once_a_cut(store):
    run = store.create_run(toy(), claim=True)
    with pytest.raises(JobError, match="is loading, not done"):
        jobs.enqueue_bundle(store, run.run_id, CUT)
    store.finish(run.job_id, "done")
    first = jobs.enqueue_bundle(store, run.run_id, CUT)
    assert jobs.enqueue_bundle(store, run.run_id, CUT) == first
    other = jobs.enqueue_bundle(store, run.run_id, CUT.model_copy(update={"cut_layer": 4}))
    assert other != first
    store.move(first.job_id, expect={"queued"}, to="failed")
    assert jobs.enqueue_bundle(store, run.run_id, CUT).job_id != first.job_id
    with pytest.raises(JobError, match="build of a bundle"):
        resume(store, first.job_id)


def test_l6_two_schedulers_start_each_job_exactly_once_one_at_a_time_in_order(store, fake_worker):
    queued = [jobs.enqueue_run(store, toy()).job_id for _ in range(3)]
    schedulers = [Scheduler(store, tick_s=0.05), Scheduler(Store(store.home), tick_s=0.05)]
    for scheduler in schedulers:
        scheduler.start()
    until(lambda: sum(scheduler.leads for scheduler in schedulers) == 1)
    until(lambda: all(store.get(job_id).state == "done" for job_id in queued))
    for scheduler in schedulers:
        scheduler.close()
    assert (store.home / "starts.txt").read_text().split() == queued
    assert (store.home / "ends.txt").read_text().split() == queued
    assert len(fake_worker) == 3


def test_l6_when_the_leading_server_goes_the_other_takes_over(store):
    first, second = Scheduler(store, tick_s=0.05), Scheduler(store, tick_s=0.05)
    first.start()
    until(lambda: first.leads)
    second.start()
    assert not second.leads
    first.close()
    until(lambda: second.leads)
    second.close()
    assert not second.leads
    assert not second.alive


def test_a_run_and_a_bundle_may_work_side_by_side_but_not_two_runs(store, fake_worker):
    done = store.create_run(toy(), claim=True)
    store.finish(done.job_id, "done")
    bundle = jobs.enqueue_bundle(store, done.run_id, CUT)
    first, second = jobs.enqueue_run(store, ENDLESS), jobs.enqueue_run(store, ENDLESS)
    scheduler = Scheduler(store)
    scheduler.tick()
    scheduler.tick()
    assert len(fake_worker) == 2, "a job that is starting has its place already"
    until(lambda: state(store, first) == "extracting" and state(store, bundle) != "queued")
    scheduler.tick()
    assert state(store, second) == "queued"
    assert len(fake_worker) == 2


@pytest.mark.usefixtures("fake_worker")
def test_a_worker_that_cannot_start_fails_its_job_in_words_and_the_queue_goes_on(
    store, monkeypatch
):
    fake = jobs.worker_command
    broken, good = jobs.enqueue_run(store, toy()), jobs.enqueue_run(store, toy())

    def command(store, job):
        return ["/nowhere"] if job.job_id == broken.job_id else fake(store, job)

    monkeypatch.setattr(jobs, "worker_command", command)
    scheduler = Scheduler(store)
    until(lambda: scheduler.tick() or state(store, good) == "done")
    assert state(store, broken) == "failed"
    assert "cannot start" in store.get(broken.job_id).message


def test_a_worker_that_dies_before_it_takes_its_job_fails_it_and_is_not_started_again(
    store, fake_worker, monkeypatch
):
    monkeypatch.setattr(jobs, "worker_command", lambda *_: [sys.executable, "-c", "exit(7)"])
    job = jobs.enqueue_run(store, toy())
    scheduler = Scheduler(store)
    until(lambda: scheduler.tick() or state(store, job) == "failed")
    assert "status 7" in store.get(job.job_id).message
    assert "log.txt" in store.get(job.job_id).hint
    assert len(fake_worker) == 1


def test_a_job_deleted_under_the_scheduler_does_not_end_the_scheduler(store, monkeypatch):
    def start(store, job):
        store.delete(job.run_id)
        raise FileNotFoundError("its folder went")

    monkeypatch.setattr(jobs, "start", start)
    scheduler = Scheduler(store, tick_s=0.01)
    scheduler.start()
    jobs.enqueue_run(store, toy())
    until(lambda: store.runs() == [])
    time.sleep(0.1)
    assert scheduler.alive
    scheduler.close()


def test_f2_a_worker_outlives_its_killed_server_and_the_next_server_meets_it_again(store):
    serve = f"""
import sys, time
from pathlib import Path
from chipviz.runs import scheduler as jobs
from chipviz.runs.store import Store
jobs.worker_command = lambda store, job: [
    sys.executable, "-c", {FAKE_WORKER!r}, "--home", str(store.home), job.job_id
]
jobs.Scheduler(Store(Path(sys.argv[1]))).start()
time.sleep(60)
"""
    job = jobs.enqueue_run(store, UNTIL_GO)
    command = [sys.executable, "-c", serve, str(store.home)]
    server = subprocess.Popen(command, cwd=jobs.PROJECT, start_new_session=True)
    until(lambda: state(store, job) == "extracting")
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    pid = store.get(job.job_id).pid
    scheduler = Scheduler(store)
    scheduler.start()
    until(lambda: scheduler.leads)
    assert state(store, job) == "extracting"
    (store.home / "go").touch()
    until(lambda: state(store, job) == "done")
    scheduler.close()
    assert store.get(job.job_id).pid == pid
    assert (store.home / "starts.txt").read_text().split() == [job.job_id]
