"""The pages and the links between them. A link keeps the run and its cut."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import streamlit as st

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

PageName = Literal["runs", "train", "layers", "sparsify", "tokens", "bundle", "models", "compare"]

_FOLDER = Path(__file__).resolve().parents[2] / "pages"
_PAGES: dict[PageName, tuple[str, str]] = {
    "runs": ("Runs", ":material/list:"),
    "train": ("Train", ":material/play_arrow:"),
    "layers": ("Layers", ":material/stacked_line_chart:"),
    "sparsify": ("Sparsify", ":material/scatter_plot:"),
    "tokens": ("Tokens", ":material/text_fields:"),
    "bundle": ("Bundle", ":material/inventory_2:"),
    "models": ("Models", ":material/account_tree:"),
    "compare": ("Compare", ":material/compare_arrows:"),
}


def pages() -> "dict[PageName, StreamlitPage]":
    """All pages, in the order of the work. Addresses are the same in every version."""
    return {
        name: st.Page(
            _FOLDER / f"{name}.py",
            title=_title(name, title),
            icon=icon,
            url_path=None if name == "runs" else name,
            default=name == "runs",
        )
        for name, (title, icon) in _PAGES.items()
    }


def _title(name: PageName, title: str) -> str:
    """Pictures have patches where texts have tokens."""
    return "Patches" if name == "tokens" and st.session_state.get("rows") == "pictures" else title


def link(
    name: PageName, label: str, params: Mapping[str, str] | None = None, icon: str | None = None
) -> None:
    """Draw a link to a page. `label` is ours, never text from data."""
    st.page_link(pages()[name], label=label, icon=icon, query_params=dict(params or {}))


def go(name: PageName, params: Mapping[str, str] | None = None) -> None:
    """Leave this page for another one."""
    st.switch_page(pages()[name], query_params=dict(params or {}))
