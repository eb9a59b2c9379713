"""Backbone + task -> pooled hidden states of every layer, streamed to disk, resumable.

Batches go through the backbone in one stream without a pause between chunks. The leader of a run
writes what has arrived while the next batches are computed.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray
from PIL import Image

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.batching import Chunk, batch_tokens, batches, plan
from chipviz.data.processor import Picture, PictureReader, Reader
from chipviz.data.task import Examples, Task
from chipviz.errors import BackboneError, JobError
from chipviz.features import cache
from chipviz.features.distributed import ALONE, Team
from chipviz.features.forward import (
    Inputs,
    of_pictures,
    pooling_pass,
    reentrant,
    width_at,
)
from chipviz.features.storage import Features, Writer
from chipviz.keys import Site, Split, Vector
from chipviz.parallel import Pool
from chipviz.progress import Meter, Progress, ProgressFn, silent

FORMAT = 3
ORDER: tuple[Split, ...] = ("validation", "train", "test")
ENCODE_ROWS = 1_000
"""Maximum texts tokenised at once. A tokenizer at work holds a hundred times what it gives."""

Rows = Sequence[NDArray[np.int32] | Picture]
"""Token ids of each text of a split, or its pictures."""
States = list[NDArray[np.float32]]
"""States of some rows, one array per vector, shape (L + 1, R, width)."""
Part = tuple[Chunk, Sequence[int], States]
"""Some rows of a chunk, counted from its first, and their states."""


@dataclass(frozen=True)
class Extracted:
    """What reading a task through a backbone leaves."""

    features: Features
    n_tokens: int
    """Tokens that this call sent through the backbone."""
    lengths: dict[Split, list[int]]
    """Tokens per prompt."""


@dataclass(frozen=True)
class _Reading:
    """What turns rows of a task into pooled states, the same in every process of a run."""

    backbone: Backbone
    pad_id: int
    ids: dict[Split, Rows]
    vectors: tuple[Vector, ...]
    meter: Meter
    pool: Pool

    def read(self, chunks: Iterable[Chunk]) -> Generator[Part]:
        """The rows of every chunk, batch by batch, chunk after chunk."""
        pieces = ((chunk, rows) for chunk in chunks for rows in self._batches(chunk))
        with pooling_pass(self.backbone, self.pad_id, self.vectors) as forward:

            def states(piece: tuple[Chunk, list[int]]) -> Part:
                chunk, rows = piece
                ids = self.ids[chunk.split]
                pooled = forward([ids[chunk.start + row] for row in rows])
                states = [one.cpu().numpy() for one in pooled]
                _refuse_no_numbers(states, self.backbone)
                return chunk, rows, states

            passes = (
                self.pool.map(states, pieces)
                if reentrant(self.backbone)
                else (states(piece) for piece in pieces)
            )
            with closing(passes):
                for part in passes:
                    self._count(*part[:2])
                    yield part

    def _batches(self, chunk: Chunk) -> list[list[int]]:
        lengths = [len(ids) for ids in self.ids[chunk.split][chunk.start : chunk.stop]]
        budget = batch_tokens(self.backbone.device)
        return batches(lengths, budget, padded=self.backbone.padded)

    def _count(self, chunk: Chunk, rows: Sequence[int]) -> None:
        ids = self.ids[chunk.split]
        what = "pictures" if isinstance(self.ids[chunk.split][chunk.start], Picture) else "texts"
        label = f"reading {chunk.split} {what} through {self.backbone.n_layers} layers"
        self.meter.advance(len(rows), label, sum(len(ids[chunk.start + row]) for row in rows))


def extract(
    backbone: Backbone,
    prompt: Reader,
    task: Task,
    home: Path,
    *,
    vectors: tuple[Vector, ...],
    pool: Pool | None = None,
    progress: ProgressFn = silent,
    on_key: Callable[[str], None] = lambda _key: None,
    on_chunk: Callable[[Features, Chunk], None] = lambda _features, _chunk: None,
    team: Team = ALONE,
) -> Extracted:
    """Compute what is missing of the features of a task.

    Args:
        backbone: The frozen model.
        prompt: Turns texts into token ids, or pictures into pixels.
        task: The texts.
        home: The folder that holds `features/`. Runs with the same backbone, texts and prompt
            share one copy there, whatever vectors each of them wants.
        vectors: Which vectors to keep per text and layer.
        pool: Where passes are computed beside each other. None makes threads for this call.
        progress: Told after every batch. Raising `Cancelled` from it stops between batches.
        on_key: Told the key of these features (`sharing`) before they are looked for.
        on_chunk: Called after each chunk, also for those that were there already, in order.
        team: The processes that share the work. All call this with the same task.

    Returns:
        All features of the task. In a helper's process they may be out of reach.
    """
    identity = _identity(backbone, prompt, task)
    digest = _digest(identity)
    key = cache.key_of(digest)
    folder = cache.folder_of(home, key)
    widths: dict[Site, int] = {v.site: width_at(backbone, v.site) for v in vectors}
    features = Features(folder, vectors, backbone.n_layers, widths, dict(identity["sizes"]))
    ids: dict[Split, Rows] = {split: _encode(prompt, task.splits[split]) for split in ORDER}
    if not isinstance(prompt, PictureReader):
        backbone.refuse_unknown_token(_largest(ids))
    lengths: dict[Split, list[int]] = {split: list(map(len, rows)) for split, rows in ids.items()}
    meter = Meter("extracting", sum(features.sizes.values()), progress)
    pool = pool or Pool(backbone.device)
    reading = _Reading(backbone, prompt.pad_id, ids, vectors, meter, pool)
    if not team.leads:
        _help(team, digest, reading)
        return Extracted(features, 0, lengths)
    on_key(key)
    n_tokens = 0
    with _alone_in(folder, progress):
        writer = Writer(features, identity)
        chunks = _chunks(backbone, ids)
        missing = {chunk: writer.missing(chunk) for chunk in chunks}
        todo = [chunk for chunk in chunks if missing[chunk]]
        with closing(_lead(team, digest, reading, todo)) as parts:
            for chunk in chunks:
                if wanted := missing[chunk]:
                    _write(writer, chunk, wanted, parts)
                    n_tokens += sum(lengths[chunk.split][chunk.start : chunk.stop])
                else:
                    meter.skip(len(chunk))
                on_chunk(features, chunk)
    return Extracted(features, n_tokens, lengths)


def example_of(backbone: Backbone, reader: Reader) -> Inputs | None:
    """One picture inside its prompt, of a decoder that is asked about pictures. Else None."""
    if backbone.image_token is None or not isinstance(reader, PictureReader):
        return None
    return of_pictures(backbone, reader.batch([Image.new("RGB", (224, 224), (90, 120, 150))]))


def _refuse_no_numbers(states: States, backbone: Backbone) -> None:
    """Name the first layer that gives no finite numbers: nothing could be fitted on them.

    Raises:
        BackboneError: If one does.
    """
    for array in states:
        if np.isfinite(array).all():
            continue
        row = int((~np.isfinite(array)).any(axis=(1, 2)).argmax())
        where = f"layer {row - 1}" if row else "the embedding"
        kind = str(backbone.dtype).removeprefix("torch.")
        raise BackboneError(
            f"{backbone.name} gives no finite numbers from {where} on, computed in {kind}.",
            "Its weights are broken, or too large for that number format: try float32.",
            "dtype",
        )


def _chunks(backbone: Backbone, ids: dict[Split, Rows]) -> list[Chunk]:
    """All chunks of a task, in the order in which they are read."""
    batch = batch_tokens(backbone.device)
    chunks = [chunk for split in ORDER for chunk in plan(split, ids[split], batch)]
    # A curve can be drawn as soon as there are a few texts to fit and a few to check with.
    return sorted(chunks, key=lambda chunk: chunk.start > 0 or chunk.split == "test")


def _write(writer: Writer, chunk: Chunk, wanted: Sequence[Vector], parts: Iterator[Part]) -> None:
    """Take the rows of a chunk, which come next, and write them."""
    left = len(chunk)
    while left:
        _, rows, states = next(parts)
        writer.write(chunk, rows, states, wanted)
        left -= len(rows)
    writer.finish(chunk, wanted)


def _lead(team: Team, digest: str, reading: _Reading, todo: Sequence[Chunk]) -> Generator[Part]:
    """The rows of each chunk to do, in order. The helpers compute their share beside."""
    team.share((digest, todo))
    with closing(reading.read(todo[:: team.size])) as own:
        for first in range(0, len(todo), team.size):
            left = len(todo[first])
            while left:
                part = next(own)
                left -= len(part[1])
                yield part
            others = team.gather(None)[1:]
            for chunk, states in zip(todo[first + 1 :], others, strict=False):
                reading.meter.advance(len(chunk), "reading texts in several processes")
                yield chunk, range(len(chunk)), states


def _help(team: Team, digest: str, reading: _Reading) -> None:
    """Compute every chunk that falls to this process and send it to the leader."""
    leaders, todo = team.share()
    if leaders != digest:
        raise JobError(
            "The processes of this run do not see the same texts or the same backbone.",
            "Give every machine the same files and the same versions.",
        )
    mine = todo[team.rank :: team.size]
    with closing(reading.read(mine)) as parts:
        for i in range(len(todo[:: team.size])):
            team.gather(_whole(mine[i], parts) if i < len(mine) else None)


def _whole(chunk: Chunk, parts: Iterator[Part]) -> States:
    """The states of all rows of a chunk, which come next."""
    whole: States = []
    left = len(chunk)
    while left:
        _, rows, states = next(parts)
        left -= len(rows)
        whole = whole or [
            np.empty((one.shape[0], len(chunk), one.shape[2]), np.float32) for one in states
        ]
        for array, one in zip(whole, states, strict=True):
            array[:, rows] = one
    return whole


def _largest(ids: dict[Split, Rows]) -> int:
    """The largest token of any text."""
    arrays = (row for rows in ids.values() for row in rows if isinstance(row, np.ndarray))
    return max((int(row.max()) for row in arrays if len(row)), default=0)


def _encode(prompt: Reader, rows: Examples) -> Rows:
    """Token ids per text, or the pictures, none of them opened yet."""
    if isinstance(prompt, PictureReader):
        return prompt.encode(rows.texts)
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(rows), ENCODE_ROWS):
        part = rows.take(range(start, min(start + ENCODE_ROWS, len(rows))))
        encoded = prompt.encode(part.texts, part.pairs)
        ids += [np.array(sequence, dtype=np.int32) for sequence in encoded]
    return ids


@contextmanager
def _alone_in(folder: Path, progress: ProgressFn) -> Iterator[None]:
    """Hold the folder. A run that needs the same features waits here and then reads them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = cache.lock_of(folder)
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


def _identity(backbone: Backbone, prompt: Reader, task: Task) -> dict[str, Any]:
    """All that the numbers depend on, beside the pooling."""
    return {
        "format": FORMAT,
        "backbone": backbone.folder.fingerprint,
        "dtype": str(backbone.dtype),
        "task": task.fingerprint,
        "prompt": prompt.fingerprint,
        "template": prompt.template,
        "max_length": prompt.max_length,
        "sizes": {split: len(task.splits[split]) for split in ORDER},
        # Only where it is so: features of all other backbones keep their identity.
        **({} if backbone.padded else {"padded": False}),
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
