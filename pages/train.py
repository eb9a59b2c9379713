import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.ui import form, live, nav, parts, state

run_id = state.requested_run()
parts.show_kept_failure()
if run_id is None:
    st.header("New run", anchor=False)
    form.show()
    st.stop()
try:
    state.store().folder(run_id)
    job = state.store().get(run_id)
except ChipvizError as error:
    parts.show_error(error)
    nav.link("runs", "All runs")
    st.stop()
state.remember_run(job.run_id)
st.header(parts.plain(job.name), anchor=False)
live.watch_run(job)
