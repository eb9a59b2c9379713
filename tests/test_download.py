"""A process that asks the Hub is heard, followed and ended."""

import json
import sys
import time

import pytest

from chipviz import download
from chipviz.download import ask, say
from chipviz.progress import Cancelled, silent

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
