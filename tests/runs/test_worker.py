"""The worker: whatever the computation does, the store says in words how it ended."""

import json
import logging
import os
import re
import signal
import sqlite3
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest

import chipviz
from chipviz.config import CutSpec, RunConfig
from chipviz.errors import SourceError
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Cancelled, Progress
from chipviz.results.metrics import CurvePoint
from chipviz.results.report import BundleReport
from chipviz.runs import worker
from chipviz.runs.schema import summary
from chipviz.runs.store import Store
from tests.example_run import report_of

CONFIG = RunConfig(backbone="tiny", data="toy")
CUT = CutSpec(cut_layer=1, pooling="mean")


def bundle_of(path):
    return BundleReport(
        path=str(path),
        kind="token",
        cut_layer=1,
        pooling="mean",
        chip="linear",
        n_parameters=50,
        weight_bytes=200,
        folder_bytes=300,
        n_verified=2,
        max_difference=0.0,
        files={},
    )


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def computes(monkeypatch):
    """Puts a function in the place of `experiment.run` (and a second of `experiment.build`)."""

    def install(run=None, build=None):
        fake = types.ModuleType("chipviz.experiment")
        fake.run, fake.build = run, build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "chipviz.experiment", fake)
        monkeypatch.setattr(chipviz, "experiment", fake, raising=False)

    return install


def fails_with(error):
    def run(_config, **_):
        raise error

    return run


def train(store, **options):
    return worker.work(store, store.create_run(CONFIG, claim=True), **options)


def exit_note(store, job):
    return json.loads(store.exit_path(job).read_text())


def log_of(store, job):
    return store.folder(job.run_id).log.read_text()


def test_a_run_that_succeeds_is_done_with_its_report_its_points_and_its_config(store, computes):
    points = [CurvePoint(2, Cut(layer, ChipKey.sound("last")), 0.5) for layer in range(3)]

    def run(config, *, home, run_id, folder, progress, on_points):
        assert (config, home, folder) == (CONFIG, store.home, store.folder(run_id))
        assert store.get(run_id).state == "loading"
        progress(Progress("extracting", "reading", 1, 2))
        on_points(points)
        folder.write_report(report_of(run_id))
        return report_of(run_id)

    computes(run)
    job = train(store)
    assert (job.state, job.message) == ("done", "")
    assert store.report(job.run_id) == report_of(job.run_id)
    assert job.cut_layer == report_of(job.run_id).selection["within"].cut_layer
    assert store.points(job.run_id) == points
    note = exit_note(store, job)
    assert (note["state"], note["pid"], note["process"]) == (
        "done",
        os.getpid(),
        job.process,
    )


def test_the_exit_note_is_written_after_the_store_knows(store, computes, monkeypatch):
    seen = []

    def watching_write(path, _text):
        seen.append((path.name, store.get(path.parent.name).state))

    monkeypatch.setattr(worker, "write_atomic", watching_write)
    computes(lambda _config, **rest: report_of(rest["run_id"]))
    train(store)
    assert seen == [("exit.json", "done")]


def test_the_note_of_an_earlier_attempt_is_gone_while_the_next_one_works(store, computes):
    job = store.create_run(CONFIG, claim=True)
    store.folder(job.run_id).path.mkdir(parents=True)
    store.exit_path(job).write_text("{}")

    def run(_config, **rest):
        assert not store.exit_path(job).exists()
        return report_of(rest["run_id"])

    computes(run)
    assert worker.work(store, job).state == "done"


def test_a_users_error_shows_its_own_message_and_hint_without_a_traceback(store, computes):
    computes(fails_with(SourceError("No such data set 'x'.", "Take bbc-news.")))
    job = train(store)
    assert (job.state, job.message, job.hint) == (
        "failed",
        "No such data set 'x'.",
        "Take bbc-news.",
    )
    assert "Traceback" not in log_of(store, job)
    assert exit_note(store, job)["message"] == "No such data set 'x'."


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_f5_out_of_memory_is_called_so_and_comes_with_advice(store, computes, error):
    computes(fails_with(error))
    job = train(store)
    assert (job.state, job.message) == ("failed", "The job ran out of memory.")
    assert "length limit" in job.hint


def test_a_full_disk_is_called_so(store, computes):
    def run(_config, **_):
        with Path("/dev/full").open("w") as file:
            file.write("x")

    computes(run)
    job = train(store)
    assert job.state == "failed"
    assert re.match(r"The disk is full: [\d,.]+ MiB are free", job.message)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_f6_a_full_disk_is_recognised_through_the_libraries_that_wrap_it(store, computes, error):
    computes(fails_with(error))
    assert train(store).message.startswith("The disk is full")


def test_an_unforeseen_error_fails_with_its_name_and_leaves_the_traceback_in_the_log(
    store, computes
):
    computes(fails_with(ValueError("seven is not six")))
    job = train(store)
    assert (job.state, job.message) == ("failed", "Unexpected ValueError: seven is not six")
    assert str(store.folder(job.run_id).log) in job.hint
    assert "Traceback" in log_of(store, job)


def test_a_run_folder_that_cannot_be_made_fails_the_job_too(store, computes):
    computes(lambda _config, **rest: report_of(rest["run_id"]))
    (store.home / "runs").write_text("in the way")
    job = train(store)
    assert job.state == "failed"
    assert job.message.startswith("Unexpected")


def test_a_request_to_stop_ends_the_run_as_stopped_at_the_next_report(store, computes):
    def run(_config, *, run_id, progress, **_):
        store.request_stop(run_id)
        for _ in range(10_000):
            progress(Progress("extracting", "reading"))
            threading.Event().wait(0.005)
        raise AssertionError("nobody stopped it")

    computes(run)
    job = train(store)
    assert (job.state, job.message) == ("stopped", "")
    assert exit_note(store, job)["state"] == "stopped"


def test_f10_sigterm_ends_the_run_as_stopped_at_the_next_report(store, computes):
    def run(_config, *, progress, **_):
        progress(Progress("fitting", "before"))
        os.kill(os.getpid(), signal.SIGTERM)
        progress(Progress("fitting", "after"))
        raise AssertionError("nobody stopped it")

    before = signal.getsignal(signal.SIGTERM)
    computes(run)
    assert train(store).state == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("library", ["lets it pass", "wraps it", "swallows it"])
def test_f10_sigterm_breaks_loading_off_without_waiting_for_a_report(store, computes, library):
    """Imports and downloads take seconds without one; a library may put its own words around."""
    reached = []

    def load(_config, *, progress, **_):
        progress(Progress("loading", "importing"))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.2)  # what a long import would go on with
            reached.append("the end of the import")
        except Exception as error:
            if library == "lets it pass":
                raise
            if library == "wraps it":
                raise ImportError("failed to import something") from error
        progress(Progress("loading", "reading weights"))
        reached.append("the next step")

    computes(load)
    job = train(store)
    assert (job.state, job.message) == ("stopped", "")
    assert not reached


def test_a_keyboard_interrupt_leaves_the_run_stopped_and_goes_on_to_the_caller(store, computes):
    computes(fails_with(KeyboardInterrupt()))
    job = store.create_run(CONFIG, claim=True)
    with pytest.raises(KeyboardInterrupt):
        worker.work(store, job)
    assert store.get(job.job_id).state == "stopped"


def test_a_job_that_was_taken_away_stops_and_stays_what_it_became(store, computes):
    def run(_config, *, run_id, progress, **_):
        store.finish(run_id, "interrupted", message="taken")
        for _ in range(10_000):
            progress(Progress("extracting", "reading"))
            threading.Event().wait(0.005)

    computes(run)
    job = train(store)
    assert (job.state, job.message) == ("interrupted", "taken")


def test_progress_is_written_at_once_for_a_new_stage_and_seldom_within_one(
    store, computes, monkeypatch
):
    written, watched = [], []

    def remember(_job_id, progress):
        written.append(progress.label)
        return True

    def run(_config, *, run_id, progress, **_):
        for n in range(500):
            progress(Progress("extracting", f"e{n}"))
        for n in range(500):
            progress(Progress("fitting", f"f{n}"))
        return report_of(run_id)

    monkeypatch.setattr(store, "report_progress", remember)
    monkeypatch.setattr(worker, "WRITE_EVERY_S", 3600.0)
    computes(run)
    train(store, watch=lambda progress: watched.append(progress.label))
    assert written == ["starting", "e0", "f0"]
    assert len(watched) == 1001


def test_the_heart_beats_while_the_work_reports_nothing(store, computes, monkeypatch):
    monkeypatch.setattr(worker, "BEAT_EVERY_S", 0.01)
    beats = threading.Semaphore(0)
    monkeypatch.setattr(store, "beat", lambda _job_id: beats.release() or True)

    def run(_config, *, run_id, **_):
        assert all(beats.acquire(timeout=10) for _ in range(3))
        return report_of(run_id)

    computes(run)
    assert train(store).state == "done"
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_warnings_and_stages_reach_the_log_with_a_time(store, computes):
    def run(_config, *, run_id, progress, **_):
        progress(Progress("fitting", "fitting 30 chips"))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("ill-conditioned", UserWarning, stacklevel=1)
        logging.getLogger("transformers").warning("a weight is missing")
        return report_of(run_id)

    computes(run)
    log = log_of(store, train(store))
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d.*fitting: fitting 30 chips$", log, re.M)
    assert "ill-conditioned" in log


def test_a_store_that_takes_no_end_still_leaves_the_whole_end_in_the_note(
    store, computes, monkeypatch
):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    computes(lambda _config, **rest: report_of(rest["run_id"]))
    monkeypatch.setattr(store, "finish", refuse)
    job = train(store)
    assert job.state == "loading"
    note = exit_note(store, job)
    assert note["state"] == "done"
    assert note["found"] == summary(report_of(job.run_id))


def finished_run(store):
    run = store.create_run(CONFIG, claim=True)
    report = report_of(run.run_id)
    store.folder(run.run_id).path.mkdir(parents=True)
    store.folder(run.run_id).write_report(report)
    store.finish(run.job_id, "done", found=summary(report))
    return run


def claimed_bundle(store, run):
    bundle = store.create_bundle(run.run_id, CUT)
    store.claim(bundle.job_id)
    return store.get(bundle.job_id)


def test_a_bundle_is_built_from_its_run_into_a_folder_of_its_own(store, computes):
    folders = []

    def build(folder, cut, *, home, out, progress):
        assert (folder, cut, home) == (store.folder(run.run_id), CUT, store.home)
        assert out.parent == folder.bundles
        folders.append(out)
        progress(Progress("verifying", "comparing"))
        return bundle_of(out)

    computes(build=build)
    run = finished_run(store)
    jobs = [worker.work(store, claimed_bundle(store, run)) for _ in range(2)]
    assert [job.state for job in jobs] == ["done", "done"]
    assert [job.bundle for job in jobs] == [bundle_of(folder) for folder in folders]
    assert folders[0] != folders[1]
    assert store.get(run.run_id).state == "done"


@pytest.mark.parametrize("error", [ValueError("odd"), Cancelled()])
def test_a_build_that_does_not_end_well_leaves_no_folder(store, computes, error):
    folders = []

    def build(_folder, _cut, *, out, **_):
        out.mkdir(parents=True)
        (out / "model.safetensors").write_bytes(b"half")
        folders.append(out)
        raise error

    computes(build=build)
    job = worker.work(store, claimed_bundle(store, finished_run(store)))
    assert job.state == ("stopped" if isinstance(error, Cancelled) else "failed")
    assert not folders[0].exists()


def test_the_command_computes_only_what_it_could_claim(store, computes):
    computes(lambda _config, **rest: report_of(rest["run_id"]))
    job = store.create_run(CONFIG)
    arguments = ["--home", str(store.home), job.job_id]
    assert worker.main(arguments) == 0
    assert store.get(job.job_id).state == "done"
    assert worker.main(arguments) == worker.NOT_QUEUED
    computes(fails_with(ValueError("odd")))
    again = store.create_run(CONFIG)
    assert worker.main(["--home", str(store.home), again.job_id]) == 1
