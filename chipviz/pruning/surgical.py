"""Parts of blocks taken out, by the method of a job: stock code cannot load what they leave."""

from torch import Tensor

from chipviz.backbones.language_model import LanguageModel
from chipviz.backbones.surgery import Surgery, operate
from chipviz.pruning import slicing, units, width
from chipviz.pruning.choose import GREEDY_ROWS
from chipviz.pruning.job import Job
from chipviz.results.models import ModelSpec


def operated(job: Job, model: LanguageModel, rows: Tensor) -> tuple[LanguageModel, Surgery]:
    """Take units, dimensions, heads or channels out of a model. It is used up.

    Args:
        job: Says by which method, and how many.
        model: The whole model.
        rows: Calibration text, shape (N, T).

    Returns:
        What is left, and what was changed.

    Raises:
        ConfigError: If so much cannot go.
        BackboneError: If the family is not made so.
    """
    spec = job.spec
    n_parameters = _n_parameters(spec, model)
    if spec.method == "slicegpt":
        narrow = slicing.width_for(model, n_parameters)
        job.found["width"] = narrow
        return slicing.sliced(model, rows, narrow)
    if spec.method == "llm-pruner":
        few = _shorter_rows(rows, width.ROWS, width.ROW_LENGTH)
        surgery = width.narrowed(model, few, n_parameters)
    else:
        gone = units.choose_units(model, rows[:GREEDY_ROWS], n_parameters, job.progress)
        job.found["order"] = [str(unit) for unit in gone]
        surgery = units.surgery_without(model, gone)
        operate(model.base, surgery)
    return model, surgery


def _shorter_rows(rows: Tensor, n: int, length: int) -> Tensor:
    """So many shorter rows of the same text, shape (n, length)."""
    length = min(length, rows.shape[1])
    return rows.reshape(-1)[: rows.numel() // length * length].view(-1, length)[:n]


def _n_parameters(spec: ModelSpec, model: LanguageModel) -> int:
    """Parameters to take out, where whole blocks are not what goes."""
    if spec.ratio is not None:
        return round(spec.ratio * model.folder.n_published)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return round((spec.layers or 0) * sum(sizes) / len(sizes))
