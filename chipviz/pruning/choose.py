"""Which whole blocks of a model go, by the method of a job."""

from torch import Tensor

from chipviz.backbones.language_model import LanguageModel
from chipviz.pruning import laco, ranking
from chipviz.pruning.blocks import PATTERNS, by_pattern
from chipviz.pruning.job import Job

CALIBRATION_ROWS = 64
"""Rows of text that blocks are judged on."""
GREEDY_ROWS = 16
"""The same where every trial reads them all."""


def blocks(job: Job, model: LanguageModel, rows: Tensor, n_removed: int) -> list[int]:
    """Blocks that go, in order of depth. LaCo changes those that stay.

    Args:
        job: Says by which method.
        model: The whole model.
        rows: Calibration text, shape (N, T).
        n_removed: Blocks to take out.
    """
    method, n_layers = job.spec.method, model.n_layers
    job.say(f"choosing {n_removed} of {n_layers} blocks")
    calibration = rows[:CALIBRATION_ROWS]
    if method in PATTERNS:
        removed = by_pattern(method, n_layers, n_removed)
    elif method == "influence":
        scores = ranking.influence(model, calibration)
        job.found["influence"] = [round(float(score), 6) for score in scores]
        removed = ranking.least_influential(scores, n_removed)
    elif method == "angular":
        distances = ranking.angular(model, calibration, n_removed)
        job.found["angular"] = [round(float(distance), 6) for distance in distances]
        removed = ranking.nearest_run(distances, n_removed)
    elif method == "greedy":
        order = ranking.greedy_blocks(model, rows[:GREEDY_ROWS], n_removed, job.progress)
        job.found["order"] = order
        removed = sorted(order)
    else:
        rule: laco.MergeRule = "released" if method == "laco-released" else "paper"
        merge = laco.merge(model, calibration, n_removed, rule, job.progress)
        job.found |= {"threshold": merge.threshold, "similarity": merge.similarity}
        laco.put(model, merge.weights)
        removed = merge.removed
    return removed
