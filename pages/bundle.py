import streamlit as st

from chipviz.ui import building, cut, gate, parts

job, report = gate.finished_run()
st.header(parts.plain(job.name), anchor=False)
left, right = st.columns(2, gap="large")
with left:
    chosen = cut.controls(report)
    building.plan(job, report, chosen)
    shown = building.built(job, chosen)
with right:
    if shown:
        building.use(shown, report)
    else:
        st.info("Build the bundle to try it here, copy the code that loads it, and download it.")
