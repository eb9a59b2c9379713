"""A language model with fewer blocks: which go, the model without them, and what heals it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from chipviz.backbones.language_model import LanguageModel, load_language_model, pack, perplexity
from chipviz.backbones.surgery import Surgery
from chipviz.data.corpus import Corpus, read_corpus
from chipviz.data.prompt import load_tokenizer
from chipviz.errors import ConfigError
from chipviz.pruning import choose, learn, surgical
from chipviz.pruning import replace as replacing
from chipviz.pruning.blocks import without
from chipviz.pruning.job import Job, Made
from chipviz.results.models import SURGICAL, ModelSpec

MAP_TOKENS = 40
"""Tokens of calibration text for every dimension of a linear map."""
HELD_OUT_ROWS = 64
"""Rows of text that perplexity is measured on."""


@dataclass(frozen=True)
class _Texts:
    """Rows of text: to choose and heal by, and to measure on."""

    rows: Tensor
    held: Tensor


@dataclass(frozen=True)
class _Shorter:
    """A model that has lost something, before anything heals it."""

    model: LanguageModel
    removed: list[int]
    """Whole blocks that are gone."""
    surgery: Surgery | None = None
    linear: Tensor | None = None
    """The map that ReplaceMe folds in, shape (D, D)."""


def shortened(job: Job) -> Made:
    """The backbone of a job with less in it, healed, and its perplexity at each stage.

    Raises:
        ChipvizError: If text cannot be had, or what is asked for cannot go or be healed so.
    """
    spec = job.spec
    needs_loss = spec.heal is not None or spec.method in (
        "greedy",
        "laco",
        "laco-released",
        *SURGICAL,
    )
    job.say(f"loading {job.folder.name}")
    _refuse_twice(job)
    model = load_language_model(job.folder, device=job.device, needs_loss=needs_loss)
    n_layers, n_blocks_gone = model.n_layers, n_blocks(spec, model)
    corpus = read_corpus(spec.calibrate, job.home, spec.seed, job.progress)
    tokenizer = load_tokenizer(job.folder.path)
    texts = _texts(job, corpus, tokenizer, int(model.config.hidden_size))

    def measure(of: LanguageModel, label: str) -> float | None:
        return perplexity(of, texts.held, job.progress, label) if of.has_head else None

    before = measure(model, f"perplexity of {job.folder.name}")
    if spec.method in SURGICAL:
        less, surgery = surgical.operated(job, model, texts.rows)
        found = _Shorter(less, [], surgery)
    else:
        found = _without_blocks(job, model, texts.rows, n_blocks_gone)
    pruned = measure(found.model, "perplexity of what is left")
    healed = _healed(job, found, corpus, tokenizer, texts)
    after = measure(healed, "perplexity at the end") if spec.heal else pruned
    return Made(
        model=healed.model,
        n_layers=n_layers - len(found.removed),
        removed=found.removed,
        before=before,
        pruned=pruned,
        after=after,
        n_perplexity=texts.held[:, 1:].numel(),
        surgery=found.surgery,
    )


def _refuse_twice(job: Job) -> None:
    """Refuse to prune a model whose parts are not those of its class."""
    if job.folder.surgery is not None:
        raise ConfigError(
            f"{job.folder.name} has parts that are not its class's: it cannot be pruned again.",
            "Prune what it was made of.",
            "backbone",
        )


def _texts(job: Job, corpus: Corpus, tokenizer: Any, hidden_size: int) -> _Texts:
    spec = job.spec
    length = min(spec.length, job.folder.n_positions or spec.length)
    for_map = MAP_TOKENS * hidden_size // length if spec.heal == "replaceme" else 0
    return _Texts(
        pack(tokenizer, corpus.texts, length, most=max(choose.CALIBRATION_ROWS, for_map)),
        pack(tokenizer, corpus.held_out, length, most=HELD_OUT_ROWS),
    )


def _healed(
    job: Job, found: _Shorter, corpus: Corpus, tokenizer: Any, texts: _Texts
) -> LanguageModel:
    """What the user asked to follow."""
    heal, model = job.spec.heal, found.model
    if found.linear is not None:
        replacing.fold(model, found.removed[0] - 1, found.linear)
    elif heal is not None:
        if job.spec.task is not None:
            return replace(model, model=learn.fit_lora(job, model.model, tokenizer))
        learned = learn.fit_all if heal == "pretrain" else learn.fit_lora_on_text
        # What others must take out of the same backbone: see `chipviz.pruning.helping`.
        job.team.share((found.removed, found.surgery))
        whole = pack(tokenizer, corpus.texts, texts.rows.shape[1])
        return learned(job, model, whole, texts.held)
    return model


def _without_blocks(job: Job, model: LanguageModel, rows: Tensor, n_removed: int) -> _Shorter:
    """The model without whole blocks."""
    removed = choose.blocks(job, model, rows, n_removed)
    linear: Tensor | None = None
    if job.spec.heal == "replaceme":
        job.say("fitting a linear map in place of the blocks")
        linear = replacing.fit_map(model, rows, removed)
    return _Shorter(without(model, removed), removed, linear=linear)


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
