"""A backbone + what is to be done -> another plain model folder, with its lineage.

parent -> what goes -> the model without it -> healing -> folder. Every step is another module's.
"""

import shutil
import time
from pathlib import Path

from chipviz.backbones.backbone import best_device
from chipviz.backbones.find import find_model
from chipviz.backbones.memory import refuse_copies
from chipviz.features.distributed import ALONE, join
from chipviz.files import publish
from chipviz.progress import Progress, ProgressFn
from chipviz.pruning import keep
from chipviz.pruning.job import Job
from chipviz.pruning.learn import tuned
from chipviz.pruning.shorten import shortened
from chipviz.pruning.training import OnMark
from chipviz.results.models import ModelRecord, ModelSpec, place_of, write_record


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
    team = join() if spec.heal == "pretrain" else ALONE
    final = place_of(home, spec.name)
    progress(Progress("loading", f"looking at {spec.backbone}"))
    folder = find_model(spec.backbone, home, progress)
    device = best_device()
    # Weights in float32, and what a fit keeps beside them: gradients and two moments.
    learns = "lora" in (spec.method, spec.heal)
    refuse_copies(folder, 4 if spec.heal == "pretrain" else 1.5 if learns else 1.1, device)
    job = Job(spec, home, scratch, folder, progress, on_mark, device, team)
    made = tuned(job) if spec.method == "lora" else shortened(job)
    progress(Progress("building", f"writing {spec.name}"))
    with publish(final) as work:
        keep.write(made, folder, work)
        record = keep.record(job, made, start)
        write_record(work, record)
    shutil.rmtree(scratch, ignore_errors=True)
    return record
