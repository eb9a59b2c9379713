r"""What can go wrong, in words a user can act on.

ChipvizError
    ConfigError      a setting is missing, misspelt or out of range
    SourceError      a backbone or data set cannot be found, fetched or read
    TaskError        texts, labels or the prompt template do not make a classification task
    BackboneError    a model has no shape chipviz can probe or cut
    BundleError      a bundle is incomplete, altered or disagrees with its own run
    JobError         a run is unknown, or not in a state that allows what was asked

A `Notice` says what a user must know although nothing is wrong enough to stop.

`is_disk_full` knows a full disk in the errors of others, `disk_full` says it; `panics_as_errors`
makes errors of what libraries in Rust raise; `unexpected` has words for what nobody foresaw.

Every one carries what happened (`message`: got, expected) and what to do next (`hint`). Where that
is to change a setting, `fields` names it, and each face calls it by its own word: `--max-length` on
the command line, *Length limit* on a page.

    try:
        ...
    except ChipvizError as error:
        print(f"error: {error.message}\nhint: {error.hint}")
"""

import errno
import shutil
import sqlite3
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "disk is full")
"""As libraries say it that wrap the system's error, and SQLite, which has none."""
_kept: dict[Path, str] = {}
"""What this process wrote last to a log of errors."""
_PAGE = 64 << 10
"""Bytes without which SQLite cannot even open a file."""


@dataclass(frozen=True)
class Refusal:
    """What a `ChipvizError` says, as plain data."""

    message: str
    hint: str = ""
    fields: tuple[str, ...] = ()
    """Settings of `RunConfig` that the hint is about, by name."""


NOTICES = {
    "blank-after-delimiter": "Blanks after each delimiter are not part of the cells.",
    "cell-spans-lines": "A cell in quotes holds lines that could be rows of their own.",
    "class-with-one-text": "A class has a single training text.",
    "class-without-training": "A class has no training text: its other rows are left out.",
    "contradicting-labels": "The same text has several labels.",
    "hidden-labels": "A split hides its labels behind -1: it is left out.",
    "labels-trimmed": "Blanks around labels are not part of them.",
    "labels-look-alike": "Classes differ in case, blanks or the form of letters alone.",
    "labels-merged": "Labels that are one class are written in several ways.",
    "layers-without-cut": "The backbone cannot be cut after some layers: no rule chooses them.",
    "no-pictures": "Files in class folders are no pictures by their names: they are left out.",
    "other-sheets": "A workbook has several sheets with rows: the first is read.",
    "pictures-animated": "A picture moves: its first frame is read.",
    "pictures-look-alike": "A validation or test picture looks like a training picture.",
    "pictures-transparent": "A picture is transparent in part: white shows through.",
    "pictures-unreadable": "A picture cannot be read: it is left out.",
    "quotes-are-text": "Quotation marks are read as text: they enclose no cells.",
    "read-without-padding": "Padding reaches the texts of this backbone: a batch has one length.",
    "repeated-texts": "The same text with the same label stands more than once: one is kept.",
    "rows-in-field": "A JSON object holds the rows in one of its fields.",
    "shared-groups": "The same group stands in two splits of the source.",
    "shared-texts": "The same text stands in two splits of the source.",
    "split-without-labels": "A split has no label column: it is left out.",
    "texts-cut": "The length limit cuts texts.",
}
"""Code of every notice, and what it says."""


@dataclass(frozen=True)
class Notice:
    """What a user must be told although nothing stops: one entry of `warnings`."""

    code: str
    """One of `NOTICES`."""
    message: str
    n: int
    """Rows, texts, cells or classes concerned."""
    examples: tuple[str, ...] = ()
    """Some of them, as a user finds them."""

    def __post_init__(self) -> None:
        assert self.code in NOTICES, self.code


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


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a library written in Rust into an error: by birth it is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from None


def is_disk_full(error: BaseException | None, folder: Path | None = None) -> bool:
    """Whether an error, or what it came from, is of a disk, or a file, that takes no more bytes.

    Args:
        error: Any error.
        folder: Where it happened, if that is known: SQLite's own word may be an error of the disk.
    """
    if isinstance(error, sqlite3.OperationalError) and folder is not None:
        return shutil.disk_usage(_there(folder)).free < _PAGE or is_disk_full(error)
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(folder: Path, needed: int | None = None) -> Refusal:
    """What to say where a disk takes no more.

    Args:
        folder: Where something was to be written.
        needed: Bytes of it, where they are known.
    """
    folder = _there(folder)
    free = f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free for {folder}"
    wanted = f", and {needed / 2**20:,.1f} MiB are needed" if needed else ""
    return Refusal(
        f"The disk is full: {free}{wanted}.",
        "Delete runs you no longer need, or free space in another way.",
    )


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def unexpected(error: Exception, home: Path) -> Refusal:
    """Keep where an error happened that nobody foresaw, and say where that is kept."""
    log = home / "errors.log"
    said = " ".join(f"Unexpected {type(error).__name__}: {error}".split())[:300]
    where = "".join(traceback.format_exception(error))
    try:
        if where != _kept.get(log):  # a page that is drawn every second says it once
            home.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(where)
        _kept[log] = where
    except OSError:
        return Refusal(f"{said}.", "Try again; where it happened could not be kept.")
    return Refusal(f"{said}.", f"This is a fault of chipviz: {log} says where it happened.")
