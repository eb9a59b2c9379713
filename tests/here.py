"""What processes of their own do, done in this one: the same code without the seconds of a start.

That the processes themselves work is said by tests that start them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from chipviz.bundle.classifier import load
from chipviz.errors import SourceError
from chipviz.runs.model_process import Answerer, reply


def said_here(folder, _kind, check, **_limits):
    """What a fresh process would say of rows, one at a time."""
    classifier = load(folder)
    return [
        list(
            classifier.predict([text], [pair] if pair is not None else None)[
                0
            ].probabilities.values()
        )
        for text, pair in check
    ]


@contextmanager
def verified_here() -> Iterator[None]:
    """Bundles are asked here after they were written, not by a fresh process."""
    with patch("chipviz.bundle.save.in_fresh_process", said_here):
        yield


class HereProcess:
    """Stands for a process that answers questions about one home folder."""

    def __init__(self, command, _log):
        self.used = 0.0
        self._answerer = Answerer(Path(command[command.index("--home") + 1]))

    lives = True

    def exchange(self, line, _deadline, _waiting):
        return reply(self._answerer, line)

    def end(self):
        pass


@contextmanager
def answered_here() -> Iterator[None]:
    """Questions of pages are answered here, by the same code and in the same words.

    No backbone is fetched, as without a network: an empty home would get one for every test.
    """
    with (
        patch("chipviz.runs.model_client._Process", HereProcess),
        patch("chipviz.backbones.find.fetch_backbone", side_effect=_nowhere),
    ):
        yield


def _nowhere(*_):
    raise SourceError("The registry cannot be reached.", "Try again.")
