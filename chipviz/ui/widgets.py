"""Small parts that several pages draw: errors, status lines, facts, bars, the stack of blocks.

Text from data enters a page in one of two ways: `formatting.plain` for Markdown, `html.escape` for
HTML.
"""

import html
from collections.abc import Callable, Sequence

import streamlit as st

from chipviz.config import RunConfig
from chipviz.errors import ChipvizError, Notice, Refusal
from chipviz.runs.store import ACTIVE, Job
from chipviz.ui.formatting import duration, label_of, megabytes, plain

_WORDS = {
    "queued": "waiting for its turn",
    "loading": "loading backbone and data",
    "extracting": "reading the data",
    "fitting": "fitting chips",
    "building": "building the bundle",
    "verifying": "verifying the bundle",
    "stalled": "stalled: no sign of life for 15 seconds",
}
_DOTS = {"done": "cv-done", "failed": "cv-bad", "interrupted": "cv-bad", "stalled": "cv-bad"}


def show_error(error: ChipvizError) -> None:
    """Say what happened and what to do next."""
    show_failure(error.refusal)


def show_failure(refusal: Refusal) -> None:
    """Say what happened and what to do next. Settings are named as in the form."""
    labels = [label_of(field) for field in refusal.fields if field in RunConfig.model_fields]
    hint = refusal.hint + f" See {' and '.join(labels)}." * bool(labels)
    tail = f"\n\n{plain(hint)}" if hint else ""
    st.error(f"**{plain(refusal.message)}**{tail}", icon=":material/error:")


def show_notices(notices: Sequence[Notice]) -> None:
    """Say what must be known although nothing stops, with rows as examples."""
    for notice in notices:
        examples = f"\n\n{plain('; '.join(notice.examples))}" if notice.examples else ""
        st.warning(f"{plain(notice.message)}{examples}", icon=":material/warning:")


def act(call: Callable[..., object], *values: object) -> None:
    """Run a button's action. Its error is shown at the top of the page that follows."""
    try:
        call(*values)
    except ChipvizError as error:
        st.session_state["failure"] = error.refusal


def has_kept_failure() -> bool:
    """Whether the error of the button that was pressed last waits to be shown."""
    return "failure" in st.session_state


def show_kept_failure() -> None:
    """Show the error of the button that was pressed last, once."""
    refusal = st.session_state.pop("failure", None)
    if refusal:
        show_failure(refusal)


def at_work(job: Job) -> bool:
    """Whether the job may still change by itself."""
    return job.state in ACTIVE or job.state == "queued"


def stage_words(job: Job) -> str:
    """What a job is doing or how it ended, in words."""
    status = job.status
    if status == "stalled" or not job.label or job.state not in ACTIVE:
        return _WORDS.get(status, status)
    return job.label


def pace_words(job: Job) -> str:
    """Rate and time left, where they are known."""
    pieces = []
    if job.state in ACTIVE and job.rate:
        bytes_rate = job.state == "loading"
        pieces.append(f"{megabytes(job.rate)}/s" if bytes_rate else f"{job.rate:,.0f} tokens/s")
    if job.state in ACTIVE and job.eta_s is not None:
        pieces.append(f"{duration(job.eta_s)} left")
    return " · ".join(pieces)


def dot(job: Job) -> str:
    """The status mark as HTML. Its words stand beside it, so colour says nothing alone."""
    name = _DOTS.get(job.status, "cv-work" if job.state in ACTIVE else "")
    return f'<span class="cv-dot {name}" aria-hidden="true"></span>'


def progress(job: Job) -> None:
    """One line: stage in words, rate, time left. Under it a bar where the length is known."""
    words = html.escape(stage_words(job))
    pace = html.escape(pace_words(job))
    st.html(
        f'<div class="cv-line">{dot(job)}<span class="cv-name">{words}</span>'
        f'<span class="cv-muted">{pace}</span></div>'
    )
    if job.state in ACTIVE:
        st.progress(min(1.0, job.done / job.total) if job.total else 0.0)


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Pairs of a number and what it means, as two columns of HTML."""
    cells = "".join(
        f"<b>{html.escape(value)}</b><span>{html.escape(meaning)}</span>" for value, meaning in rows
    )
    return f'<div class="cv-fact">{cells}</div>'


def bar(share: float, label: str = "") -> str:
    """One bar in HTML, filled to a share in [0, 1]; with a label it is read out as a picture."""
    picture = f' role="img" aria-label="{html.escape(label)}"' if label else ""
    return f'<div class="cv-bar"{picture}><i style="width:{100 * share:.1f}%"></i></div>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Rows of a name, a bar filled to a share in [0, 1], and a figure, in HTML."""
    cells = "".join(
        f"<span>{html.escape(name)}</span>{bar(share)}<span>{html.escape(figure)}</span>"
        for name, share, figure in rows
    )
    return f'<div class="cv-bars">{cells}</div>'


def stack(n_layers: int, cut_layer: int) -> str:
    """The model as a stack, in HTML: kept blocks in the accent, removed ones washed out."""
    height = max(2, min(8, 250 // n_layers))
    block = f'style="height:{height}px"'
    gone = f'<div class="cv-gone" {block}></div>' * (n_layers - 1 - cut_layer)
    kept = f'<div class="cv-kept" {block}></div>' * (cut_layer + 1)
    says = f"{cut_layer + 1} of {n_layers} layers kept, {n_layers - 1 - cut_layer} removed"
    return (
        f'<div class="cv-stack" role="img" aria-label="{says}">{gone}'
        f'<div class="cv-chip">chip</div>{kept}<div class="cv-embed">embed</div></div>'
    )
