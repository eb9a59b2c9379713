"""What a model does by itself, without a chip: its answers to a task, its perplexity on text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chipviz.backbones import answers
from chipviz.backbones.backbone import best_device
from chipviz.backbones.find import find_model
from chipviz.backbones.language_model import load_language_model, pack, perplexity
from chipviz.config import RunConfig
from chipviz.data.corpus import read_corpus
from chipviz.data.from_table import load_task
from chipviz.data.prompt import load_tokenizer
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.results.metrics import wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """How often a model's likeliest label is right on the test texts."""

    backbone: str
    data: str
    n: int
    accuracy: float
    """By the likelihood of the label's words."""
    accuracy_low: float
    accuracy_high: float
    accuracy_normalised: float
    """By that likelihood per token, which favours no short label."""
    normalised_low: float
    normalised_high: float
    template: str
    """As it was asked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def evaluate_answers(config: RunConfig, home: Path, progress: ProgressFn = silent) -> Evaluation:
    """Ask a model the test texts of a task.

    Args:
        config: Names the backbone and the task. How chips are trained plays no part.
        home: The folder that holds models and data.
        progress: Told every batch.

    Raises:
        ChipvizError: If the data or the model cannot be had, or it is an encoder.
    """
    task = load_task(config, home, progress)
    folder = find_model(config.backbone, home, progress)
    tokenizer = load_tokenizer(folder.path, folder.n_positions)
    prompt = answers.asking_prompt(tokenizer, task, config.max_length)
    progress(Progress("loading", f"loading {folder.name}"))
    model = load_language_model(folder, device=best_device())
    rows = task.splits["test"]
    found = answers.ask(model, tokenizer, prompt, task, rows, progress)
    right = [int(np.sum(said == rows.labels)) for said in (found.raw, found.normalised)]
    (low, high), (low_normalised, high_normalised) = (wilson_interval(k, len(rows)) for k in right)
    return Evaluation(
        backbone=folder.name,
        data=task.name,
        n=len(rows),
        accuracy=right[0] / len(rows),
        accuracy_low=low,
        accuracy_high=high,
        accuracy_normalised=right[1] / len(rows),
        normalised_low=low_normalised,
        normalised_high=high_normalised,
        template=prompt.template,
    )


def evaluate_text(
    backbone: str,
    source: str | None,
    *,
    length: int,
    max_rows: int,
    home: Path,
    progress: ProgressFn = silent,
) -> dict[str, Any]:
    """Perplexity of a model on held-out text: the test split, or a tenth that calibration skips.

    Args:
        backbone: As `find_model` takes it.
        source: Data with a text column. None is the embedded one.
        length: Tokens of a row of text.
        max_rows: Maximum rows.
        home: The folder that holds models and data.
        progress: Told every batch.

    Returns:
        `perplexity`, `n_tokens` that it is of, `length`, and what was read.

    Raises:
        ChipvizError: If text or model cannot be had, or it is an encoder.
    """
    folder = find_model(backbone, home, progress)
    corpus = read_corpus(source, home, 0, progress)
    length = min(length, folder.n_positions or length)
    rows = pack(load_tokenizer(folder.path), corpus.held_out, length, most=max_rows)
    progress(Progress("loading", f"loading {folder.name}"))
    model = load_language_model(folder, device=best_device())
    return {
        "backbone": folder.name,
        "data": corpus.name,
        "perplexity": perplexity(model, rows, progress),
        "n_tokens": rows[:, 1:].numel(),
        "length": length,
    }
