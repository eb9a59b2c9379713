"""Kill -9 in mid-extraction: of the worker, seen and resumed in the page; of the server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from playwright.sync_api import expect

from chipviz.config import RunConfig
from chipviz.runs import scheduler
from chipviz.runs.store import Store
from tests.browser.conftest import ROOT, _free_port, _wait_for
from tests.conftest import planted_rows

pytestmark = pytest.mark.slow
TEXTS = 10_000


@pytest.fixture(scope="module")
def config(tiny_backbone_folder, tmp_path_factory):
    """So many texts that even a tiny backbone reads for some seconds."""
    path = tmp_path_factory.mktemp("many") / "many.csv"
    lines = [f"{text},{label}" for text, label in planted_rows(TEXTS)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n", "utf-8")
    return RunConfig.checked(
        backbone=str(tiny_backbone_folder), data=str(path), template="{text} :", max_length=24
    )


def until(store, run_id, ready, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = store.get(run_id)
        if ready(job):
            return job
        assert job.state != "failed", job.message
        time.sleep(0.05)
    raise AssertionError(f"still {store.get(run_id)}")


def reading(job):
    return job.state == "extracting" and job.done > TEXTS // 10


def unbroken(config, home):
    """The same run in a process of its own, from the command line."""
    arguments = ["--backbone", config.backbone, "--data", config.data, "--max-length", "24"]
    arguments += ["--template", config.template, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "chipviz", "--home", str(home), "train", *arguments],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_f1_a_killed_worker_shows_as_interrupted_and_resumes_to_the_same_scores(
    page, app_url, app_home, config, tmp_path
):
    store = Store(app_home)
    run_id = scheduler.enqueue_run(store, config).run_id
    page.goto(f"{app_url}/train?run={run_id}")
    victim = until(store, run_id, reading)
    os.kill(victim.pid, signal.SIGKILL)
    expect(page.get_by_text(re.compile("Interrupted"))).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Resume").click()
    done = until(store, run_id, lambda job: job.state == "done")
    whole = unbroken(config, tmp_path)
    found = store.report(done.run_id).model_dump(mode="json")
    assert found["timing"]["n_tokens"] < whole["timing"]["n_tokens"], "read once, kept"
    assert found["scores"] == whole["scores"]
    expect(page.get_by_text(re.compile("Open the layers"))).to_be_visible()


def start_server(home, port):
    with (home / "server.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
            cwd=ROOT,
            env=os.environ | {"CHIPVIZ_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def test_f2_a_killed_server_leaves_the_worker_at_work_and_finds_it_again(page, config, tmp_path):
    home, port = tmp_path / "home", _free_port()
    home.mkdir()
    url = f"http://127.0.0.1:{port}"
    server = start_server(home, port)
    try:
        _wait_for(f"{url}/_stcore/health", server, home / "server.log")
        store = Store(home)
        run_id = scheduler.enqueue_run(store, config).run_id
        worker = until(store, run_id, reading)
        server.kill()
        server.wait()
        later = until(
            store, run_id, lambda job: job.done > worker.done or job.state != "extracting"
        )
        assert later.pid == worker.pid
        server = start_server(home, port)
        _wait_for(f"{url}/_stcore/health", server, home / "server.log")
        page.goto(f"{url}/?run={run_id}")
        expect(page.get_by_text(store.get(run_id).name).first).to_be_visible()
        done = until(store, run_id, lambda job: job.state == "done")
        assert done.pid == worker.pid
        expect(page.get_by_text(re.compile("done")).first).to_be_visible()
        with urllib.request.urlopen(f"{url}/api/health", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.kill()
        server.wait()
