"""What a page looks at: the store, the run in the address, and the cut chosen for it.

The cut of each run is kept once a session and stands in the address; the widgets are views of it.
The address wins where it names a cut (a reload, a pasted link, the browser's back button).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from chipviz import jobs
from chipviz.canvas import DARK, LIGHT, Look
from chipviz.config import Pooling, home_dir
from chipviz.report import RunReport
from chipviz.store import Job, Store


@dataclass(frozen=True)
class Cut:
    """Where to cut: the last layer kept, and the pooling its chip reads."""

    layer: int
    pooling: Pooling


def store() -> Store:
    """The store of `CHIPVIZ_HOME`, shared by all sessions."""
    return _store(home_dir())


def inference() -> jobs.Inference:
    """The client of the one inference process that all sessions share."""
    return _inference(home_dir())


@st.cache_resource
def _store(home: Path) -> Store:
    return Store(home)


@st.cache_resource
def _inference(home: Path) -> jobs.Inference:
    return jobs.Inference(home)


def look() -> Look:
    """The colours of the theme this browser shows."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def requested_run() -> str | None:
    """The run named in the address; foreign text is checked before anything is made of it."""
    return st.query_params.get("run")


def current_run() -> Job | None:
    """The run in the address, else the last one this session opened, else the newest done.

    Raises:
        ChipvizError: If the address names a run that does not exist.
    """
    wanted = requested_run()
    if wanted:
        store().run_dir(wanted)
        job = store().get(wanted)
    else:
        job = _remembered() or next((run for run in store().runs() if run.state == "done"), None)
    if job:
        st.session_state["run"] = job.run_id
        _write_address({"run": job.run_id})
    return job


def _remembered() -> Job | None:
    run_id = st.session_state.get("run")
    return next((run for run in store().runs() if run.run_id == run_id), None)


def current_cut(report: RunReport) -> Cut:
    """The cut chosen for a run: from the address, else kept, else what rule *within* says."""
    best = report.selection["within"]
    kept = _cuts().get(report.run_id, Cut(best.cut_layer, best.pooling))
    cut = parse_cut(st.query_params.to_dict(), report, kept) or kept
    choose_cut(report, cut.layer, cut.pooling)
    return cut


def choose_cut(report: RunReport, layer: int, pooling: Pooling) -> None:
    """Keep a cut for this run and show it in the address."""
    _cuts()[report.run_id] = Cut(layer, pooling)
    _write_address({"run": report.run_id, "cut": str(layer), "pooling": pooling})


def parse_cut(params: Mapping[str, str], report: RunReport, kept: Cut) -> Cut | None:
    """The cut an address names, what is missing taken from `kept`; None if it names none.

    A layer or pooling that the run does not have counts as not named.
    """
    text = params.get("cut", "")
    layer = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else -1
    layer_fits = 0 <= layer < report.backbone.n_layers
    asked = params.get("pooling")
    named: list[Pooling] = [name for name in poolings(report) if name == asked]
    if not layer_fits and not named:
        return None
    return Cut(layer if layer_fits else kept.layer, named[0] if named else kept.pooling)


def poolings(report: RunReport) -> list[Pooling]:
    """The poolings that a run has chips for."""
    names: dict[Pooling, None] = {score.pooling: None for score in report.scores}
    return list(names)


def address() -> dict[str, str]:
    """What a link to another page must carry."""
    keys = ("run", "cut", "pooling")
    return {key: st.query_params[key] for key in keys if key in st.query_params}


def _cuts() -> dict[str, Cut]:
    return st.session_state.setdefault("cuts", {})


def _write_address(params: Mapping[str, str]) -> None:
    for key, value in params.items():
        if st.query_params.get(key) != value:
            st.query_params[key] = value
