"""The server: a bundle goes only to who has its link, whole; every answer is guarded."""

import io
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from itsdangerous import URLSafeTimedSerializer
from starlette.applications import Starlette
from starlette.testclient import TestClient

from chipviz.config import CutSpec, RunConfig
from chipviz.results.report import BundleReport
from chipviz.ui import server as server_module
from chipviz.ui.gate import SECURITY_HEADERS, token_of
from chipviz.ui.server import Server, bundle_link
from tests.withstand.servers import serving, status_of

ROOT = Path(__file__).resolve().parents[2]
CUT = CutSpec(cut_layer=3, pooling="mean")
FILES = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(3_000_000),
    "README.md": "ein hübsches Modell".encode(),
}


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "home", hosts=["models.example"])


@pytest.fixture
def client(server):
    app = Starlette(routes=server.routes, middleware=server.middleware)
    return TestClient(app, base_url="http://localhost:8501")


def built_bundle(store, files, data="bbc-news"):
    run = store.create_run(RunConfig(backbone="smollm2-135m", data=data), claim=True)
    store.finish(run.job_id, "done")
    job = store.create_bundle(run.run_id, CUT)
    store.claim(job.job_id)
    folder = store.folder(run.run_id).bundles / job.name
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    report = BundleReport(
        path=str(folder),
        kind="token",
        cut_layer=3,
        pooling="mean",
        chip="linear",
        n_parameters=1,
        weight_bytes=1,
        folder_bytes=1,
        n_verified=1,
        max_difference=0.0,
        files={},
    )
    store.finish(job.job_id, "done", result=report.model_dump_json())
    return store.get(job.job_id)


def test_a_link_gives_the_whole_bundle_as_a_sound_zip_of_the_length_it_said(server, client):
    answer = client.get(bundle_link(server.store, built_bundle(server.store, FILES)))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/zip"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "content-encoding" not in answer.headers
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.testzip() is None
    assert {Path(name).name: archive.read(name) for name in archive.namelist()} == FILES
    assert len({Path(name).parent for name in archive.namelist()}) == 1


def test_head_says_what_get_would_send_and_reads_nothing(server, client, monkeypatch):
    def read(_archive):
        raise AssertionError("HEAD packed the bundle")

    link = bundle_link(server.store, built_bundle(server.store, FILES))
    get = client.get(link)
    monkeypatch.setattr(server_module.ZipStream, "__iter__", read)
    head = client.head(link)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-length", "content-type", "content-disposition"):
        assert head.headers[name] == get.headers[name]


def test_each_link_gives_its_own_bundle(server, client):
    bundles = [built_bundle(server.store, {"README.md": str(n).encode()}) for n in range(2)]
    for n, job in enumerate(bundles):
        archive = client.get(bundle_link(server.store, job)).content
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            assert [opened.read(name) for name in opened.namelist()] == [str(n).encode()]


def test_a_hostile_data_set_name_never_reaches_the_file_name(server, client):
    data = '../"\r\nSet-Cookie: x=1;ü\0.csv'
    answer = client.get(bundle_link(server.store, built_bundle(server.store, FILES, data)))
    assert "set-cookie" not in answer.headers
    name = answer.headers["content-disposition"].removeprefix("attachment; filename=")
    assert name.strip('"').replace("-", "").replace(".", "").replace("_", "").isalnum()
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert not any(name.startswith(("/", "..")) for name in archive.namelist())


def test_b11_only_a_link_that_this_home_signed_for_bundles_is_good(server, client, tmp_path):
    job = built_bundle(server.store, FILES)
    good = bundle_link(server.store, job)
    foreign = bundle_link(Server(tmp_path / "other").store, job)
    key = (server.store.home / "secret.key").read_text()
    for_something_else = URLSafeTimedSerializer(key, salt="login").dumps([job.run_id, job.job_id])
    odd = URLSafeTimedSerializer(key, salt="chipviz.bundle").dumps({"what": "else"})
    unsigned = f"/bundles/{job.job_id}"
    changed = good[:12] + ("a" if good[12] != "a" else "b") + good[13:]
    for link in (foreign, f"/bundles/{for_something_else}", f"/bundles/{odd}", unsigned, changed):
        answer = client.get(link)
        assert (answer.status_code, answer.headers["content-type"]) == (
            403,
            "text/plain; charset=utf-8",
        )
        assert "not valid" in answer.text
    assert client.get("/bundles/").status_code == 404
    assert client.post(good).status_code == 405
    assert client.get(good).status_code == 200


def test_b11_a_link_expires(server, client, monkeypatch):
    link = bundle_link(server.store, built_bundle(server.store, FILES))
    monkeypatch.setattr(server_module, "LINK_AGE_S", -1)
    answer = client.get(link)
    assert answer.status_code == 403
    assert "expired" in answer.text


def test_a_link_to_what_is_gone_or_not_built_says_so(server, client):
    job = built_bundle(server.store, FILES)
    link = bundle_link(server.store, job)
    unbuilt = server.store.create_bundle(job.run_id, CUT)
    assert client.get(bundle_link(server.store, unbuilt)).status_code == 404
    server.store.move(unbuilt.job_id, expect={"queued"}, to="stopped")
    server.store.delete(job.run_id)
    assert client.get(link).status_code == 404


@pytest.mark.parametrize("path", ["..%2f..%2fsecret.key", "%00", "a" * 5000, "../../secret.key"])
def test_b11_no_path_leads_out_of_the_bundles(server, client, path):
    built_bundle(server.store, FILES)
    assert client.get(f"/bundles/{path}").status_code in (403, 404)


def test_a_link_still_works_after_the_server_was_restarted(server):
    link = bundle_link(server.store, built_bundle(server.store, FILES))
    again = Server(server.store.home)
    restarted = TestClient(Starlette(routes=again.routes), base_url="http://localhost")
    assert restarted.head(link).status_code == 200


def test_the_key_is_readable_by_its_owner_alone(server):
    bundle_link(server.store, built_bundle(server.store, FILES))
    mode = (server.store.home / "secret.key").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert [p.name for p in server.store.home.glob("secret.key*")] == ["secret.key"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8501", "127.0.0.1:1", "[::1]:80", "LocalHost", "models.example:443"],
)
def test_local_and_configured_hosts_are_answered(client, host):
    answer = client.get("/api/health", headers={"host": host})
    assert answer.status_code == 503  # nobody started the scheduler, but the answer is ours
    assert answer.headers.items() >= {k.lower(): v for k, v in SECURITY_HEADERS.items()}.items()


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:127.0.0.1", "", "127.0.0.1.x"]
)
def test_a_foreign_host_is_refused_with_guarded_answer(server, client, host):
    link = bundle_link(server.store, built_bundle(server.store, FILES))
    for path in ("/api/health", link):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "does not answer to that host" in answer.text
        assert answer.headers["x-frame-options"] == "DENY"


def test_health_tells_of_scheduler_store_and_disk(server, client):
    server.scheduler.start()
    while not server.scheduler.leads:
        time.sleep(0.01)
    answer = client.get("/api/health")
    server.scheduler.close()
    assert answer.status_code == 200
    facts = answer.json()
    assert facts["free_disk_bytes"] > 0
    assert (facts["ok"], facts["scheduler"], facts["store"]) == (True, "leads", "writable")
    stopped = client.get("/api/health")
    assert (stopped.status_code, stopped.json()["scheduler"]) == (503, "stopped")


def test_health_tells_of_a_store_that_cannot_be_written(server, client):
    server.store.path.unlink()
    server.store.path.mkdir()
    answer = client.get("/api/health")
    assert (answer.status_code, answer.json()["store"]) == (503, "not writable")


def fetch(url, **headers):
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
    except urllib.error.URLError:
        return None, {}, b""


def test_streamlit_run_starts_the_app_with_guarded_pages_routes_and_scheduler(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    command += ["--server.address", "127.0.0.1", "--server.headless", "true"]
    command += ["--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none"]
    environment = os.environ | {"CHIPVIZ_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while fetch(f"{url}/api/health")[0] != 200:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        status, headers, body = fetch(url)
        assert (status, b"<html" in body) == (200, True)
        assert all(headers[name] == value for name, value in SECURITY_HEADERS.items())
        assert fetch(url, Host="evil.example")[0] == 403
        assert fetch(f"{url}/bundles/forged")[0] == 403
        assert fetch(f"{url}/bundles/..%2fsecret.key")[0] == 400
    finally:
        process.terminate()
        process.wait(timeout=30)


# ranges


def test_a_download_that_broke_off_goes_on_to_the_same_bytes(server, client):
    link = bundle_link(server.store, built_bundle(server.store, FILES))
    whole = client.get(link)
    n = len(whole.content)
    for start, end in [(0, 1), (0, n), (1_000_000, 1_000_007), (n - 1, n), (n // 2, n)]:
        answer = client.get(link, headers={"Range": f"bytes={start}-{end - 1}"})
        assert answer.content == whole.content[start:end]
        assert int(answer.headers["content-length"]) == end - start
        if end - start < n:
            assert answer.status_code == 206
            assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{n}"
    assert client.get(link, headers={"Range": "bytes=-9"}).content == whole.content[-9:]
    assert client.get(link, headers={"Range": "bytes=9-"}).content == whole.content[9:]
    assert client.get(link, headers={"Range": f"bytes=5-{10 * n}"}).content == whole.content[5:]


@pytest.mark.parametrize("wanted", ["bytes={n}-", "bytes={n}-{n}", "bytes=-0", f"bytes={10**40}-"])
def test_b11_a_range_beyond_the_end_is_refused_with_the_length(server, client, wanted):
    link = bundle_link(server.store, built_bundle(server.store, FILES))
    n = int(client.head(link).headers["content-length"])
    answer = client.get(link, headers={"Range": wanted.format(n=n)})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{n}"
    assert answer.content == b""


@pytest.mark.parametrize(
    "wanted",
    [
        "bytes=5-2",
        "bytes=0-1,4-5",
        "bytes=-",
        "bytes=a-b",
        "lines=1-2",
        "bytes=٣-٤",
        "",
        "bytes=0x1-",
    ],
)
def test_b11_what_is_no_single_range_of_bytes_gets_the_whole(server, client, wanted):
    link = bundle_link(server.store, built_bundle(server.store, {"README.md": b"whole"}))
    answer = client.get(link, headers={"Range": wanted.encode()})
    assert answer.status_code == 200
    assert len(answer.content) == int(answer.headers["content-length"])


def test_a_range_of_a_bundle_that_has_changed_meanwhile_is_the_whole_of_the_new_one(server, client):
    job = built_bundle(server.store, FILES)
    link = bundle_link(server.store, job)
    tag = client.head(link).headers["etag"]
    asked = {"Range": "bytes=9-", "If-Range": tag}
    assert client.get(link, headers=asked).status_code == 206
    Path(job.bundle.path, "config.json").write_bytes(b'{"changed": true}')
    answer = client.get(link, headers=asked)
    assert answer.status_code == 200
    assert answer.headers["etag"] != tag


# the token


@pytest.fixture
def locked(tmp_path):
    server = Server(tmp_path / "home", token="open sesame")
    app = Starlette(routes=server.routes, middleware=server.middleware)
    return TestClient(app, base_url="http://localhost:8501", follow_redirects=False)


def test_with_a_token_only_a_browser_that_came_by_the_printed_address_is_answered(locked):
    assert locked.get("/api/health").status_code == 401
    assert locked.get("/api/health", params={"token": "open"}).status_code == 401
    assert (
        locked.get("/api/health", headers={"Cookie": "chipviz_token=ö".encode()}).status_code == 401
    )
    welcome = locked.get("/api/health?run=a%26b&token=open+sesame")
    assert welcome.status_code == 303
    assert welcome.headers["location"] == "/api/health?run=a%26b"
    cookie = welcome.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert locked.get("/api/health").status_code != 401  # the cookie came with it
    assert locked.get("/api/health", headers={"Host": "evil.example"}).status_code == 403


def test_the_way_in_leads_nowhere_else(locked):
    welcome = locked.get("http://localhost:8501//evil.example/x?token=open+sesame")
    assert welcome.headers["location"] == "/evil.example/x"
    foreign = {"Host": "evil.example"}
    assert locked.get("/?token=open+sesame", headers=foreign).status_code == 403


@pytest.mark.parametrize(
    ("arguments", "token"), [([], None), (["--token=a=b"], "a=b"), (["x", "--tokens"], None)]
)
def test_the_token_is_an_argument(arguments, token):
    assert token_of(arguments) == token
    assert token_of(["--token"]) != token_of(["--token"])


def test_what_the_server_writes_is_readable_by_its_user_alone(tmp_path):
    with serving(tmp_path) as (port, _):
        assert status_of(f"http://127.0.0.1:{port}/api/health") == 200
        time.sleep(1.5)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert made
    assert not [path for path in made if path.stat().st_mode & 0o077]
