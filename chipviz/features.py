"""Backbone + task -> pooled hidden states of every layer, streamed to disk, resumable.

Batches go through the backbone in one stream without a pause between chunks; the leader of a run
writes what has arrived while the next batches are computed.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from numpy.typing import NDArray
from torch import Tensor

from chipviz import sharing
from chipviz.arrays import Features, Writer
from chipviz.backbone import Backbone, pad, watch_layers
from chipviz.batching import Chunk, batch_tokens, batches, plan
from chipviz.config import Pooling, Split
from chipviz.errors import JobError
from chipviz.pooling import AT_ONE_TOKEN, pool
from chipviz.progress import Meter, Progress, ProgressFn, silent
from chipviz.prompt import Prompt
from chipviz.streams import side_by_side
from chipviz.task import Examples, Task
from chipviz.team import ALONE, Team

FORMAT = 3
ORDER: tuple[Split, ...] = ("validation", "train", "test")
ENCODE_ROWS = 1_000

Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""
Part = tuple[Sequence[int], NDArray[np.float32]]
"""Some rows of a chunk, counted from its first, and their states, shape (P, L + 1, R, D)."""


@dataclass(frozen=True)
class _Reading:
    """What turns rows of a task into pooled states, the same in every process of a run."""

    backbone: Backbone
    pad_id: int
    ids: dict[Split, list[NDArray[np.int32]]]
    poolings: tuple[Pooling, ...]
    meter: Meter

    def read(self, chunks: Sequence[Chunk]) -> Generator[Iterator[Part]]:
        """The parts of each chunk, in order; a chunk's must be taken before the next chunk's."""
        pieces = ((chunk, rows) for chunk in chunks for rows in self._batches(chunk))
        with pooling_pass(self.backbone, self.pad_id, self.poolings) as forward:

            def states(piece: tuple[Chunk, list[int]]) -> Part:
                chunk, rows = piece
                ids = self.ids[chunk.split]
                return rows, forward([ids[chunk.start + row] for row in rows]).cpu().numpy()

            passes = (
                side_by_side(states, pieces, self.backbone.device)
                if _reentrant(self.backbone)
                else (states(piece) for piece in pieces)
            )
            with closing(passes):
                for chunk in chunks:
                    yield self._parts(chunk, passes)

    def _batches(self, chunk: Chunk) -> list[list[int]]:
        lengths = [len(ids) for ids in self.ids[chunk.split][chunk.start : chunk.stop]]
        return batches(lengths, batch_tokens(self.backbone.device))

    def _parts(self, chunk: Chunk, passes: Iterator[Part]) -> Iterator[Part]:
        ids, left = self.ids[chunk.split], len(chunk)
        label = f"reading {chunk.split} texts through {self.backbone.n_layers} layers"
        while left:
            rows, states = next(passes)
            left -= len(rows)
            yield rows, states
            self.meter.advance(len(rows), label, sum(len(ids[chunk.start + row]) for row in rows))

    def whole(self, chunk: Chunk, parts: Iterable[Part]) -> NDArray[np.float32]:
        """The states of all rows of a chunk, shape (P, L + 1, N, D)."""
        layers, width = self.backbone.n_layers + 1, self.backbone.hidden_size
        values = np.empty((len(self.poolings), layers, len(chunk), width), dtype=np.float32)
        for rows, states in parts:
            values[:, :, rows] = states
        return values


def extract(
    backbone: Backbone,
    prompt: Prompt,
    task: Task,
    home: Path,
    *,
    poolings: tuple[Pooling, ...],
    progress: ProgressFn = silent,
    on_key: Callable[[str], None] = lambda _key: None,
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
        on_key: Told the key of these features (`sharing`) before they are looked for.
        on_chunk: Called after each chunk, also for those that were there already, in order.
        team: The processes that share the work; all call this with the same task.

    Returns:
        The features, and how many tokens this call sent through the backbone. In a helper's process
        the features may be out of reach.
    """
    identity = _identity(backbone, prompt, task)
    digest = _digest(identity)
    key = sharing.key_of(digest)
    folder = sharing.folder_of(home, key)
    features = Features(
        folder, poolings, backbone.n_layers, backbone.hidden_size, dict(identity["sizes"])
    )
    ids: dict[Split, list[NDArray[np.int32]]] = {
        split: _encode(prompt, task.splits[split]) for split in ORDER
    }
    meter = Meter("extracting", sum(features.sizes.values()), progress)
    reading = _Reading(backbone, prompt.tokenizer.pad_token_id, ids, poolings, meter)
    if not team.leads:
        _help(team, digest, reading)
        return features, 0
    on_key(key)
    batch = batch_tokens(backbone.device)
    chunks = [chunk for split in ORDER for chunk in plan(split, ids[split], batch)]
    # A curve can be drawn as soon as there are a few texts to fit and a few to check with.
    chunks.sort(key=lambda chunk: chunk.start > 0 or chunk.split == "test")
    n_tokens = 0
    with _alone_in(folder, progress):
        writer = Writer(features, identity)
        missing = {chunk: writer.missing(chunk) for chunk in chunks}
        todo = [chunk for chunk in chunks if missing[chunk]]
        with closing(_lead(team, digest, reading, todo)) as results:
            for chunk in chunks:
                if wanted := missing[chunk]:
                    for rows, states in next(results):
                        writer.write(chunk, rows, states, wanted)
                    writer.finish(chunk, wanted)
                    n_tokens += sum(map(len, ids[chunk.split][chunk.start : chunk.stop]))
                else:
                    meter.skip(len(chunk))
                on_chunk(features, chunk)
    return features, n_tokens


def _lead(
    team: Team, digest: str, reading: _Reading, todo: Sequence[Chunk]
) -> Generator[Iterable[Part]]:
    """The parts of each chunk to do, in order; the helpers compute their share beside."""
    team.share((digest, todo))
    with closing(reading.read(todo[:: team.size])) as own:
        for first, parts in zip(range(0, len(todo), team.size), own, strict=True):
            yield parts
            others = team.gather(None)[1:]
            for chunk, states in zip(todo[first + 1 :], others, strict=False):
                reading.meter.advance(len(chunk), "reading texts in several processes")
                yield [(range(len(chunk)), states)]


def _help(team: Team, digest: str, reading: _Reading) -> None:
    """Compute every chunk that falls to this process and send it to the leader."""
    leaders, todo = team.share()
    if leaders != digest:
        raise JobError(
            "The processes of this run do not see the same texts or the same backbone.",
            "Give every machine the same files and the same versions.",
        )
    mine = todo[team.rank :: team.size]
    with closing(reading.read(mine)) as read:
        for i in range(len(todo[:: team.size])):
            team.gather(reading.whole(mine[i], next(read)) if i < len(mine) else None)


def _encode(prompt: Prompt, rows: Examples) -> list[NDArray[np.int32]]:
    """Token ids of each text; in slices, for a tokenizer at work holds a hundred times as much."""
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(rows), ENCODE_ROWS):
        part = rows.take(range(start, min(start + ENCODE_ROWS, len(rows))))
        encoded = prompt.encode(part.texts, part.pairs)
        ids += [np.array(sequence, dtype=np.int32) for sequence in encoded]
    return ids


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
    lock = sharing.lock_of(folder)
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
