"""A data set of the Hub comes whole and of one commit; each way to say no has its sentence."""

import errno
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from chipviz import download
from chipviz.data import hub as data_hub
from chipviz.data.hub import fetch_hub_data
from chipviz.data.pictures import Pictures
from chipviz.data.tables import read_table
from chipviz.errors import SourceError
from chipviz.progress import Cancelled, silent
from tests.seeing import COLOURS, picture

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(answer):
    """A Hub on this machine; `answer(handler)` writes the whole response."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def saying(status, code=None):
    def answer(handler):
        handler.send_response(status)
        if code:
            handler.send_header("X-Error-Code", code)
            handler.send_header("X-Error-Message", "no")
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    return answer


def trickle(handler):
    """One byte a second, for as long as somebody listens."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(1)
    except OSError:
        return


@pytest.fixture
def online(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("answer", "source", "said"),
    [
        (saying(403, "GatedRepo"), "owner/name", "The data set owner/name is gated"),
        (saying(401, "RepoNotFound"), "owner/name", "The Hub has no data set owner/name"),
        (saying(404, "RepoNotFound"), "owner/name:sub", "The Hub has no data set owner/name"),
        (saying(404, "RevisionNotFound"), "owner/name@v7", "has no revision 'v7'"),
        (saying(500), "owner/name", "is not on this machine and the Hub did not answer"),
        (trickle, "owner/name", "The Hub sent nothing of owner/name for 6 seconds"),
    ],
)
def test_each_way_to_say_no_has_its_sentence(home, monkeypatch, answer, source, said):
    monkeypatch.setattr(download, "PATIENCE_S", 6.0 if answer is trickle else 60.0)
    with hub(answer) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(SourceError, match=said) as refused:
            read_table(source, home)
    assert refused.value.hint
    assert not list(home.rglob("*.parquet"))


def test_without_a_network_the_sentence_says_so_and_a_copy_is_taken_where_there_is_one(home):
    with pytest.raises(SourceError, match=r"owner/name:sub is not on this machine and the Hub"):
        read_table("owner/name:sub", home)
    folder = home / "data" / "hub" / f"owner--name--sub@{SHA}"
    folder.mkdir(parents=True)
    write_splits(folder)
    for source in ("owner/name:sub", f"owner/name:sub@{SHA[:7]}"):
        table = read_table(source, home)
        assert (table.name, table.revision) == ("name:sub", SHA)
        assert table.label_names == {"label": ["no", "yes"]}
    with pytest.raises(SourceError, match="is not on this machine"):
        read_table("owner/name:sub@other", home)


def test_a_cancel_ends_the_process(home):
    def stop(_):
        raise Cancelled

    with pytest.raises(Cancelled):
        fetch_hub_data("owner/name", home, stop)


@pytest.mark.parametrize(
    "source", ["a b", "a/b/c", "..", "a/..", "-x/y", "a/b:", "a/b@", "a/b:c/d", "a\n", "a/b@--x"]
)
def test_what_is_no_id_is_refused_before_anybody_is_asked(home, monkeypatch, source):
    monkeypatch.setattr(download, "ask", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(SourceError, match="no Hub id"):
        fetch_hub_data(source, home, silent)


# --- the other half, in this process ------------------------------------------------------------


def loaded(**splits):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"text": [f"{name} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]},
                features=features,
            )
            for name, n in splits.items()
        }
    )


def write_splits(folder):
    for name, rows in loaded(train=8, test=4).items():
        rows.to_parquet(folder / f"{name}.parquet")


def test_a_data_set_is_written_by_splits_with_its_class_names(tmp_path, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((*arguments, options["revision"]))
        return loaded(train=8, dev=4, validation=2, test_matched=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    final = tmp_path / f"x@{SHA}"
    assert data_hub._bring("owner/name", "sub", SHA, False, final) is None
    assert asked == [("owner/name", "sub", SHA)]
    assert sorted(file.name for file in final.iterdir()) == ["train.parquet", "validation.parquet"]
    table = read_table(str(final), tmp_path)
    assert [len(frame) for frame in table.frames.values()] == [8, 2]
    assert table.label_names == {"label": ["no", "yes"]}


@pytest.mark.parametrize("as_files", [True, False])
def test_a_data_set_of_pictures_comes_with_its_pictures(tmp_path, monkeypatch, as_files):
    """On the Hub they are cells; a script or a loader of folders leaves paths of its cache."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))}
    )
    shown = [picture(COLOURS[name], i) for i in range(8) for name in COLOURS]
    cells: list[object] = list(shown)
    if as_files:
        cells = [str(tmp_path / f"{i}.png") for i in range(len(shown))]
        for path, one in zip(cells, shown, strict=True):
            one.save(str(path))
    rows = {"image": cells, "label": [i % 3 for i in range(len(shown))]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=whole, test=whole)
    )
    final = tmp_path / "home" / f"x@{SHA}"
    assert data_hub._bring("owner/name", "", SHA, False, final) is None
    for path in tmp_path.glob("*.png"):
        path.unlink()  # what was brought stands by itself
    table = read_table(str(final), tmp_path / "home")
    assert table.pictures == ("image",)
    assert table.label_names == {"label": list(COLOURS)}
    store = Pictures(tmp_path / "home" / "data" / "pictures")
    for reference, one in zip(table.frames["train"]["image"], shown, strict=True):
        assert np.array_equal(np.asarray(store.open(reference)), np.asarray(one))


def test_what_cannot_be_read_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b'].")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    refused = data_hub._bring("owner/name", "", SHA, False, tmp_path / "x")
    assert refused is not None
    error = download.refusal(refused, "data set", "owner/name", "")
    assert "Please pick one among: ['a', 'b']" in error.message
    assert "owner/name:SUBSET" in error.hint
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_to_the_process_that_asks(tmp_path, monkeypatch, capsys):
    def fill(*_, **__):
        full = OSError(errno.ENOSPC, "No space left on device")
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    monkeypatch.setattr(datasets, "load_dataset", fill)
    with download.saying_full():
        data_hub._bring("owner/name", "", SHA, False, tmp_path / "x")
    assert json.loads(capsys.readouterr().out) == {"refused": "full"}
    assert list(tmp_path.iterdir()) == []


def test_a_commit_is_brought_once_and_then_only_asked_for(tmp_path, monkeypatch, capsys):
    asked, brought = [], []

    def info(_self, repo, **options):
        asked.append((repo, options["revision"]))
        return SimpleNamespace(sha=SHA)

    def load(*arguments, **_):
        brought.append(arguments)
        return loaded(train=8, test=4)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for revision in ("", "v1"):
        data_hub._fetch("owner/name", "", revision, str(tmp_path))
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last == {"folder": str(tmp_path / f"owner--name@{SHA}")}
    assert asked == [("owner/name", None), ("owner/name", "v1")]
    assert brought == [("owner/name", None)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "test"], {"train": "train", "test": "test"}),
        (
            ["auxiliary_train", "dev", "validation"],
            {"train": "auxiliary_train", "validation": "validation"},
        ),
        (["all"], {"train": "all"}),
        (["test"], {"train": "test"}),
    ],
)
def test_splits_are_found_by_their_names(names, expected):
    assert dict(data_hub._splits(names)) == expected
