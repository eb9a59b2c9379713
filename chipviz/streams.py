"""Independent pieces of work side by side: on a CPU's cores, or on a GPU beside the caller.

Knows nothing of models: a piece is a function call that spends its time in torch.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_STREAMS = 8
"""Pieces at work at once: Python's lock leaves little to more of them."""


_n_threads = 0
"""Threads of this process before its pieces got a share of them; 0 while none are at work."""


def n_streams(device: torch.device) -> int:
    """How many pieces `side_by_side` has at work at once."""
    n_threads = _n_threads or torch.get_num_threads()
    return min(n_threads, MAX_STREAMS) if device.type == "cpu" else 1


def side_by_side(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> Generator[R]:
    """Results of `work` in order; on a CPU several items at a time, each on its share of the cores.

    Small products gain little from a second thread, and every one waits for its slowest part:
    several pieces with a thread each are done earlier than one after another with all threads. A
    CUDA device has one piece at a time, and goes on while the caller uses what is done.
    One item more than are at work is taken ahead: results that wait take memory. An exception, from
    `work` or from the caller, leaves what was not begun undone. The caller may have other work
    done side by side between two results: both share the same threads.
    """
    global _n_threads
    n_beside, outermost = n_streams(device), _n_threads == 0
    if n_beside == 1 and device.type != "cuda":
        yield from map(work, items)
        return
    if outermost:
        _n_threads = torch.get_num_threads()
        torch.set_num_threads(_n_threads // n_beside)
    threads = _n_threads
    waiting = iter(items)
    pool, begun = _pool(n_beside, threads // n_beside), deque[Future[R]]()
    try:
        begun.extend(pool.submit(work, item) for item in islice(waiting, n_beside + 1))
        while begun:
            result = begun[0].result()
            begun.popleft()
            begun.extend(pool.submit(work, item) for item in islice(waiting, 1))
            yield result
    finally:
        for future in begun:
            future.cancel()
        wait(begun)
        if outermost:
            torch.set_num_threads(threads)
            _n_threads = 0


@lru_cache(maxsize=1)
def _pool(n_threads: int, _cores_each: int) -> ThreadPoolExecutor:
    """The same threads every time: each new one would leave memory of its own behind."""
    return ThreadPoolExecutor(n_threads)
