"""A file or a folder has its name whole or not at all."""

import signal
import subprocess
import sys

import pytest

from chipviz import files
from chipviz.files import PROJECT, write_atomic


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "exit.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_atomic(path, "new, then a lone surrogate: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- a folder: complete or absent


def test_a_folder_has_its_final_name_only_when_it_is_complete(tmp_path):
    final = tmp_path / "model"
    with files.publish(final) as work:
        (work / "weights").write_text("all of them")
        assert not final.exists()
    assert (final / "weights").read_text() == "all of them"
    assert list(tmp_path.iterdir()) == [final]


def fill_the_disk(folder):
    (folder / "weights").write_text("ne")
    raise OSError("disk full")


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path):
    final = tmp_path / "model"
    with files.publish(final) as work:
        (work / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), files.publish(final) as work:
        fill_the_disk(work)
    assert (final / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_killed_process_leaves_nothing_that_counts_and_its_rest_is_swept(tmp_path):
    final = tmp_path / "model"
    code = f"""
import os, signal
from pathlib import Path
from chipviz import files
with files.publish(Path({str(final)!r})) as work:
    (work / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with files.publish(final) as work:
        (work / "weights").write_text("whole")
    assert list(tmp_path.iterdir()) == [final]


def test_the_sweep_spares_the_unfinished_folder_of_a_longer_name(tmp_path):
    with files.publish(tmp_path / "cut.1") as other:
        (other / "weights").write_text("x")
        with files.publish(tmp_path / "cut") as work:
            (work / "weights").write_text("y")
    assert (tmp_path / "cut.1" / "weights").read_text() == "x"


def test_published_files_can_be_read_by_everybody(tmp_path):
    with files.publish(tmp_path / "model") as work:
        (work / "weights").touch(0o600)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o644
