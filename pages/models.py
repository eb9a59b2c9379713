import streamlit as st

from chipviz.ui import model_form, model_list, nav, widgets

making = bool(st.query_params.get("new"))
with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
    st.header("A new model" if making else "Models made from models", anchor=False)
    if making:
        nav.link("models", "All models", icon=":material/list:")
    else:
        nav.link("models", "Make a model", {"new": "1"}, ":material/add:")
widgets.show_kept_failure()
if making:
    model_form.show()
else:
    model_list.show()
