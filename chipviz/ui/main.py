"""The script of every page run: page configuration, styles, navigation, then the page itself."""

import gc

import streamlit as st

from chipviz.ui import guard, nav, state, style


@st.cache_resource
def _freeze() -> None:
    """Keep what is imported out of later collections: reruns stay short."""
    gc.collect()
    gc.freeze()


st.set_page_config(page_title="chipviz", page_icon=style.ICON, layout="wide")
_freeze()
page = st.navigation(list(nav.pages().values()), position="top")
st.html(style.sheet(state.look()))
with guard.saying():
    page.run()
