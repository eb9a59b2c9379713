"""Requests that come at the same time are answered in one pass."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from chipviz.errors import ChipvizError

A = TypeVar("A")
"""The answer for one row."""
Predict = Callable[[Sequence[str], Sequence[str] | None], list[A]]

MAX_ROWS = 64
"""Rows of one pass, at most. A request of more is a pass of its own."""
MAX_WAITING = 2_048
"""Rows that may wait. Beyond them requests are refused."""
GATHER_S = 0.004
"""Seconds that a pass waits for requests like those that the last one had."""


class BusyError(Exception):
    """Too many rows wait already."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(f"busy for {retry_s:.0f} s")
        self.retry_s = retry_s


@dataclass
class _Asked(Generic[A]):
    """One request that waits."""

    texts: Sequence[str]
    pairs: Sequence[str] | None
    answer: "Future[list[A]]" = field(default_factory=Future)


class Batcher(Generic[A]):
    """One thread that computes, and a line of requests before it."""

    def __init__(
        self,
        opening: Callable[[], Predict[A]],
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Starts the thread, which loads the model too.

        A thread that has computed once keeps helpers of its own. If those of two threads are more
        than there are cores, all of them yield at every step: a text took 30 % longer.

        Args:
            opening: Gives what answers texts (and second texts). Both are called by the thread.
            max_rows: Rows of one pass.
            max_waiting: Rows that may wait.
        """
        self._opening, self._max_rows, self._max_waiting = opening, max_rows, max_waiting
        self.seen: Callable[[int, int], object] = lambda _requests, _rows: None
        """Told requests and rows of each pass."""
        self._opened: Future[Predict[A]] = Future()
        self._line: deque[_Asked[A]] = deque()
        self._changed = threading.Condition()
        self._n_waiting = 0
        self._closing = False
        self._last = 1  # requests of the last pass
        self._row_s = 0.0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            Exception: What loading raised.
        """
        self._opened.result()

    @property
    def n_waiting(self) -> int:
        """Rows that wait."""
        return self._n_waiting

    def ask(self, texts: Sequence[str], pairs: Sequence[str] | None) -> "Future[list[A]]":
        """Put a request in the line. A cancelled one is not computed.

        Raises:
            BusyError: If too many rows wait, or it is closed.
        """
        asked = _Asked[A](texts, pairs)
        with self._changed:
            full = self._n_waiting and self._n_waiting + len(texts) > self._max_waiting
            if full or self._closing:
                raise BusyError(max(1.0, self._row_s * self._n_waiting))
            self._line.append(asked)
            self._n_waiting += len(texts)
            self._changed.notify()
        return asked.answer

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            self._opened.set_result(self._opening())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self._opened.set_exception(error)
            return
        while batch := self._take():
            start, rows = time.monotonic(), sum(len(asked.texts) for asked in batch)
            self.seen(len(batch), rows)
            self._answer(batch)
            took = (time.monotonic() - start) / max(1, rows)
            self._row_s = took if not self._row_s else 0.8 * self._row_s + 0.2 * took

    def _take(self) -> list[_Asked[A]]:
        """The next pass: what waits, in its order. Empty at the end."""
        with self._changed:
            while not self._line and not self._closing:
                self._changed.wait()
            until = time.monotonic() + GATHER_S
            while len(self._line) < self._last and not self._closing:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Asked[A]] = []
            rows = 0
            while self._line:
                if batch and rows + len(self._line[0].texts) > self._max_rows:
                    break
                asked = self._line.popleft()
                self._n_waiting -= len(asked.texts)
                if asked.answer.set_running_or_notify_cancel():
                    batch.append(asked)
                    rows += len(asked.texts)
            if not batch and not self._closing:
                return self._take()
            self._last = max(1, len(batch))
            return batch

    def _answer(self, batch: Sequence[_Asked[A]]) -> None:
        """One pass for all. If it fails, one for each: a bad text is the fault of its request."""
        try:
            pairs = [pair for asked in batch for pair in asked.pairs or ()]
            texts = [text for asked in batch for text in asked.texts]
            found = self._opened.result()(texts, pairs or None)
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            if len(batch) == 1:
                batch[0].answer.set_exception(_about(error))
                return
            for asked in batch:
                self._answer([asked])
            return
        place = 0
        for asked in batch:
            with suppress(Exception):  # nobody waits for it any more
                asked.answer.set_result(found[place : place + len(asked.texts)])
            place += len(asked.texts)


def _about(error: Exception) -> Exception:
    """What is told of an error: all of one that the user can mend, the kind of any other."""
    if isinstance(error, ChipvizError):
        return error
    return ChipvizError(f"The model failed: {type(error).__name__}.", "The server's log says more.")
