"""Which texts are read together: chunks, which a killed run does again, and batches of a pass.

Knows lengths only. What is planned depends on the lengths and the device alone, so that a resumed
run reads every text in the company it would have had.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from chipviz.keys import Split

BATCH_TOKENS = {"cpu": 1_024, "cuda": 16_384}
"""Tokens of one forward pass at most, padding included: large enough for full matrix speed on the
device, small enough for a CPU's cache."""
PASS_SHARE = 1 / 32
"""What a pass costs beside its tokens, as a share of a full one. Measured on a CPU: passes of 128
and 256 tokens reach 0.77 and 0.91 of the speed of full ones, as if each had 32 tokens more."""
SHORTEST = 16
"""Tokens that a row counts at least for a batch to be full: of each row one state a layer waits to
be written, however short it is, and several batches wait at once."""
FIRST_BATCHES, CHUNK_BATCHES, MOST_BATCHES = 4, 8, 32
"""Full batches of a split's first chunk, of the next, and of the largest. Texts are sorted by
length within a chunk, so large ones are read faster. But the live curve waits for the first, and
what a killed run has to do again is half of what it had done, or little."""


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of one split."""

    split: Split
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Name in a manifest."""
        return f"{self.split}:{self.start}-{self.stop}"


def batch_tokens(device: torch.device) -> int:
    """Tokens of one forward pass on a device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def plan(split: Split, ids: Sequence[Sized], batch: int) -> list[Chunk]:
    """Cut a split into chunks of consecutive rows, each half as long as all before it.

    Args:
        split: Whose rows they are.
        ids: Token ids of each row.
        batch: Tokens of a full batch. A chunk has as many as the constants above say, and what is
            left of less than half a chunk goes with the last one.
    """
    chunks: list[Chunk] = []
    start, done = 0, 0
    ends = np.cumsum([len(sequence) for sequence in ids]).tolist()
    for row, end in enumerate(ends):
        wanted = min(max(CHUNK_BATCHES * batch, done // 2), MOST_BATCHES * batch)
        wanted = wanted if chunks else FIRST_BATCHES * batch
        full = end - done >= wanted and ends[-1] - end >= wanted // 2
        if full or row == len(ends) - 1:
            chunks.append(Chunk(split, start, row + 1))
            start, done = row + 1, end
    return chunks


def batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Group rows so that all passes together cost least, padding and passes counted.

    Args:
        lengths: Tokens of each row.
        budget: Rows x longest (or `SHORTEST`) stays within it, unless a row alone is longer.
        padded: Whether rows of several lengths may share a batch.

    Returns:
        Row numbers by batch. Every row in exactly one, longest first.

    Source: ours. The shortest path through the rows in order of length.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    if not padded:
        return _of_one_length(order, lengths, budget)
    n_rows = len(order)
    cost = np.zeros(n_rows + 1)  # of all rows from here on
    stop = np.zeros(n_rows, dtype=np.int64)
    counts = np.arange(1, n_rows + 1)
    for first in reversed(range(n_rows)):
        longest = max(1, lengths[order[first]])
        most = min(n_rows - first, max(1, budget // max(longest, SHORTEST)))
        costs = counts[:most] * longest + cost[first + 1 : first + 1 + most]
        best = int(costs.argmin())
        cost[first], stop[first] = costs[best] + budget * PASS_SHARE, first + 1 + best
    grouped, first = [], 0
    while first < n_rows:
        grouped.append(order[first : stop[first]])
        first = int(stop[first])
    return grouped


def _of_one_length(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches without padding, of rows in order of length."""
    grouped: list[list[int]] = []
    for length, rows in groupby(order, key=lambda row: lengths[row]):
        same = list(rows)
        most = max(1, budget // max(length, SHORTEST))
        grouped += [same[start : start + most] for start in range(0, len(same), most)]
    return grouped
