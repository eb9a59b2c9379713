"""Step 3 of a new run: the prompt, and what the chips would read of three texts."""

import html
from typing import Any

import streamlit as st

from chipviz.config import EXAMPLE
from chipviz.preview import Preview, PromptPreview
from chipviz.ui import formatting, state, thumbnails
from chipviz.ui.plots import token_lengths

MAX_SHOWN = 1_500
"""Characters of a prompt drawn before the rest is folded into a mark."""


def choose(*, embedded: bool) -> dict[str, Any]:
    """Draw the step. The example has its own prompt and limit."""
    st.subheader("3 Prompt", anchor=False)
    left, right = st.columns([3, 1])
    template = left.text_area(
        formatting.label_of("template"),
        str(EXAMPLE["template"]) if embedded else "",
        key=f"template_{embedded}",
        placeholder="Empty: the text alone; a question with options is asked as such.",
        help=formatting.help_of("template"),
    )
    limit = right.number_input(
        formatting.label_of("max_length"),
        min_value=1,
        max_value=32768,
        value=64 if embedded else 256,
        key=f"limit_{embedded}",
        help=formatting.help_of("max_length"),
    )
    return {"template": template or None, "max_length": limit}


def show(found: Preview) -> None:
    """Draw what a run would read: the prompts and their lengths, or the pictures."""
    if found.lengths is None:
        _show_pictures(found)
        return
    st.html(
        '<p class="cv-muted">Three training texts as they will be read, probed tokens marked</p>'
    )
    st.html("".join(prompt_html(example) for example in found.examples))
    lengths = found.lengths
    over = f", {lengths.n_over:,} over the limit" if lengths.n_over else ""
    st.plotly_chart(
        token_lengths.lengths_figure(
            lengths.edges,
            lengths.counts,
            limit=found.max_length,
            subtitle=f"{lengths.n_measured:,} prompts, median {lengths.median:,}, "
            f"longest {lengths.longest:,} tokens{over}",
            look=state.look(),
        ),
        key="lengths",
        theme=None,
        config={"displayModeBar": False},
        alt="How many prompts have how many tokens",
    )


def _show_pictures(found: Preview) -> None:
    st.subheader("3 Pictures", anchor=False)
    st.html('<p class="cv-muted">Training pictures; what the model does not see is dark</p>')
    figures = [
        thumbnails.figure(
            thumbnails.cropped(one.reference, one.seen),
            f"{one.label[:40]}, {one.width:,} x {one.height:,}",
        )
        for one in found.pictures
    ]
    st.html(f'<div class="cv-grid">{"".join(figures)}</div>')


def prompt_html(example: PromptPreview) -> str:
    """One prompt as the model reads it, the probed tokens marked, in HTML. All text escaped."""
    prompt, tokens = example.prompt, example.tokens
    said, marks = [], {}
    for pooling, (start, stop) in example.probed.items():
        if stop - start > 1:
            said.append(f"{pooling} reads all {stop - start:,} tokens")
            continue
        said.append(f"{pooling} reads <code>{html.escape(_visible(tokens[start]))}</code>")
        span = _place(prompt, tokens[start], at_end=start > 0)
        if span:
            marks[span] = pooling
    pieces, place = [], 0
    for (start, stop), pooling in sorted(marks.items()):
        pieces.append(_folded(prompt[place:start]))
        text = prompt[start:stop]
        shown = _visible(text) if not text.strip() else text
        pieces.append(
            f'<mark class="cv-probed cv-p-{pooling}" title="{pooling} reads this token">'
            f"{html.escape(shown)}</mark>"
        )
        place = stop
    pieces.append(_folded(prompt[place:]))
    ends = "".join(
        f'<div class="cv-left-out"><s>{html.escape(end.begins)}</s>'
        f"{' …' * (len(end.begins) < end.n_chars)} "
        f'<span class="cv-muted">left out by the limit, {end.n_chars:,} characters</span></div>'
        for end in example.left_out
    )
    return (
        f'<div class="cv-prompt"><div class="cv-read">{"".join(pieces)}</div>{ends}'
        f'<div class="cv-muted">label <b>{html.escape(example.label[:80])}</b> · '
        f"{' · '.join(said)}</div></div>"
    )


def _place(prompt: str, token: str, *, at_end: bool) -> tuple[int, int] | None:
    """Where the first or last token stands in the decoded prompt. Pieces of words carry marks."""
    for form in (token, token.removeprefix("##")):
        if form and at_end and prompt.endswith(form):
            return len(prompt) - len(form), len(prompt)
        if form and not at_end and prompt.startswith(form):
            return 0, len(form)
    return None


def _visible(token: str) -> str:
    """A token with its white space as signs."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _folded(text: str) -> str:
    """The beginning and the end of a text, in HTML. Between them how much is not shown."""
    if len(text) <= MAX_SHOWN:
        return html.escape(text)
    head, tail = text[: 2 * MAX_SHOWN // 3], text[-MAX_SHOWN // 3 :]
    gap = f'<span class="cv-muted"> … {len(text) - MAX_SHOWN:,} characters … </span>'
    return f"{html.escape(head)}{gap}{html.escape(tail)}"
