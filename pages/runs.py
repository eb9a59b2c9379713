import streamlit as st

from chipviz.config import EXAMPLE, RunConfig
from chipviz.runs import scheduler
from chipviz.ui import nav, run_list, state, widgets

title, example, new = st.columns([5, 4, 2], vertical_alignment="center")
title.header("Find the layer your classifier needs", anchor=False)
if example.button(
    "Try it: BBC news on SmolLM2 (about 2 min)",
    type="primary",
    key="try_it",
    width="stretch",
    icon=":material/play_arrow:",
):
    job = scheduler.enqueue_run(state.store(), RunConfig.checked(**EXAMPLE))
    nav.go("train", {"run": job.run_id})
if new.button("New run", key="new_run", width="stretch"):
    nav.go("train")
widgets.show_kept_failure()
run_list.show()
run_list.tidy_up()
