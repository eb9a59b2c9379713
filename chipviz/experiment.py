"""The line: task -> backbone -> features -> chips -> scores -> selection -> cut -> bundle.

The file to open first. Knows the order of the steps and what a run folder holds; every step is
another module's. Tells its caller what happens and never asks who that is.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from chipviz import bundle, controls, cost, metrics, sources
from chipviz.backbone import Backbone, convert_gguf, load_backbone
from chipviz.chips import STRENGTHS, Chips, choose_strength, fit_linear
from chipviz.config import CutSpec, Pooling, Rule, RunConfig, Split
from chipviz.errors import ConfigError
from chipviz.features import Chunk, Features, extract, forward_pooled
from chipviz.metrics import EMBEDDING_LAYER, CurvePoint, Score
from chipviz.progress import Meter, Progress, ProgressFn
from chipviz.report import (
    BackboneInfo,
    BundleReport,
    Controls,
    Example,
    RunReport,
    TaskInfo,
    Timing,
)
from chipviz.selection import select
from chipviz.task import Prompt, Task, bake, load_prompt, load_tokenizer, make_task, n_truncated

PointsFn = Callable[[Sequence[CurvePoint]], None]

LIVE_GROWTH = 1.3
"""The live curve is refitted when this many times more training texts have arrived: all refits
together cost a few times the last one, whatever the number of texts."""
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
    progress(Progress("loading", "reading the texts"))
    task = make_task(sources.read_table(config.data, home, progress), config)
    backbone, prompt = _load(config, task, home, progress)
    prompt.save(run_dir / "prompt")
    clock.lap("load_s")
    live = _LiveCurve(task, config.poolings, progress, on_points)
    features, n_tokens = extract(
        backbone,
        prompt,
        task,
        home,
        poolings=config.poolings,
        progress=progress,
        on_chunk=live.on_chunk,
    )
    clock.lap("extract_s", less=live.seconds)
    chips = fit(features, task, config.poolings, progress, on_points)
    chips.save(run_dir / "chips.safetensors", backbone.fingerprint)
    progress(Progress("fitting", "scoring on the test texts"))
    scores = score(features, chips, task, run_dir)
    clock.lap("fit_s", plus=live.seconds)
    _keep_examples(task, run_dir)
    return _report(config, run_id, task, backbone, prompt, scores, clock, n_tokens)


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
    weight = chips.weight(cut.cut_layer, cut.pooling, cut.chip)
    rows = [json.loads(line) for line in (run_dir / "checked.jsonl").read_text("utf-8").split("\n")]
    check = [(row["text"], row["text_pair"]) for row in rows]
    progress(Progress("verifying", f"asking the dense model about {len(check)} texts"))
    expected = _expected(backbone, prompt, weight, cut, check)
    progress(Progress("building", f"cutting after layer {cut.cut_layer}, writing and verifying"))
    return bundle.save(backbone, prompt, weight, cut, report, out, check, expected)


def reopen(
    config: RunConfig, report: RunReport, *, home: Path, run_dir: Path, stored: bool = False
) -> tuple[Backbone, Prompt, Chips]:
    """Load what a finished run used: its backbone, its prompt and its chips.

    Args:
        config: The run's own.
        report: The run's own.
        home: The folder that holds `backbones/`.
        run_dir: The run's folder.
        stored: Load the backbone on the CPU in the dtype of its files, not the fastest one.

    Raises:
        ChipvizError: If the backbone is gone or is another one now.
    """
    folder = sources.find_backbone(config.backbone, home, convert_gguf)
    place: dict[str, str] = {"dtype": "auto", "device": "cpu"} if stored else {}
    backbone = load_backbone(folder, sources.public_name(config.backbone), **place)  # type: ignore[arg-type]
    task = report.task
    prompt = load_prompt(run_dir / "prompt", task.template, task.max_length, task.max_chars)
    return backbone, prompt, Chips.load(run_dir / "chips.safetensors", backbone.fingerprint)


def fit(
    features: Features,
    task: Task,
    poolings: Sequence[Pooling],
    progress: ProgressFn,
    on_points: PointsFn,
) -> Chips:
    """Fit the chips of all layers on all training texts, each strength chosen on validation.

    Every fit begins at zero, so the result depends on the features alone, not on the way there.
    """
    labels, validation = _labels(task, "train"), _labels(task, "validation")
    layers = range(EMBEDDING_LAYER, features.n_layers)
    meter = Meter("fitting", len(poolings) * len(layers), progress)
    weights: dict[tuple[str, Pooling], list[Tensor]] = {("linear", p): [] for p in poolings}
    strengths: dict[tuple[str, Pooling], list[float]] = {("linear", p): [] for p in poolings}
    for pooling in poolings:
        points = []
        for layer in layers:
            grid = fit_linear(features.read("train", pooling, layer), labels, task.n_classes)
            held_out = features.read("validation", pooling, layer)
            best = choose_strength(grid, held_out, validation)
            weights["linear", pooling].append(grid[best])
            strengths["linear", pooling].append(STRENGTHS[best])
            if layer != EMBEDDING_LAYER:
                accuracy = _accuracy(grid[best], held_out, validation)
                points.append(CurvePoint(len(labels), layer, pooling, "linear", accuracy))
            meter.advance(1, f"fitting {pooling} chips to convergence")
        on_points(points)
    stacked = {key: torch.stack(rows) for key, rows in weights.items()}
    return Chips(stacked, strengths)  # type: ignore[arg-type]


def score(features: Features, chips: Chips, task: Task, run_dir: Path) -> list[Score]:
    """Score every chip on validation and, once, on test; keep what each predicted."""
    scores: list[Score] = []
    predicted: dict[str, NDArray[np.int32]] = {}
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        labels = task.splits[split].labels
        predicted[f"labels.{split}"] = labels.astype(np.int32)
        for chip, pooling in chips.weights:
            answers = []
            for layer in range(EMBEDDING_LAYER, features.n_layers):
                rows = features.read(split, pooling, layer)
                probabilities = chips.probabilities(rows, layer, pooling, chip).numpy()
                answers.append(probabilities.argmax(axis=1).astype(np.int32))
                scores.append(
                    metrics.score(
                        probabilities, labels, layer=layer, pooling=pooling, chip=chip, split=split
                    )
                )
            predicted[f"{split}.{pooling}.{chip}"] = np.stack(answers[1:])  # without the embedding
    temporary = run_dir / "predictions.tmp"
    save_file(predicted, temporary)
    temporary.replace(run_dir / "predictions.safetensors")
    return scores


@dataclass
class _LiveCurve:
    """Refits all layers, warm, each time clearly more training texts have arrived."""

    task: Task
    poolings: Sequence[Pooling]
    progress: ProgressFn
    on_points: PointsFn
    seconds: float = 0.0
    _n_fitted: int = 0
    _weights: dict[tuple[Pooling, int], Tensor] = field(default_factory=dict)

    def on_chunk(self, features: Features, chunk: Chunk) -> None:
        n_train = len(self.task.splits["train"])
        enough = min(n_train, LIVE_GROWTH * self._n_fitted)
        if chunk.split != "train" or chunk.stop < enough:
            return
        start = time.perf_counter()
        self._n_fitted = chunk.stop
        labels = _labels(self.task, "train")[: chunk.stop]
        validation = _labels(self.task, "validation")
        label = f"drawing the curve after {chunk.stop} of {n_train} texts"
        for pooling in self.poolings:
            points = []
            for layer in range(features.n_layers):
                self.progress(Progress("extracting", label))
                weight = self._fit(features, pooling, layer, labels)
                accuracy = _accuracy(
                    weight, features.read("validation", pooling, layer), validation
                )
                points.append(CurvePoint(chunk.stop, layer, pooling, "linear", accuracy))
            self.on_points(points)
        self.seconds += time.perf_counter() - start

    def _fit(self, features: Features, pooling: Pooling, layer: int, labels: Tensor) -> Tensor:
        """One strength from the middle of the grid and a loose end: this curve is a preview."""
        weight = fit_linear(
            features.read("train", pooling, layer, len(labels)),
            labels,
            self.task.n_classes,
            strengths=[STRENGTHS[len(STRENGTHS) // 2]],
            start=self._weights.get((pooling, layer)),
            tolerance=1e-3,
            max_steps=30,
        )[0]
        self._weights[pooling, layer] = weight
        return weight


@dataclass
class _Clock:
    """Seconds by step."""

    start: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str, *, less: float = 0.0, plus: float = 0.0) -> None:
        """Give the time since the last lap to a step; some of it may belong to another."""
        elapsed = time.perf_counter() - self.start - sum(self.laps.values())
        self.laps[name] = elapsed - less + plus

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


def _load(
    config: RunConfig, task: Task, home: Path, progress: ProgressFn
) -> tuple[Backbone, Prompt]:
    """The prompt before the model: a template that does not fit costs no loading."""
    folder = sources.find_backbone(config.backbone, home, convert_gguf, progress)
    progress(Progress("loading", "baking the prompt into the tokenizer"))
    tokenizer = load_tokenizer(folder)
    prompt = bake(tokenizer, config.template, config.max_length, task.splits["train"])
    progress(Progress("loading", f"loading {sources.public_name(config.backbone)}"))
    return load_backbone(folder, sources.public_name(config.backbone)), prompt


def _labels(task: Task, split: Split) -> Tensor:
    return torch.from_numpy(task.splits[split].labels)


def _accuracy(weight: Tensor, rows: Tensor, labels: Tensor) -> float:
    return float(((rows @ weight.T).argmax(dim=1) == labels).double().mean())


def _expected(
    backbone: Backbone,
    prompt: Prompt,
    weight: Tensor,
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
    return (pooled @ weight.T).softmax(dim=-1)


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
    scores: list[Score],
    clock: _Clock,
    n_tokens: int,
) -> RunReport:
    stored, limit = backbone.stored_dtype.itemsize, prompt.max_length
    tfidf = controls.tfidf(*(task.splits[s] for s in ("train", "validation", "test")))
    costs = [
        cost.layer_cost(
            backbone, layer, pooling, task.n_classes, max_length=limit, stored_bytes=stored
        )
        for pooling in config.poolings
        for layer in range(backbone.n_layers)
    ]
    extract_s = clock.laps["extract_s"]
    report = RunReport(
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
        dense=cost.dense_cost(backbone, limit, stored),
        costs=costs,
    )
    rules = [rule for rule in get_args(Rule) if rule != "manual"]
    chosen = {rule: report.describe(select(scores, rule)) for rule in rules}
    return report.model_copy(update={"selection": chosen})


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
