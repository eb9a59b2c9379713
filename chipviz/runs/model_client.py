"""The pages' side of `model_process`: processes that keep models loaded, asked in lines.

So the server never holds torch, and a model that takes too long can be ended.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from pydantic import TypeAdapter

from chipviz.errors import ChipvizError, JobError, Refusal
from chipviz.files import PROJECT
from chipviz.runs.questions import ANSWER, REFUSED, Question, line_of

A = TypeVar("A")

IDLE_S = 300.0
"""Seconds without a question after which a process, and the memory of its model, is given back."""
_SLICE_S = 0.2


def _nothing() -> None:
    pass


class Inference:
    """Asks such processes, which it starts when they are first needed."""

    def __init__(
        self,
        home: Path,
        command: Sequence[str] | None = None,
        *,
        most: int = 1,
        idle_s: float = IDLE_S,
    ) -> None:
        """Nothing is started yet.

        Args:
            home: The folder of the runs that it answers about.
            command: What starts a process. None is `python -m chipviz.runs.model_process`.
            most: Maximum processes: so many questions are answered beside each other.
            idle_s: Seconds after which a process that nobody asks is ended.
        """
        own = [sys.executable, "-m", "chipviz.runs.model_process", "--home", str(home)]
        self.home, self._command = home, command or own
        self._most, self._idle_s = most, idle_s
        self._changed = threading.Condition()
        self._idle: list[_Process] = []
        self._n_busy = 0

    def ask(
        self,
        question: Question,
        kind: type[A],
        timeout_s: float = 120.0,
        waiting: Callable[[], None] = _nothing,
    ) -> A:
        """Send one question and wait for its answer. Where all processes are busy, wait for one.

        Args:
            question: What to ask.
            kind: Type of its answer, as the question says.
            timeout_s: Maximum seconds to wait.
            waiting: Called some times a second. If it raises, the question is given up, and the
                process that works on it is ended.

        Raises:
            ChipvizError: What the process itself answered with.
            JobError: If it died, or gave no answer in `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        process = self._take(deadline, timeout_s, waiting)
        kept = False
        try:
            answer = process.exchange(line_of(question), deadline, waiting)
            kept = True
        except queue.Empty:
            raise JobError(
                f"No answer in {timeout_s:g} s.", "Try again with a shorter text or fewer texts."
            ) from None
        except BrokenPipeError:
            raise JobError(
                "The process that was asked ended without an answer.",
                f"Try again; see {self.home / 'inference.log'} if it happens again.",
            ) from None
        finally:
            self._give(process, keep=kept)
        if answer.startswith(REFUSED):
            refusal = TypeAdapter(Refusal).validate_json(answer.removeprefix(REFUSED))
            raise ChipvizError(refusal.message, refusal.hint, *refusal.fields)
        return TypeAdapter(kind).validate_json(answer.removeprefix(ANSWER))

    def close(self) -> None:
        """End all processes that nobody is asking."""
        self._end_idle(0.0)

    def _take(self, deadline: float, timeout_s: float, waiting: Callable[[], None]) -> "_Process":
        """A process that nobody else asks until it is given back."""
        with self._changed:
            while self._n_busy >= self._most:
                if time.monotonic() > deadline:
                    raise JobError(
                        f"No answer in {timeout_s:g} s: others are asking.", "Try again."
                    )
                self._changed.wait(_SLICE_S)
                waiting()
            self._n_busy += 1
            process = self._idle.pop() if self._idle else None
        if process is not None and process.lives:
            return process
        try:
            if process is not None:
                process.end()
            return _Process(self._command, self.home / "inference.log")
        except BaseException:
            self._give(None, keep=False)
            raise

    def _give(self, process: "_Process | None", *, keep: bool) -> None:
        if process is not None and not keep:
            process.end()
        with self._changed:
            self._n_busy -= 1
            if process is not None and keep:
                process.used = time.monotonic()
                self._idle.append(process)
                timer = threading.Timer(self._idle_s + 0.1, self._end_idle, (self._idle_s,))
                timer.daemon = True
                timer.start()
            self._changed.notify()

    def _end_idle(self, idle_s: float) -> None:
        """End processes that nobody has asked for so many seconds."""
        with self._changed:
            old = [p for p in self._idle if time.monotonic() - p.used >= idle_s]
            self._idle = [p for p in self._idle if p not in old]
        for process in old:
            process.end()


class _Process:
    """One process. Whoever holds it asks one question at a time."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.used = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                encoding="utf-8",
                start_new_session=True,
                cwd=PROJECT,
            )
        self._said: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._said), daemon=True
        ).start()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def exchange(self, line: str, deadline: float, waiting: Callable[[], None]) -> str:
        """The line that answers. Others were printed by a library on the way.

        Raises:
            queue.Empty: If none came until `deadline`.
            BrokenPipeError: If the process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while True:
            left = deadline - time.monotonic()
            try:
                text = self._said.get(timeout=max(0.0, min(_SLICE_S, left)))
            except queue.Empty:
                if left <= 0:
                    raise
                waiting()
                continue
            if text is None:
                raise BrokenPipeError
            if text.startswith((ANSWER, REFUSED)):
                return text

    def end(self) -> None:
        """End it, and what it has started."""
        with suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):  # what was still to be written has no reader
            self._process.stdin.close()


def _read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
