import streamlit as st

from chipviz.ui import (
    cut,
    cut_summary,
    formatting,
    nav,
    require_run,
    result_tabs,
    rule_table,
    state,
    widgets,
)

job, report = require_run.finished_run()
st.header(formatting.plain(job.name), anchor=False)
if report.warnings:
    with st.expander(f"Warnings ({len(report.warnings)})", icon=":material/warning:"):
        widgets.show_notices(report.warnings)
predictions = state.predictions(job.run_id)
chart, side = st.columns([5, 3], gap="large")
with side:
    chosen = cut.controls(report)
    cut_summary.show(report, chosen, predictions)
    with st.container(horizontal=True, key="next"):
        nav.link("bundle", "Build the bundle", state.address(), ":material/inventory_2:")
        by = "patch by patch" if report.task.kind == "image" else "word by word"
        nav.link("tokens", f"See it {by}", state.address(), ":material/text_fields:")
with chart:
    cut.rule_buttons(report, chosen)
    st.html(rule_table.rule_table(report, chosen, predictions))
    cut.curve(report, chosen)
    st.caption(f"{formatting.plain(cut.why(report, chosen))} Click a point to cut there.")
    oracle = cut.oracle_words(report)
    if oracle:
        st.caption(formatting.plain(oracle))
result_tabs.tabs(job, report, chosen, predictions)
