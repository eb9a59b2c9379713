"""The Hub: a small one on this machine says yes, no, and nothing; each gets its own sentence."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chipviz import download
from chipviz.backbones import hub
from chipviz.backbones.find import find_model
from chipviz.errors import SourceError
from chipviz.progress import Cancelled, silent
from tests.families import load_backbone

SHA = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    """Serves the files of one repository, `owner/good`; other names stand for other troubles."""

    files: dict
    seen: list
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Authorization")))
        if "/missing" in self.path:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if "/gated" in self.path:
            return self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="Ask first.")
        if "/slow" in self.path:
            return self._trickle()
        if "nosuchbranch" in self.path:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if "/resolve/" in self.path:
            body = self.files[name]
            return self._answer(200, body, ETag=f'"{name}"', X_Repo_Commit=SHA)
        if "/tree/" in self.path:
            listed = [
                {"type": "file", "path": f, "size": len(b), "oid": f} for f, b in self.files.items()
            ]
            return self._answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        info = {"id": "owner/good", "sha": SHA, "siblings": [{"rfilename": f} for f in self.files]}
        self._answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def _trickle(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.2)
        except OSError:
            pass


@pytest.fixture
def server(tiny_backbone_folder, tmp_path, monkeypatch):
    """A Hub on this machine with one good repository; yields its handler."""
    files = {f.name: f.read_bytes() for f in tiny_backbone_folder.iterdir()}
    files |= {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04N."}
    handler = type("Handler", (_Hub,), {"files": files, "seen": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield handler
    running.shutdown()
    running.server_close()


def test_a_backbone_comes_with_its_commit_and_without_code_or_pickles(server, home):
    folder = find_model("owner/good", home, silent)
    assert folder.revision == hub.revision_of(folder.path) == SHA
    assert {f.name for f in folder.path.iterdir()} == set(server.files) - {
        "evil.py",
        "pytorch_model.bin",
    }
    assert load_backbone(folder, "owner/good", device="cpu").n_layers == 4
    # A second time nobody is asked: the commit is named.
    server.seen.clear()
    assert find_model(f"owner/good@{SHA}", home, silent).path == folder.path
    assert not any("/resolve/" in path for path, _ in server.seen)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/missing", "has no backbone owner/missing, or it is private"),
        ("owner/gated", "owner/gated is gated"),
        ("owner/good@nosuchbranch", "no revision 'nosuchbranch'"),
    ],
)
@pytest.mark.usefixtures("server")
def test_f11_each_no_of_the_hub_has_its_own_sentence(name, said, home):
    with pytest.raises(SourceError, match=said) as refused:
        find_model(name, home, silent)
    assert "\n" not in refused.value.message


@pytest.mark.usefixtures("server")
def test_f11_a_hub_that_sends_a_byte_now_and_then_is_given_up(home, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE_S", 3.0)
    with pytest.raises(SourceError, match="sent nothing of owner/slow for 3 seconds"):
        find_model("owner/slow", home, silent)
    assert download.PATIENCE_S < 30


def test_f11_an_unreachable_hub_has_its_own_sentence(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:1")):
        monkeypatch.setenv(name, value)
        with pytest.raises(SourceError, match="not on this machine and the Hub did not answer"):
            find_model("owner/name", home, silent)
        monkeypatch.delenv(name)


def test_b12_the_token_comes_from_the_environment_alone(server, home, monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("hf_stored")
    find_model("owner/good", home, silent)
    assert {token for _, token in server.seen} == {None}
    server.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SourceError, match="owner/missing") as refused:
        find_model("owner/missing", home, silent)
    assert {token for _, token in server.seen} == {"Bearer hf_secret"}
    assert "hf_secret" not in refused.value.message + refused.value.hint


@pytest.mark.usefixtures("server")
def test_a_cancel_ends_the_process_that_asks(home, monkeypatch):
    started = []
    popen = download.subprocess.Popen

    def remember(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def stop(_):
        raise Cancelled

    monkeypatch.setattr(download.subprocess, "Popen", remember)
    with pytest.raises(Cancelled):
        find_model("owner/slow", home, stop)
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("gpt2", ("gpt2", "main")),
        ("owner/name", ("owner/name", "main")),
        ("owner/na.me_1-b@v1.0", ("owner/na.me_1-b", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", None),
        ("owner/name@../main", None),
        ("owner//name", None),
        ("a/b/c", None),
        ("-flag", None),
        ("--revision=x/y", None),
        ("owner/-name", None),
        ("owner/name@-flag", None),
        ("owner/na me", None),
        ("ówner/name", None),
        ("owner/name\n", None),
    ],
)
def test_an_id_is_a_name_and_a_revision_or_none(source, found):
    assert hub.split_id(source) == found


@pytest.mark.usefixtures("server")
def test_a_full_disk_is_not_taken_for_a_silent_hub(home, full_disk):
    with full_disk(20_000), pytest.raises(SourceError, match=r"disk is full: .*owner/good"):
        find_model("owner/good", home, silent)
