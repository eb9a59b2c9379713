"""`python -m benchmarks.serving BUNDLE TEXTS`: the service beside a naive one, many clients.

The naive one is FastAPI with `transformers.pipeline`, a request at a time. Both serve the same
*sequence* bundle from processes of their own; rounds alternate. TEXTS is a file with a text a line.
Writes a section of docs/results.md.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.stored import RESULTS, ROOT, write_section

NAIVE = """\
import sys
import uvicorn
from fastapi import FastAPI
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1], top_k=None)
app = FastAPI()
@app.get("/health")
async def health(): return {}
@app.post("/predict")
async def predict(body: dict): return classify(body["texts"])
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""
CLIENTS = (1, 8, 32)
ROUND_S = 8.0
ROUNDS = 4


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A server in a process of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts it and waits until it answers."""
        self.port = free_port()
        words = [word.replace("PORT", str(self.port)) for word in command]
        self._process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(OSError):
                self.ask(http.client.HTTPConnection("127.0.0.1", self.port), ["A text."])
                return
            time.sleep(0.2)
        raise RuntimeError("a server did not start")

    @staticmethod
    def ask(connection: http.client.HTTPConnection, texts: Sequence[str]) -> Any:
        """The answer of one request on a connection that stays."""
        body, kind = json.dumps({"texts": texts}), {"Content-Type": "application/json"}
        connection.request("POST", "/predict", body, kind)
        reply = connection.getresponse()
        said = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}")
        return json.loads(said)

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()


def load(server: Server, texts: Sequence[str], n_clients: int, seconds: float) -> list[float]:
    """Seconds of each request of so many clients, each sending as soon as it has its answer."""
    until, took = time.monotonic() + seconds, list[float]()

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        i = first
        while time.monotonic() < until:
            start = time.perf_counter()
            server.ask(connection, [texts[i % len(texts)]])
            took.append(time.perf_counter() - start)
            i += n_clients
        connection.close()

    clients = [threading.Thread(target=client, args=(i,)) for i in range(n_clients)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    return took


def compare(ours: Server, naive: Server, texts: Sequence[str], n_clients: int) -> str:
    """A row: requests a second and the 95th percentile of both, medians of the rounds."""
    rates: dict[str, list[float]] = {"ours": [], "naive": []}
    slow: dict[str, list[float]] = {"ours": [], "naive": []}
    for i in range(ROUNDS):
        pair = [("ours", ours), ("naive", naive)]
        for name, server in pair if i % 2 else pair[::-1]:
            took = load(server, texts, n_clients, ROUND_S)
            rates[name].append(len(took) / ROUND_S)
            slow[name].append(quantiles(took, n=20)[-1])
    ratios = [a / b for a, b in zip(rates["ours"], rates["naive"], strict=True)]
    cells = [
        f"{n_clients}",
        *(f"{median(rates[name]):.1f}" for name in ("naive", "ours")),
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        *(f"{1e3 * median(slow[name]):.0f}" for name in ("naive", "ours")),
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Start both, load them in turns, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a sequence bundle")
    parser.add_argument("texts", type=Path, help="a file with a text a line")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args(arguments)
    texts = [line for line in options.texts.read_text("utf-8").splitlines() if line.strip()]
    path = str(options.bundle.resolve())
    ours = Server(["-m", "chipviz", "serve", path, "--port", "PORT"])
    naive = Server(["-c", NAIVE, path, "PORT"])
    lines = [
        "Made by `python -m benchmarks.serving BUNDLE TEXTS`; not by hand. `serve` beside FastAPI "
        "with `transformers.pipeline`, a request of one text at a time;",
        f"the same bundle, {ROUNDS} rounds of {ROUND_S:.0f} s in turns, on one machine with the "
        "clients. Requests a second, and the 95th percentile in ms.",
        "",
        "| clients | naive | serve | ratio (range) | p95 naive | p95 serve |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    try:
        for n_clients in CLIENTS:
            lines.append(compare(ours, naive, texts, n_clients))
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    finally:
        ours.stop()
        naive.stop()
    write_section(options.out, "Serving", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
