"""LoRA on a task: a backbone that has learned the answers, merged into a plain model again.

A decoder learns the words of the label after the task's own prompt, and its loss is on the answer
alone. An encoder learns through a classification head on its first token, which is dropped.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from chipviz.backbones.backbone import pad
from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.pruning.training import Fitted, OnMark, Plan, fit

MICRO_TOKENS = 2_048
"""Tokens that go through the model at once, padding included."""
PARTS = 4
"""Validations in an epoch."""
MOST_VALIDATED = 256
"""Texts of a validation."""


@dataclass(frozen=True)
class Lora:
    """Shape of the adapter."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str | None = "all-linear"
    """Modules that get one. None is what peft takes for the family: queries and values."""


@dataclass(frozen=True)
class Text:
    """A prompt with its answer, for a decoder, or with its class, for an encoder."""

    ids: list[int]
    """Tokens of the prompt, and for a decoder of the answer after it."""
    n_prompt: int
    """Tokens of the prompt."""
    label: int


def with_answers(
    prompts: Sequence[Sequence[int]], labels: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[Text]:
    """Prompts with the tokens of their answers.

    Args:
        prompts: Token ids of each prompt.
        labels: Class of each.
        answers: Token ids of each class's words. None at all for an encoder.
    """
    return [
        Text([*ids, *(answers[label] if answers else ())], len(ids), int(label))
        for ids, label in zip(prompts, labels, strict=True)
    ]


def answer_loss(model: Any, texts: Sequence[Text]) -> tuple[Tensor, int]:
    """Sum of the losses of the answers' tokens, and how many these are.

    Args:
        model: A causal language model.
        texts: A batch.
    """
    device = next(model.parameters()).device
    tokens, mask = pad([text.ids for text in texts], 0, device)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    place = torch.arange(tokens.shape[1] - 1, device=device)[None]
    starts = torch.tensor([text.n_prompt - 1 for text in texts], device=device)[:, None]
    ends = mask.sum(dim=1, keepdim=True) - 1
    wanted = (place >= starts) & (place < ends)
    losses = cross_entropy(logits[:, :-1][wanted].float(), tokens[:, 1:][wanted], reduction="sum")
    return losses, int(wanted.sum())


def class_loss(model: Any, texts: Sequence[Text]) -> tuple[Tensor, int]:
    """Sum of the losses of the classes, and how many texts these are.

    Args:
        model: A sequence classifier.
        texts: A batch.
    """
    device = next(model.parameters()).device
    tokens, mask = pad([text.ids for text in texts], 0, device)
    labels = torch.tensor([text.label for text in texts], device=device)
    logits = model(input_ids=tokens, attention_mask=mask).logits.float()
    return cross_entropy(logits, labels, reduction="sum"), len(texts)


LossFn = Callable[[Any, Sequence[Text]], tuple[Tensor, int]]


def micro_batches(texts: Sequence[Text]) -> list[list[Text]]:
    """Texts by length, so many at a time that padding and all stay within `MICRO_TOKENS`."""
    found: list[list[Text]] = []
    for text in sorted(texts, key=lambda text: len(text.ids)):
        if found and len(text.ids) * (len(found[-1]) + 1) <= MICRO_TOKENS:
            found[-1].append(text)
        else:
            found.append([text])
    return found


def mean_loss(model: Any, texts: Sequence[Text], loss_of: LossFn) -> float:
    """Mean loss of a token of the answers, without dropout."""
    total, n_tokens = 0.0, 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for some in micro_batches(texts):
            loss, n = loss_of(model, some)
            total, n_tokens = total + float(loss), n_tokens + n
    model.train(training)
    return total / max(1, n_tokens)


def in_order(n_texts: int, batch: int, seed: int) -> Callable[[int], list[int]]:
    """Which texts a step takes: every epoch has an order of its own, known from the seed alone."""
    per_epoch = max(1, -(-n_texts // batch))

    def rows_of(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(n_texts)
        return order[place * batch : (place + 1) * batch].tolist()

    return rows_of


def fit_lora(
    model: Any,
    shape: Lora,
    train: Sequence[Text],
    validation: Sequence[Text],
    *,
    plan: Callable[[int], Plan],
    loss_of: LossFn,
    batch: int,
    head: str | None = None,
    checkpoint: Path | None = None,
    progress: ProgressFn = silent,
    on_mark: OnMark = lambda _: None,
) -> tuple[Any, Fitted]:
    """Fit an adapter and merge it.

    Args:
        model: In float32. It is used up.
        shape: Of the adapter.
        train: Texts to fit on.
        validation: Texts to stop on.
        plan: How, given the steps of an epoch.
        loss_of: What is lowered.
        batch: Texts of a step.
        head: Module that is fitted whole beside the adapter, by the end of its name.
        checkpoint: File of the state on the way.
        progress: Told every step.
        on_mark: Told every loss.

    Returns:
        The merged model, and how the fit ended.

    Raises:
        BackboneError: If the family has no modules that an adapter could sit on.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.targets,
        modules_to_save=[head] if head else None,
    )
    torch.manual_seed(plan(1).seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # of two libraries, about each other
            tuned: Any = get_peft_model(model, config)
    except FOREIGN as error:
        raise BackboneError(
            f"No LoRA adapter fits this model: {' '.join(str(error).split())[:160]}.",
            "Take the preset sound, which puts one on every matrix, or another backbone.",
            "method",
        ) from None
    parameters: dict[str, nn.Parameter] = {
        name: p for name, p in tuned.named_parameters() if p.requires_grad
    }
    rows_of = in_order(len(train), batch, plan(1).seed)
    some = validation[:MOST_VALIDATED]
    progress(Progress("fitting", f"{sum(p.numel() for p in parameters.values()):,} parameters"))
    tuned.train()
    fitted = fit(
        parameters,
        plan(max(1, -(-len(train) // batch))),
        lambda step: micro_batches([train[i] for i in rows_of(step)]),
        lambda texts: loss_of(tuned, texts),
        validate=lambda: mean_loss(tuned, some, loss_of),
        checkpoint=checkpoint,
        name="tuning",
        progress=progress,
        on_mark=on_mark,
    )
    tuned.eval()
    return tuned.merge_and_unload(), fitted
