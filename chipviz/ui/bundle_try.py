"""Try a bundle on a text or on a picture."""

import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.results.answers import Prediction
from chipviz.results.report import BundleReport
from chipviz.runs.questions import Predict
from chipviz.ui import bundle_beside, formatting, state, uploads, widgets


def text(bundle: BundleReport, *, takes_pair: bool) -> None:
    """Ask for a text, and show what the bundle says of it."""
    with st.form("try", border=False):
        given = st.text_area("Try it on a text", max_chars=20_000, height=100, key="try_text")
        pair = ""
        if takes_pair:
            pair = st.text_area("Second text", max_chars=20_000, height=100, key="try_pair")
        early = bundle_beside.has_exits(bundle) and st.checkbox(
            "Let it leave early", key="try_early"
        )
        asked = st.form_submit_button("Classify")
    if not asked or not given.strip():
        return
    _answer(Predict(bundle.path, [given], [pair] if takes_pair else None, early))


def picture(bundle: BundleReport) -> None:
    """Ask for a picture, and show what the bundle says of it."""
    file = st.file_uploader(
        "Try it on a picture", type=uploads.PICTURES, max_upload_size=16, key="try_picture"
    )
    if file is None:
        return
    try:
        path = uploads.keep(file)
    except ChipvizError as error:
        widgets.show_error(error)
        return
    _answer(Predict(bundle.path, [str(path)], None))


def _answer(question: Predict) -> None:
    try:
        with st.spinner("Reading. The first one takes longer: the bundle is loaded."):
            (prediction,) = state.inference().ask(question, list[Prediction])
    except ChipvizError as error:
        widgets.show_error(error)
        return
    shares = sorted(prediction.probabilities.items(), key=lambda share: -share[1])
    if prediction.layer is not None:
        st.write(f"It left at layer {prediction.layer}.")
    st.html(widgets.bars([(name, share, formatting.percent(share)) for name, share in shares]))
