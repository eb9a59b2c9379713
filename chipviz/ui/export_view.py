"""Where else a bundle can run: export it, take it away, copy the lines that run it there."""

from pathlib import Path
from typing import get_args

import streamlit as st

from chipviz.bundle import targets
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.bundle.targets import GRAPHS, Exported, Target
from chipviz.errors import ChipvizError
from chipviz.runs.questions import Export
from chipviz.runs.store import Job
from chipviz.ui import formatting, server, state, widgets

PATIENCE_S = 900.0


def show(job: Job) -> None:
    """Offer every place; one that cannot take this bundle is greyed, with the reason."""
    assert job.bundle is not None
    bundle = Path(job.bundle.path)
    try:
        metadata = read_metadata(bundle)
    except ChipvizError as error:
        widgets.show_error(error)
        return
    with st.expander("Take it elsewhere", icon=":material/output:"):
        for target in get_args(Target):
            _place(job, bundle, metadata, target)


def _place(job: Job, bundle: Path, metadata: Metadata, target: Target) -> None:
    refused = targets.refusal(target, metadata)
    done = targets.read_export(bundle, target)
    left, right = st.columns([3, 1], vertical_alignment="center")
    with left:
        st.markdown(f"**{targets.TITLES[target]}**  \n{refused or _what(target)}")
        int8 = False
        if target in GRAPHS and not refused:
            int8 = st.checkbox("Weights of 8 bits, if labels stay", key=f"int8_{target}")
    with right:
        asked = st.button(
            "Again" if done else "Export",
            disabled=refused is not None,
            key=f"export_{target}",
            width="stretch",
        )
    if asked:
        done = _export(Export(str(bundle), target, int8)) or done
    if done:
        _done(job, done, metadata)


def _what(target: Target) -> str:
    said = targets.WHAT[target]
    return f"{said[:1].upper()}{said[1:]}."


def _export(question: Export) -> Exported | None:
    try:
        with st.spinner("Writing it, and asking it what the bundle was asked. About a minute."):
            return state.inference().ask(question, Exported, timeout_s=PATIENCE_S)
    except ChipvizError as error:
        widgets.show_error(error)
        return None


def _done(job: Job, done: Exported, metadata: Metadata) -> None:
    """An export: how its check went, its download and its lines."""
    rounded = ", weights of 8 bits" if done.int8 else ""
    st.write(
        f"{done.n_agree} of {done.n_checked} {metadata.task.rows} get the same label, largest "
        f"difference {done.max_difference:.0e}{rounded}."
    )
    st.link_button(
        f"Download for {done.target} ({formatting.megabytes(done.n_bytes)})",
        server.bundle_link(state.store(), job, done.target),
        icon=":material/download:",
        key=f"download_{done.target}",
        width="stretch",
    )
    language = "bash" if done.target in ("vllm", "head") else "python"
    lines = targets.use(done.target, metadata).replace("PATH", done.path)
    st.code(lines, language=language, wrap_lines=True)
