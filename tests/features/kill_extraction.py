"""Kill extractions at random moments and go on: `python -m MODULE BACKBONE FOLDER`.

A program of its own: modules are imported once, then every extraction is a fork. Nothing that
starts threads is done before a fork: a child of a threaded process may wait forever.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaModel, PreTrainedTokenizerFast

from chipviz.backbones import batching
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.data.task import Examples, Task
from chipviz.features import extract
from chipviz.keys import Vector
from tests.families import load_backbone

N_KILLS = 20
PATIENCE_S = 60
IMPORTED = (LlamaModel, PreTrainedTokenizerFast)
"""What every extraction would import otherwise."""
WORDS = ("red", "green", "blue", "one", "two", "three", "sun", "moon")


def read_texts(folder: Path, home: Path, ready: int) -> None:
    """Extract features of 160 texts in chunks of about 60 tokens."""
    batching.BATCH_TOKENS["cpu"] = 30
    batching.FIRST_BATCHES, batching.CHUNK_BATCHES, batching.MOST_BATCHES = 1, 2, 2
    draw = np.random.default_rng(0)

    def some(n):
        texts = [" ".join(draw.choice(WORDS, draw.integers(1, 14))) for _ in range(n)]
        return Examples(texts, None, draw.integers(0, 2, n))

    task = Task("toy", ("a", "b"), {"train": some(120), "validation": some(20), "test": some(20)})
    backbone = load_backbone(folder, "tiny", dtype=torch.float32, device="cpu")
    prompt = bake(load_tokenizer(folder), "say {text} now", 40, task.splits["train"])
    os.write(ready, b"1")
    extract.extract(
        backbone, prompt, task, home, vectors=tuple(map(Vector.named, ("last", "mean", "raw")))
    )


def begin(folder: Path, home: Path) -> int:
    """Start an extraction in a fork of this process and wait until it reads; returns its pid."""
    listen, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE_S)
        try:
            read_texts(folder, home, ready)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ready)
    os.read(listen, 1)
    os.close(listen)
    return pid


def digest(home: Path) -> dict[str, str]:
    """Hash of every array and of the manifest."""
    files = sorted(f for f in home.rglob("*") if f.suffix in (".npy", ".json", ".tmp"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main(folder: Path, out: Path) -> dict[str, object]:
    """Kill, go on, compare; says how often there was work left, and what ended otherwise."""
    torch.set_num_threads(1)
    victim, start = begin(folder, out / "whole"), time.monotonic()
    os.waitpid(victim, 0)
    duration = time.monotonic() - start
    truth = digest(out / "whole")
    draw, broken, odd = random.Random(5), 0, []
    for i in range(N_KILLS):
        home = out / str(i)
        victim = begin(folder, home)
        time.sleep(draw.random() * duration)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        if digest(home) != truth:
            broken += 1
        else:  # it was done before: the machine is faster than it was at first
            duration *= 0.7
        _, status = os.waitpid(begin(folder, home), 0)
        ended = digest(home)
        if status or ended != truth:
            names = ended.keys() | truth.keys()
            odd.append([i, status, [n for n in names if ended.get(n) != truth.get(n)]])
    return {"files": len(truth), "broken": broken, "odd": odd}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
