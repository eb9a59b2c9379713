"""One real server a session, in its own home; what it fetched is shared between sessions."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from chipviz.runs import scheduler
from chipviz.runs.store import Store
from tests.conftest import shared_home
from tests.example_run import EVIL, LABELS, built_bundle, finished_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args):
    chromium = os.environ.get("CHIPVIZ_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here: apt-get install -y chromium, or set CHIPVIZ_CHROMIUM")
    return {
        **browser_type_launch_args,
        "executable_path": chromium,
        "args": ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    }


@pytest.fixture(scope="session")
def base_url():
    """The plugin's own fixture of this name warns under pytest 9, and warnings are errors here."""
    return None


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args):
    return {
        **browser_context_args,
        "viewport": {"width": 1280, "height": 900},
        "accept_downloads": True,
    }


@pytest.fixture(scope="session")
def app_home(tmp_path_factory):
    return shared_home(tmp_path_factory)


@pytest.fixture(scope="session")
def app_url(app_home):
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with (app_home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
            cwd=ROOT,
            env=os.environ | {"CHIPVIZ_HOME": str(app_home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(f"{url}/_stcore/health", server, app_home / "server.log")
        yield url
    finally:
        store = Store(app_home)
        for job in store.queue() + store.active():
            scheduler.stop(store, job.job_id)
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def seeded(app_home):
    """A finished run of hostile data, written past the engine."""
    store = Store(app_home)
    run = finished_run(store, text=EVIL, label_names=[EVIL, *LABELS[1:]])
    built_bundle(store, run.run_id)
    return run


@pytest.fixture
def page(page):
    """A page that fails the test when a script on it breaks."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    yield page
    assert errors == []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no server after 60 s: {log.read_text()}")
