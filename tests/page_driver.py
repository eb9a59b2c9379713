"""How tests open a page without a browser and read what it shows."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).resolve().parents[1]


def open_page(name, **params):
    at = AppTest.from_file(str(ROOT / "chipviz/ui/main.py"), default_timeout=120)
    at.run()
    for key, value in params.items():
        at.query_params[key] = value
    at.switch_page(f"../../pages/{name}.py").run()
    assert not at.exception
    assert not [error.value for error in at.error if "Unexpected" in error.value]
    return at


def open_tab(at, name):
    """Open one of the views under the curve; only the open one is drawn."""
    at.session_state["views"] = name
    return at.run()


def html_of(at):
    return " ".join(block.proto.body for block in at.get("html"))


def text_of(at):
    kinds = ("markdown", "caption", "info", "warning", "error", "header", "subheader")
    return " ".join(str(element.value) for kind in kinds for element in at.get(kind))


def button(at, key):
    return next(b for b in at.button if b.key == key)
