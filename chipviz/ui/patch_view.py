"""The patch view: a picture, what a layer says at each patch, and the verdict of every layer."""

import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.keys import Cut
from chipviz.results.answers import PatchReading
from chipviz.runs.questions import ReadPatches
from chipviz.runs.store import Job
from chipviz.ui import formatting, state, thumbnails, uploads, widgets
from chipviz.ui.plots import heatmaps
from chipviz.ui.plots.patches import patches_figure

SHOWN = 6
"""Classes in the verdict."""


def choose_picture(job: Job) -> tuple[str, int | None] | None:
    """Draw the choice of a picture: a test picture, or one from this computer.

    Returns:
        Reference or path, and the true class where it is known. None where none can be shown.
    """
    examples = state.store().folder(job.run_id).read_examples("test")
    file = st.file_uploader(
        "A picture of your own", type=uploads.PICTURES, max_upload_size=16, key="patch_upload"
    )
    if file is not None:
        try:
            return str(uploads.keep(file)), None
        except ChipvizError as error:
            widgets.show_error(error)
            return None
    if not examples:
        st.info("The pictures of this run are not on disk any more. Give one of your own.")
        return None
    place = thumbnails.chosen(job.run_id) % len(examples)
    st.button(
        "Another test picture",
        icon=":material/shuffle:",
        on_click=thumbnails.choose,
        args=(job.run_id, place + 1),
    )
    return examples[place].text, examples[place].label


def ask(run_id: str, source: str, cut: Cut) -> PatchReading:
    """What every layer's chip says at every patch.

    Raises:
        ChipvizError: If the run, its backbone or the picture cannot be read.
    """
    return _ask(ReadPatches(run_id, source, cut), run_id, source, cut.chip.name)


@st.cache_data(max_entries=32, show_spinner=False)
def _ask(_question: ReadPatches, run_id: str, source: str, chip: str) -> PatchReading:
    """Kept by all of the question but its layer: the answer holds all layers."""
    del run_id, source, chip
    return state.inference().ask(_question, PatchReading)


def show(answer: PatchReading, cut: Cut, truth: int | None) -> None:
    """Draw the picture on its tints."""
    slots = heatmaps.class_slots(
        len(answer.label_names), answer=_best(answer, cut.layer), truth=truth
    )
    st.plotly_chart(
        patches_figure(answer, cut.layer, slots, look=state.look()),
        key="patches",
        theme=None,
        config={"displayModeBar": False},
        alt=f"The picture, each patch tinted by what the chip of layer {cut.layer} says there",
    )
    rows, columns = answer.grid
    st.caption(
        f"{_what_a_tint_is(cut)} The picture has {answer.width:,} x {answer.height:,} pixels; what "
        f"its processor leaves of it is read as {rows} x {columns} patches."
    )


def _best(answer: PatchReading, layer: int) -> int:
    said = answer.by_layer[layer]
    return max(range(len(said)), key=said.__getitem__)


def _what_a_tint_is(cut: Cut) -> str:
    if cut.chip.pooling == "first":
        return (
            "A tint is what the chip says of a patch. It was trained on the class token, so that "
            "is outside of what it knows."
        )
    if cut.chip.pooling == "first+mean":
        return "A tint is what the chip says of the class token and this patch alone."
    return "A tint is what the chip says of this patch alone. It was trained on all of them."


def show_verdict(answer: PatchReading, layer: int, truth: int | None) -> None:
    """Draw what a layer says of the whole picture, and where the answer settles."""
    names, said, best = answer.label_names, answer.by_layer[layer], _best(answer, layer)
    right = ", which is right" if truth == best else ""
    wrong = f", the truth is {names[truth]}" if truth is not None and truth != best else ""
    st.markdown(
        f"**{formatting.plain(names[best])}** {formatting.percent(said[best])}{right}"
        f"{formatting.plain(wrong)}"
    )
    order = sorted(range(len(names)), key=lambda c: -said[c])[:SHOWN]
    st.html(widgets.bars([(names[c], said[c], formatting.percent(said[c])) for c in order]))
    where = "at or below the cut" if answer.settled_layer <= layer else "above the cut"
    st.html(
        f'<div class="cv-big">Settled at layer <span class="cv-accent">'
        f"{int(answer.settled_layer)}</span></div>"
        f'<div class="cv-muted">From there on every layer gives the last layer\'s answer; that is '
        f"{where} at layer {int(layer)}.</div>"
    )
