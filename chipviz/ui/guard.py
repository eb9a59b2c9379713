"""Whatever goes wrong while a page or a live part of one is drawn becomes words on it."""

import functools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import streamlit as st

from chipviz.config import home_dir
from chipviz.errors import (
    ChipvizError,
    Refusal,
    disk_full,
    is_disk_full,
    panics_as_errors,
    unexpected,
)
from chipviz.ui import widgets


@contextmanager
def saying() -> Iterator[None]:
    """Show an error of the block as a sentence and a hint, never as a traceback."""
    try:
        with panics_as_errors():
            yield
    except ChipvizError as error:
        widgets.show_error(error)
    except (OSError, sqlite3.Error) as error:
        widgets.show_failure(_of_home(error))
    except Exception as error:  # noqa: BLE001 - a page never shows a traceback
        widgets.show_failure(unexpected(error, home_dir()))


def live(view: Callable[..., None], every_s: float | None) -> Callable[..., None]:
    """A part of a page that draws itself anew every so many seconds. None only when used.

    A button in it whose action failed has the whole page drawn, which says so at its top.
    """

    @functools.wraps(view)
    def guarded(*values: object) -> None:
        with saying():
            if widgets.has_kept_failure():
                st.rerun()
            view(*values)

    return st.fragment(guarded, run_every=every_s)


def _of_home(error: OSError | sqlite3.Error) -> Refusal:
    """What to say where the home folder does not do what a page needs."""
    if is_disk_full(error, home_dir()):
        return disk_full(home_dir())
    hint = "Check the disk and the rights of the home folder, then reload the page."
    return Refusal(f"The home folder cannot be read or written: {error}.", hint)
