"""A made model becomes a folder like any other, with the record of how it was made."""

import time
from pathlib import Path
from typing import Any

from chipviz.backbones.adapters import copy_tokenizer
from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.surgery import Surgery, write_surgery
from chipviz.pruning.job import Job, Made
from chipviz.results.models import Ancestor, ModelRecord, read_record
from chipviz.sources import public_name


def write(made: Made, parent: ModelFolder, work: Path) -> None:
    """Save a model as its parent was: the same dtype, tokenizer and licence."""
    model: Any = made.model.to("cpu", parent.stored_dtype)
    model.config.name_or_path = ""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    model.save_pretrained(work, max_shard_size="5GB")
    surgery = made.surgery or parent.surgery
    if surgery is not None:
        write_surgery(work, surgery)
    copy_tokenizer(parent.path, work)
    licence = f"---\nlicense: {parent.licence}\n---\n\n" if parent.licence is not None else ""
    (work / "README.md").write_text(f"{licence}{_words(surgery)}\n", "utf-8")


def _words(surgery: Surgery | None) -> str:
    """What a reader of the folder must know."""
    if surgery is None:
        return "Made by chipviz; lineage.json says how. Stock transformers loads it."
    return (
        f"Made by chipviz ({surgery.method}); lineage.json says how. Its parts have shapes that no "
        "class of transformers has: stock code cannot load it, chipviz does, by surgery.json."
    )


def record(job: Job, made: Made, start: float) -> ModelRecord:
    """How a model was made, and of what."""
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
