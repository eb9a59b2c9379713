"""Independent pieces of work beside each other: on a CPU's cores, or on a GPU beside the caller.

Knows nothing of models: a piece is a function call that spends its time in torch. Torch itself is
loaded by whoever works, not by whoever imports this.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_BESIDE = 8
"""Maximum pieces at work at once. Python's lock leaves little to more of them."""


def n_beside(device: "torch.device") -> int:
    """Number of pieces that a pool for this device has at work at once."""
    import torch

    return min(torch.get_num_threads(), MAX_BESIDE) if device.type == "cpu" else 1


class Pool:
    """The threads of one run.

    Small products gain little from a second thread, and each waits for its slowest part. Several
    pieces with a thread each are done earlier than one after another with all threads. A CUDA
    device has one piece at a time, and goes on while the caller uses what is done. Other devices
    and a single core compute in the caller's thread.

    The threads live as long as the pool: each new thread would leave memory of its own behind.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.width = n_beside(device)
        """Pieces at work at once."""
        self._n_threads, self._set_threads = torch.get_num_threads(), torch.set_num_threads
        self._here = self.width == 1 and device.type != "cuda"
        self._executor = ThreadPoolExecutor(self.width)
        self._n_maps = 0
        """Maps under way. The first gives each piece its share of the cores, the last ends that."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown()

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
        """Results of `work` in order.

        One item more than are at work is taken ahead: results that wait take memory. An exception,
        from `work` or from the caller, leaves what was not begun undone. The caller may map other
        work between two results: both share the same threads.
        """
        if self._here:
            yield from map(work, items)
            return
        waiting, begun = iter(items), deque[Future[R]]()
        self._n_maps += 1
        self._set_threads(self._n_threads // self.width)
        try:
            ahead = islice(waiting, self.width + 1)
            begun.extend(self._executor.submit(work, item) for item in ahead)
            while begun:
                result = begun[0].result()
                begun.popleft()
                begun.extend(self._executor.submit(work, item) for item in islice(waiting, 1))
                yield result
        finally:
            for future in begun:
                future.cancel()
            wait(begun)
            self._n_maps -= 1
            if not self._n_maps:
                self._set_threads(self._n_threads)
