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
    """Draw the picture on its tints, the verdict beside it, and where the answer settles."""
    names, last = answer.label_names, len(answer.by_layer) - 1
    left, right = st.columns([3, 2], gap="large")
    with left:
        layer = st.slider(
            "Layer",
            0,
            last,
            cut.layer,
            key=f"patch_layer_{cut.layer}",
            help="What the chip of this layer says. The cut is where it begins.",
        )
        said = answer.by_layer[layer]
        best = max(range(len(names)), key=said.__getitem__)
        slots = heatmaps.class_slots(len(names), answer=best, truth=truth)
        st.plotly_chart(
            patches_figure(answer, layer, slots, look=state.look()),
            key="patches",
            theme=None,
            config={"displayModeBar": False},
            alt=f"The picture, each patch tinted by what the chip of layer {layer} says there",
        )
        st.caption(_what_a_tint_is(cut))
    with right:
        _verdict(answer, layer, best, truth)


def _what_a_tint_is(cut: Cut) -> str:
    if cut.chip.pooling == "first":
        return (
            "A tint is what the chip says of a patch. It was trained on the class token, so that "
            "is outside of what it knows."
        )
    if cut.chip.pooling == "first+mean":
        return "A tint is what the chip says of the class token and this patch alone."
    return "A tint is what the chip says of this patch alone. It was trained on all of them."


def _verdict(answer: PatchReading, layer: int, best: int, truth: int | None) -> None:
    names, said = answer.label_names, answer.by_layer[layer]
    right = "" if truth is None else (", which is right" if truth == best else "")
    wrong = "" if truth in (None, best) else f", the truth is {names[truth or 0]}"
    st.markdown(
        f"**{formatting.plain(names[best])}** {formatting.percent(said[best])}"
        f"{right}{formatting.plain(wrong)}"
    )
    order = sorted(range(len(names)), key=lambda c: -said[c])[:8]
    st.html(widgets.bars([(names[c], said[c], formatting.percent(said[c])) for c in order]))
    where = "at or below" if answer.settled_layer <= layer else "above"
    st.html(
        f'<div class="cv-big">Settled at layer <span class="cv-accent">'
        f"{int(answer.settled_layer)}</span></div>"
        f'<div class="cv-muted">From there on every layer gives the last layer\'s answer; that is '
        f"{where} layer {int(layer)}.</div>"
    )
    rows, columns = answer.grid
    st.caption(
        f"{answer.width:,} x {answer.height:,} pixels as given; the model sees {rows} x {columns} "
        "patches of what its processor leaves."
    )
