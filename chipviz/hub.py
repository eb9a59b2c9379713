"""The Hub: a model's files, fetched by a process of their own that can be stopped.

`python -m chipviz.hub REPO REVISION` is that process: one JSON object a line on standard output, a
last one with `folder` or `refused`. Its parent gives up when nothing new was said for a while; the
library itself waits for as long as a byte comes now and then.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from chipviz.errors import SourceError
from chipviz.progress import Progress, ProgressFn

PATIENCE_S = 25.0
"""How long the Hub may say and send nothing."""
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
NOT_WANTED = ["*/*", "consolidated*"]
"""Files of a model stand at the top; folders and one name hold the same weights in other forms."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)


def split_id(source: str) -> tuple[str, str] | None:
    """Repository and revision of `owner/name` or `owner/name@revision`; None if it is no such id.

    The revision is "main" where none is given.
    """
    repo, at, revision = source.partition("@")
    revision = revision if at else "main"
    if any(bad in source for bad in ("..", "--")):
        return None
    if not _ID.fullmatch(repo) or not _REVISION.fullmatch(revision):
        return None
    return repo, revision


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds."""
    found = re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if found and folder.parent.name == "snapshots" else None


def download(repo: str, revision: str, progress: ProgressFn) -> Path:
    """Fetch a model's configuration, tokenizer, card and safetensors into the Hub's cache.

    Args:
        repo: Such as `owner/name`.
        revision: A branch, tag or commit.
        progress: Told how many bytes have arrived; a cancel ends the process.

    Returns:
        The folder of one commit.

    Raises:
        SourceError: One sentence for each way in which the Hub says no, or nothing.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "chipviz.hub", repo, revision],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    said: queue.Queue[dict[str, Any] | None] = queue.Queue()
    listener = threading.Thread(target=_listen, args=(process.stdout, said), daemon=True)
    listener.start()
    try:
        last = _follow(said, repo, progress)
    finally:
        process.kill()
        process.wait()
        listener.join()
    if "folder" in last:
        return Path(last["folder"])
    raise _refusal(last.get("refused", "offline"), repo, revision)


def _listen(lines: TextIO, said: "queue.Queue[dict[str, Any] | None]") -> None:
    with lines:
        for line in lines:
            said.put(json.loads(line))
    said.put(None)


def _follow(
    said: "queue.Queue[dict[str, Any] | None]", repo: str, progress: ProgressFn
) -> dict[str, Any]:
    """Report what arrives; the last object said, or that nothing came for too long."""
    now = Progress("loading", f"asking the Hub for {repo}")
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
        last, heard = line, time.monotonic()
        if total := line.get("total"):
            now = Progress("loading", f"downloading {repo}", min(line["done"], total), total)


def _refusal(kind: str, repo: str, revision: str) -> SourceError:
    at = "" if revision == "main" else f"@{revision}"
    messages = {
        "gated": (
            f"The backbone {repo} is gated.",
            "Accept its licence on the Hub and set HF_TOKEN in the environment.",
        ),
        "missing": (
            f"The Hub has no backbone {repo}, or it is private.",
            "Check the name (embedded: smollm2-135m, minilm-l6); a private one needs HF_TOKEN.",
        ),
        "revision": (
            f"The backbone {repo} has no revision {revision[:60]!r}.",
            "Give a branch, a tag or a commit after the @, or none.",
        ),
        "slow": (
            f"The Hub sent nothing of {repo}{at} for {PATIENCE_S:.0f} seconds.",
            "Try again later; what has arrived is kept. Or give the folder of a saved model.",
        ),
        "offline": (
            f"The backbone {repo}{at} is not on this machine and the Hub did not answer.",
            "Check the connection, or take a folder, smollm2-135m or minilm-l6.",
        ),
    }
    return SourceError(*messages[kind])


# --- the process that fetches -------------------------------------------------------------------


def _say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _fetch(repo: str, revision: str) -> None:
    from huggingface_hub import constants, errors, snapshot_download
    from tqdm.auto import tqdm

    class Said(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        """A bar that is a line of JSON."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            if self.unit == "B" and self.n != getattr(self, "said", 0):
                self.said = self.n
                _say(done=self.n, total=self.total)

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 18  # small steps: a slow line is told from a dead one
    # A missing token is said so: otherwise one that lies on this machine would be taken.
    token = os.environ.get("HF_TOKEN") or False
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            allow_patterns=WANTED,
            ignore_patterns=NOT_WANTED,
            max_workers=4,
            tqdm_class=Said,
        )
    except errors.GatedRepoError:
        _say(refused="gated")
    except errors.RevisionNotFoundError:
        _say(refused="revision")
    except errors.RepositoryNotFoundError:
        _say(refused="missing")
    else:
        _say(folder=str(folder))


if __name__ == "__main__":
    _fetch(*sys.argv[1:])
