import streamlit as st

from chipviz.ui import formatting, neuron_view, require_run

job, report = require_run.finished_run()
st.header(formatting.plain(job.name), anchor=False)
neuron_view.show(job, report)
