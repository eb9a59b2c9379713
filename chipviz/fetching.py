"""A question to the Hub, asked by a process of its own: it can be stopped, and given up.

The library itself waits for as long as a byte comes now and then; here a silence has an end. The
process says one JSON object a line on standard output, the last with what was found or `refused`.
What it says beside, such as a bar of progress, only shows that it goes on.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from chipviz.errors import SourceError, is_disk_full
from chipviz.files import PROJECT
from chipviz.progress import Progress, ProgressFn

PATIENCE_S = 25.0
"""How long the Hub may say and send nothing."""


def ask(module: str, arguments: Sequence[str], name: str, progress: ProgressFn) -> dict[str, Any]:
    """Run `python -m chipviz.MODULE ARGUMENTS` until it ends or falls silent.

    Args:
        module: `hub` or `datahub`.
        arguments: Of that module, as a program.
        name: What is asked for, in words.
        progress: Told `done` of `total` bytes where the process says them; a cancel ends it.

    Returns:
        The last object it said beside bytes, {} if none; {"refused": "slow"} if it fell silent.

    Raises:
        SourceError: If the disk is full.
        Cancelled: As raised by `progress`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"chipviz.{module}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=PROJECT,
        text=True,
    )
    said: queue.Queue[dict[str, Any] | None] = queue.Queue()
    listener = threading.Thread(target=_listen, args=(process.stdout, said), daemon=True)
    listener.start()
    try:
        answer = _follow(said, name, progress)
    finally:
        process.kill()
        process.wait()
        listener.join()
    if answer.get("refused") == "full":
        raise SourceError(
            f"The disk is full: {name} did not fit.",
            "Free space, or let CHIPVIZ_HOME and HF_HOME name folders on another disk.",
        )
    return answer


def say(**values: object) -> None:
    """One object to the process that asked, on a line of its own whatever stood before it."""
    sys.stdout.write("\n" + json.dumps(values) + "\n")
    sys.stdout.flush()


@contextmanager
def saying_full() -> Iterator[None]:
    """In the process that asks, a full disk is a refusal of its own."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        say(refused="full")


def ready() -> str | bool:
    """Make this process one that asks: the token to do it with.

    A missing token is said so: otherwise one that lies on this machine would be taken.
    """
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 18  # small steps: a slow line is told from a dead one
    return os.environ.get("HF_TOKEN") or False


def _listen(lines: TextIO, said: "queue.Queue[dict[str, Any] | None]") -> None:
    with lines:
        for line in lines:
            said.put(json.loads(line) if line.startswith("{") else {})
    said.put(None)


def _follow(
    said: "queue.Queue[dict[str, Any] | None]", name: str, progress: ProgressFn
) -> dict[str, Any]:
    """Report what arrives; the last object said, or that nothing came for too long."""
    now = Progress("loading", f"asking the Hub for {name}")
    heard = time.monotonic()
    last: dict[str, Any] = {}
    while True:
        progress(now)
        try:
            line = said.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() - heard > PATIENCE_S:
                return {"refused": "slow"}
            continue
        if line is None:
            return last
        heard = time.monotonic()
        if total := line.get("total"):
            now = Progress("loading", f"downloading {name}", min(line["done"], total), total)
        else:
            last = line or last
