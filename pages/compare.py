import streamlit as st

from chipviz.ui import compare_view, widgets

st.header("Compare", anchor=False)
widgets.show_kept_failure()
compare_view.show()
