"""Backbone + task -> pooled hidden states of every layer, streamed to disk, resumable.

One array a split and pooling, (L + 1, N, D) float32; a manifest says which chunks of rows are done
and what their bytes were. A chunk counts only when the manifest says so, and the manifest is
written after the bytes: whatever kills the process, the next one goes on at the next chunk.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbone import Backbone, pad, watch_layers
from chipviz.config import Pooling, Split
from chipviz.metrics import EMBEDDING_LAYER
from chipviz.pooling import last_positions, pool
from chipviz.progress import Meter, Progress, ProgressFn, silent
from chipviz.task import Prompt, Task

FORMAT = 1
ORDER: tuple[Split, ...] = ("validation", "train", "test")
"""Validation goes first, so that the curve can be drawn from the first training chunk on."""
CHUNK_TOKENS = 4_096
"""Tokens of one chunk, at most: how much a killed run has to do again."""
BATCH_TOKENS = 2_048
"""Tokens of one forward pass, padding included: large enough for full matrix speed on a CPU,
small enough for its cache."""


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of one split."""

    split: Split
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Name in the manifest."""
        return f"{self.split}:{self.start}-{self.stop}"


@dataclass(frozen=True)
class Features:
    """Pooled hidden states on disk."""

    folder: Path
    poolings: tuple[Pooling, ...]
    n_layers: int

    def read(self, split: Split, pooling: Pooling, layer: int, n: int | None = None) -> Tensor:
        """The first `n` rows of one layer; layer -1 is the embedding output.

        Returns:
            Shape (n, D), float32, a copy in memory.

        Raises:
            IndexError: If there is no such layer.
        """
        if not EMBEDDING_LAYER <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside of -1 to {self.n_layers - 1}")
        stored = _open(self.folder, split, pooling, "r")
        return torch.from_numpy(np.array(stored[layer + 1, :n]))


def extract(
    backbone: Backbone,
    prompt: Prompt,
    task: Task,
    home: Path,
    *,
    poolings: tuple[Pooling, ...],
    progress: ProgressFn = silent,
    on_chunk: Callable[[Features, Chunk], None] = lambda _features, _chunk: None,
) -> tuple[Features, int]:
    """Compute what is missing of the features of a task, and return all of them.

    Args:
        backbone: The frozen model.
        prompt: Turns texts into token ids.
        task: The texts.
        home: The folder that holds `features/`; runs with the same backbone, texts and prompt
            share one copy there.
        poolings: Which vectors to keep of each text and layer.
        progress: Told after every batch; raising `Cancelled` from it stops between batches.
        on_chunk: Called after each chunk, also for those that were there already, in order.

    Returns:
        The features, and how many tokens this call sent through the backbone.
    """
    sizes: dict[Split, int] = {split: len(task.splits[split]) for split in ORDER}
    identity = _identity(backbone, prompt, task, poolings, sizes)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = home / "features" / digest[:24]
    features = Features(folder, poolings, backbone.n_layers)
    ids = {s: prompt.encode(task.splits[s].texts, task.splits[s].pairs) for s in ORDER}
    chunks = [chunk for split in ORDER for chunk in plan(split, ids[split])]
    meter = Meter("extracting", sum(sizes.values()), progress)
    n_tokens = 0
    with _alone_in(folder, progress):
        done = _open_store(folder, identity, sizes, poolings, backbone)
        for chunk in chunks:
            rows = chunk.stop - chunk.start
            if chunk.key in done and done[chunk.key] == _checksum(folder, chunk, poolings):
                meter.skip(rows)
            else:
                part = ids[chunk.split][chunk.start : chunk.stop]
                n_tokens += _extract_chunk(backbone, part, prompt, chunk, features, meter)
                done[chunk.key] = _checksum(folder, chunk, poolings)
                _write_manifest(folder, identity, done)
            on_chunk(features, chunk)
    return features, n_tokens


def plan(split: Split, ids: Sequence[Sequence[int]]) -> list[Chunk]:
    """Cut a split into chunks of consecutive rows of about `CHUNK_TOKENS` tokens."""
    chunks, start, tokens = [], 0, 0
    for row, sequence in enumerate(ids):
        tokens += len(sequence)
        if tokens >= CHUNK_TOKENS or row == len(ids) - 1:
            chunks.append(Chunk(split, start, row + 1))
            start, tokens = row + 1, 0
    return chunks


def batches(lengths: Sequence[int], budget: int = BATCH_TOKENS) -> list[list[int]]:
    """Group rows of similar length so that rows x longest stays within `budget` tokens.

    Returns:
        Row numbers by batch; every row in exactly one, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    grouped: list[list[int]] = []
    for row in order:
        longest = lengths[grouped[-1][0]] if grouped else 0
        if grouped and (len(grouped[-1]) + 1) * longest <= budget:
            grouped[-1].append(row)
        else:
            grouped.append([row])
    return grouped


@torch.inference_mode()
def forward_pooled(
    backbone: Backbone, ids: Sequence[Sequence[int]], pad_id: int, poolings: Sequence[Pooling]
) -> Tensor:
    """One forward pass; every layer is pooled as it leaves its block, on the device.

    Returns:
        Shape (P, L + 1, B, D), float32, on the device; row 0 of the layers is the embedding.
    """
    tokens, mask = pad(ids, pad_id, backbone.device)
    last = last_positions(mask)
    shape = (len(poolings), backbone.n_layers + 1, len(ids), backbone.hidden_size)
    pooled = torch.empty(shape, dtype=torch.float32, device=backbone.device)
    rows = torch.arange(len(ids), device=backbone.device)

    def see(layer: int, hidden: Tensor) -> None:
        for i, pooling in enumerate(poolings):
            # A norm works on each token alone, so the last token can be taken before it.
            if pooling == "last":
                pooled[i, layer + 1] = backbone.read(hidden[rows, last]).float()
            else:
                pooled[i, layer + 1] = pool(backbone.read(hidden), mask, pooling)

    with watch_layers(backbone, see):
        backbone.forward(tokens, mask)
    return pooled


@contextmanager
def _alone_in(folder: Path, progress: ProgressFn) -> Iterator[None]:
    """Hold the folder; a run that needs the same features waits here and then reads them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            progress(Progress("extracting", "waiting for another run that reads the same texts"))
    try:
        yield
    finally:
        lock.release()


def _extract_chunk(
    backbone: Backbone,
    ids: Sequence[Sequence[int]],
    prompt: Prompt,
    chunk: Chunk,
    features: Features,
    meter: Meter,
) -> int:
    """Compute the rows of one chunk and write them; returns the tokens read."""
    n_rows, n_tokens = chunk.stop - chunk.start, 0
    shape = (len(features.poolings), backbone.n_layers + 1, n_rows, backbone.hidden_size)
    values = np.empty(shape, dtype=np.float32)
    for rows in batches([len(sequence) for sequence in ids]):
        batch = [ids[i] for i in rows]
        pooled = forward_pooled(backbone, batch, prompt.tokenizer.pad_token_id, features.poolings)
        values[:, :, rows] = pooled.cpu().numpy()
        tokens = sum(len(sequence) for sequence in batch)
        n_tokens += tokens
        label = f"reading {chunk.split} texts through {backbone.n_layers} layers"
        meter.advance(len(rows), label, tokens)
    for i, pooling in enumerate(features.poolings):
        stored = _open(features.folder, chunk.split, pooling, "r+")
        stored[:, chunk.start : chunk.stop] = values[i]
        stored.flush()
    return n_tokens


def _identity(
    backbone: Backbone,
    prompt: Prompt,
    task: Task,
    poolings: tuple[Pooling, ...],
    sizes: dict[Split, int],
) -> dict[str, Any]:
    """All that the numbers depend on."""
    return {
        "format": FORMAT,
        "backbone": backbone.fingerprint,
        "dtype": str(backbone.dtype),
        "task": task.fingerprint,
        "prompt": prompt.fingerprint,
        "template": prompt.template,
        "max_length": prompt.max_length,
        "poolings": list(poolings),
        "sizes": dict(sizes),
    }


def _open_store(
    folder: Path,
    identity: dict[str, Any],
    sizes: dict[Split, int],
    poolings: tuple[Pooling, ...],
    backbone: Backbone,
) -> dict[str, int]:
    """Make sure every array is there, and say which chunks are done."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _read_manifest(folder, identity)
    for split in ORDER:
        for pooling in poolings:
            shape = (backbone.n_layers + 1, sizes[split], backbone.hidden_size)
            path = _path(folder, split, pooling)
            if not _is_array(path, shape):
                done = {}
                _create(path, shape)
    return done


def _read_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, int]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest["done"] if manifest.get("identity") == identity else {}


def _write_manifest(folder: Path, identity: dict[str, Any], done: dict[str, int]) -> None:
    temporary = folder / f"manifest.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({"identity": identity, "done": done}, indent=1), "utf-8")
    temporary.replace(folder / "manifest.json")


def _path(folder: Path, split: Split, pooling: Pooling) -> Path:
    return folder / f"{split}-{pooling}.npy"


def _is_array(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return stored.shape == shape and stored.dtype == np.float32


def _create(path: Path, shape: tuple[int, ...]) -> None:
    """An empty array that owns its disk space: a full disk is an error here, not a crash later."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)


def _open(folder: Path, split: Split, pooling: Pooling, mode: str) -> Any:
    """Map one array; the mapping goes with the last reference, and its pages with it."""
    return np.lib.format.open_memmap(_path(folder, split, pooling), mode=mode)  # type: ignore[arg-type]


def _checksum(folder: Path, chunk: Chunk, poolings: tuple[Pooling, ...]) -> int:
    """CRC-32 of one chunk's bytes; catches truncated and flipped files."""
    crc = 0
    for pooling in poolings:
        stored: NDArray[np.float32] = _open(folder, chunk.split, pooling, "r")
        for layer in stored:
            crc = zlib.crc32(layer[chunk.start : chunk.stop].tobytes(), crc)
    return crc
