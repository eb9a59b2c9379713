"""A backbone + what is to be done -> another plain model folder, with its lineage.

parent -> what goes -> the model without it -> healing -> folder. Every step is another module's.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from chipviz.backbones.adapters import copy_tokenizer
from chipviz.backbones.backbone import best_device
from chipviz.backbones.find import find_model
from chipviz.backbones.memory import refuse_copies
from chipviz.backbones.model_folder import ModelFolder
from chipviz.files import publish
from chipviz.progress import Progress, ProgressFn
from chipviz.pruning.job import Job, Made
from chipviz.pruning.learn import tuned
from chipviz.pruning.shorten import shortened
from chipviz.pruning.training import OnMark
from chipviz.results.models import (
    Ancestor,
    ModelRecord,
    ModelSpec,
    place_of,
    read_record,
    write_record,
)
from chipviz.sources import public_name


def make(
    spec: ModelSpec,
    *,
    home: Path,
    scratch: Path,
    progress: ProgressFn,
    on_mark: OnMark = lambda _: None,
) -> ModelRecord:
    """Make a model and put it where `--backbone NAME` finds it.

    Args:
        spec: What to make of what.
        home: The folder that holds `models/`.
        scratch: Folder for the state on the way. Kept if the job breaks off, else removed.
        progress: Told every step. Raising `Cancelled` from it stops at a safe point.
        on_mark: Told every loss.

    Raises:
        ChipvizError: Whatever the user can mend. Nothing is left at the model's name then.
    """
    start = time.time()
    final = place_of(home, spec.name)
    progress(Progress("loading", f"looking at {spec.backbone}"))
    folder = find_model(spec.backbone, home, progress)
    device = best_device()
    # Weights in float32, and what a fit keeps beside them: gradients and two moments.
    learns = "lora" in (spec.method, spec.heal)
    refuse_copies(folder, 4 if spec.heal == "pretrain" else 1.5 if learns else 1.1, device)
    job = Job(spec, home, scratch, folder, progress, on_mark, device)
    made = tuned(job) if spec.method == "lora" else shortened(job)
    progress(Progress("building", f"writing {spec.name}"))
    with publish(final) as work:
        _write(made.model, folder, work)
        record = _record(job, made, start)
        write_record(work, record)
    shutil.rmtree(scratch, ignore_errors=True)
    return record


def _write(model: Any, parent: ModelFolder, work: Path) -> None:
    """Save a model as its parent was: the same dtype, tokenizer and licence."""
    model = model.to("cpu", parent.stored_dtype)
    model.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    model.save_pretrained(work, max_shard_size="5GB")
    copy_tokenizer(parent.path, work)
    if parent.licence is not None:
        (work / "README.md").write_text(f"---\nlicense: {parent.licence}\n---\n", "utf-8")


def _record(job: Job, made: Made, start: float) -> ModelRecord:
    spec, older = job.spec, read_record(job.folder.path)
    n_layers = made.n_layers + len(made.removed)
    root = (
        older.root
        if older
        else Ancestor(name=job.folder.name, n_layers=n_layers, n_parameters=job.folder.n_published)
    )
    return ModelRecord(
        name=spec.name,
        parent=public_name(spec.backbone),
        root=root,
        method=f"{spec.method}+{spec.heal}" if spec.heal else spec.method,
        spec=spec,
        removed=made.removed,
        n_layers=made.n_layers,
        n_parameters=sum(p.numel() for p in made.model.parameters()),
        perplexity_before=made.before,
        perplexity_pruned=made.pruned,
        perplexity_after=made.after,
        n_perplexity=made.n_perplexity,
        found=job.found,
        created=start,
        seconds=time.time() - start,
    )
