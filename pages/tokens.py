import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.ui import cut, formatting, require_run, token_view, widgets

job, report = require_run.finished_run()
st.header(formatting.plain(job.name), anchor=False)
text, text_pair, truth = token_view.choose_text(job, report)
chosen = cut.controls(report)
single = token_view.choose_single(chosen)
if not text.strip():
    st.info("Write or paste a text to see what every layer says about it.")
    st.stop()
try:
    with st.spinner("Reading the text. The first one takes longer: the model is loaded."):
        answer = token_view.ask(job.run_id, text, text_pair, chosen, single=single)
except ChipvizError as error:
    widgets.show_error(error)
    st.stop()
token_view.show(answer, text, chosen, truth, single=single)
