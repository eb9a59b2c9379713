"""What takes too long for the suite: `python -m tests.slow [l2 l5 f1 f9 b9 u2]`, about 15 minutes.

Prints one line a check, with its figure, and ends with 1 where one does not hold. The letters are
those of the list that `tests/withstand` goes through.
"""

import asyncio
import hashlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import sync_playwright

from benchmarks.load import growing, repeating
from benchmarks.sessions import Session
from chipviz.config import EXAMPLE, RunConfig
from chipviz.runs import scheduler as jobs
from chipviz.runs.store import Store
from chipviz.ui.server import bundle_link
from tests.example_run import active_run, built_bundle, finished_run
from tests.families import NAMED, make_tokenizer, planted_rows
from tests.page_driver import open_page
from tests.withstand.servers import serving
from tests.withstand.test_use import PIECES

CHROMIUM = os.environ.get("CHIPVIZ_CHROMIUM", "/usr/bin/chromium")


def l2_a_session_of_3000_ticks(home: Path) -> tuple[bool, str]:
    """Memory of the server while one tab ticks as fast as it is answered."""
    store = Store(home)
    job = store.create_run(RunConfig.checked(**EXAMPLE), claim=True)
    with growing(store, job.job_id), serving(home) as (port, process):
        server = psutil.Process(process.pid)
        _ticks(port, job.run_id, 300)  # what is imported and cached once
        before = server.memory_info().rss
        _ticks(port, job.run_id, 3_000)
        grown = (server.memory_info().rss - before) / 2**20
    return grown < 15, f"the server grew by {grown:.1f} MiB (bound 15)"


def _ticks(port: int, run_id: str, n: int) -> None:
    session = Session(port, "train", f"run={run_id}")
    asyncio.run(session.run(time.perf_counter(), n, 0.0))
    assert len(session.times_ms) == n


def l5_a_bundle_of_2_gib_for_three_at_once(home: Path) -> tuple[bool, str]:
    """Memory of the server while three clients take it, and a fourth goes on at the half."""
    store = Store(home)
    job = built_bundle(store, finished_run(store).run_id)
    assert job.bundle is not None
    with Path(job.bundle.path, "model.safetensors").open("wb") as file:
        for i in range(2_048):
            file.write(hashlib.sha256(str(i).encode()).digest() * (2**20 // 32))
    with serving(home) as (port, process):
        url = f"http://127.0.0.1:{port}{bundle_link(store, job)}"
        server = psutil.Process(process.pid)
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health").close()
        before = server.memory_info().rss
        peak, digests = [0], []
        takers = [threading.Thread(target=lambda: digests.append(_digest(url))) for _ in range(3)]
        for taker in takers:
            taker.start()
        while any(taker.is_alive() for taker in takers):
            peak[0] = max(peak[0], server.memory_info().rss)
            time.sleep(0.05)
        grown = (peak[0] - before) / 2**20
        resumed = _digest(url, parts=2)
    same = len(set(digests)) == 1 and len(digests) == 3
    text = f"the server grew by {grown:.0f} MiB (bound 64); three equal: {same}"
    return grown < 64 and same and resumed == digests[0], (
        f"{text}; broken off and gone on equal: {resumed == digests[0]}"
    )


def _digest(url: str, parts: int = 1) -> str:
    """SHA-256 of a download in so many ranges, each a request of its own."""
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        length = int(answer.headers["content-length"])
    digest, edges = hashlib.sha256(), [length * i // parts for i in range(parts + 1)]
    for start, end in itertools.pairwise(edges):
        wanted = urllib.request.Request(url, headers={"Range": f"bytes={start}-{end - 1}"})
        with urllib.request.urlopen(wanted) as answer:
            while chunk := answer.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def f1_sixty_kills(home: Path) -> tuple[bool, str]:
    """A run killed at random moments, again and again, against one that nobody disturbs."""
    rng, n_kills = random.Random(0), 0
    store = Store(home)
    config = _many_texts(home)
    whole = _train(config, home / "whole")
    job = jobs.enqueue_run(store, config)
    while n_kills < 60:
        process = jobs.start(store, store.get(job.job_id))
        time.sleep(rng.uniform(0.5, 9.0))
        process.kill()
        process.wait()
        n_kills += 1
        with store._open() as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        jobs.reconcile(store)
        if store.get(job.job_id).state == "done":
            job = jobs.enqueue_run(store, config)
        else:
            assert store.get(job.job_id).state == "interrupted", store.get(job.job_id)
            jobs.resume(store, job.job_id)
    jobs.start(store, store.get(job.job_id)).wait()
    jobs.reconcile(store)
    same = json.loads(store.report(job.run_id).model_dump_json())["scores"] == whole["scores"]
    return same, f"{n_kills} kills, store whole each time, scores equal to an unbroken run: {same}"


def _many_texts(home: Path) -> RunConfig:
    path = home / "many.csv"
    rows = [f"{text},{label}" for text, label in planted_rows(4_000)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    tiny = home / "tiny"
    NAMED["llama"].build(tiny, tie_word_embeddings=True, initializer_range=0.2)
    make_tokenizer("bytes").save_pretrained(tiny)
    return RunConfig.checked(backbone=str(tiny), data=str(path))


def _train(config: RunConfig, home: Path) -> dict:
    command = [sys.executable, "-m", "chipviz", "--home", str(home), "train", "--json"]
    command += ["--backbone", config.backbone, "--data", config.data]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def f9_a_network_that_drops(home: Path) -> tuple[bool, str]:
    """The line to the server goes away for 30 seconds, then for 200."""
    store = Store(home)
    job = active_run(store)
    words = []
    with (
        repeating(1, lambda: store.beat(job.job_id)),  # as whoever computes it would
        serving(home) as (port, _),
        _line(port) as (there, cut),
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{there}/train?run={job.run_id}")
        page.get_by_text("reading 520 of 1,400 texts").first.wait_for()
        for seconds in (30, 200):
            cut.set()
            time.sleep(seconds)
            cut.clear()
            start = time.monotonic()
            page.reload() if seconds > 120 else None
            page.locator("[data-testid='stApp'][data-test-connection-state='CONNECTED']").wait_for(
                timeout=60_000, state="attached"
            )
            page.get_by_text("reading 520 of 1,400 texts").first.wait_for(timeout=60_000)
            words.append(f"after {seconds} s back in {time.monotonic() - start:.0f} s")
        browser.close()
    return True, ", ".join(words)


@contextmanager
def _line(port: int):
    """A port that leads to another one, unless the event is set."""
    cut, pairs = threading.Event(), []
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while (data := source.recv(65_536)) and not cut.is_set():
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if cut.is_set():
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", port))
            pairs.append((near, far))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=carry, args=ends, daemon=True).start()

    def sever() -> None:
        while True:
            cut.wait()
            for near, far in pairs:
                for end in (near, far):
                    end.close()
            pairs.clear()
            time.sleep(0.2)

    threading.Thread(target=accept, daemon=True).start()
    threading.Thread(target=sever, daemon=True).start()
    yield listener.getsockname()[1], cut
    listener.close()


def b9_a_thousand_addresses(home: Path) -> tuple[bool, str]:
    """Every page with addresses of odd words: none breaks."""
    os.environ["CHIPVIZ_HOME"] = str(home)
    run, rng, broken = finished_run(Store(home)), random.Random(1), []
    pages = ["runs", "train", "layers", "bundle"]
    for name in pages:
        at = open_page(name, run=run.run_id)
        for _ in range(250):
            at.query_params.clear()
            for key in rng.sample(["run", "cut", "pooling", "chip", "rule", "x"], 3):
                at.query_params[key] = rng.choice([*PIECES, run.run_id])
            at.run()
            if at.exception or [e for e in at.error if "Unexpected" in e.value]:
                broken.append(dict(at.query_params))
    return not broken, f"{250 * len(pages)} addresses, {len(broken)} broke a page {broken[:1]}"


def u2_a_newcomer_sees_a_curve(home: Path) -> tuple[bool, str]:
    """From `streamlit run app.py` in an empty home to the first point of the example's curve."""
    start = time.monotonic()
    with serving(home) as (port, _), sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_role("button", name="Try it").click()
        page.get_by_text("of 800 texts").first.wait_for(timeout=240_000)
        page.locator(".st-key-live_curve path.point").first.wait_for(
            timeout=240_000, state="attached"
        )
        seconds = time.monotonic() - start
        browser.close()
        store = Store(home)
        for job in store.active():
            jobs.stop(store, job.job_id)
    return seconds <= 60, f"{seconds:.0f} s, download and conversion included (bound 60)"


CHECKS: dict[str, Callable[[Path], tuple[bool, str]]] = {
    "l2": l2_a_session_of_3000_ticks,
    "l5": l5_a_bundle_of_2_gib_for_three_at_once,
    "f1": f1_sixty_kills,
    "f9": f9_a_network_that_drops,
    "b9": b9_a_thousand_addresses,
    "u2": u2_a_newcomer_sees_a_curve,
}


def main() -> int:
    """Run the checks that are named, or all."""
    failed = 0
    for name in sys.argv[1:] or CHECKS:
        with tempfile.TemporaryDirectory(prefix="chipviz-slow-") as folder:
            home = Path(folder) / "home"
            home.mkdir()
            start = time.monotonic()
            held, figure = CHECKS[name](home)
        failed += not held
        verdict = "held" if held else "MISSED"
        sys.stdout.write(f"{name} {verdict}: {figure} ({time.monotonic() - start:.0f} s)\n")
        sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
