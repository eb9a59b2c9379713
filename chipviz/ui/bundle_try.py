"""Try a bundle on a text, on a picture, or on a table of texts."""

from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.results.answers import Prediction
from chipviz.results.report import BundleReport
from chipviz.runs.questions import ClassifyTable, Predict, TablePart
from chipviz.ui import bundle_beside, formatting, state, uploads, widgets

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

TABLES = ["csv", "tsv", "jsonl", "parquet"]


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


def table(bundle: BundleReport) -> None:
    """Ask for a table, classify its rows a part at a time, and give it back with the answers."""
    with st.expander("Classify a table", icon=":material/table_rows:"):
        file = st.file_uploader(
            "Table with the columns of the run",
            type=TABLES,
            max_upload_size=uploads.MAX_MB,
            key="try_table",
        )
        left, right = st.columns([2, 1], vertical_alignment="center")
        shares = left.checkbox("Probability of every class", key="try_shares")
        early = bundle_beside.has_exits(bundle) and left.checkbox(
            "Let texts leave early", key="try_table_early"
        )
        asked = right.button(
            "Classify the rows", disabled=file is None, key="try_table_go", width="stretch"
        )
        if file is None:
            return
        try:
            question = ClassifyTable(bundle.path, str(uploads.keep(file)), shares, early)
            if asked:
                st.session_state["classified"] = (question, _classified(question))
        except ChipvizError as error:
            widgets.show_error(error)
            return
        done = st.session_state.get("classified")
        if done and done[0] == question and Path(done[1]).is_file():
            _give_back(Path(done[1]), file)


def _classified(question: ClassifyTable) -> str:
    """Where the finished table is. Leaving the page stops it; asking again goes on."""
    with st.status("Reading. The first rows take longer: the bundle is loaded.") as shown:
        while True:
            part = state.inference().ask(question, TablePart)
            if part.finished:
                shown.update(
                    label="All rows are classified; every column is kept.", state="complete"
                )
                return part.out
            shown.update(label=f"{part.n_rows:,} rows are classified. Leaving the page stops it.")


def _give_back(out: Path, file: "UploadedFile") -> None:
    stem = file.name.rpartition(".")[0] or "table"
    st.download_button(
        f"Download ({formatting.megabytes(out.stat().st_size)})",
        out.read_bytes(),
        file_name=f"{stem}-predicted{out.suffix}",
        icon=":material/download:",
        key="try_table_download",
        width="stretch",
    )


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
