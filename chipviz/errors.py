r"""What can go wrong, in words a user can act on.

ChipvizError
    ConfigError      a setting is missing, misspelt or out of range
    SourceError      a backbone or data set cannot be found, fetched or read
    TaskError        texts, labels or the prompt template do not make a classification task
    BackboneError    a model has no shape chipviz can probe or cut
    BundleError      a bundle is incomplete, altered or disagrees with its own run
    JobError         a run is unknown, or not in a state that allows what was asked

`is_disk_full` knows a full disk in the errors of others.

Every one carries what happened (`message`: got, expected) and what to do next (`hint`). Where that
is to change a setting, `fields` names it, and each face calls it by its own word: `--max-length` on
the command line, *Length limit* on a page.

    try:
        ...
    except ChipvizError as error:
        print(f"error: {error.message}\nhint: {error.hint}")
"""

import errno
from dataclasses import dataclass

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "disk is full")
"""As libraries say it that wrap the system's error, and SQLite, which has none."""


@dataclass(frozen=True)
class Refusal:
    """What a `ChipvizError` says, as plain data."""

    message: str
    hint: str = ""
    fields: tuple[str, ...] = ()
    """Settings of `RunConfig` that the hint is about, by name."""


class ChipvizError(Exception):
    """Base of all errors a user can cause: one sentence and one hint, never a traceback."""

    def __init__(self, message: str, hint: str, *fields: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields
        """Settings of `RunConfig` that the hint is about, by name."""

    @property
    def refusal(self) -> Refusal:
        """What it says, as plain data."""
        return Refusal(self.message, self.hint, self.fields)


class ConfigError(ChipvizError):
    """A setting is missing, misspelt or out of range."""


class SourceError(ChipvizError):
    """A backbone or data set cannot be found, fetched or read."""


class TaskError(ChipvizError):
    """Texts, labels or the prompt template do not make a classification task."""


class BackboneError(ChipvizError):
    """A model has no shape chipviz can probe or cut."""


class BundleError(ChipvizError):
    """A bundle is incomplete, altered or disagrees with its own run."""


class JobError(ChipvizError):
    """A run is unknown, or not in a state that allows what was asked."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of a disk, or a file, that takes no more bytes."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
