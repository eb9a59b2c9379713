"""Pooled hidden states on disk: one array a split and pooling, and a manifest.

Arrays are (L + 1, N, D) float32, the embedding output first. The manifest says which chunks of rows
are done and what their bytes were, and is written after the bytes: whatever kills the process, the
next one goes on at the next chunk.
"""

import errno
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.batching import Chunk
from chipviz.config import Pooling, Split
from chipviz.metrics import EMBEDDING_LAYER


@dataclass(frozen=True)
class Features:
    """Pooled hidden states on disk, to read."""

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
        with self.path(split, pooling).open("rb") as file:
            file.seek(_begin(file) + 4 * first)
            values = np.fromfile(file, np.float32, (stop - start) * self.hidden_size)
        return torch.from_numpy(values.reshape(-1, self.hidden_size))

    def path(self, split: Split, pooling: Pooling) -> Path:
        """The file of one array."""
        return self.folder / f"{split}-{pooling}.npy"

    def checksum(self, chunk: Chunk, pooling: Pooling) -> int:
        """CRC-32 of one chunk's bytes; catches truncated and flipped files."""
        crc = 0
        for layer in range(EMBEDDING_LAYER, self.n_layers):
            rows = self.read(chunk.split, pooling, layer, chunk.start, chunk.stop)
            crc = zlib.crc32(rows.numpy().data, crc)
        return crc


class Writer:
    """The writing side of `Features`; only who holds the folder's lock may have one."""

    def __init__(self, features: Features, identity: dict[str, Any]) -> None:
        """Make sure every array is there, and see which chunks are done.

        Args:
            features: What is to be written.
            identity: All that the numbers depend on; chunks of another identity are not done.
        """
        self._features = features
        self._identity = identity
        self._manifest = features.folder / "manifest.json"
        features.folder.mkdir(parents=True, exist_ok=True)
        self._done = self._read_manifest()
        for split, n_rows in features.sizes.items():
            for pooling in features.poolings:
                shape = (features.n_layers + 1, n_rows, features.hidden_size)
                path = features.path(split, pooling)
                if not _is_array(path, shape):
                    _create(path, shape)

    def missing(self, chunk: Chunk) -> list[Pooling]:
        """The poolings of a chunk that were never done, or whose bytes are not what they were."""
        sums, features = self._done.get(chunk.key, {}), self._features
        return [
            p for p in features.poolings if p not in sums or sums[p] != features.checksum(chunk, p)
        ]

    def write(
        self,
        chunk: Chunk,
        rows: Sequence[int],
        values: NDArray[np.float32],
        wanted: Sequence[Pooling],
    ) -> None:
        """Put some rows of a chunk where they belong.

        Args:
            chunk: Not done before `finish` is called for it.
            rows: Counted from the chunk's first.
            values: Shape (P, L + 1, R, D), of all poolings of the features.
            wanted: Poolings to write.
        """
        n_rows = self._features.sizes[chunk.split]
        width = 4 * self._features.hidden_size
        for i, pooling in enumerate(self._features.poolings):
            if pooling not in wanted:
                continue
            # Written, not mapped: the pages of a mapping would count as this process's memory.
            # Without a buffer, which every seek would empty.
            with self._features.path(chunk.split, pooling).open("r+b", buffering=0) as file:
                begin = _begin(file) + width * chunk.start
                for layer, states in enumerate(values[i]):
                    for row, state in zip(rows, states, strict=True):
                        file.seek(begin + width * (layer * n_rows + row))
                        if file.write(state.data) != width:
                            raise OSError(errno.ENOSPC, "No space left on device", file.name)

    def finish(self, chunk: Chunk, wanted: Sequence[Pooling]) -> None:
        """Say that all rows of a chunk are written."""
        for pooling in wanted:
            with self._features.path(chunk.split, pooling).open("r+b") as file:
                os.fsync(file.fileno())
        sums = {p: self._features.checksum(chunk, p) for p in wanted}
        self._done[chunk.key] = self._done.get(chunk.key, {}) | sums
        temporary = self._manifest.with_suffix(".tmp")  # one name: locked, so none is left over
        content = {"identity": self._identity, "done": self._done}
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(self._manifest)

    def _read_manifest(self) -> dict[str, dict[str, int]]:
        """Chunk -> pooling -> checksum."""
        try:
            manifest = json.loads(self._manifest.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return manifest["done"] if manifest.get("identity") == self._identity else {}


def _begin(file: BinaryIO) -> int:
    """Leave a file of an array where its numbers begin, and say where that is."""
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


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
