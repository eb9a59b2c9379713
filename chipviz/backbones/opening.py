"""The backbone and the prompt of a run: opened for a new run, or as a finished run used them."""

from dataclasses import replace
from pathlib import Path

import torch

from chipviz.backbones.backbone import Backbone, best_device, load_backbone
from chipviz.backbones.find import find_model
from chipviz.backbones.memory import chosen_dtype, look_ahead
from chipviz.backbones.vision import open_vision, refuse_wordless
from chipviz.config import RunConfig
from chipviz.data.processor import Reader
from chipviz.data.prompt import bake, load_prompt, load_tokenizer, segment_break
from chipviz.data.task import Task
from chipviz.progress import Progress, ProgressFn
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder


def open_backbone(
    config: RunConfig,
    task: Task,
    *,
    home: Path,
    progress: ProgressFn,
    dtype: torch.dtype | None = None,
) -> tuple[Backbone, Reader]:
    """Bake the prompt and load the backbone of a new run.

    The prompt comes before the model: a template that does not fit costs no loading.

    Args:
        config: The run's settings.
        task: Its texts. The prompt is baked for the training ones.
        home: The folder that holds `backbones/`.
        progress: Told each step.
        dtype: What to compute in. None takes the user's choice, or what is fast here.

    Raises:
        ChipvizError: If the backbone cannot be had, read or held in memory, or the template does
            not fit.
    """
    folder = find_model(config.backbone, home, progress)
    dtype = dtype or chosen_dtype(config, best_device(), home)
    if config.device_map is None:
        n_texts = sum(map(len, task.splits.values()))
        pictures = task.kind == "image"
        look_ahead(folder, config, home=home, n_texts=n_texts, pictures=pictures).refuse()
    if task.kind == "image":
        progress(Progress("loading", f"loading {folder.name}"))
        return open_vision(folder, config, home, dtype)
    refuse_wordless(folder)
    progress(Progress("loading", "baking the prompt into the tokenizer"))
    tokenizer = load_tokenizer(folder.path, folder.n_positions)
    prompt = bake(tokenizer, task.template, config.max_length, task.splits["train"])
    progress(Progress("loading", f"loading {folder.name}"))
    backbone = load_backbone(
        folder,
        dtype=dtype,
        device_map=config.device_map,
        blocks_path=config.blocks,
        sep=segment_break(prompt.tokenizer),
    )
    return backbone, prompt


def reopen(
    config: RunConfig, report: RunReport, *, home: Path, folder: RunFolder, stored: bool = False
) -> tuple[Backbone, Reader]:
    """Load the backbone and the prompt that a finished run used.

    Args:
        config: The run's settings.
        report: What the run found.
        home: The folder that holds `backbones/`.
        folder: The run's folder.
        stored: Load the backbone on the CPU in the dtype of its files, not in the run's.

    Raises:
        ChipvizError: If the backbone is gone, or the prompt is not what it was.
    """
    task = report.task
    model = replace(find_model(_pinned(config.backbone, report), home), name=report.backbone.name)
    dtype = "auto" if stored else getattr(torch, report.backbone.dtype)
    device = "cpu" if stored else None
    if task.kind == "image":
        kept = folder.whole(folder.prompt)
        return open_vision(model, config, home, dtype, processor=kept, device=device)
    prompt = load_prompt(
        folder.whole(folder.prompt), task.template, task.max_length, task.max_chars
    )
    backbone = load_backbone(
        model,
        dtype=dtype,
        device=device,
        device_map=None if stored else config.device_map,
        blocks_path=config.blocks,
        sep=segment_break(prompt.tokenizer),
    )
    return backbone, prompt


def _pinned(source: str, report: RunReport) -> str:
    """The very commit that a run read. A branch of the Hub may have moved on."""
    revision = report.backbone.revision
    return f"{source.partition('@')[0]}@{revision}" if revision else source
