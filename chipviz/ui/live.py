"""Live parts: they ask the store every two seconds while a job is at work, and compute nothing."""

from collections import deque

import streamlit as st

from chipviz.errors import JobError
from chipviz.results.run_folder import RunFolder
from chipviz.runs import scheduler
from chipviz.runs.store import Job
from chipviz.ui import guard, nav, state, widgets
from chipviz.ui.plots import curves

EVERY_S = 2.0
_LOG_LINES = 40


def watch_run(job: Job) -> None:
    """Show a training run while it works and how it ended, with the button that fits."""
    _run_buttons(job)
    every = EVERY_S if widgets.at_work(job) else None
    guard.live(_run_view, every)(job.run_id, widgets.at_work(job))


def watch_bundle(job: Job) -> None:
    """Show a bundle build while it works. The page is drawn anew when it ends."""
    st.button("Stop", icon=":material/stop:", key="stop_build", on_click=_stop, args=(job.job_id,))
    guard.live(_bundle_view, EVERY_S)(job.job_id)


def resume_button(job: Job, key: str) -> None:
    """Offer to go on with a run that ended early."""
    st.button("Resume", icon=":material/resume:", key=key, on_click=_resume, args=(job.run_id,))


def stop_button(job: Job, key: str) -> None:
    """Offer to stop a run. What it has on disk stays readable."""
    label = "Stopping" if job.stop_requested else "Stop"
    st.button(
        label,
        icon=":material/stop:",
        key=key,
        on_click=_stop,
        args=(job.job_id,),
        disabled=job.stop_requested,
    )


def how_it_ended(job: Job) -> None:
    """Say in words why a job is not done."""
    if job.status == "failed":
        widgets.show_failure(job.refusal)
    elif job.status == "stopped":
        st.info("Stopped. What was read so far is kept: resume goes on from there.")
    elif job.status == "interrupted":
        st.warning(
            "Interrupted: the process that computed this run is gone. "
            "What was read so far is kept: resume goes on from there."
        )
    elif job.status == "stalled":
        st.warning(
            "Stalled: the process gives no sign of life. It may be short of memory. "
            "Wait, or stop it and resume."
        )


def _run_buttons(job: Job) -> None:
    if widgets.at_work(job):
        stop_button(job, key="stop_run")
    elif job.state == "done":
        nav.link("layers", "Open the layers", {"run": job.run_id}, ":material/stacked_line_chart:")
    else:
        resume_button(job, key="resume_run")


def _run_view(run_id: str, was_at_work: bool) -> None:
    job = still_there(run_id)
    if was_at_work and not widgets.at_work(job):
        st.rerun()
    with st.container():  # a place of its own: what comes and goes here must not move the chart
        widgets.progress(job)
        how_it_ended(job)
    store, look, total = state.store(), state.look(), _texts(job)
    mark = store.points_mark(run_id)
    if mark[0] or widgets.at_work(job):
        st.plotly_chart(
            state.drawn_once(
                (run_id, mark, total, look),
                lambda: curves.live_figure(
                    store.points(run_id, ends_only=True), total=total, look=look
                ),
            ),
            key="live_curve",
            theme=None,
            config={"displayModeBar": False},
            alt="Validation accuracy of a chip on every layer, growing as texts are read",
        )
    _log(store.folder(run_id))


def still_there(job_id: str) -> Job:
    """The job. One that was deleted elsewhere is the page's to speak of, once."""
    try:
        return state.store().get(job_id)
    except JobError:
        st.rerun()


def _texts(job: Job) -> int | None:
    if job.state == "done":
        return state.store().report(job.run_id).task.n_train
    return job.config.max_train


def _bundle_view(job_id: str) -> None:
    job = still_there(job_id)
    if not widgets.at_work(job):
        st.rerun()
    widgets.progress(job)


def _log(folder: RunFolder) -> None:
    if not folder.log.exists():
        return
    with st.expander("Log"):
        with folder.log.open(encoding="utf-8", errors="replace") as lines:
            tail = deque(lines, maxlen=_LOG_LINES)
        st.code("".join(tail) or "(empty)", language=None, wrap_lines=True)


def _stop(job_id: str) -> None:
    widgets.act(scheduler.stop, state.store(), job_id)


def _resume(run_id: str) -> None:
    widgets.act(scheduler.resume, state.store(), run_id)
