"""The models made here, what is being made, and how it goes: live while something is at work."""

import html

import streamlit as st

from chipviz.results import models
from chipviz.results.models import ModelRecord
from chipviz.runs.store import Job
from chipviz.ui import formatting, guard, live, nav, state, widgets
from chipviz.ui.plots import fits


def show() -> None:
    """Draw what is under way or broke off, then every model there is."""
    store = state.store()
    made = models.made_models(store.home)
    every_job = store.models()
    open_jobs = [job for job in every_job if job.state != "done"]
    for job in open_jobs:
        every = live.EVERY_S if widgets.at_work(job) else None
        guard.live(_job_view, every)(job.job_id, widgets.at_work(job))
    if not made and not open_jobs:
        st.info(
            "No models yet. Take layers out of a backbone, heal what is left, or tune one on a "
            "task. What comes of it is a plain model: train chips on it as on any other, and "
            "compare."
        )
    jobs = {job.name: job for job in every_job if job.state == "done"}
    for _, record in made:
        _model(record, jobs.get(record.name))


def _job_view(job_id: str, was_at_work: bool) -> None:
    job = live.still_there(job_id)
    if was_at_work and not widgets.at_work(job):
        st.rerun()
    spec = job.model
    with st.container(border=True, key=f"making_{job_id}"):
        words = (
            f"{formatting.plain(job.name)}: {spec.in_words} of {formatting.plain(spec.backbone)}"
        )
        st.markdown(f"**{words}**")
        widgets.progress(job)
        live.how_it_ended(job)
        _chart(job)
        with st.container(horizontal=True):
            if widgets.at_work(job):
                live.stop_button(job, key=f"stop_{job_id}")
            else:
                live.resume_button(job, key=f"resume_{job_id}")
                st.button(
                    "Remove",
                    icon=":material/delete:",
                    type="tertiary",
                    key=f"forget_{job_id}",
                    on_click=widgets.act,
                    args=(state.store().forget_model, job_id),
                )


def _chart(job: Job) -> None:
    """The losses of a fit, where there is one."""
    marks = state.store().marks(job.job_id)
    if marks:
        st.plotly_chart(
            fits.fit_figure(marks, look=state.look()),
            key=f"fit_{job.job_id}",
            theme=None,
            config={"displayModeBar": False},
            alt="Loss of a token by tokens learned from, falling as the fit goes on",
        )


def _model(record: ModelRecord, job: Job | None) -> None:
    with st.container(border=True, key=f"model_{record.name}"):
        words, buttons = st.columns([5, 3], vertical_alignment="center")
        with words:
            st.html(_line(record))
        with buttons, st.container(horizontal=True, horizontal_alignment="right"):
            nav.link("train", "Train chips", {"backbone": record.name}, ":material/play_arrow:")
            with st.popover(
                "Delete", icon=":material/delete:", type="tertiary", key=f"ask_{record.name}"
            ):
                st.write(
                    "Delete this model for good? Runs that were trained on it stay, but cannot be "
                    "cut any more. Models made of it stand by themselves."
                )
                st.button(
                    "Delete for good",
                    key=f"delete_{record.name}",
                    on_click=widgets.act,
                    args=(models.delete_model, state.store().home, record.name),
                )
        with st.expander("How it was made"):
            st.html(widgets.facts(_facts(record)))
            if job is not None:
                _chart(job)


def _line(record: ModelRecord) -> str:
    cells = [
        f'<span class="cv-name">{html.escape(record.name)}</span>',
        f"<span>{html.escape(record.method)} of {html.escape(record.parent)}</span>",
        *(f'<span class="cv-muted">{html.escape(cell)}</span>' for cell in _details(record)),
    ]
    return f'<div class="cv-line">{"".join(cells)}</div>'


def _details(record: ModelRecord) -> list[str]:
    less = 1 - record.n_parameters / record.root.n_parameters
    found = [
        f"{record.n_layers} of {record.root.n_layers} layers",
        f"{formatting.millions(record.n_parameters)} parameters"
        + (f", {100 * less:.0f} % fewer" if less > 0 else ""),
    ]
    if record.perplexity_before is not None and record.perplexity_after is not None:
        found.append(f"perplexity {record.perplexity_before:.1f} to {record.perplexity_after:.1f}")
    return found


def _facts(record: ModelRecord) -> list[tuple[str, str]]:
    spec = record.spec
    rows = [(formatting.ago(record.created), f"made in {formatting.duration(record.seconds)}")]
    if record.removed:
        shown = ", ".join(map(str, record.removed))
        rows.append((str(len(record.removed)), f"layers of {record.parent} are gone: {shown}"))
    stages = (
        (record.perplexity_before, f"perplexity of {record.parent} on held-out text"),
        (record.perplexity_pruned, "without the layers"),
        (record.perplexity_after if spec.heal else None, f"healed by {spec.heal}"),
    )
    rows += [(f"{value:,.1f}", words) for value, words in stages if value is not None]
    if record.n_perplexity:
        rows.append((f"{record.n_perplexity:,}", f"tokens measured, rows of {spec.length}"))
    if n_tokens := record.found.get("n_tokens"):
        rows.append((f"{n_tokens:,}", "tokens learned from; papers learn from 20,000,000,000"))
    if (loss := record.found.get("validation_loss")) is not None:
        rows.append((f"{loss:.3f}", "loss of an answer's token on validation"))
    return rows
