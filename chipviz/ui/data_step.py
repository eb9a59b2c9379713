"""Step 1 of a new run: where the texts come from, and which columns are what."""

import hashlib
from typing import Any

import streamlit as st

from chipviz import sources
from chipviz.config import EXAMPLE
from chipviz.errors import ChipvizError, Refusal
from chipviz.preview import ColumnsPreview, Preview
from chipviz.ui import draft, formatting, lookups, uploads, widgets

MAX_BARS = 12
"""Maximum classes drawn. The others are counted."""


def choose() -> dict[str, Any] | None:
    """Draw the step.

    Returns:
        Fields of `RunConfig`, `data` empty where nothing is named yet. None if what is named cannot
        be used, which has been said.
    """
    st.subheader("1 Data", anchor=False)
    kind = st.segmented_control(
        "Where the data comes from",
        draft.DATA_SOURCES,
        default="Embedded",
        required=True,
        key="data_source",
    )
    if kind == "Embedded":
        st.caption("BBC news: 2,225 articles in five topics.")
        return {"data": str(EXAMPLE["data"])}
    try:
        data = _named(kind)
    except ChipvizError as error:
        widgets.show_error(error)
        return None
    if not data:
        return {"data": ""}
    if not lookups.is_here("data", data):
        lookups.offer("data", data)
        return {"data": data}
    columns = _columns(data)
    return None if columns is None else {"data": data} | columns


def _named(kind: str) -> str:
    if kind == "Upload":
        file = st.file_uploader(
            "A table with a text and a label column, or a zip of class folders with pictures",
            type=uploads.DATA,
            max_upload_size=uploads.MAX_MB,
            key="upload",
        )
        st.caption(
            "CSV, TSV, Excel, JSON lines, JSON, Parquet or lines of fastText, or a zip with one "
            f"folder of pictures for each class, up to {uploads.MAX_MB} MB. Larger data is best "
            "named under File or folder."
        )
        return "" if file is None else str(uploads.keep(file))
    if kind == "Hub":
        return st.text_input(
            "Hub id of a data set", placeholder="owner/name:subset@revision", key="data_hub"
        ).strip()
    path = st.text_input(
        "Path on this computer",
        placeholder="/path/to/reviews.csv",
        key="data_path",
        help="A CSV, TSV, JSON or Parquet file, a folder of such files named train, validation "
        "and test, or a folder or zip of class folders with pictures.",
    ).strip()
    return sources.absolute(path, ()) if path else ""


def _columns(data: str) -> dict[str, str | None] | None:
    """Draw one box per role with the guess chosen. The run names what differs from the guess."""
    first = lookups.columns(data, None)
    if isinstance(first, Refusal):
        lookups.show_failure(first, data)
        return None
    names = first.columns
    if first.pictures:
        return _picture_columns(data, first)
    places = st.columns(4)
    with places[0]:
        label = _box("label", names, first.roles.get("label"), data)
    if label is None:
        st.warning(formatting.plain(first.missing) + " Choose the one that holds the labels.")
        return None
    named = None if label == first.roles.get("label") else label
    found = lookups.columns(data, named) if named else first
    guess = {} if isinstance(found, Refusal) else found.roles
    rest = [name for name in names if name != label]
    guessed_for = f"{data}\0{label}"
    with places[1]:
        text = _box("text", rest, guess.get("text"), guessed_for)
    with places[2]:
        pair = _box("text_pair", [None, *rest], guess.get("text_pair"), guessed_for)
    with places[3]:
        choices = _box("choices", [None, *rest], guess.get("choices"), guessed_for)
    if text is None:
        missing = found.message if isinstance(found, Refusal) else found.missing
        st.warning(formatting.plain(missing) + " Choose the one that holds the texts.")
        return None
    others = {"text": text, "text_pair": pair, "choices": choices}
    if others == {role: guess.get(role) for role in others}:
        return {"label": named}
    return {"label": label} | others


def _picture_columns(data: str, found: ColumnsPreview) -> dict[str, str | None] | None:
    """The same for a table with pictures, which are read alone."""
    left, right = st.columns(2)
    with left:
        label = _box("label", list(found.columns), found.roles.get("label"), data)
    with right:
        text = _box("text", list(found.pictures), found.pictures[0], data, "Picture column")
    if label is None or text is None:
        st.warning("Choose the column that holds the labels, and the one that holds the pictures.")
        return None
    return {
        "label": None if label == found.roles.get("label") else label,
        "text": None if text == found.pictures[0] else text,
    }


def are_pictures(data: str | None) -> bool:
    """Whether data that can be looked at holds pictures."""
    if not data or data in sources.DATA_WHEELS or not lookups.is_here("data", data):
        return False
    found = lookups.columns(data, None)
    return not isinstance(found, Refusal) and bool(found.pictures)


def _box(
    role: str, options: list[Any], guess: str | None, guessed_for: str, label: str | None = None
) -> str | None:
    """A box with the guess chosen and named as one. `guessed_for` names that table."""
    key = f"column_{role}_{hashlib.sha256(guessed_for.encode()).hexdigest()[:12]}"
    if st.session_state.get(key) not in options:  # the file has other columns than it had
        st.session_state.pop(key, None)
    return st.selectbox(
        label or formatting.label_of(role),
        options,
        index=options.index(guess) if guess in options else None,
        format_func=lambda name: _shown(name, guess),
        placeholder="Choose",
        key=key,
    )


def _shown(name: str | None, guess: str | None) -> str:
    if name is None:
        return "(none)"
    return f"{name} (guessed)" if name == guess else name


def show_rows(found: Preview) -> None:
    """Draw the splits and the labels of a preview."""
    splits = found.splits
    sizes = ", ".join(
        f"{rows.n:,} {name}{' (made here)' * rows.made}" for name, rows in splits.items()
    )
    cut = sum(rows.n_truncated for rows in splits.values())
    shared = [f"{n:,} in {two.replace(', ', ' and ')}" for two, n in found.shared.items() if n]
    where = f": {', '.join(shared)}" if shared else ""
    facts = [
        (f"{sum(rows.n for rows in splits.values()):,}", f"{found.rows}: {sizes}"),
        (f"{cut:,}", "texts that the length limit cuts"),
        (f"{sum(found.shared.values()):,}", f"{found.rows} that stand in two splits{where}"),
    ]
    if found.kind == "image":
        facts.pop(1)
    st.html(widgets.facts(facts))
    st.html(label_bars(splits["train"].label_counts, found.rows))


def label_bars(counts: dict[str, int], what: str = "texts") -> str:
    """How many training rows each label has, as bars. The largest first, in HTML."""
    largest = sorted(counts.items(), key=lambda item: -item[1])
    most = max(1, largest[0][1])
    rows = [(label[:80], n / most, f"{n:,}") for label, n in largest[:MAX_BARS]]
    more = len(largest) - MAX_BARS
    rest = f'<p class="cv-muted">and {more:,} labels more, none of them with more</p>'
    head = f'<p class="cv-muted">Training {what} by label</p>'
    return f"{head}{widgets.bars(rows)}{rest if more > 0 else ''}"
