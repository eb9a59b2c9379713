"""The way into pages that need a finished run: the run, or a friendly word why there is none."""

import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.results.report import RunReport
from chipviz.runs.store import Job
from chipviz.ui import formatting, live, nav, state, widgets


def finished_run() -> tuple[Job, RunReport]:
    """The run this page shows. The page stops here when there is none to show."""
    widgets.show_kept_failure()
    try:
        job = state.current_run()
    except ChipvizError as error:
        widgets.show_error(error)
        nav.link("runs", "All runs")
        st.stop()
    if job is None:
        st.info(
            "No finished run yet. Start the example on the home page: it takes about two minutes."
        )
        nav.link("runs", "Go to the home page")
        st.stop()
    state.remember_run(job.run_id)
    if job.state != "done":
        _not_done(job)
        st.stop()
    try:
        report = state.store().report(job.run_id)
    except ChipvizError as error:
        widgets.show_error(error)
        nav.link("runs", "All runs")
        st.stop()
    state.choose_cut(report, state.current_cut(report))
    if st.session_state.get("rows", "texts") != report.task.rows:
        st.session_state["rows"] = report.task.rows
        st.rerun()  # the name of the page of tokens or patches is drawn already
    return job, report


def _not_done(job: Job) -> None:
    st.header(formatting.plain(job.name), anchor=False)
    if widgets.at_work(job):
        st.info("This run is still at work; its layers open here when it is done.")
    widgets.progress(job)
    live.how_it_ended(job)
    nav.link("train", "Watch it", {"run": job.run_id})
