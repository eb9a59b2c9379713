"""Files that people send from their browser: kept in the home under a name made here."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from chipviz.data.pictures import ENDINGS
from chipviz.errors import ConfigError
from chipviz.files import replacing
from chipviz.ui import state

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

PICTURES = [ending.lstrip(".") for ending in ENDINGS]
DATA = ["csv", "tsv", "jsonl", "json", "parquet", "txt", "xlsx", "zip"]
KINDS = [*DATA, *PICTURES]
MAX_MB = 64


def keep(file: "UploadedFile") -> Path:
    """The path of an uploaded file. Written once, however often the page is drawn.

    Raises:
        ConfigError: If it is of no kind that can be read, or too large.
    """
    kept: dict[str, Path] = st.session_state.setdefault("uploads", {})
    if file.file_id not in kept:
        kept[file.file_id] = save(state.store().home, file.name, file.getvalue())
    return kept[file.file_id]


def save(home: Path, name: str, content: bytes) -> Path:
    """Keep a file under a slug of its name and its content's hash.

    The same content gives the same path, so that features of an earlier run are found again.

    Raises:
        ConfigError: If it is of no kind that can be read, or too large.
    """
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix.lower() not in KINDS:
        raise ConfigError(
            f"The file {name[-80:]!r} is not one of {', '.join(KINDS)}.",
            "Save the table in one of these forms and upload it again.",
        )
    if len(content) > MAX_MB << 20:
        raise ConfigError(
            f"The file {name[-80:]!r} is larger than {MAX_MB} MB.",
            "Put it on this computer and give its path under File or folder.",
        )
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40] or "data"
    folder = home / "data" / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}-{hashlib.sha256(content).hexdigest()[:16]}.{suffix.lower()}"
    if not path.exists():
        with replacing(path) as part:
            part.write_bytes(content)
    return path
