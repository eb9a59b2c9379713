import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.ui import cut, gate, parts, words

job, report = gate.finished_run()
st.header(parts.plain(job.name), anchor=False)
text, text_pair, truth = words.choose_text(job, report)
chosen = cut.controls(report)
if not text.strip():
    st.info("Write or paste a text to see what every layer says about it.")
    st.stop()
try:
    with st.spinner("Reading the text. The first one takes longer: the model is loaded."):
        answer = words.ask(job.run_id, text, text_pair, chosen)
except ChipvizError as error:
    parts.show_error(error)
    st.stop()
words.show(answer, text, chosen, truth)
