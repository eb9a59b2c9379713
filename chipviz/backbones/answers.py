"""What a language model answers by itself: how likely each label's words are after a prompt.

Source: the *Raw* rows of arXiv:2410.06541, which compare the options' likelihoods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.backbone import Backbone, pad
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.language_model import LanguageModel, with_head
from chipviz.config import RunConfig
from chipviz.data.prompt import Prompt, bake, load_tokenizer
from chipviz.data.task import Examples, Task
from chipviz.errors import ConfigError
from chipviz.progress import Progress, ProgressFn, silent

CUE = "Answer:"
"""What ends a prompt that has no words after its text, so that a model knows that it is asked."""


@dataclass(frozen=True)
class Answers:
    """Log-likelihood of every label's words after every prompt."""

    likelihood: NDArray[np.float64]
    """Sum over the tokens of the words, shape (N, C)."""
    n_tokens: NDArray[np.int64]
    """Tokens of each label's words, shape (C,)."""

    @property
    def raw(self) -> NDArray[np.int64]:
        """The likeliest label of each text, shape (N,)."""
        return self.likelihood.argmax(axis=1)

    @property
    def normalised(self) -> NDArray[np.int64]:
        """The likeliest label by token: long words are at no disadvantage. Shape (N,)."""
        return (self.likelihood / self.n_tokens).argmax(axis=1)


def asking(template: str | None, *, takes_pair: bool) -> str:
    """A template that ends with a question for the label: the user's own, or one with a cue.

    Args:
        template: The user's. None is the bare text.
        takes_pair: Whether there is a second text.
    """
    bare = "{text}\n{text_pair}" if takes_pair else "{text}"
    template = template or bare
    ends_in_text = template.rstrip().endswith("}")
    return f"{template.rstrip()}\n{CUE}" if ends_in_text else template


def asking_prompt(tokenizer: Any, task: Task, max_length: int) -> Prompt:
    """The task's prompt as a model is asked it.

    Raises:
        ConfigError: As `bake` does.
    """
    train = task.splits["train"]
    template = asking(task.template, takes_pair=train.pairs is not None)
    return bake(tokenizer, template, max_length, train)


def label_words(names: Sequence[str], template: str) -> list[str]:
    """The words that answer a prompt: labels without underscores, after a blank where it has none.

    Args:
        names: Labels.
        template: What they answer.
    """
    blank = "" if template.endswith((" ", "\n")) else " "
    return [blank + " ".join(name.replace("_", " ").split()) for name in names]


def have_words(names: Sequence[str]) -> bool:
    """Whether every label is a word that a model may know, not a number."""
    return all(any(c.isalpha() for c in name) for name in names)


def answer_tokens(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer as they follow a prompt."""
    found = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in found]


@torch.inference_mode()
def read_answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    progress: ProgressFn = silent,
    label: str = "asking the model itself",
) -> Answers:
    """Read every prompt once, and every answer after it.

    Args:
        model: The language model.
        prompts: Token ids of each text's prompt, N of them.
        answers: Token ids of each label's words, C of them.
        progress: Told every batch.
        label: What is done, in words.
    """
    found = np.zeros((len(prompts), len(answers)))
    firsts = torch.tensor([ids[0] for ids in answers])
    if not model.keeps_cache:
        return _without_cache(model, prompts, answers, progress, label)
    more = max(map(len, answers)) > 1
    lengths, done = [len(ids) for ids in prompts], 0
    # What is kept of a prompt is held once for every answer.
    budget = max(1, 4 * batch_tokens(model.device) // len(answers)) if more else None
    for rows in batches(lengths, budget or batch_tokens(model.device), padded=not more):
        ids, mask = pad([list(prompts[i]) for i in rows], 0, model.device)
        output = model.model(input_ids=ids, attention_mask=mask, use_cache=more)
        last = mask.sum(dim=1) - 1
        at_end = output.logits[torch.arange(len(rows)), last].float().log_softmax(dim=-1)
        found[rows] = at_end[:, firsts.to(at_end.device)].double().cpu().numpy()
        if more:
            found[rows] += _rest(
                model, output.past_key_values, len(rows), lengths[rows[0]], answers
            )
        done += len(rows)
        progress(Progress("fitting", f"{label}, {done:,} of {len(prompts):,} texts"))
    return Answers(found, np.array([len(ids) for ids in answers]))


def _without_cache(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    progress: ProgressFn,
    label: str,
) -> Answers:
    """The same, every prompt read once with every answer."""
    found = np.zeros((len(prompts), len(answers)))
    for i, prompt in enumerate(prompts):
        texts = [[*prompt, *answer] for answer in answers]
        ids, mask = pad(texts, 0, model.device)
        scores = model.logits(ids, mask).log_softmax(dim=-1)
        for j, answer in enumerate(answers):
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found[i, j] = sum(float(scores[j, at, t]) for at, t in zip(places, answer, strict=True))
        progress(Progress("fitting", f"{label}, {i + 1:,} of {len(prompts):,} texts"))
    return Answers(found, np.array([len(ids) for ids in answers]))


def _rest(
    model: LanguageModel, cache: Any, n_rows: int, n_read: int, answers: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Log-likelihood of every token of the answers but the first, shape (B, C).

    Args:
        model: The language model.
        cache: What its blocks keep of the prompts, all of one length.
        n_rows: B.
        n_read: Tokens of each prompt.
        answers: Token ids of each answer.
    """
    tokens, mask = pad([list(ids) for ids in answers], 0, model.device)
    n_answers, longest = tokens.shape
    cache.batch_repeat_interleave(n_answers)
    tokens, mask = tokens.repeat(n_rows, 1), mask.repeat(n_rows, 1)
    seen = torch.ones((len(tokens), n_read), dtype=mask.dtype, device=mask.device)
    places = torch.arange(n_read, n_read + longest - 1, device=mask.device)
    logits = model.model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([seen, mask[:, :-1]], dim=1),
        position_ids=places.expand(len(tokens), -1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    scores = logits.float().log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[:, :, 0]
    total: Tensor = (scores.double() * mask[:, 1:]).sum(dim=1)
    return total.view(n_rows, n_answers).cpu().numpy()


def ask(
    model: LanguageModel,
    tokenizer: Any,
    prompt: Prompt,
    task: Task,
    rows: Examples,
    progress: ProgressFn = silent,
) -> Answers:
    """What a model answers about texts.

    Args:
        model: The language model.
        tokenizer: Its own, without a prompt.
        prompt: As the model is asked.
        task: Names the labels.
        rows: The texts.
        progress: Told every batch.
    """
    words = label_words(task.label_names, prompt.template)
    return read_answers(
        model, prompt.encode(rows.texts, rows.pairs), answer_tokens(tokenizer, words), progress
    )


MOST_ASKED = 400
"""Maximum test texts that a run asks its backbone itself."""


def zero_shot(
    backbone: Backbone, task: Task, config: RunConfig, progress: ProgressFn = silent
) -> NDArray[np.int32] | None:
    """What the backbone of a run answers by itself to the first test texts.

    Args:
        backbone: As it was probed.
        task: Its texts.
        config: The run's settings.
        progress: Told every batch.

    Returns:
        The class whose words are likeliest after each prompt, shape (M,). None of an encoder, of a
        head that cannot be put on, and where a label is no word.
    """
    if task.kind == "image":
        return None
    model = with_head(backbone) if have_words(task.label_names) and not config.device_map else None
    if model is None:
        return None
    tokenizer = load_tokenizer(backbone.folder.path, backbone.folder.n_positions)
    try:
        prompt = asking_prompt(tokenizer, task, config.max_length)
    except ConfigError:  # the limit has no room for the cue
        return None
    rows = task.splits["test"]
    rows = rows.take(range(min(MOST_ASKED, len(rows))))
    return ask(model, tokenizer, prompt, task, rows, progress).raw.astype(np.int32)
