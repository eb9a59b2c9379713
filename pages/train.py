import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.ui import form, formatting, live, nav, state, widgets

run_id = state.requested_run()
widgets.show_kept_failure()
if run_id is None:
    st.header("New run", anchor=False)
    form.show()
    st.stop()
try:
    state.store().folder(run_id)
    job = state.store().get(run_id)
except ChipvizError as error:
    widgets.show_error(error)
    nav.link("runs", "All runs")
    st.stop()
state.remember_run(job.run_id)
st.header(formatting.plain(job.name), anchor=False)
live.watch_run(job)
