"""The table of runs on the home page: one compact row each, live while something is at work."""

import html

import streamlit as st

from chipviz.runs.store import Job
from chipviz.ui import formatting, live, nav, state, widgets

PAGE_SIZE = 20


def show() -> None:
    """Draw the runs, or what to do when there are none."""
    runs = state.store().runs()
    if not runs:
        st.info(
            "No runs yet. The example needs nothing but the package registry: it trains a small "
            "classifier on every layer of a language model and shows where the answer is ready."
        )
        return
    active = any(widgets.at_work(job) for job in runs)
    st.fragment(_rows, run_every=live.EVERY_S if active else None)(active)


def _rows(was_active: bool) -> None:
    runs = state.store().runs()
    if was_active and not any(widgets.at_work(job) for job in runs):
        st.rerun()
    shown = st.session_state.get("runs_shown", PAGE_SIZE)
    for job in runs[:shown]:
        _row(job)
    if len(runs) > shown:
        st.button(f"Show {min(PAGE_SIZE, len(runs) - shown)} more", on_click=_more, key="more")


def _more() -> None:
    st.session_state["runs_shown"] = st.session_state.get("runs_shown", PAGE_SIZE) + PAGE_SIZE


def _row(job: Job) -> None:
    with st.container(border=True, key=f"run_{job.run_id}"):
        words, buttons = st.columns([5, 3], vertical_alignment="center")
        with words:
            st.html(_line(job))
        with (
            buttons,
            st.container(
                horizontal=True, horizontal_alignment="right", vertical_alignment="center"
            ),
        ):
            _buttons(job)


def _line(job: Job) -> str:
    cells = [
        widgets.dot(job),
        f'<span class="cv-name">{html.escape(job.name)}</span>',
        f"<span>{html.escape(_status(job))}</span>",
        *(f'<span class="cv-muted">{html.escape(cell)}</span>' for cell in _details(job)),
    ]
    return f'<div class="cv-line">{"".join(cells)}</div>'


def _status(job: Job) -> str:
    share = f" {100 * job.done / job.total:.0f} %" if job.total else ""
    if job.status in ("done", "queued"):
        return job.status
    if job.status in ("interrupted", "stopped"):
        return f"{job.status} at{share}" if share else job.status
    return f"{job.status}{'' if job.status == 'failed' else share}"


def _details(job: Job) -> list[str]:
    if job.test_accuracy is not None:
        return [
            formatting.ago(job.finished or job.created),
            f"{formatting.percent(job.test_accuracy)} at layer {job.cut_layer} of {job.n_layers}",
            f"{100 * (job.parameter_ratio or 0):.0f} % fewer parameters",
        ]
    if job.state == "failed":
        return [job.message]
    points = state.store().points(job.run_id)
    newest = [p.accuracy for p in points if p.n_train == points[-1].n_train]
    best_so_far = [f"best so far {formatting.percent(max(newest))}"] if newest else []
    pace = widgets.pace_words(job)
    return [*([pace] if pace else []), *best_so_far]


def _buttons(job: Job) -> None:
    params = {"run": job.run_id}
    nav.link(
        "layers" if job.state == "done" else "train", "Open", params, ":material/arrow_forward:"
    )
    if widgets.at_work(job):
        live.stop_button(job, key=f"stop_{job.run_id}")
        return
    if job.state != "done":
        live.resume_button(job, key=f"resume_{job.run_id}")
    with st.popover("Delete", icon=":material/delete:", type="tertiary", key=f"ask_{job.run_id}"):
        st.write(
            "Delete this run, its curve and its bundles for good? The hidden states it read go "
            "with it, unless another run uses them."
        )
        st.button(
            "Delete for good",
            key=f"delete_{job.run_id}",
            on_click=widgets.act,
            args=(state.store().delete, job.run_id),
        )
