"""The web application: `streamlit run app.py`.

On a machine that others use as well: `streamlit run app.py -- --token`. It prints an address with a
token, and answers only browsers that came by it. `--token=WORD` sets it.

Streamlit finds the server by reading this file for the assignment `app = App(...)`.
"""

import sys

import streamlit as st
from streamlit.starlette import App

from chipviz.config import home_dir
from chipviz.ui.gate import token_of
from chipviz.ui.server import Server

server = Server(
    home_dir(), hosts=st.get_option("server.allowedHosts"), token=token_of(sys.argv[1:])
)
app = App(
    "chipviz/ui/main.py",
    routes=server.routes,
    middleware=server.middleware,
    lifespan=server.lifespan,
)
