import streamlit as st

from chipviz.ui import (
    bundle_use,
    bundle_view,
    cut,
    export_view,
    formatting,
    join_view,
    require_run,
)

job, report = require_run.finished_run()
st.header(formatting.plain(job.name), anchor=False)
left, right = st.columns(2, gap="large")
with left:
    chosen = cut.controls(report)
    bundle_view.plan(job, report, chosen)
    shown = bundle_view.built(job, chosen)
with right:
    if shown:
        bundle_use.show(shown, report)
        export_view.show(shown)
        join_view.show(shown)
    else:
        st.info("Build the bundle to try it here, copy the code that loads it, and download it.")
