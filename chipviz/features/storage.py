"""Pooled hidden states on disk: one array per split and vector, and a manifest.

Arrays are (L + 1, N, width) float32, the embedding output first. The manifest says which chunks of
rows are done and what their bytes were. It is written after the bytes: whatever kills the process,
the next one goes on at the next chunk.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.batching import Chunk
from chipviz.errors import SourceError, disk_full
from chipviz.files import write_atomic
from chipviz.keys import EMBEDDING_LAYER, Site, Split, Vector


@dataclass(frozen=True)
class Features:
    """Pooled hidden states on disk, to read."""

    folder: Path
    vectors: tuple[Vector, ...]
    n_layers: int
    widths: dict[Site, int]
    """Numbers per state. Each site has its own."""
    sizes: dict[Split, int]
    """Texts per split."""

    def width(self, vector: Vector) -> int:
        """Numbers of one row of a vector."""
        return vector.n_states * self.widths[vector.site]

    def read(
        self, split: Split, vector: Vector, layer: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows `start` to `stop` of one layer. Layer -1 is the embedding output.

        Returns:
            Shape (stop - start, width), float32. Read, not mapped: the pages of a mapping would
            count as this process's memory.

        Raises:
            IndexError: If there is no such layer.
        """
        if not EMBEDDING_LAYER <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside of -1 to {self.n_layers - 1}")
        n_rows, width = self.sizes[split], self.width(vector)
        stop = n_rows if stop is None else min(stop, n_rows)
        first = ((layer + 1) * n_rows + start) * width
        with self.path(split, vector).open("rb") as file:
            file.seek(_begin(file) + 4 * first)
            values = np.fromfile(file, np.float32, (stop - start) * width)
        return torch.from_numpy(values.reshape(-1, width))

    def path(self, split: Split, vector: Vector) -> Path:
        """The file of one array."""
        return self.folder / f"{split}-{vector.name}.npy"

    def checksum(self, chunk: Chunk, vector: Vector) -> int:
        """CRC-32 of one chunk's bytes. Catches truncated and flipped files."""
        crc = 0
        for layer in range(EMBEDDING_LAYER, self.n_layers):
            rows = self.read(chunk.split, vector, layer, chunk.start, chunk.stop)
            crc = zlib.crc32(rows.numpy().data, crc)
        return crc


class Writer:
    """The writing side of `Features`. Only who holds the folder's lock may have one."""

    def __init__(self, features: Features, identity: dict[str, Any]) -> None:
        """Make sure every array is there, and see which chunks are done.

        Args:
            features: What is to be written.
            identity: All that the numbers depend on. Chunks of another identity are not done.

        Raises:
            SourceError: If the disk has no room for them.
        """
        self._features = features
        self._identity = identity
        self._manifest = features.folder / "manifest.json"
        features.folder.mkdir(parents=True, exist_ok=True)
        self._done = self._read_manifest()
        arrays = {
            features.path(split, vector): (
                features.n_layers + 1,
                n_rows,
                features.width(vector),
            )
            for split, n_rows in features.sizes.items()
            for vector in features.vectors
        }
        absent = {path: shape for path, shape in arrays.items() if not _is_array(path, shape)}
        _refuse_no_room(features.folder, sum(4 * math.prod(shape) for shape in absent.values()))
        for path, shape in absent.items():
            _create(path, shape)

    def missing(self, chunk: Chunk) -> list[Vector]:
        """The vectors of a chunk that were never done, or whose bytes are not what they were."""
        sums, features = self._done.get(chunk.key, {}), self._features
        return [
            vector
            for vector in features.vectors
            if vector.name not in sums or sums[vector.name] != features.checksum(chunk, vector)
        ]

    def write(
        self,
        chunk: Chunk,
        rows: Sequence[int],
        values: Sequence[NDArray[np.float32]],
        wanted: Sequence[Vector],
    ) -> None:
        """Put some rows of a chunk where they belong.

        Args:
            chunk: Not done before `finish` is called for it.
            rows: Counted from the chunk's first.
            values: One array per vector of the features, shape (L + 1, R, width).
            wanted: Vectors to write.
        """
        n_rows = self._features.sizes[chunk.split]
        for vector, states_of_layers in zip(self._features.vectors, values, strict=True):
            if vector not in wanted:
                continue
            width = 4 * self._features.width(vector)
            # Written, not mapped: the pages of a mapping would count as this process's memory.
            # Without a buffer, which every seek would empty.
            with self._features.path(chunk.split, vector).open("r+b", buffering=0) as file:
                begin = _begin(file) + width * chunk.start
                for layer, states in enumerate(states_of_layers):
                    for row, state in zip(rows, states, strict=True):
                        file.seek(begin + width * (layer * n_rows + row))
                        if file.write(state.data) != width:
                            raise OSError(errno.ENOSPC, "No space left on device", file.name)

    def finish(self, chunk: Chunk, wanted: Sequence[Vector]) -> None:
        """Say that all rows of a chunk are written."""
        for vector in wanted:
            with self._features.path(chunk.split, vector).open("r+b") as file:
                os.fsync(file.fileno())
        sums = {vector.name: self._features.checksum(chunk, vector) for vector in wanted}
        self._done[chunk.key] = self._done.get(chunk.key, {}) | sums
        content = {"identity": self._identity, "done": self._done}
        write_atomic(self._manifest, json.dumps(content, indent=1))

    def _read_manifest(self) -> dict[str, dict[str, int]]:
        """Chunk -> name of a vector -> checksum."""
        try:
            manifest = json.loads(self._manifest.read_text("utf-8"))
            same = manifest["identity"] == self._identity
            return {chunk: dict(sums) for chunk, sums in manifest["done"].items()} if same else {}
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return {}  # read again what nobody vouches for


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


def _refuse_no_room(folder: Path, needed: int) -> None:
    """Say before hours of reading that the disk has too few bytes for what is read."""
    if needed > shutil.disk_usage(folder).free:
        said = disk_full(folder, needed)
        raise SourceError(said.message, f"{said.hint} Or read fewer texts.", "max_train")


def _create(path: Path, shape: tuple[int, ...]) -> None:
    """An empty array that owns its disk space: a full disk is an error here, not a crash later."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
