"""The token view: a text on class tints, the answer at its end, the map of tokens and layers."""

import html
from collections.abc import Sequence
from itertools import islice

import streamlit as st

from chipviz.keys import Cut
from chipviz.results.answers import TokenReading
from chipviz.results.report import Example, RunReport
from chipviz.runs.questions import ReadTokens
from chipviz.runs.store import Job
from chipviz.ui import formatting, state, style
from chipviz.ui.plots import heatmaps
from chipviz.ui.plots.theme import CLASS_COLOURS

MAX_CHARS = 20_000
MAX_WORDS = 4_000
"""Tokens of a text that are shown on their tints."""


def choose_text(job: Job, report: RunReport) -> tuple[str, str | None, int | None]:
    """Draw the text field, filled with a stored test text.

    Returns:
        The text, its second part where the task has one, and the true class where it is known.
    """
    examples = state.store().folder(job.run_id).read_examples("test")
    place = st.session_state.get(f"example_{job.run_id}", 0)
    example = examples[place % len(examples)] if examples else Example(text="", label=0)
    key = f"{job.run_id}_{place}"
    first, second = example.text[:MAX_CHARS], (example.text_pair or "")[:MAX_CHARS]
    text = st.text_area("Text", first, max_chars=MAX_CHARS, height=130, key=f"text_{key}")
    pair = None
    if "{text_pair}" in report.task.template:
        pair = st.text_area("Second text", second, max_chars=MAX_CHARS, key=f"pair_{key}")
    if (first, second) != (example.text, example.text_pair or ""):
        st.caption(f"The first {MAX_CHARS:,} characters of a longer text.")
    if len(examples) > 1:
        st.button(
            "Another test text", icon=":material/shuffle:", on_click=_next, args=(job.run_id,)
        )
    unchanged = bool(examples) and (text, pair or "") == (first, second)
    return text, pair, example.label if unchanged else None


def choose_single(cut: Cut) -> bool:
    """Draw the choice between the text so far and single tokens, where a chip knows both."""
    if cut.chip.pooling not in ("mean", "max"):
        return False
    return st.toggle(
        "Single tokens",
        key="single",
        help="The chip was trained on whole texts. A token alone is not what it knows.",
    )


def ask(run_id: str, text: str, text_pair: str | None, cut: Cut, *, single: bool) -> TokenReading:
    """What every layer's chip says at every token.

    Raises:
        ChipvizError: If the run or its backbone cannot be read, or no answer comes in time.
    """
    question = ReadTokens(run_id, text, text_pair, cut, single)
    return _ask(question, run_id, text, text_pair, cut.chip.name, single)


@st.cache_data(max_entries=64, show_spinner=False)
def _ask(
    _question: ReadTokens, run_id: str, text: str, pair: str | None, chip: str, single: bool
) -> TokenReading:
    """Kept by all of the question but its layer: the answer holds all layers."""
    del run_id, text, pair, chip, single
    return state.inference().ask(_question, TokenReading)


def show(answer: TokenReading, text: str, cut: Cut, truth: int | None, *, single: bool) -> None:
    """Draw words, answer, map and the layer at which the answer is settled."""
    names = answer.label_names
    said = answer.by_layer[cut.layer]
    best = max(range(len(names)), key=lambda c: said[c])
    slots = heatmaps.class_slots(len(names), answer=best, truth=truth)
    st.html(
        f'<div class="cv-words">{coloured(answer, text, cut.layer, slots)}</div>'
        f"{_verdict(names, said, best, slots, truth)}"
    )
    st.html(_legend(names, slots))
    if cut.chip.joins:
        what = "each token alone" if single else "the text up to that token"
        st.caption(
            f"A tint is what the joined neurons say of {what}, which is outside of what their "
            "classifier was trained on: whole texts."
        )
    elif cut.chip.pooling in ("mean", "max") and not single:
        st.caption("A tint is what the chip says of the text up to that token.")
    else:
        st.caption("A tint is what the chip says at that token, having read the text up to there.")
    settled = answer.settled_layer
    where = "at or below the cut" if settled <= cut.layer else "above the cut"
    st.html(
        f'<div class="cv-big">Settled at layer <span class="cv-accent">{int(settled)}</span></div>'
        f'<div class="cv-muted">From there on every layer gives the last layer\'s answer; '
        f"that is {where} at layer {cut.layer}.</div>"
    )
    st.plotly_chart(
        heatmaps.token_map_figure(
            [token.text for token in answer.tokens],
            answer.label_index,
            answer.confidence,
            names,
            cut_layer=cut.layer,
            slots=slots,
            look=state.look(),
        ),
        key="token_map",
        theme=None,
        config={"displayModeBar": False},
        alt="Class that the chip of each layer says at each token",
    )


def coloured(answer: TokenReading, text: str, layer: int, slots: Sequence[int]) -> str:
    """The text as HTML: each token on its class tint, the template plain, what was cut off struck.

    Every piece of text is escaped. Classes come from a fixed list.
    """
    pieces: list[str] = []
    place = 0
    end_of_text = max((i for i, t in enumerate(answer.tokens) if t.in_text), default=-1)
    rows = zip(answer.tokens, answer.label_index[layer], answer.confidence[layer], strict=True)
    for i, (token, label, share) in enumerate(islice(rows, MAX_WORDS)):
        if not token.in_text:
            pieces.append(_span("cv-frame", token.text))
            continue
        start, end = max(place, token.start), max(place, token.end)
        pieces.append(html.escape(text[place:start]))
        title = f"{answer.label_names[label]} {100 * share:.0f} %"
        pieces.append(
            _span(f"cv-t {style.tint_class(slots[label], share)}", text[start:end], title)
        )
        place = end
        if i == end_of_text and place < len(text):
            pieces.append(_span("cv-rest", text[place:], "beyond the length limit: not read"))
    if len(answer.tokens) > MAX_WORDS:
        pieces.append(_span("cv-rest", f" … and {len(answer.tokens) - MAX_WORDS:,} more tokens"))
    return "".join(pieces)


def _span(name: str, text: str, title: str = "") -> str:
    tip = f' title="{html.escape(title)}"' if title else ""
    return f'<span class="{name}"{tip}>{html.escape(text)}</span>'


def _verdict(
    names: Sequence[str],
    said: Sequence[float],
    best: int,
    slots: Sequence[int],
    truth: int | None,
) -> str:
    right = "" if truth is None else (", which is right" if truth == best else "")
    wrong = f", the truth is {names[truth]}" if truth not in (None, best) else ""  # pyright: ignore
    key = _span(f"cv-key {style.tint_class(slots[best], 1.0)}", names[best])
    share = html.escape(f"{formatting.percent(said[best])}{right}{wrong}")
    return f'<p class="cv-big">{key}{share}</p>'


def _legend(names: Sequence[str], slots: Sequence[int]) -> str:
    if len(names) > len(CLASS_COLOURS):
        kinds = ((2, "right, or the answer"), (5, "a wrong answer"), (7, "another class"))
        return "".join(_span(f"cv-key {style.tint_class(slot, 0.8)}", word) for slot, word in kinds)
    return "".join(
        _span(f"cv-key {style.tint_class(slot, 0.8)}", name)
        for slot, name in zip(slots, names, strict=True)
    )


def _next(run_id: str) -> None:
    key = f"example_{run_id}"
    st.session_state[key] = st.session_state.get(key, 0) + 1
