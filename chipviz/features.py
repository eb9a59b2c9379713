"""Backbone + task -> pooled hidden states of every layer, streamed to disk, resumable.

One array a split and pooling, (L + 1, N, D) float32; a manifest says which chunks of rows are done
and what their bytes were. A chunk counts only when the manifest says so, and the manifest is
written after the bytes: whatever kills the process, the next one goes on at the next chunk.
"""

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
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
from chipviz.errors import JobError
from chipviz.metrics import EMBEDDING_LAYER
from chipviz.pooling import AT_ONE_TOKEN, pool
from chipviz.progress import Meter, Progress, ProgressFn, silent
from chipviz.prompt import Prompt
from chipviz.streams import side_by_side
from chipviz.task import Examples, Task
from chipviz.team import ALONE, Team

FORMAT = 2
ORDER: tuple[Split, ...] = ("validation", "train", "test")
BATCH_TOKENS = {"cpu": 1_024, "cuda": 16_384}
"""Tokens of one forward pass at most, padding included: large enough for full matrix speed on the
device, small enough for a CPU's cache."""
SMALL_BATCH, SIMILAR = 0.2, 0.9
"""A batch with this share of its tokens takes no text any more that is clearly shorter, of less
than this share of its longest: another pass costs less than the padding."""
ENCODE_ROWS = 1_000
CHUNK_BATCHES = 8
"""Full batches of one chunk: how much a killed run has to do again, and how many texts there are to
sort by length. A split's first chunk has half as many: the curve waits for it."""


Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""


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
    hidden_size: int
    sizes: dict[Split, int]

    def read(
        self, split: Split, pooling: Pooling, layer: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows `start` to `stop` of one layer; layer -1 is the embedding output.

        Returns:
            Shape (stop - start, D), float32. Read, not mapped: the pages of a mapping would count
            as this process's memory.

        Raises:
            IndexError: If there is no such layer.
        """
        if not EMBEDDING_LAYER <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside of -1 to {self.n_layers - 1}")
        n_rows = self.sizes[split]
        stop = n_rows if stop is None else min(stop, n_rows)
        first = ((layer + 1) * n_rows + start) * self.hidden_size
        path = _path(self.folder, split, pooling)
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(4 * first, os.SEEK_CUR)
            values = np.fromfile(file, np.float32, (stop - start) * self.hidden_size)
        return torch.from_numpy(values.reshape(-1, self.hidden_size))


@dataclass(frozen=True)
class _Reading:
    """What turns rows of a task into pooled states, the same in every process of a run."""

    backbone: Backbone
    pad_id: int
    ids: dict[Split, list[NDArray[np.int32]]]
    poolings: tuple[Pooling, ...]

    def compute(self, chunk: Chunk, meter: Meter) -> NDArray[np.float32]:
        """Pooled states of one chunk, shape (P, L + 1, N, D)."""
        ids = self.ids[chunk.split][chunk.start : chunk.stop]
        shape = (
            len(self.poolings),
            self.backbone.n_layers + 1,
            chunk.stop - chunk.start,
            self.backbone.hidden_size,
        )
        values = np.empty(shape, dtype=np.float32)
        lengths = [len(sequence) for sequence in ids]
        label = f"reading {chunk.split} texts through {self.backbone.n_layers} layers"
        grouped = batches(lengths, batch_tokens(self.backbone.device))
        with pooling_pass(self.backbone, self.pad_id, self.poolings) as forward:

            def states(rows: list[int]) -> NDArray[np.float32]:
                return forward([ids[i] for i in rows]).cpu().numpy()

            passes = (
                side_by_side(states, grouped, self.backbone.device)
                if _reentrant(self.backbone)
                else map(states, grouped)
            )
            for rows, pooled in zip(grouped, passes, strict=True):
                values[:, :, rows] = pooled
                meter.advance(len(rows), label, sum(lengths[i] for i in rows))
        return values


def extract(
    backbone: Backbone,
    prompt: Prompt,
    task: Task,
    home: Path,
    *,
    poolings: tuple[Pooling, ...],
    progress: ProgressFn = silent,
    on_chunk: Callable[[Features, Chunk], None] = lambda _features, _chunk: None,
    team: Team = ALONE,
) -> tuple[Features, int]:
    """Compute what is missing of the features of a task, and return all of them.

    Args:
        backbone: The frozen model.
        prompt: Turns texts into token ids.
        task: The texts.
        home: The folder that holds `features/`; runs with the same backbone, texts and prompt
            share one copy there, whatever poolings each of them wants.
        poolings: Which vectors to keep of each text and layer.
        progress: Told after every batch; raising `Cancelled` from it stops between batches.
        on_chunk: Called after each chunk, also for those that were there already, in order.
        team: The processes that share the work; all call this with the same task.

    Returns:
        The features, and how many tokens this call sent through the backbone. In a helper's process
        the features may be out of reach.
    """
    identity = _identity(backbone, prompt, task)
    folder = home / "features" / _digest(identity)[:24]
    features = Features(
        folder, poolings, backbone.n_layers, backbone.hidden_size, dict(identity["sizes"])
    )
    ids: dict[Split, list[NDArray[np.int32]]] = {
        split: _encode(prompt, task.splits[split]) for split in ORDER
    }
    reading = _Reading(backbone, prompt.tokenizer.pad_token_id, ids, poolings)
    meter = Meter("extracting", sum(features.sizes.values()), progress)
    if not team.leads:
        _help(team, identity, reading, meter)
        return features, 0
    budget = CHUNK_BATCHES * batch_tokens(backbone.device)
    chunks = [chunk for split in ORDER for chunk in plan(split, ids[split], budget)]
    # A curve can be drawn as soon as there are a few texts to fit and a few to check with.
    chunks.sort(key=lambda chunk: chunk.start > 0 or chunk.split == "test")
    n_tokens = 0
    with _alone_in(folder, progress):
        done = _open_store(features, identity)
        missing = {chunk.key: _missing(features, chunk, done) for chunk in chunks}
        results = _results(team, identity, reading, meter, [c for c in chunks if missing[c.key]])
        for chunk in chunks:
            if wanted := missing[chunk.key]:
                _write(features, chunk, wanted, next(results))
                sums = {p: _checksum(features, chunk, p) for p in wanted}
                done[chunk.key] = done.get(chunk.key, {}) | sums
                _write_manifest(folder, identity, done)
                n_tokens += sum(map(len, ids[chunk.split][chunk.start : chunk.stop]))
            else:
                meter.skip(chunk.stop - chunk.start)
            on_chunk(features, chunk)
    return features, n_tokens


def _results(
    team: Team, identity: dict[str, Any], reading: _Reading, meter: Meter, todo: list[Chunk]
) -> Iterator[NDArray[np.float32]]:
    """The values of each chunk to do, in order; the helpers compute their share beside."""
    team.share((_digest(identity), todo))
    for first in range(0, len(todo), team.size):
        together = todo[first : first + team.size]
        values = team.gather(reading.compute(together[0], meter))
        for chunk, computed in zip(together, values, strict=False):
            if chunk is not together[0]:
                meter.advance(chunk.stop - chunk.start, "reading texts in several processes")
            yield computed


def _help(team: Team, identity: dict[str, Any], reading: _Reading, meter: Meter) -> None:
    """Compute every chunk that falls to this process and send it to the leader."""
    digest, todo = team.share()
    if digest != _digest(identity):
        raise JobError(
            "The processes of this run do not see the same texts or the same backbone.",
            "Give every machine the same files and the same versions.",
        )
    for first in range(0, len(todo), team.size):
        mine = todo[first + team.rank : first + team.rank + 1]
        team.gather(reading.compute(mine[0], meter) if mine else None)


def _encode(prompt: Prompt, rows: Examples) -> list[NDArray[np.int32]]:
    """Token ids of each text; in slices, for a tokenizer at work holds a hundred times as much."""
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(rows), ENCODE_ROWS):
        part = rows.take(range(start, min(start + ENCODE_ROWS, len(rows))))
        encoded = prompt.encode(part.texts, part.pairs)
        ids += [np.array(sequence, dtype=np.int32) for sequence in encoded]
    return ids


def batch_tokens(device: torch.device) -> int:
    """Tokens of one forward pass on a device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def plan(split: Split, ids: Sequence[Sized], budget: int) -> list[Chunk]:
    """Cut a split into chunks of consecutive rows of about `budget` tokens, the first of half."""
    chunks, start, tokens = [], 0, 0
    for row, sequence in enumerate(ids):
        tokens += len(sequence)
        if tokens >= (budget if start else budget / 2) or row == len(ids) - 1:
            chunks.append(Chunk(split, start, row + 1))
            start, tokens = row + 1, 0
    return chunks


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows of similar length so that rows x longest stays within `budget` tokens.

    Returns:
        Row numbers by batch; every row in exactly one, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    grouped: list[list[int]] = []
    for row in order:
        longest = lengths[grouped[-1][0]] if grouped else 0
        n_tokens = len(grouped[-1]) * longest if grouped else 0
        padded = lengths[row] < SIMILAR * longest and n_tokens >= budget * SMALL_BATCH
        if grouped and n_tokens + longest <= budget and not padded:
            grouped[-1].append(row)
        else:
            grouped.append([row])
    return grouped


@contextmanager
def pooling_pass(
    backbone: Backbone, pad_id: int, poolings: Sequence[Pooling]
) -> Iterator[Callable[[Sequence[Ids]], Tensor]]:
    """A function that pools every layer as it leaves its block, on the device.

    It takes the token ids of one batch and returns shape (P, L + 1, B, D), float32, on the device;
    row 0 of the layers is the embedding. Several threads may call it at the same time.
    """
    of_all = [p for p in poolings if p not in AT_ONE_TOKEN]
    own = threading.local()  # each thread's mask, and where its batch goes

    def see(layer: int, hidden: Tensor) -> None:
        mask = own.mask.to(hidden.device)
        normed = backbone.read(hidden) if of_all else hidden
        for i, pooling in enumerate(poolings):
            if pooling in of_all:
                one = pool(normed, mask, pooling)
            else:
                one = pool(hidden, mask, pooling)
                # A norm works on each token alone, so it can come after the token is taken.
                if pooling != "raw":
                    one = backbone.read(one.to(hidden.dtype)).float()
            own.pooled[i, layer + 1] = one.to(own.pooled.device)

    @torch.inference_mode()
    def forward(ids: Sequence[Ids]) -> Tensor:
        tokens, own.mask = pad(ids, pad_id, backbone.device)
        shape = (len(poolings), backbone.n_layers + 1, len(ids), backbone.hidden_size)
        pooled = own.pooled = torch.empty(shape, dtype=torch.float32, device=backbone.device)
        backbone.forward(tokens, own.mask)
        return pooled

    with watch_layers(backbone, see):
        yield forward


def forward_pooled(
    backbone: Backbone, ids: Sequence[Ids], pad_id: int, poolings: Sequence[Pooling]
) -> Tensor:
    """One pass over one batch: see `pooling_pass`."""
    with pooling_pass(backbone, pad_id, poolings) as forward:
        return forward(ids)


def _reentrant(backbone: Backbone) -> bool:
    """Whether several passes may run at once: not where a pass changes the model.

    Parts that were put away come and go, and some rotary embeddings stretch with the text.
    """
    stretching = (str(getattr(m, "rope_type", "")) for m in backbone.model.modules())
    changing = any("dynamic" in kind or "longrope" in kind for kind in stretching)
    return not changing and not hasattr(backbone.model, "hf_device_map")


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


def _identity(backbone: Backbone, prompt: Prompt, task: Task) -> dict[str, Any]:
    """All that the numbers depend on, beside the pooling."""
    return {
        "format": FORMAT,
        "backbone": backbone.fingerprint,
        "dtype": str(backbone.dtype),
        "task": task.fingerprint,
        "prompt": prompt.fingerprint,
        "template": prompt.template,
        "max_length": prompt.max_length,
        "sizes": {split: len(task.splits[split]) for split in ORDER},
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


Done = dict[str, dict[str, int]]
"""Chunk -> pooling -> CRC-32 of its bytes."""


def _open_store(features: Features, identity: dict[str, Any]) -> Done:
    """Make sure every array is there, and say which chunks are done."""
    features.folder.mkdir(parents=True, exist_ok=True)
    done = _read_manifest(features.folder, identity)
    for split, n_rows in features.sizes.items():
        for pooling in features.poolings:
            shape = (features.n_layers + 1, n_rows, features.hidden_size)
            path = _path(features.folder, split, pooling)
            if not _is_array(path, shape):
                _create(path, shape)
    return done


def _missing(features: Features, chunk: Chunk, done: Done) -> list[Pooling]:
    """The poolings of a chunk that were never done, or whose bytes are not what they were."""
    sums = done.get(chunk.key, {})
    return [
        p for p in features.poolings if p not in sums or sums[p] != _checksum(features, chunk, p)
    ]


def _write(
    features: Features, chunk: Chunk, wanted: Sequence[Pooling], values: NDArray[np.float32]
) -> None:
    for i, pooling in enumerate(features.poolings):
        if pooling in wanted:
            stored = _open(features.folder, chunk.split, pooling, "r+")
            stored[:, chunk.start : chunk.stop] = values[i]
            stored.flush()


def _read_manifest(folder: Path, identity: dict[str, Any]) -> Done:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return manifest["done"] if manifest.get("identity") == identity else {}


def _write_manifest(folder: Path, identity: dict[str, Any], done: Done) -> None:
    temporary = folder / "manifest.tmp"  # one name: the folder is locked, and none is left over
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


def _checksum(features: Features, chunk: Chunk, pooling: Pooling) -> int:
    """CRC-32 of one chunk's bytes; catches truncated and flipped files."""
    crc = 0
    for layer in range(EMBEDDING_LAYER, features.n_layers):
        rows = features.read(chunk.split, pooling, layer, chunk.start, chunk.stop)
        crc = zlib.crc32(rows.numpy().data, crc)
    return crc
