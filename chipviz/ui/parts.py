"""Small parts that several pages draw: errors, status lines, facts, bars, the stack of blocks.

Text from data enters a page here in one of two ways: `plain` for Markdown, `html.escape` for HTML.
"""

import html
import re
import time
from collections.abc import Callable, Sequence

import streamlit as st

from chipviz.config import RunConfig
from chipviz.errors import ChipvizError, Refusal
from chipviz.runs.store import ACTIVE, Job

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:^=&])")
_WORDS = {
    "queued": "waiting for its turn",
    "loading": "loading backbone and data",
    "extracting": "reading texts",
    "fitting": "fitting chips",
    "building": "building the bundle",
    "verifying": "verifying the bundle",
    "stalled": "stalled: no sign of life for 15 seconds",
}
_DOTS = {"done": "cv-done", "failed": "cv-bad", "interrupted": "cv-bad", "stalled": "cv-bad"}


def plain(text: str) -> str:
    """Text for places that read Markdown: every mark escaped, so it shows as written."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def show_error(error: ChipvizError) -> None:
    """Say what happened and what to do next."""
    show_failure(error.refusal)


def show_failure(refusal: Refusal) -> None:
    """Say what happened and what to do next. Settings are named as in the form."""
    labels = [label_of(field) for field in refusal.fields if field in RunConfig.model_fields]
    hint = refusal.hint + f" See {' and '.join(labels)}." * bool(labels)
    tail = f"\n\n{plain(hint)}" if hint else ""
    st.error(f"**{plain(refusal.message)}**{tail}", icon=":material/error:")


def label_of(field: str) -> str:
    """What a setting of `RunConfig` is called in the form."""
    return RunConfig.model_fields[field].title or field


def help_of(field: str) -> str:
    """What a setting of `RunConfig` does, in a sentence or two."""
    return RunConfig.model_fields[field].description or ""


def act(call: Callable[..., object], *values: object) -> None:
    """Run a button's action. Its error is shown at the top of the page that follows."""
    try:
        call(*values)
    except ChipvizError as error:
        st.session_state["failure"] = error.refusal


def show_kept_failure() -> None:
    """Show the error of the button that was pressed last, once."""
    refusal = st.session_state.pop("failure", None)
    if refusal:
        show_failure(refusal)


def percent(value: float) -> str:
    """An accuracy or share in [0, 1] as people read it."""
    return f"{100 * value:.1f} %"


def megabytes(n_bytes: float) -> str:
    """Bytes as MB, from 1 GB on as GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"


def millions(count: int) -> str:
    """A parameter count."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


def milliseconds(seconds: float) -> str:
    """A latency, in ms below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def duration(seconds: float) -> str:
    """Time left, as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def ago(moment: float) -> str:
    """How long ago a unix time was, in one unit."""
    gone = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if gone >= size:
            return f"{int(gone // size)} {unit} ago"
    return "just now"


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


def bars(shares: Sequence[tuple[str, float]]) -> None:
    """Probabilities of labels as bars, in the given order."""
    cells = "".join(
        f"<span>{html.escape(label)}</span>"
        f'<div class="cv-bar"><i style="width:{100 * share:.1f}%"></i></div>'
        f"<span>{100 * share:.1f} %</span>"
        for label, share in shares
    )
    st.html(f'<div class="cv-bars">{cells}</div>')


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
