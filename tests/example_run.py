"""A finished run with the numbers a real one has: BBC news on SmolLM2, 30 layers, two poolings."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from chipviz import config
from chipviz.config import CutSpec, Pooling, RunConfig
from chipviz.metrics import CurvePoint, Score, wilson_interval
from chipviz.progress import Progress
from chipviz.report import (
    BackboneInfo,
    BundleReport,
    Controls,
    CutCost,
    Example,
    LayerCost,
    RunReport,
    SelectionInfo,
    TaskInfo,
    Timing,
)
from chipviz.selection import select
from chipviz.store import Job, Store

LAYERS = 30
LABELS = ["business", "entertainment", "politics", "sport", "tech"]
DENSE = 134_515_008
BLOCK = 3_540_096
POOLINGS: tuple[Pooling, ...] = ("last", "mean")
N = {"train": 800, "validation": 200, "test": 400}
EVIL = "<img src=x onerror=window.__pwn=1><script>window.__pwn=1</script> [x](javascript:1) *b*"


def accuracy_of(layer: int, pooling: Pooling) -> float:
    """Last token: slow, then the drastic change at layer 21. Mean: there from layer 8 on."""
    if layer < 0:
        return 0.35 if pooling == "last" else 0.90
    if pooling == "last":
        return 0.40 + 0.41 * layer / 20 if layer < 21 else 0.93 + 0.001 * (layer - 21)
    return 0.86 + 0.097 * layer / 8 if layer < 8 else 0.957 - 0.001 * (layer - 8)


def scores() -> list[Score]:
    table = []
    for pooling in POOLINGS:
        for layer in range(-1, LAYERS):
            for split in ("validation", "test"):
                n = N[split]
                right = round(n * accuracy_of(layer, pooling))
                low, high = wilson_interval(right, n)
                table.append(
                    Score(
                        layer=layer,
                        pooling=pooling,
                        chip="linear",
                        split=split,
                        n=n,
                        accuracy=right / n,
                        accuracy_low=low,
                        accuracy_high=high,
                        macro_f1=right / n,
                        log_loss=1.5 * (1 - right / n),
                        ece=0.03,
                    )
                )
    return table


def costs() -> list[LayerCost]:
    table = []
    for pooling in POOLINGS:
        for layer in range(LAYERS):
            kept = DENSE - BLOCK * (LAYERS - 1 - layer) + 5 * 576
            table.append(
                LayerCost(
                    n_parameters=kept,
                    weight_bytes=2 * kept,
                    flops_per_token=2 * BLOCK * (layer + 1),
                    layer=layer,
                    pooling=pooling,
                    layer_ratio=(LAYERS - 1 - layer) / LAYERS,
                    parameter_ratio=(DENSE - kept) / DENSE,
                )
            )
    return table


def report_of(run_id: str, label_names: list[str] | None = None) -> RunReport:
    bare = RunReport(
        run_id=run_id,
        status="done",
        preset="sound",
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
            n_classes=5,
            label_names=label_names or LABELS,
            template="News: {text}\nTopic of this article:",
            max_length=64,
            max_chars=290,
            n_truncated=1398,
        ),
        timing=Timing(
            load_s=2, extract_s=30, fit_s=4, total_s=36, n_tokens=89600, tokens_per_s=2900
        ),
        scores=scores(),
        controls=Controls(majority=0.23, embedding=0.90, tfidf=0.94),
        controls_validation=Controls(majority=0.225, embedding=0.895, tfidf=0.945),
        selection={},
        dense=CutCost(
            n_parameters=DENSE, weight_bytes=2 * DENSE, flops_per_token=2 * (DENSE - BLOCK)
        ),
        costs=costs(),
    )
    rules = ("validate", "within", "fixed")
    chosen: dict = {rule: bare.describe(select(bare.scores, rule)) for rule in rules}
    assert all(isinstance(choice, SelectionInfo) for choice in chosen.values())
    return bare.model_copy(update={"selection": chosen})


def points(upto: int = 800) -> list[CurvePoint]:
    return [
        CurvePoint(n, layer, pooling, "linear", accuracy_of(layer, pooling) - 20 / n)
        for n in range(80, upto + 1, 80)
        for pooling in POOLINGS
        for layer in range(LAYERS)
    ]


def write_files(run_dir: Path, examples: list[Example]) -> None:
    """The files of a finished run, as `chipviz.report` reads them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [example.model_dump_json() for example in examples]
    (run_dir / "examples.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    labels = np.array([example.label for example in examples], dtype=np.int32)
    rng = np.random.default_rng(0)
    arrays = {"labels.test": labels}
    for pooling in POOLINGS:
        rows = [
            np.where(
                rng.random(len(labels)) < accuracy_of(layer, pooling), labels, (labels + 1) % 5
            )
            for layer in range(LAYERS)
        ]
        arrays[f"test.{pooling}.linear"] = np.stack(rows).astype(np.int32)
    save_file(arrays, run_dir / "predictions.safetensors")


def finished_run(store: Store, *, label_names: list[str] | None = None, text: str = "") -> Job:
    job = store.create_run(RunConfig.checked(**config.EXAMPLE), claim=True)
    store.add_points(job.run_id, points())
    first = text or "Shares rose on Tuesday after the bank raised its forecast for the year."
    examples = [Example(text=first, label=0)]
    examples += [
        Example(text=f"Article {i} about the match & more", label=i % 5) for i in range(1, 400)
    ]
    write_files(store.run_dir(job.run_id), examples)
    report = report_of(job.run_id, label_names)
    assert store.finish(job.job_id, "done", result=report.model_dump_json())
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
    folder = store.run_dir(run_id) / "bundle" / job.name
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


def token_answer(text: str, layer: int) -> dict:
    """What the inference process answers: two template tokens, then the words of `text`."""
    tokens = [{"text": "News:", "start": 0, "end": 0, "in_text": False}]
    place = 0
    for word in text.split(" "):
        tokens.append({"text": word, "start": place, "end": place + len(word), "in_text": True})
        place += len(word) + 1
    tokens.append({"text": "\nTopic", "start": 0, "end": 0, "in_text": False})
    t = len(tokens)
    return {
        "tokens": tokens,
        "layer": layer,
        "label_names": LABELS,
        "label_index": [[0 if k > 6 else (i % 5) for i in range(t)] for k in range(LAYERS)],
        "confidence": [[0.3 + 0.02 * k + 0.05 * (i % 2) for i in range(t)] for k in range(LAYERS)],
        "at_cut": [[0.8, 0.05, 0.05, 0.05, 0.05] for _ in range(t)],
        "by_layer": [
            [0.8, 0.05, 0.05, 0.05, 0.05] if k > 6 else [0.2, 0.3, 0.2, 0.2, 0.1]
            for k in range(LAYERS)
        ],
        "settled_layer": 7,
    }
