"""A finished run with the numbers a real one has: BBC news on SmolLM2, 30 layers, two poolings."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from chipviz import config
from chipviz.config import CutSpec, Rule, RunConfig
from chipviz.keys import ChipKey, Cut, fields_of
from chipviz.progress import Progress
from chipviz.results.answers import Token, TokenReading
from chipviz.results.metrics import CurvePoint, Score, wilson_interval
from chipviz.results.report import (
    BackboneInfo,
    BundleKind,
    BundleReport,
    Controls,
    CutCost,
    Example,
    LayerCost,
    Measured,
    Parts,
    RunReport,
    TaskInfo,
    Timing,
)
from chipviz.results.run_folder import Predictions, RunFolder
from chipviz.results.selection import Correct
from chipviz.runs.schema import summary
from chipviz.runs.store import Job, Store

LAYERS = 30
LABELS = ["business", "entertainment", "politics", "sport", "tech"]
DENSE = 134_515_008
BLOCK = 3_540_096
LAST, MEAN = ChipKey.sound("last"), ChipKey.sound("mean")
CHIPS = (LAST, MEAN)
CHIP_PARAMETERS = {"linear": 5 * 576, "mlp": 256 * (576 + 1) + 5 * (256 + 1)}
N = {"train": 800, "validation": 200, "test": 400}
EVIL = "<img src=x onerror=window.__pwn=1><script>window.__pwn=1</script> [x](javascript:1) *b*"


def at(layer: int, vector: str = "mean", kind: str = "linear") -> Cut:
    """A cut by the words that a link has for it."""
    return Cut(layer, ChipKey.named(vector, kind))


def accuracy_of(layer: int, key: ChipKey) -> float:
    """Mean: there from layer 8 on. Others: slow, then the drastic change at layer 21.

    Poolings beyond those two, and MLPs, lie a little lower, so that no two curves are one.
    """
    lower = {"first": 0.30, "max": 0.05, "raw": 0.15}.get(key.vector.name, 0.0)
    lower += 0.01 if key.kind == "mlp" else 0.0
    return _curve(layer, key.vector.name) - lower


def _curve(layer: int, vector: str) -> float:
    if vector != "mean":
        if layer < 0:
            return 0.35
        return 0.40 + 0.41 * layer / 20 if layer < 21 else 0.93 + 0.001 * (layer - 21)
    if layer < 0:
        return 0.90
    return 0.86 + 0.097 * layer / 8 if layer < 8 else 0.957 - 0.001 * (layer - 8)


def scores(chips: Sequence[ChipKey] = CHIPS, n_again: int = 0) -> list[Score]:
    """Of every chip on every layer; fitted `n_again` times more, each further off."""
    table = []
    for key in chips:
        for layer in range(-1, LAYERS):
            for split in ("validation", "test"):
                n = N[split]
                right = round(n * accuracy_of(layer, key))
                low, high = wilson_interval(right, n)
                accuracy, loss = right / n, 1.5 * (1 - right / n)
                table.append(
                    Score(
                        layer=layer,
                        **fields_of(key),
                        split=split,
                        n=n,
                        accuracy=accuracy,
                        accuracy_low=low,
                        accuracy_high=high,
                        macro_f1=accuracy,
                        macro_f1_low=low,
                        macro_f1_high=high,
                        log_loss=loss,
                        log_loss_low=0.8 * loss,
                        log_loss_high=1.2 * loss,
                        ece=0.03,
                        ece_low=0.02,
                        ece_high=0.05,
                        # The published recipe is one run in one order.
                        repeats=tuple(
                            accuracy + 0.004 * i * (-1) ** i for i in range(1, n_again + 1)
                        )
                        if key.recipe == "sound"
                        else (),
                    )
                )
    return table


def correct(chips: Sequence[ChipKey] = CHIPS) -> Correct:
    """Validation hits with exactly the accuracies of `scores`: chips mostly miss the same texts."""
    rng = np.random.default_rng(1)
    n = N["validation"]
    hard = rng.random(n)
    hits = {}
    for key in chips:
        rows = np.zeros((LAYERS, n), dtype=bool)
        for layer, row in enumerate(rows):
            right = round(n * accuracy_of(layer, key))
            row[np.argsort(hard + 0.05 * rng.random(n))[:right]] = True
        hits[key] = rows
    return hits


def costs(chips: Sequence[ChipKey] = CHIPS) -> list[LayerCost]:
    table = []
    for key in chips:
        chip_parameters = CHIP_PARAMETERS[key.kind]
        for layer in range(LAYERS):
            backbone = DENSE - BLOCK * (LAYERS - 1 - layer)
            kept = backbone + chip_parameters
            table.append(
                LayerCost(
                    n_parameters=kept,
                    weight_bytes=2 * backbone + 4 * chip_parameters,
                    flops_per_token=2 * BLOCK * (layer + 1) + 2 * chip_parameters,
                    layer=layer,
                    **fields_of(key),
                    chip_parameters=chip_parameters,
                    layer_ratio=(LAYERS - 1 - layer) / LAYERS,
                    parameter_ratio=(DENSE - kept) / DENSE,
                    bundle=_bundle_of(key),
                    latency_s=0.002 * (layer + 1),
                    peak_bytes=2 * backbone + 4 * chip_parameters + 6_000_000,
                )
            )
    return table


def _bundle_of(key: ChipKey) -> BundleKind:
    stock: dict[ChipKey, BundleKind] = {LAST: "sequence", MEAN: "token"}
    return stock.get(key, "chipviz")


def report_of(
    run_id: str,
    label_names: list[str] | None = None,
    chips: Sequence[ChipKey] = CHIPS,
    n_again: int = 0,
) -> RunReport:
    bare = RunReport(
        run_id=run_id,
        status="done",
        preset="published" if any(key.recipe == "published" for key in chips) else "sound",
        backbone=BackboneInfo(
            name="smollm2-135m",
            n_layers=LAYERS,
            hidden_size=576,
            n_parameters=DENSE,
            dtype="bfloat16",
            device="cpu",
        ),
        task=TaskInfo(
            name="bbc-news",
            n_train=800,
            n_validation=200,
            n_test=400,
            n_classes=len(label_names or LABELS),
            label_names=label_names or LABELS,
            template="News: {text}\nTopic of this article:",
            max_length=64,
            max_chars=290,
            n_truncated=1398,
            columns={"text": "text", "label": "label"},
            guessed=["text", "label"],
            made=["validation", "test"],
        ),
        timing=Timing(
            load_s=2, extract_s=30, fit_s=4, total_s=36, n_tokens=89600, tokens_per_s=2900
        ),
        scores=scores(chips, n_again),
        controls=Controls(majority=0.23, embedding=0.90, tfidf=0.94),
        controls_validation=Controls(majority=0.225, embedding=0.895, tfidf=0.945),
        selection={},
        dense=CutCost(
            n_parameters=DENSE,
            weight_bytes=2 * DENSE,
            flops_per_token=2 * (DENSE - BLOCK),
            latency_s=0.065,
            peak_bytes=2 * DENSE + 8_000_000,
        ),
        costs=costs(chips),
        parts=Parts(
            embedding=DENSE - LAYERS * BLOCK - 576,
            blocks=[BLOCK] * LAYERS,
            final_norm=576,
            lm_head=0,
            other=0,
            tied=True,
        ),
        measured=Measured(batch=1, n_tokens=64, repeats=5, device="cpu", dtype="bfloat16"),
    )
    rules: list[Rule] = [rule for rule in get_args(Rule) if rule != "manual"]
    hits = correct(chips)
    chosen = {rule: bare.select(rule, correct=hits) for rule in rules}
    return bare.model_copy(update={"selection": chosen})


def points(upto: int = 800) -> list[CurvePoint]:
    return [
        CurvePoint(n, Cut(layer, key), accuracy_of(layer, key) - 20 / n)
        for n in range(80, upto + 1, 80)
        for key in CHIPS
        for layer in range(LAYERS)
    ]


def last_points(chips: Sequence[ChipKey]) -> list[CurvePoint]:
    """Of the chips that are fitted once, when all texts have been read."""
    return [
        CurvePoint(N["train"], Cut(layer, key), accuracy_of(layer, key))
        for key in chips
        if key not in CHIPS
        for layer in range(LAYERS)
    ]


def write_files(
    folder: RunFolder, examples: list[Example], chips: Sequence[ChipKey] = CHIPS
) -> None:
    """The files of a finished run, but for its report."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_examples("test", examples)
    labels = np.array([example.label for example in examples], dtype=np.int32)
    validation = np.arange(N["validation"], dtype=np.int32) % 5
    rng = np.random.default_rng(0)
    found = Predictions({"test": labels, "validation": validation}, {})
    for key, hits in correct(chips).items():
        rows = [
            np.where(rng.random(len(labels)) < accuracy_of(layer, key), labels, (labels + 1) % 5)
            for layer in range(LAYERS)
        ]
        found.classes["test", key] = np.stack(rows).astype(np.int32)
        said = np.where(hits, validation, (validation + 1) % 5).astype(np.int32)
        found.classes["validation", key] = said
        found.temperatures[key] = np.ones(LAYERS, dtype=np.float32)
        for split, truth in found.labels.items():
            right = found.classes[split, key] == truth
            odds = rng.normal(np.where(right, 3.0, 0.5), 1.0)
            found.sure[split, key] = odds.astype(np.float32)
    folder.write_predictions(found)


def finished_run(
    store: Store,
    *,
    label_names: list[str] | None = None,
    text: str = "",
    chips: Sequence[ChipKey] = CHIPS,
    n_again: int = 0,
    template: str = "",
) -> Job:
    job = store.create_run(RunConfig.checked(**config.EXAMPLE), claim=True)
    store.add_points(job.run_id, points() + last_points(chips))
    first = text or "Shares rose on Tuesday after the bank raised its forecast for the year."
    examples = [Example(text=first, label=0)]
    examples += [
        Example(text=f"Article {i} about the match & more", label=i % 5) for i in range(1, 400)
    ]
    folder = store.folder(job.run_id)
    write_files(folder, examples, chips)
    report = report_of(job.run_id, label_names, chips, n_again)
    if template:
        task = report.task.model_copy(update={"template": template})
        report = report.model_copy(update={"task": task})
    folder.write_report(report)
    assert store.finish(job.job_id, "done", found=summary(report))
    return store.get(job.job_id)


def active_run(store: Store) -> Job:
    job = store.create_run(RunConfig.checked(**config.EXAMPLE), claim=True)
    store.add_points(job.run_id, points(320))
    store.report_progress(
        job.job_id, Progress("extracting", "reading 520 of 1,400 texts", 520, 1400, 1940.0, 18.0)
    )
    return store.get(job.job_id)


def built_bundle(store: Store, run_id: str) -> Job:
    job = store.create_bundle(run_id, CutSpec(cut_layer=8, pooling="mean"))
    assert store.claim(job.job_id)
    folder = store.folder(run_id).bundles / job.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    cost = next(c for c in costs() if c.layer == 8)
    bundle = BundleReport(
        path=str(folder),
        kind="token",
        cut_layer=8,
        pooling="mean",
        chip="linear",
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        folder_bytes=cost.weight_bytes + 3_600_000,
        n_verified=64,
        max_difference=2e-7,
        files={"model.safetensors": cost.weight_bytes, "tokenizer.json": 3_600_000},
    )
    assert store.finish(job.job_id, "done", result=bundle.model_dump_json())
    return store.get(job.job_id)


def token_reading(text: str, layer: int) -> TokenReading:
    """What the process that holds models answers: two template tokens, then the words of `text`."""
    tokens = [Token("News:", 0, 0, in_text=False, in_pair=False)]
    place = 0
    for word in text.split(" "):
        tokens.append(Token(word, place, place + len(word), in_text=True, in_pair=False))
        place += len(word) + 1
    tokens.append(Token("\nTopic", 0, 0, in_text=False, in_pair=False))
    t = len(tokens)
    return TokenReading(
        tokens=tokens,
        layer=layer,
        label_names=LABELS,
        label_index=[[0 if k > 6 else (i % 5) for i in range(t)] for k in range(LAYERS)],
        confidence=[[0.3 + 0.02 * k + 0.05 * (i % 2) for i in range(t)] for k in range(LAYERS)],
        at_cut=[[0.8, 0.05, 0.05, 0.05, 0.05] for _ in range(t)],
        by_layer=[
            [0.8, 0.05, 0.05, 0.05, 0.05] if k > 6 else [0.2, 0.3, 0.2, 0.2, 0.1]
            for k in range(LAYERS)
        ],
        settled_layer=7,
    )
