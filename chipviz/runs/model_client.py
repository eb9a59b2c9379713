"""The pages' side of `model_process`: a process that keeps models loaded, asked in lines.

So the server never holds torch, and a model that takes too long can be ended.
"""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from pydantic import TypeAdapter

from chipviz.errors import ChipvizError, JobError, Refusal
from chipviz.files import PROJECT
from chipviz.runs.questions import ANSWER, REFUSED, Question, line_of

A = TypeVar("A")


class Inference:
    """Asks one such process, which it starts when it is first needed."""

    def __init__(self, home: Path, command: Sequence[str] | None = None) -> None:
        """Nothing is started yet.

        Args:
            home: The folder of the runs that it answers about.
            command: What starts the process. None is `python -m chipviz.runs.model_process`.
        """
        own = [sys.executable, "-m", "chipviz.runs.model_process", "--home", str(home)]
        self.home, self._command = home, command or own
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def ask(self, question: Question, kind: type[A], timeout_s: float = 120.0) -> A:
        """Send one question and wait for its answer. One at a time, others wait their turn.

        Args:
            question: What to ask.
            kind: Type of its answer, as the question says.
            timeout_s: Maximum seconds to wait.

        Raises:
            ChipvizError: What the process itself answered with.
            JobError: If it died, or gave no answer in `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            raise JobError(f"No answer in {timeout_s:g} s: others are asking.", "Try again.")
        try:
            answer = self._exchange(line_of(question), deadline, timeout_s)
        finally:
            self._lock.release()
        if answer.startswith(REFUSED):
            refusal = TypeAdapter(Refusal).validate_json(answer.removeprefix(REFUSED))
            raise ChipvizError(refusal.message, refusal.hint, *refusal.fields)
        return TypeAdapter(kind).validate_json(answer.removeprefix(ANSWER))

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _exchange(self, line: str, deadline: float, timeout_s: float) -> str:
        """The line that answers. Others were printed by a library on the way."""
        process = self._living()
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            while True:
                text = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
                if text is None:
                    raise BrokenPipeError
                if text.startswith((ANSWER, REFUSED)):
                    return text
        except queue.Empty:
            self._end()
            raise JobError(
                f"No answer in {timeout_s:g} s.", "Try again with a shorter text or fewer texts."
            ) from None
        except BrokenPipeError:
            self._end()
            raise JobError(
                "The process that reads texts ended without an answer.",
                f"Try again; see {self.home / 'inference.log'} if it happens again.",
            ) from None

    def _living(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._begin()
        return self._process

    def _begin(self) -> subprocess.Popen[str]:
        with (self.home / "inference.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                start_new_session=True,
                cwd=PROJECT,
            )
        self._answers = queue.Queue()
        assert process.stdout is not None
        reader = threading.Thread(
            target=_read_lines, args=(process.stdout, self._answers), daemon=True
        )
        reader.start()
        return process

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        assert process.stdin is not None
        with suppress(OSError):  # what was still to be written has no reader
            process.stdin.close()


def _read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
