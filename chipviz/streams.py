"""Independent pieces of work side by side on the cores of a CPU.

Knows nothing of models: a piece is a function call that spends its time in torch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_STREAMS = 8
"""Pieces at work at once: Python's lock leaves little to more of them."""


def n_streams(device: torch.device) -> int:
    """How many pieces `side_by_side` has at work at once."""
    return min(torch.get_num_threads(), MAX_STREAMS) if device.type == "cpu" else 1


def side_by_side(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """Results of `work` in order; on a CPU several items at a time, each on its share of the cores.

    Small products gain little from a second thread, and every one waits for its slowest part:
    several pieces with a thread each are done earlier than one after another with all threads.
    An exception, from `work` or from the caller, leaves what was not begun undone.
    """
    threads, n_beside = torch.get_num_threads(), n_streams(device)
    if n_beside == 1:
        yield from map(work, items)
        return
    torch.set_num_threads(threads // n_beside)
    waiting = iter(items)
    pool, begun = _pool(n_beside, threads // n_beside), deque[Future[R]]()
    try:
        begun.extend(pool.submit(work, item) for item in islice(waiting, 2 * n_beside))
        while begun:
            result = begun[0].result()
            begun.popleft()
            begun.extend(pool.submit(work, item) for item in islice(waiting, 1))
            yield result
    finally:
        for future in begun:
            future.cancel()
        wait(begun)
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool(n_threads: int, _cores_each: int) -> ThreadPoolExecutor:
    """The same threads every time: each new one would leave memory of its own behind."""
    return ThreadPoolExecutor(n_threads)
