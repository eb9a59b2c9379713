"""The web application: `streamlit run app.py`.

Streamlit finds the server by reading this file for the assignment `app = App(...)`.
"""

import streamlit as st
from streamlit.starlette import App

from chipviz.config import home_dir
from chipviz.ui.server import Server

server = Server(home_dir(), hosts=st.get_option("server.allowedHosts"))
app = App(
    "chipviz/ui/main.py",
    routes=server.routes,
    middleware=server.middleware,
    lifespan=server.lifespan,
)
