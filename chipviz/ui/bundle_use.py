"""How to use a bundle: download it, try it on a text, load it."""

import streamlit as st

from chipviz.bundle import card
from chipviz.results.report import RunReport
from chipviz.runs.store import Job
from chipviz.ui import bundle_try, formatting, server, state
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
        bundle_try.picture(bundle)
    else:
        bundle_try.text(bundle, takes_pair=takes_pair)
        bundle_try.table(bundle)
    needs = "chipviz" if bundle.kind == "chipviz" else "torch and transformers alone"
    st.markdown(f"**Load it** anywhere, with {needs}")
    lines = card.use(bundle.kind, report.task).replace('"PATH"', repr(bundle.path))
    st.code(lines, language="python", wrap_lines=True)
