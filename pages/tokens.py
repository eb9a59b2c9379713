import streamlit as st

from chipviz.errors import ChipvizError
from chipviz.ui import cut, formatting, patch_view, require_run, thumbnails, token_view, widgets

job, report = require_run.finished_run()
st.header(formatting.plain(job.name), anchor=False)
if report.task.kind == "image":
    left, right = st.columns([3, 2], gap="large")
    with right:
        chosen = cut.controls(report)
        verdict = st.container()
        picture = patch_view.choose_picture(job)
    if picture is None:
        st.stop()
    try:
        with left, st.spinner("Reading the picture. The first one takes longer."):
            read = patch_view.ask(job.run_id, picture[0], chosen)
    except ChipvizError as error:
        widgets.show_error(error)
        st.stop()
    with left:
        patch_view.show(read, chosen, picture[1])
    with verdict:
        patch_view.show_verdict(read, chosen.layer, picture[1])
    thumbnails.mistakes(job, report, chosen)
    st.stop()
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
