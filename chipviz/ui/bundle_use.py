"""How to use a bundle: download it, try it on a text, load it."""

import streamlit as st

from chipviz.bundle import card
from chipviz.errors import ChipvizError
from chipviz.results.answers import Prediction
from chipviz.results.report import BundleReport, RunReport
from chipviz.runs.questions import Predict
from chipviz.runs.store import Job
from chipviz.ui import bundle_beside, formatting, server, state, uploads, widgets
from chipviz.ui.bundle_view import name_of


def show(job: Job, report: RunReport) -> None:
    """Download, try and load one bundle."""
    takes_pair = "{text_pair}" in report.task.template
    bundle = job.bundle
    assert bundle is not None
    st.subheader(name_of(bundle), anchor=False)
    st.link_button(
        f"Download ({formatting.megabytes(bundle.folder_bytes)})",
        server.bundle_link(state.store(), job),
        type="primary",
        icon=":material/download:",
        key="download",
        width="stretch",
    )
    st.caption("The same files lie in this folder:")
    st.code(bundle.path, language=None, wrap_lines=True)
    if report.task.kind == "image":
        _try_picture(bundle)
    else:
        _try_it(bundle, takes_pair=takes_pair)
    needs = "chipviz" if bundle.kind == "chipviz" else "torch and transformers alone"
    st.markdown(f"**Load it** anywhere, with {needs}")
    lines = card.use(bundle.kind, report.task).replace('"PATH"', repr(bundle.path))
    st.code(lines, language="python", wrap_lines=True)


def _try_it(bundle: BundleReport, *, takes_pair: bool) -> None:
    with st.form("try", border=False):
        text = st.text_area("Try it on a text", max_chars=20_000, height=100, key="try_text")
        pair = ""
        if takes_pair:
            pair = st.text_area("Second text", max_chars=20_000, height=100, key="try_pair")
        early = bundle_beside.has_exits(bundle) and st.checkbox(
            "Let it leave early", key="try_early"
        )
        asked = st.form_submit_button("Classify")
    if not asked or not text.strip():
        return
    _answer(Predict(bundle.path, [text], [pair] if takes_pair else None, early))


def _try_picture(bundle: BundleReport) -> None:
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
