"""A language model with fewer blocks: which go, the model without them, and what heals it."""

from torch import Tensor

from chipviz.backbones.language_model import LanguageModel, load_language_model, pack, perplexity
from chipviz.data.corpus import read_corpus
from chipviz.data.prompt import load_tokenizer
from chipviz.errors import ConfigError
from chipviz.pruning import laco, learn, ranking
from chipviz.pruning import replace as replacing
from chipviz.pruning.blocks import PATTERNS, by_pattern, without
from chipviz.pruning.job import Job, Made
from chipviz.results.models import ModelSpec

CALIBRATION_ROWS = 64
"""Rows of text that blocks are judged on."""
GREEDY_ROWS = 16
"""The same where every trial reads them all."""
MAP_TOKENS = 40
"""Tokens of calibration text for every dimension of a linear map."""
HELD_OUT_ROWS = 64
"""Rows of text that perplexity is measured on."""


def shortened(job: Job) -> Made:
    """The backbone of a job with fewer blocks, healed, and its perplexity at each stage.

    Raises:
        ChipvizError: If text cannot be had, or the blocks cannot go or be healed so.
    """
    spec = job.spec
    measured = spec.method == "greedy" or spec.heal is not None or spec.method.startswith("laco")
    job.say(f"loading {job.folder.name}")
    model = load_language_model(job.folder, device=job.device, needs_loss=measured)
    n_removed = n_blocks(spec, model)
    corpus = read_corpus(spec.calibrate, job.home, spec.seed, job.progress)
    tokenizer = load_tokenizer(job.folder.path)
    length = min(spec.length, job.folder.n_positions or spec.length)
    width = int(model.config.hidden_size)
    wanted = max(CALIBRATION_ROWS, MAP_TOKENS * width // length if spec.heal == "replaceme" else 0)
    rows = pack(tokenizer, corpus.texts, length, most=wanted)
    held = pack(tokenizer, corpus.held_out, length, most=HELD_OUT_ROWS)

    def measure(of: LanguageModel, label: str) -> float | None:
        return perplexity(of, held, job.progress, label) if model.has_head else None

    before = measure(model, f"perplexity of {job.folder.name}")
    removed = _choose(job, model, rows, n_removed)
    linear: Tensor | None = None
    if job.spec.heal == "replaceme":
        job.say("fitting a linear map in place of the blocks")
        linear = replacing.fit_map(model, rows, removed)
    shorter = without(model, removed)
    pruned = measure(shorter, "perplexity without the blocks")
    if linear is not None:
        replacing.fold(shorter, removed[0] - 1, linear)
    elif job.spec.heal == "pretrain":
        whole = pack(tokenizer, corpus.texts, length)
        shorter = learn.fit_all(job, shorter, whole, held)
    elif job.spec.heal == "lora":
        tuned = learn.fit_lora(job, shorter.model, tokenizer)
        shorter = LanguageModel(job.folder, tuned, model.has_head)
    after = measure(shorter, "perplexity at the end") if job.spec.heal else pruned
    n_layers = model.n_layers - n_removed
    return Made(shorter.model, n_layers, removed, before, pruned, after, held[:, 1:].numel())


def n_blocks(spec: ModelSpec, model: LanguageModel) -> int:
    """Blocks to take out: as many as the user says, or as come nearest to a ratio of parameters.

    Raises:
        ConfigError: If none would stay.
    """
    if spec.layers is not None:
        wanted = spec.layers
    else:
        sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        share = sum(sizes) / len(sizes) / model.folder.n_published
        wanted = max(1, round((spec.ratio or 0.0) / share))
    if wanted >= model.n_layers:
        raise ConfigError(
            f"{model.name} has {model.n_layers} blocks, and {wanted} are to go: none would stay.",
            "Take out fewer.",
            "layers",
        )
    return wanted


def _choose(job: Job, model: LanguageModel, rows: Tensor, n_removed: int) -> list[int]:
    """Blocks that go, in order of depth. LaCo changes those that stay."""
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
