"""Pictures of the home folder, small: for grids, strips and tables."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import streamlit as st
from PIL import Image

from chipviz.data.pictures import Pictures
from chipviz.errors import ChipvizError
from chipviz.keys import Cut
from chipviz.results.report import RunReport
from chipviz.runs.store import Job
from chipviz.ui import state

THUMB = 96
"""Pixels of a thumbnail's longer side."""
SHOWN = 12
"""Mistakes in a strip."""


def opened(reference: str) -> Image.Image | None:
    """A small copy of a picture. None of one that is gone."""
    return _small(str(state.store().home), reference)


@st.cache_data(max_entries=512, show_spinner=False)
def _small(home: str, reference: str) -> Image.Image | None:
    """Decoded once: a page is drawn at every click."""
    try:
        picture = Pictures(Path(home) / "data" / "pictures").open(reference)
    except ChipvizError:
        return None
    picture.thumbnail((2 * THUMB, 2 * THUMB))
    return picture


def thumbnail(reference: str) -> str | None:
    """A picture as a small JPEG in an address, for tables. None of one that is gone."""
    picture = opened(reference)
    if picture is None:
        return None
    picture.thumbnail((THUMB, THUMB))
    return _address(picture)


def _address(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(picture: Image.Image | None, caption: str) -> str:
    """A picture with its caption, in HTML. The caption is escaped here."""
    said = html.escape(caption)
    shown = "" if picture is None else f'<img src="{_address(picture)}" alt="{said}">'
    return f'<figure class="cv-figure">{shown}<figcaption>{said}</figcaption></figure>'


def cropped(reference: str, seen: Sequence[float]) -> Image.Image | None:
    """A small copy of a picture, what the processor's crop leaves out darkened."""
    picture = opened(reference)
    if picture is None:
        return None
    left, top, right, bottom = seen
    box = (
        round(left * picture.width),
        round(top * picture.height),
        round(right * picture.width),
        round(bottom * picture.height),
    )
    dark = Image.blend(picture, Image.new("RGB", picture.size, (90, 90, 90)), 0.75)
    dark.paste(picture.crop(box), box[:2])
    return dark


def chosen(run_id: str) -> int:
    """The place of the test picture that a page shows."""
    return st.session_state.get(f"picture_{run_id}", 0)


def choose(run_id: str, place: int) -> None:
    """Show another one."""
    st.session_state[f"picture_{run_id}"] = place


def mistakes(job: Job, report: RunReport, cut: Cut) -> None:
    """Draw test pictures that the cut gets wrong, as a strip. One of them can be opened."""
    folder = state.store().folder(job.run_id)
    try:
        predictions, examples = folder.read_predictions(), folder.read_examples("test")
    except ChipvizError:
        return
    said, labels = predictions.at(cut, "test"), predictions.labels["test"]
    wrong = [i for i in range(min(len(examples), len(labels))) if said[i] != labels[i]]
    st.subheader(f"{sum(said != labels):,} of {len(labels):,} test pictures wrong", anchor=False)
    names = report.task.label_names
    places = st.columns(6)
    for place, row in enumerate(wrong[:SHOWN]):
        with places[place % len(places)]:
            caption = f"{names[labels[row]][:40]}, taken for {names[said[row]][:40]}"
            st.html(figure(opened(examples[row].text), caption))
            st.button("Open", key=f"open_{row}", on_click=choose, args=(job.run_id, row))
