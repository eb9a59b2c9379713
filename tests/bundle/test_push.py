"""What arrives at a model hub: a stand-in on loopback that speaks its protocol."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from chipviz.files import PROJECT
from tests.bundle.test_save import built, finished  # noqa: F401


class Hub(ThreadingHTTPServer):
    """Repositories as dictionaries of files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.large, self.tokens, self.cards = {}, {}, set(), []
        self.refuse = False

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_args):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers["content-length"] or 0))

    def _say(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        data = self._body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self._say({})

    def do_POST(self):
        hub, body = self.server, self._body()
        self.server.tokens.add(self.headers["authorization"])
        if hub.refuse:
            self._say({"error": "You may not write here."}, 403)
        elif self.path.endswith("/repos/create"):
            said = json.loads(body)
            self._say({"url": f"{hub.address}/{said['organization']}/{said['name']}"})
        elif self.path.endswith("/validate-yaml"):
            hub.cards.append(json.loads(body)["content"])
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._say({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._say({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            self._say({"commitUrl": f"{hub.address}/o/n/commit/1", "commitOid": "1"})
        else:
            self._say({"error": self.path}, 404)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def push(hub, *words, token="hf_secret"):
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
    return subprocess.run(
        [sys.executable, "-m", "chipviz", "push", *map(str, words)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_bundle_arrives_whole_with_the_token_of_the_environment(hub, finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    done = push(hub, bundle, "owner/name", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.files == {file.name: file.read_bytes() for file in bundle.iterdir()}
    assert hub.tokens == {"Bearer hf_secret"}
    said = json.loads(done.stdout)
    assert said["files"] == {name: len(data) for name, data in hub.files.items()}
    assert said["address"].endswith("/commit/1")
    # What the hub's own check is sent is what a card's reader understands.
    assert hub.cards
    data = ModelCard(hub.cards[0]).data
    assert data.pipeline_tag == "text-classification"
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "f1"}


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    done = push(hub, bundle, "owner/name", "--dry-run", token="")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert (hub.files, hub.tokens) == ({}, set())


def test_what_must_not_go_stays(hub, finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    for words, token, said in (
        ((bundle, "owner/name"), "", "There is no token"),
        ((bundle, "../etc"), "t", "names no repository"),
        ((tmp_path, "owner/name"), "t", "is no bundle and no export"),
    ):
        done = push(hub, *words, token=token)
        assert done.returncode == 1
        assert said in done.stderr
    (bundle / "config.json").write_text("{}")
    assert "config.json is not what its checksum says" in push(hub, bundle, "o/n").stderr
    assert (hub.files, hub.tokens) == ({}, set())


def test_a_refusal_of_the_hub_is_a_sentence(hub, finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    hub.refuse = True
    done = push(hub, bundle, "owner/name")
    assert done.returncode == 1
    assert "The hub refused owner/name" in done.stderr
    assert "hf_secret" not in done.stderr + done.stdout
    assert done.stderr.count("\n") == 2
