"""The line: task -> backbone -> features -> chips -> scores -> selection -> cut -> bundle.

The file to open first. Knows the order of the steps and what a run folder holds; every step is
another module's. Tells its caller what happens and never asks who that is.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from chipviz import bundle, controls, cost, sharing, sources, tables
from chipviz.adapters import find_model
from chipviz.backbone import Backbone, best_device, load_backbone
from chipviz.chips import Chip, Chips
from chipviz.columns import say_columns
from chipviz.config import CutSpec, Rule, RunConfig, Split
from chipviz.errors import ConfigError
from chipviz.features import extract, forward_pooled
from chipviz.hub import revision_of
from chipviz.metrics import EMBEDDING_LAYER, Score
from chipviz.outlook import chosen_dtype, outlook
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.prompt import (
    Prompt,
    bake,
    load_prompt,
    load_tokenizer,
    n_truncated,
    segment_break,
)
from chipviz.report import (
    BackboneInfo,
    BundleReport,
    Controls,
    Example,
    LayerCost,
    RunReport,
    SelectionInfo,
    TaskInfo,
    Timing,
    load_correct,
)
from chipviz.task import Task, make_task
from chipviz.team import join
from chipviz.training import LiveCurve, PointsFn, Trainer
from chipviz.vetting import licence_of

N_EXAMPLES = 400
N_CHECKED = 64
"""Test texts kept for the pages, and validation texts a bundle is verified on."""


def run(
    config: RunConfig,
    *,
    home: Path,
    run_id: str,
    run_dir: Path,
    progress: ProgressFn,
    on_points: PointsFn,
) -> RunReport:
    """Train chips on every layer and report; everything but the report is left in `run_dir`.

    Args:
        config: What to do.
        home: The folder of shared backbones, data and features.
        run_id: Named in the report.
        run_dir: This run's own folder.
        progress: Told often; raising `Cancelled` from it stops at a safe point.
        on_points: Told the validation accuracies of all layers each time they are known anew.

    Raises:
        ChipvizError: Whatever the user can mend.
        Cancelled: As raised by `progress`.
    """
    clock = _Clock()
    team = join()
    progress(Progress("loading", "reading the texts"))
    task = make_task(tables.read_table(config.data, home, progress), config)
    if task.columns:
        progress(Progress("loading", say_columns(task.columns.roles, task.columns.guessed)))
    backbone, prompt = _load(config, task, home, progress)
    config = config.resolved(causal=backbone.causal)
    team.share(backbone.dtype)  # everything is in place: helpers may begin
    prompt.save(run_dir / "prompt")
    clock.lap("load_s")
    # Sums of fits are float64, which MPS does not have.
    fitting = backbone.device if backbone.device.type == "cuda" else torch.device("cpu")
    live = LiveCurve(task, config, fitting, progress, on_points)
    features, n_tokens = extract(
        backbone,
        prompt,
        task,
        home,
        poolings=config.features,
        progress=progress,
        on_key=partial(sharing.use, run_dir),
        on_chunk=live.on_chunk,
        team=team,
    )
    clock.lap("extract_s", less=live.seconds)
    bias = backbone.final_norm is None
    trainer = Trainer(features, task, config, fitting, progress, on_points, bias)
    chips = trainer.fit()
    chips.save(run_dir / "chips.safetensors", backbone.fingerprint)
    scores = trainer.score(chips, run_dir)
    clock.lap("fit_s")  # what was drawn while reading is in it
    _keep_examples(task, run_dir)
    report = _report(config, run_id, task, backbone, prompt, chips, scores, clock, n_tokens)
    return report.model_copy(update={"selection": _selection(report, run_dir)})


def help_leader(config: RunConfig, *, home: Path) -> None:
    """Read texts for the run whose leader is another process of this launch.

    Raises:
        ChipvizError: As `run` does, or if the leader is gone.
    """
    team = join()
    dtype = team.share()
    task = make_task(tables.read_table(config.data, home, silent), config)
    backbone, prompt = _load(config, task, home, silent, dtype)
    config = config.resolved(causal=backbone.causal)
    extract(backbone, prompt, task, home, poolings=config.features, team=team)


def build(
    config: RunConfig,
    report: RunReport,
    cut: CutSpec,
    *,
    home: Path,
    run_dir: Path,
    out: Path,
    progress: ProgressFn,
) -> BundleReport:
    """Cut a finished run's backbone and write the verified bundle to `out`.

    Raises:
        ChipvizError: If the cut does not exist, or the bundle fails its verification.
    """
    if cut.cut_layer >= report.backbone.n_layers:
        raise ConfigError(
            f"Layer {cut.cut_layer} does not exist, the last is {report.backbone.n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    progress(Progress("building", f"loading {sources.public_name(config.backbone)}"))
    backbone, prompt, chips = reopen(config, report, home=home, run_dir=run_dir, stored=True)
    chip = chips.at(cut.cut_layer, cut.pooling, cut.chip)
    rows = [json.loads(line) for line in (run_dir / "checked.jsonl").read_text("utf-8").split("\n")]
    check = [(row["text"], row["text_pair"]) for row in rows]
    progress(Progress("verifying", f"asking the dense model about {len(check)} texts"))
    expected = _expected(backbone, prompt, chip, cut, check)
    progress(Progress("building", f"cutting after layer {cut.cut_layer}, writing and verifying"))
    return bundle.save(backbone, prompt, chip, cut, report, out, check, expected)


def reopen(
    config: RunConfig, report: RunReport, *, home: Path, run_dir: Path, stored: bool = False
) -> tuple[Backbone, Prompt, Chips]:
    """Load what a finished run used: its backbone, its prompt and its chips.

    Args:
        config: The run's own.
        report: The run's own.
        home: The folder that holds `backbones/`.
        run_dir: The run's folder.
        stored: Load the backbone on the CPU in the dtype of its files, not in the run's.

    Raises:
        ChipvizError: If the backbone is gone or is another one now.
    """
    folder = find_model(_pinned(config.backbone, report), home)
    task = report.task
    prompt = load_prompt(run_dir / "prompt", task.template, task.max_length, task.max_chars)
    backbone = load_backbone(
        folder,
        sources.public_name(config.backbone),
        dtype="auto" if stored else getattr(torch, report.backbone.dtype),
        device="cpu" if stored else None,
        device_map=None if stored else config.device_map,
        blocks_path=config.blocks,
        sep=segment_break(prompt.tokenizer),
    )
    return backbone, prompt, Chips.load(run_dir / "chips.safetensors", backbone.fingerprint)


def _pinned(source: str, report: RunReport) -> str:
    """The very commit that a run read; a branch of the Hub may have moved on."""
    revision = report.backbone.revision
    return f"{source.partition('@')[0]}@{revision}" if revision else source


def _selection(report: RunReport, run_dir: Path) -> dict[Rule, SelectionInfo]:
    """What every rule says; where no cut is as small as the default budget, that rule is silent."""
    correct = load_correct(run_dir)
    chosen: dict[Rule, SelectionInfo] = {}
    for rule in get_args(Rule):
        if rule != "manual":
            with suppress(ConfigError):
                chosen[rule] = report.select(rule, correct=correct)
    return chosen


@dataclass
class _Clock:
    """Seconds by step."""

    start: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str, *, less: float = 0.0) -> None:
        """Give the time since the last lap to a step, `less` what belongs to the next one."""
        elapsed = time.perf_counter() - self.start - sum(self.laps.values())
        self.laps[name] = elapsed - less

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


def _load(
    config: RunConfig,
    task: Task,
    home: Path,
    progress: ProgressFn,
    dtype: torch.dtype | None = None,
) -> tuple[Backbone, Prompt]:
    """The prompt before the model: a template that does not fit costs no loading."""
    folder = find_model(config.backbone, home, progress)
    name, device = sources.public_name(config.backbone), best_device()
    dtype = dtype or chosen_dtype(config, device, home)
    if config.device_map is None:
        n_vectors = sum(map(len, task.splits.values())) * max(2, len(config.features))
        outlook(folder, name, dtype=dtype, device=device, n_vectors=n_vectors).refuse()
    progress(Progress("loading", "baking the prompt into the tokenizer"))
    tokenizer = load_tokenizer(folder)
    prompt = bake(tokenizer, task.template, config.max_length, task.splits["train"])
    progress(Progress("loading", f"loading {name}"))
    backbone = load_backbone(
        folder,
        name,
        dtype=dtype,
        device_map=config.device_map,
        blocks_path=config.blocks,
        sep=segment_break(prompt.tokenizer),
    )
    return backbone, prompt


def _expected(
    backbone: Backbone,
    prompt: Prompt,
    chip: Chip,
    cut: CutSpec,
    check: Sequence[tuple[str, str | None]],
) -> Tensor:
    """What the run's own chip says, read from the dense model by hooks, in float32."""
    stored = backbone.dtype
    texts = [text for text, _ in check]
    pairs = [pair or "" for _, pair in check] if check[0][1] is not None else None
    backbone.model.float()  # exact, and so is the way back
    try:
        states = [
            forward_pooled(backbone, [ids], prompt.tokenizer.pad_token_id, [cut.pooling])
            for ids in prompt.encode(texts, pairs)
        ]
    finally:
        backbone.model.to(stored)
    pooled = torch.cat([state[0, cut.cut_layer + 1] for state in states])  # (N, D)
    return chip.probabilities(pooled)


def _keep_examples(task: Task, run_dir: Path) -> None:
    """Texts the pages show, and texts a bundle is verified on."""
    kept: tuple[tuple[Split, str, int], ...] = (
        ("test", "examples.jsonl", N_EXAMPLES),
        ("validation", "checked.jsonl", N_CHECKED),
    )
    for split, name, n in kept:
        rows = task.splits[split].take(range(min(n, len(task.splits[split]))))
        pairs = rows.pairs or [None] * len(rows)
        lines = [
            Example(text=text, text_pair=pair, label=int(label)).model_dump_json()
            for text, pair, label in zip(rows.texts, pairs, rows.labels, strict=True)
        ]
        (run_dir / name).write_text("\n".join(lines), "utf-8")


def _report(
    config: RunConfig,
    run_id: str,
    task: Task,
    backbone: Backbone,
    prompt: Prompt,
    chips: Chips,
    scores: list[Score],
    clock: _Clock,
    n_tokens: int,
) -> RunReport:
    stored, limit = backbone.stored_dtype.itemsize, prompt.max_length
    tfidf = controls.tfidf(*(task.splits[s] for s in ("train", "validation", "test")))
    measurement = cost.measure(backbone, cost.typical_length(prompt, task.splits["validation"]))
    extract_s = clock.laps["extract_s"]
    return RunReport(
        run_id=run_id,
        status="done",
        preset=config.preset,
        backbone=BackboneInfo(
            name=backbone.name,
            n_layers=backbone.n_layers,
            hidden_size=backbone.hidden_size,
            n_parameters=backbone.n_published,
            dtype=str(backbone.dtype).removeprefix("torch."),
            device=str(backbone.device),
            revision=revision_of(backbone.folder),
            causal=backbone.causal,
            blocks=config.blocks,
            licence=licence_of(backbone.folder),
        ),
        task=_task_info(task, prompt),
        timing=Timing(
            **clock.laps,
            total_s=clock.total,
            n_tokens=n_tokens,
            tokens_per_s=n_tokens / extract_s if extract_s > 0 else 0.0,
        ),
        scores=scores,
        controls=_controls(task, scores, "test", tfidf[1]),
        controls_validation=_controls(task, scores, "validation", tfidf[0]),
        selection={},
        dense=cost.dense_cost(backbone, limit, stored, measurement),
        costs=_costs(backbone, chips, limit, measurement),
        parts=cost.parts(backbone),
        measured=measurement.how,
    )


def _costs(
    backbone: Backbone, chips: Chips, max_length: int, measurement: cost.Measurement
) -> list[LayerCost]:
    """What every cut costs with every chip."""
    costs: list[LayerCost] = []
    for (kind, pooling), stack in chips.stacks.items():
        holder = bundle.kind_of(backbone, pooling, stack)
        costs += [
            cost.layer_cost(
                backbone,
                layer,
                pooling,
                kind,
                stack.at(0),
                bundle=holder,
                max_length=max_length,
                stored_bytes=backbone.stored_dtype.itemsize,
                measurement=measurement,
            )
            for layer in range(backbone.n_layers)
        ]
    return costs


def _task_info(task: Task, prompt: Prompt) -> TaskInfo:
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    return TaskInfo(
        name=task.name,
        n_train=sizes["train"],
        n_validation=sizes["validation"],
        n_test=sizes["test"],
        n_classes=task.n_classes,
        label_names=list(task.label_names),
        template=prompt.template,
        max_length=prompt.max_length,
        max_chars=prompt.max_chars,
        n_truncated=n_truncated(prompt, task),
        columns=task.columns.roles if task.columns else {},
        guessed=list(task.columns.guessed) if task.columns else [],
        made=list(task.made),
        revision=task.revision,
    )


def _controls(task: Task, scores: list[Score], split: Split, tfidf: float) -> Controls:
    """The embedding control is the pooling that validation prefers."""
    embedding = [s for s in scores if s.layer == EMBEDDING_LAYER]
    best = max((s for s in embedding if s.split == "validation"), key=lambda s: s.accuracy)
    same = next(s for s in embedding if s.split == split and s.pooling == best.pooling)
    return Controls(
        majority=controls.majority(task.splits["train"], task.splits[split]),
        embedding=same.accuracy,
        tfidf=tfidf,
    )
