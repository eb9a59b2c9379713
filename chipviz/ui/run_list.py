"""The table of runs on the home page: one compact row each, live while something is at work."""

import html
from pathlib import Path

import streamlit as st

from chipviz.runs import tidy
from chipviz.runs.store import ACTIVE, Job, State
from chipviz.ui import formatting, guard, live, nav, state, widgets

PAGE_SIZE = 20
SHOWN = 5
"""Leftovers that are named one by one."""


def show() -> None:
    """Draw the runs, or what to do when there are none."""
    runs = state.store().runs()
    if not runs:
        st.info(
            "No runs yet. The example needs nothing but the package registry: it trains a small "
            "classifier on every layer of a language model and shows where the answer is ready."
        )
        return
    if any(widgets.at_work(job) for job in runs):
        guard.live(_watch, live.EVERY_S)([(job.run_id, job.state) for job in runs])
    shown = st.session_state.get("runs_shown", PAGE_SIZE)
    for job in runs[:shown]:
        # Only rows at work tick: all of them drawn anew would be most of what a busy server does.
        if job.state in ACTIVE:
            guard.live(_live_row, live.EVERY_S)(job.run_id)
        else:
            _row(job)
    if len(runs) > shown:
        st.button(f"Show {min(PAGE_SIZE, len(runs) - shown)} more", on_click=_more, key="more")


def _watch(drawn: list[tuple[str, State]]) -> None:
    """Draw the page anew when a run began, ended, came or went."""
    if list(state.store().states().items()) != drawn:
        st.rerun()


def _more() -> None:
    st.session_state["runs_shown"] = st.session_state.get("runs_shown", PAGE_SIZE) + PAGE_SIZE


def _live_row(run_id: str) -> None:
    _row(live.still_there(run_id))


def _row(job: Job) -> None:
    with st.container(border=True, key=f"run_{job.run_id}"):
        words, buttons = st.columns([5, 3], vertical_alignment="center")
        with words:
            st.html(_line(job))
        with (
            buttons,
            st.container(
                horizontal=True, horizontal_alignment="right", vertical_alignment="center"
            ),
        ):
            _buttons(job)


def _line(job: Job) -> str:
    cells = [
        widgets.dot(job),
        f'<span class="cv-name">{html.escape(job.name)}</span>',
        f"<span>{html.escape(_status(job))}</span>",
        *(f'<span class="cv-muted">{html.escape(cell)}</span>' for cell in _details(job)),
    ]
    return f'<div class="cv-line">{"".join(cells)}</div>'


def _status(job: Job) -> str:
    share = f" {100 * job.done / job.total:.0f} %" if job.total else ""
    if job.status in ("done", "queued"):
        return job.status
    if job.status in ("interrupted", "stopped"):
        return f"{job.status} at{share}" if share else job.status
    return f"{job.status}{'' if job.status == 'failed' else share}"


def _details(job: Job) -> list[str]:
    if job.test_accuracy is not None:
        return [
            formatting.ago(job.finished or job.created),
            f"{formatting.percent(job.test_accuracy)} at layer {job.cut_layer} of {job.n_layers}",
            f"{100 * (job.parameter_ratio or 0):.0f} % fewer parameters",
        ]
    if job.state == "failed":
        return [job.message]
    points = state.store().points(job.run_id, ends_only=True)
    newest = [p.accuracy for p in points if p.n_train == points[-1].n_train]
    best_so_far = [f"best so far {formatting.percent(max(newest))}"] if newest else []
    pace = widgets.pace_words(job)
    return [*([pace] if pace else []), *best_so_far]


def _buttons(job: Job) -> None:
    params = {"run": job.run_id}
    nav.link(
        "layers" if job.state == "done" else "train", "Open", params, ":material/arrow_forward:"
    )
    if widgets.at_work(job):
        live.stop_button(job, key=f"stop_{job.run_id}")
        return
    if job.state != "done":
        live.resume_button(job, key=f"resume_{job.run_id}")
    ask = st.popover(
        "Delete",
        icon=":material/delete:",
        type="tertiary",
        key=f"ask_{job.run_id}",
        on_change="rerun",
    )
    with ask:
        # Counted when somebody asks: it looks at every file.
        freed = f" {_freed(job)} are free then." if ask.open else ""
        st.write(
            "Delete this run, its curve and its bundles for good? The hidden states it read go "
            f"with it, unless another run uses them.{freed}"
        )
        st.button(
            "Delete for good",
            key=f"delete_{job.run_id}",
            on_click=widgets.act,
            args=(state.store().delete, job.run_id),
        )


def _freed(job: Job) -> str:
    return formatting.megabytes(state.store().bytes_of(job.run_id))


def tidy_up() -> None:
    """Offer to remove what no run needs any more. Looks only when asked."""
    with st.popover("Tidy up", icon=":material/mop:", type="tertiary", key="tidy"):
        st.write("Files that no run of this list needs: remains of crashes, unused hidden states.")
        if st.button("Look", key="tidy_look"):
            st.session_state["leftovers"] = tidy.leftovers(state.store())
        found = st.session_state.get("leftovers")
        if found is None:
            return
        if not found:
            st.caption("Nothing is left over.")
            return
        n_bytes = sum(left.n_bytes for left in found)
        for left in found[:SHOWN]:
            size, home = formatting.megabytes(left.n_bytes), state.store().home
            path = formatting.plain(str(Path(left.path).relative_to(home)))
            st.caption(f"{path}: {size}, {left.why}")
        if len(found) > SHOWN:
            st.caption(f"and {len(found) - SHOWN} more")
        st.button(
            f"Remove {len(found)} for good, {formatting.megabytes(n_bytes)}",
            key="tidy_remove",
            on_click=widgets.act,
            args=(_remove, found),
        )


def _remove(found: list[tidy.Leftover]) -> None:
    st.session_state.pop("leftovers", None)
    tidy.remove(state.store(), found)
