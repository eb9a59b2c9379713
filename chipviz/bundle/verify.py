"""Whether a bundle does what its run's chip does: asked of a fresh process, which has limits.

A bundle to verify is one that somebody distrusts: nothing of it is believed before it is looked at.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chipviz.bundle import card
from chipviz.bundle.metadata import SUMS, Metadata, read_metadata
from chipviz.bundle.opening import refuse_unfit
from chipviz.bundle.vision import MADE
from chipviz.errors import BundleError
from chipviz.files import PROJECT, read_small
from chipviz.results.report import BundleKind

TOLERANCE = 1e-3
"""Largest probability difference between a bundle and its run's own chip, both in float32."""
MAX_TESTS, MAX_TEST_CHARS = 100, 100_000
"""Texts of a bundle's own test, and characters of each."""
PATIENCE_S = 300.0
MEMORY_BYTES = 6 << 30
"""What a stranger's bundle may take to repeat its test, beside four times its weights."""
_AGAIN = "Build or download the bundle again."

_LIMIT = """\
try:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
except (ImportError, ValueError, OSError):
    pass
"""
"""First lines of a program that may take so much memory, where the system can hold it to that."""


def verify(path: Path) -> dict[str, Any]:
    """Check a bundle: every checksum, nothing foreign inside, and its own test in a fresh process.

    Returns:
        Files checked, texts compared and the largest probability difference.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    metadata = read_metadata(path)
    refuse_unfit(path, metadata.kind)
    n_files = check_sums(path)
    texts, expected = self_test_of(metadata)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    limit = MEMORY_BYTES + 4 * weights
    found = in_fresh_process(path, metadata.kind, texts, memory=limit, patience_s=PATIENCE_S)
    return {
        "path": str(path),
        "kind": metadata.kind,
        "n_files": n_files,
        "n_texts": len(texts),
        "max_difference": compare(texts, found, expected),
    }


def check_sums(path: Path) -> int:
    """Compare every file of a bundle with its checksum.

    Returns:
        How many there are.

    Raises:
        BundleError: Naming the first file that was altered, added or removed.
    """
    sums, there = _read_sums(path), _files(path)
    for name, file in there.items():
        if sums.get(name) != _sha256(file):
            raise BundleError(f"{name} is not what its checksum says.", _AGAIN)
    if absent := sorted(set(sums) - set(there)):
        raise BundleError(f"{absent[0][:80]} is missing.", _AGAIN)
    return len(sums)


def compare(
    check: Sequence[tuple[str, str | None]], found: list[list[float]], expected: Tensor
) -> float:
    """Largest probability difference between what a fresh process found and what is expected.

    Raises:
        BundleError: If a difference is above `TOLERANCE`, naming the text.
    """
    differences = (torch.tensor(found) - expected).abs().amax(dim=1)
    worst = int(differences.argmax())
    if not differences[worst] <= TOLERANCE:
        raise BundleError(
            f"The bundle disagrees with its run's chip by {differences[worst]:.3g} on the text "
            f"{check[worst][0][:60]!r}.",
            "This is a fault of chipviz or of the model's family; the bundle was not kept.",
        )
    return float(differences[worst])


def in_fresh_process(
    folder: Path,
    kind: BundleKind,
    check: Sequence[tuple[str | None, ...]],
    *,
    memory: int | None = None,
    patience_s: float | None = None,
    program: str | None = None,
) -> list[list[float]]:
    """Probabilities by class of texts. Of the stock kinds, without a line of chipviz.

    Args:
        folder: The bundle.
        kind: What it is.
        check: Texts, each with its second text or None, as the program takes them.
        memory: Bytes that the process may take.
        patience_s: Seconds that it may take.
        program: What it runs. None is that of its kind.

    Raises:
        BundleError: If it fails, or takes more.
    """
    environment = dict(os.environ)
    if kind == "chipviz":  # which may not be installed, only be at hand
        places = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    limit = _LIMIT.replace("MOST", str(memory)) if memory else ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", limit + (program or card.PROGRAMS[kind]), str(folder)],
            input=json.dumps(check).encode(),
            capture_output=True,
            check=False,
            env=environment,
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired:
        raise BundleError(
            f"{folder.name} did not answer its own test in {patience_s:.0f} seconds.",
            "Do not trust it, or try again on a machine that is less busy.",
        ) from None
    if done.returncode != 0:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise BundleError(
            f"A fresh process could not load the bundle: {last[:200]}",
            "This is a fault of chipviz or of the model's family; the bundle was not kept."
            if patience_s is None
            else _AGAIN,
        )
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a bundle."""
    lines = [f"{_sha256(file)}  {name}\n" for name, file in _files(folder).items()]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its path there, but for the checksums themselves."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: files[name] for name in sorted(files) if files[name].is_file() and name != SUMS}


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        lines = read_small(folder / SUMS).splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines if line)}
    except (OSError, ValueError):
        raise BundleError(f"{SUMS} is missing or damaged.", _AGAIN) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def self_test_of(metadata: Metadata) -> tuple[list[tuple[str, str | None]], Tensor]:
    """The texts that stand in a bundle, and the probabilities it gave for them, (N, C).

    Raises:
        BundleError: If there are none, or what stands there is no test.
    """
    texts: list[tuple[str, str | None]] = []
    rows: list[list[float]] = []
    try:
        for test in metadata.everything["self_test"]:
            texts.append((test["text"], test.get("text_pair")))
            rows.append([float(value) for value in test["probabilities"]])
        given = [text for pair in texts for text in pair if text is not None]
        good = (
            0 < len(texts) <= MAX_TESTS
            and all(isinstance(text, str) and len(text) <= MAX_TEST_CHARS for text in given)
            and (metadata.task.kind == "text" or set(given) <= set(MADE))
            and {len(row) for row in rows} == {len(metadata.task.label_names)}
            and all(math.isfinite(value) for row in rows for value in row)
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise BundleError("chip.json holds no test of the bundle.", _AGAIN)
    return texts, torch.tensor(rows)
