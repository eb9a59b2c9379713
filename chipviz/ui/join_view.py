"""Put the chips of several tasks on one backbone: this bundle and those of other runs."""

from pathlib import Path

import streamlit as st

from chipviz.bundle import tasks
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.errors import ChipvizError
from chipviz.runs.questions import Join
from chipviz.runs.store import Job
from chipviz.ui import formatting, server, state, widgets
from chipviz.ui.bundle_view import name_of

PATIENCE_S = 900.0


def show(job: Job) -> None:
    """Offer the bundles of other tasks that were cut from the same backbone."""
    assert job.bundle is not None
    bundle = Path(job.bundle.path)
    own = _metadata(bundle)
    if own is None or own.task.kind != "text":
        return
    others = _others(job, own)
    with st.expander("Several tasks on this backbone", icon=":material/hub:"):
        if not others:
            st.write("Build a bundle of another task on this backbone: then both fit in one.")
            return
        chosen = st.multiselect("Join with", list(others), key="join_with")
        asked = st.button("Join", key="join", disabled=not chosen)
        done = tasks.read_report(tasks.place_of(bundle))
        if asked:
            done = _join(Join([str(bundle), *(others[name] for name in chosen)])) or done
        if done:
            _done(job, done)


def _others(job: Job, own: Metadata) -> dict[str, str]:
    """Bundles of other runs on the same model: what they are called, and their folders."""
    wanted = own.everything["backbone"].get("fingerprint")
    found: dict[str, str] = {}
    store = state.store()
    backbone = store.get(job.run_id).config.backbone
    for run in store.runs():
        if run.run_id == job.run_id or run.config.backbone != backbone:
            continue
        for other in store.bundles(run.run_id):
            if other.bundle is None or (there := _metadata(Path(other.bundle.path))) is None:
                continue
            if there.everything["backbone"].get("fingerprint") == wanted:
                name = f"{run.name}: {name_of(other.bundle)}"  # options are no Markdown
                found.setdefault(name, other.bundle.path)
    return found


def _metadata(path: Path) -> Metadata | None:
    try:
        return read_metadata(path)
    except ChipvizError:
        return None


def _join(question: Join) -> tasks.JoinReport | None:
    try:
        with st.spinner("Joining, and asking the whole what each was asked. About a minute."):
            return state.inference().ask(question, tasks.JoinReport, timeout_s=PATIENCE_S)
    except ChipvizError as error:
        widgets.show_error(error)
        return None


def _done(job: Job, done: tasks.JoinReport) -> None:
    """What was joined: figures of the whole and of each, download and lines."""
    alone = sum(task.n_parameters for task in done.tasks)
    passes = (
        "one pass answers all tasks"
        if done.n_passes == 1
        else f"prompts differ, so a text takes {done.n_passes} passes"
    )
    st.write(
        f"{len(done.tasks)} tasks on layers 0 to {done.cut_layer}: {done.n_parameters:,} "
        f"parameters instead of {alone:,}; {passes}. {done.n_checked} rows compared, largest "
        f"difference {done.max_difference:.0e}."
    )
    st.dataframe(
        {
            "task": [task.name for task in done.tasks],
            "layer": [task.cut_layer for task in done.tasks],
            "test accuracy": [formatting.percent(task.test_accuracy) for task in done.tasks],
            "parameters alone": [f"{task.n_parameters:,}" for task in done.tasks],
        },
        hide_index=True,
    )
    st.link_button(
        f"Download all tasks ({formatting.megabytes(done.n_bytes)})",
        server.bundle_link(state.store(), job, "joined"),
        icon=":material/download:",
        key="download_joined",
        width="stretch",
    )
    line = f'python -m chipviz predict {done.path} --text "TEXT" --json'
    st.code(line, language="bash", wrap_lines=True)
