"""Prompt: the template and the length limit, baked into the tokenizer.

Knows tokenizers, neither tables nor models.
"""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from chipviz.data.multiple_choice import OPTIONS, holds_options, is_options
from chipviz.data.task import MAX_TEXT, Examples, Task
from chipviz.errors import ConfigError, Notice, SourceError, TaskError, panics_as_errors

FITTING_SHARE = 0.95
"""Share of the over-long training texts that stay within the token limit after the cut."""


@dataclass(frozen=True)
class Prompt:
    """A tokenizer that turns raw texts into whole prompts: template, limit and all.

    Saved with a bundle it does the same inside plain `transformers`, which never truncates unless
    told to. Hence the limit stands in the tokenizer's normalizer, as characters.
    """

    tokenizer: Any
    template: str
    max_length: int
    max_chars: int
    """Where a longer text is cut before it is tokenised, in characters. A second text too, unless
    it is a question with its options."""

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of whole prompts, one list a text."""
        return encode(self.tokenizer, texts, pairs)["input_ids"] if texts else []

    @property
    def pad_id(self) -> int:
        """The token that pads a batch."""
        return self.tokenizer.pad_token_id

    @property
    def takes_pair(self) -> bool:
        """Whether it has a place for a second text."""
        return "{text_pair}" in self.template

    def save(self, folder: Path) -> None:
        """Write the tokenizer, template and limit included, as plain `transformers` reads it."""
        self.tokenizer.chat_template = None  # it would be wrapped around the baked template
        self.tokenizer.save_pretrained(folder)
        # A family's own class builds its steps anew and would drop template and limit; this one
        # takes tokenizer.json as it stands.
        path = folder / "tokenizer_config.json"
        said = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        said.pop("auto_map", None)
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False), "utf-8")

    @property
    def fingerprint(self) -> str:
        """Changes when any text could come out as other tokens."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any
) -> Any:
    """Whole prompts as tokens. Where the model itself ends a text gives way, never the template.

    A length limit in characters lets dense texts, such as Chinese ones, have more tokens.

    Raises:
        TaskError: If a prompt has no token at all.
    """
    longest = tokenizer.model_max_length
    # Of two texts the longer one gives way: usually the first, and always one that can.
    try:
        with panics_as_errors():
            found = tokenizer(
                list(texts),
                list(pairs) if pairs is not None else None,
                truncation="only_first" if pairs is None else "longest_first",
                max_length=longest if longest < 10**9 else None,
                **options,
            )
    except Exception as error:  # noqa: BLE001 - the library raises no kind of its own
        raise TaskError(
            f"The tokenizer cannot read a text: {' '.join(str(error).split())[:160]}",
            "Give the model's tokenizer as it was published; it needs an unknown token.",
        ) from None
    if bare := [text for text, ids in zip(texts, found["input_ids"], strict=True) if not ids]:
        raise TaskError(
            f"The text {bare[0][:40]!r} has no tokens, so there is nothing to read.",
            "Leave such texts out, or train with a template such as 'Text: {text}'.",
            "template",
        )
    return found


def load_tokenizer(folder: Path, n_positions: int | None = None) -> Any:
    """Load the tokenizer of a model folder. It pads on the right, as every rule here assumes.

    Args:
        folder: The model folder.
        n_positions: Maximum tokens per text of the model, where it has an end.

    Raises:
        SourceError: If the folder holds none, or none that the `tokenizers` library can run.
    """
    try:
        with panics_as_errors():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # noqa: BLE001 - as many kinds as there are odd settings
        raise SourceError(
            f"No tokenizer can be loaded from {folder.name}: {' '.join(str(error).split())[:160]}",
            "The folder needs tokenizer.json and tokenizer_config.json.",
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{folder.name} has only a slow tokenizer.", "Save its fast form (tokenizer.json)."
        )
    tokenizer.padding_side = "right"
    if n_positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, n_positions)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise SourceError(
            f"The tokenizer of {folder.name} names no pad, end or unknown token.",
            'Name one, such as "pad_token": "<pad>", in its tokenizer_config.json.',
        )
    return tokenizer


def bake(tokenizer: Any, template: str | None, max_length: int, sample: Examples) -> Prompt:
    """Put the template and the length limit into a copy of the tokenizer.

    Args:
        tokenizer: The tokenizer as loaded. It is not changed.
        template: Prompt around `{text}` and, for two fields, `{text_pair}`. None for bare
            texts, two of them on two lines or in the family's own form ([CLS] a [SEP] b [SEP]).
        max_length: Tokens a prompt may have.
        sample: Training rows, to find out how many characters fit the limit.

    Raises:
        ConfigError: If the template lacks a field, or the limit cannot hold it.
    """
    takes_pair = sample.pairs is not None
    template = template or (_pair_form(tokenizer) if takes_pair else "{text}")
    parts = _parse(template, takes_pair)
    rows = sample.take(range(min(len(sample), 2000)))
    baked, pieces = _with_template(tokenizer, parts, rows)
    _give_own_pad(baked, [token for ids in pieces for token in ids], pairs=takes_pair)
    n_fixed = sum(len(ids) for ids in pieces)
    room, pairs = max_length - n_fixed, rows.pairs or []
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"The backbone reads at most {tokenizer.model_max_length:,} tokens, and the length "
            f"limit is {max_length:,}.",
            f"Give {tokenizer.model_max_length:,} or less.",
            "max_length",
        )
    if room < 1:
        raise ConfigError(
            f"The template takes {n_fixed} tokens, which leaves no room for text within the length "
            f"limit of {max_length}.",
            f"Give {n_fixed + 16} tokens or more, or a shorter template.",
            "max_length",
            "template",
        )
    if pairs and all(map(is_options, pairs)):
        # Without a passage nothing may go; the model's own limit takes the question's beginning.
        baked.truncation_side = baked.init_kwargs["truncation_side"] = "left"
        return Prompt(baked, template, max_length, MAX_TEXT)
    room, longest = _beside(tokenizer, pairs, room) if pairs else (room, 0)
    max_chars = _chars_for(tokenizer, rows.texts, room)
    whole = bool(pairs) and all(map(holds_options, pairs))
    if not whole:  # the normalizer cannot tell texts from second texts, which shall stay whole
        max_chars = max(max_chars, longest)
    normalizer = baked.backend_tokenizer.normalizer
    steps = [_cut_at(max_chars, whole=whole), *([normalizer] if normalizer is not None else [])]
    baked.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return Prompt(baked, template, max_length, max_chars)


def _beside(tokenizer: Any, pairs: Sequence[str], room: int) -> tuple[int, int]:
    """What second texts leave of the room: tokens for the first, which gets a quarter at least.

    The other number is the length of the longest second text that would fit alone, in characters.
    """
    lengths = [len(ids) for ids in tokenizer(list(pairs), add_special_tokens=False)["input_ids"]]
    left = room - int(np.quantile(lengths, FITTING_SHARE))
    fitting = [len(pair) for pair, n in zip(pairs, lengths, strict=True) if n <= room]
    return max(left, room // 4, 1), max(fitting, default=0)


def _cut_at(max_chars: int, *, whole: bool) -> Any:
    """Drop a text's characters beyond a number. *whole* spares questions with their options."""
    # Oniguruma counts to 100,000 at most.
    head = rf"(?:[\s\S]{{1000}}){{{max_chars // 1000}}}[\s\S]{{{max_chars % 1000}}}"
    spared = rf"(?!{OPTIONS})" if whole else ""
    return normalizers.Replace(Regex(rf"\A{spared}{head}\K[\s\S]+"), "")


def load_prompt(folder: Path, template: str, max_length: int, max_chars: int) -> Prompt:
    """Read a baked tokenizer that `Prompt.save` wrote."""
    return Prompt(load_tokenizer(folder), template, max_length, max_chars)


def left_out(prompt: Prompt, text: str, pair: str = "") -> tuple[str, ...]:
    """The ends of a row's texts that the length limit removes."""
    texts = [text] if holds_options(pair) else [text, pair]
    return tuple(end for whole in texts if (end := whole[prompt.max_chars :]))


def as_read(prompt: Prompt, rows: Examples) -> Examples:
    """The rows as far as the model reads them: without what the length limit removes."""
    limit = prompt.max_chars
    if rows.pairs is None:
        return Examples([text[:limit] for text in rows.texts], None, rows.labels)
    pairs = [pair if holds_options(pair) else pair[:limit] for pair in rows.pairs]
    return Examples([text[:limit] for text in rows.texts], pairs, rows.labels)


def n_cut(prompt: Prompt, rows: Examples) -> int:
    """How many rows the length limit shortens a text of."""
    pairs = rows.pairs or [""] * len(rows)
    return sum(bool(left_out(prompt, *row)) for row in zip(rows.texts, pairs, strict=True))


def n_truncated(prompt: Prompt, task: Task) -> int:
    """How many rows of a task the length limit shortens a text of."""
    return sum(n_cut(prompt, rows) for rows in task.splits.values())


def cut_notices(max_length: int, n_cut: int, n_texts: int) -> list[Notice]:
    """What must be said where the length limit shortens `n_cut` of `n_texts` rows."""
    if not n_cut:
        return []
    message = f"The length limit of {max_length} tokens cuts {n_cut:,} of {n_texts:,} texts."
    return [Notice("texts-cut", message, n_cut)]


def segment_break(tokenizer: Any) -> int | None:
    """The token that ends the first of two texts, where the family tells the model which is which.

    Works for tokenizers as loaded and as baked. See `chipviz.backbones.backbone.segments`.
    """
    return tokenizer.sep_token_id if "token_type_ids" in tokenizer.model_input_names else None


def hard_endings(tokenizer: Any) -> list[str]:
    """Texts that may end in a token with a meaning: one spelled out, the unknown one, or none."""
    named = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token}
    spelled = [f"It ended so {token}" for token in sorted(filter(None, named))]
    # Tokenizers of bytes have an unknown token, too, that no text gives.
    texts = [*spelled, "\ue000 \U0001f9ff \u0e01", ""]
    return [text for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if ids]


def pad_ends_prompts(tokenizer: Any, *, pairs: bool) -> bool:
    """Whether the last token of a prompt can be the one that padding is made of.

    Stock classes read the last token that is not padding, by its number. They read another token
    than the chip where a template ends in the pad token, where the tokenizer appends it, and where
    it stands for unknown characters too.
    """
    texts = ["a", *hard_endings(tokenizer)]
    found = tokenizer(texts, texts if pairs else None)["input_ids"]
    return any(ids and ids[-1] == tokenizer.pad_token_id for ids in found)


def _give_own_pad(baked: Any, used: Sequence[int], *, pairs: bool) -> None:
    """Take another control token for padding where the pad token can end a prompt.

    What padding is made of reaches no text. One that no prompt holds lets stock classes find the
    last token. Where the vocabulary has none left, the bundle is one of our own.
    """
    if not pad_ends_prompts(baked, pairs=pairs):
        return
    free = [
        str(token)
        for number, token in baked.added_tokens_decoder.items()
        if token.special and number not in {*used, baked.pad_token_id}
    ]
    was = baked.pad_token
    for token in sorted(free, key=lambda token: ("pad" not in token.lower(), token)):
        baked.pad_token = token
        if not pad_ends_prompts(baked, pairs=pairs):
            return
    baked.pad_token = was


def _pair_form(tokenizer: Any) -> str:
    """How two texts stand where no template says it: as the family's encoders have seen pairs."""
    first, second = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b"))
    before, after = _specials_around(tokenizer)
    whole = tokenizer("a", "b")["input_ids"]
    start, stop = len(before) + len(first), len(whole) - len(second) - len(after)
    between = whole[start:stop]
    if tokenizer.sep_token_id not in between:
        return "{text}\n{text_pair}"
    return "{text}" + "".join(tokenizer.convert_ids_to_tokens(between)) + "{text_pair}"


def _parse(template: str, takes_pair: bool) -> list[str]:
    """Split a template into literal pieces and fields, in order."""
    parts = [part for part in re.split(r"(\{text\}|\{text_pair\})", template) if part]
    wanted = ["{text}", "{text_pair}"] if takes_pair else ["{text}"]
    for field in ("{text}", "{text_pair}"):
        if parts.count(field) != wanted.count(field):
            raise ConfigError(
                f"The template holds {field} {parts.count(field)} times, "
                f"expected {wanted.count(field)}: {template[:80]!r}.",
                "Write a template such as 'News: {text}\\nTopic of this article:'"
                + ("; {text_pair} needs a second column." if field == "{text_pair}" else "."),
                *(("template", "text_pair") if field == "{text_pair}" else ("template",)),
            )
    return parts


def _with_template(tokenizer: Any, parts: list[str], rows: Examples) -> tuple[Any, list[list[int]]]:
    """A copy of the tokenizer whose post-processor writes the whole prompt, and its fixed pieces.

    A space before a text belongs to the text's first token in most vocabularies. Where one stands
    before every text, three ways to hand it over are tried, and the one that agrees most with the
    plainly tokenised prompt is kept.
    """
    fields = [i for i, part in enumerate(parts) if part in ("{text}", "{text_pair}")]
    ways: list[tuple[list[str], bool]] = [(parts, False)]
    if all(i and re.search(r"(?<! ) \Z", parts[i - 1]) for i in fields):
        without = [part[:-1] if i + 1 in fields else part for i, part in enumerate(parts)]
        ways = [(without, True), (without, False), (parts, False)]
    if len(ways) == 1:
        return _assemble(tokenizer, *ways[0])
    few = [[text.strip()[:200] for text in texts[:8]] for texts in (rows.texts, rows.pairs or [])]
    template = "".join(parts)
    written = [
        template.replace("{text_pair}", pair).replace("{text}", text)
        for text, pair in zip_longest(*few, fillvalue="")
    ]
    plain = tokenizer(written)["input_ids"]

    def agreement(way: tuple[list[str], bool]) -> int:
        baked, _ = _assemble(tokenizer, *way)
        found = baked(few[0], few[1] or None)["input_ids"]
        return sum(a == b for a, b in zip(found, plain, strict=True))

    return _assemble(tokenizer, *max(ways, key=agreement))


def _assemble(tokenizer: Any, parts: list[str], glue: bool) -> tuple[Any, list[list[int]]]:
    baked = copy.deepcopy(tokenizer)
    backend = baked.backend_tokenizer
    before, after = _specials_around(tokenizer)
    literal = [p for p in parts if p not in ("{text}", "{text_pair}")]
    pieces = {f"piece{i}": _ids_of(tokenizer, p) for i, p in enumerate(literal)}
    pieces |= {"before": before, "after": after}
    names = iter(f"piece{i}" for i in range(len(literal)))
    fields = {"{text}": "$A", "{text_pair}": "$B"}
    middle = [fields.get(p) or next(names) for p in parts]
    layout: list[str] = []
    segment, marks = 0, _marks_segments(tokenizer)
    for item in ["before", *middle, "after"]:
        if item.startswith("$") or pieces[item]:
            layout.append(f"{item}:{segment}")
        if marks and tokenizer.sep_token_id in pieces.get(item, []):
            segment = 1
    special = [
        {"id": name, "ids": ids, "tokens": [f"{name}.{i}" for i in range(len(ids))]}
        for name, ids in pieces.items()
        if ids
    ]
    takes_pair = "{text_pair}" in parts
    backend.post_processor = TemplateProcessing(
        single=[item for item in layout if not item.startswith("$B")],
        pair=layout if takes_pair else [*layout, "$B:0"],
        special_tokens=special,
    )
    if glue:
        was = backend.normalizer
        steps = [*([was] if was is not None else []), normalizers.Prepend(" ")]
        backend.normalizer = normalizers.Sequence(steps)
    # A text is data: "<|im_end|>" inside it must not become the control token.
    baked.split_special_tokens = True
    baked.init_kwargs["split_special_tokens"] = True
    # Stock code hands over what is named here, and no more than training has seen.
    inputs = ["input_ids", *["token_type_ids"] * marks, "attention_mask"]
    baked.model_input_names = baked.init_kwargs["model_input_names"] = inputs
    return baked, list(pieces.values())


def _specials_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the family puts before and after a text (BOS, CLS, SEP), as ids."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _marks_segments(tokenizer: Any) -> bool:
    """Whether the family's own form of two texts says of each token which text it is of."""
    own = segment_break(tokenizer) is not None
    return own and tokenizer("a", "b")["token_type_ids"][-1] == 1


def _ids_of(tokenizer: Any, piece: str) -> list[int]:
    """Token ids of a literal piece as they stand after other text, not at the start of one."""
    anchor = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    both = tokenizer("a\n" + piece, add_special_tokens=False)["input_ids"]
    if both[: len(anchor)] == anchor:
        return both[len(anchor) :]
    return tokenizer(piece, add_special_tokens=False)["input_ids"]


def _chars_for(tokenizer: Any, texts: Sequence[str], room: int) -> int:
    """How many characters of a text `room` tokens hold, for all but a few texts."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    long = [offsets for offsets in encoded["offset_mapping"] if len(offsets) > room]
    if long:
        fits = [offsets[room - 1][1] for offsets in long]
    else:
        counts = [max(1, len(offsets)) for offsets in encoded["offset_mapping"]]
        fits = [room * len(t) / n for t, n in zip(texts, counts, strict=True) if t]
    return max(1, int(np.quantile(fits, 1 - FITTING_SHARE))) if fits else room
