"""`python -m benchmarks.pictures DATA_FOLDER`: chips on every layer of a vision encoder.

Trains whole runs on sets of pictures, fits scikit-learn on states of a plain loop beside them, and
times the reading of pictures against that loop and, where it is installed, against timm's model of
the same shape. Writes a section of docs/results.md, a set at a time.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from benchmarks.stored import RESULTS, trained, write_section
from chipviz.backbones.find import find_model
from chipviz.backbones.vision import open_vision
from chipviz.chips.linear import STRENGTHS
from chipviz.config import RunConfig, home_dir
from chipviz.data.from_table import load_task
from chipviz.data.pictures import Pictures
from chipviz.data.task import Task
from chipviz.features.forward import pooling_pass
from chipviz.keys import ChipKey, Cut, Pooling, Split, Vector
from chipviz.progress import silent
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder

SETS = ("caltech101", "stanford_cars", "cifar10")
BACKBONE = "dinov2-small"
POOLINGS: tuple[Pooling, ...] = ("first", "mean", "first+mean")
CHECKED = (3, 6, 9, 11)
"""Layers whose chips stand beside scikit-learn's."""
BATCH = 8
TIMED = 64
"""Pictures read in a round of the timing."""


@dataclass(frozen=True)
class Checked:
    """Test accuracy of a chip, and of scikit-learn on states of a plain loop."""

    pooling: Pooling
    layer: int
    ours: float
    theirs: float


def plain_states(task: Task, home: Path) -> dict[tuple[Split, Pooling, int], NDArray[np.float32]]:
    """Normed states of `CHECKED` layers by transformers alone, in float32, shape (N, D)."""
    folder = find_model(BACKBONE, home).path
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    store = Pictures(home / "data" / "pictures")
    found: dict[tuple[Split, Pooling, int], list[NDArray[np.float32]]] = {}
    for split, rows in task.splits.items():
        for start in range(0, len(rows), BATCH):
            shown = [store.open(one) for one in rows.texts[start : start + BATCH]]
            pixels = processor(shown, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
                for layer in CHECKED:
                    normed = model.layernorm(states[layer + 1])
                    first, mean = normed[:, 0], normed[:, 1:].mean(dim=1)
                    parts = {"first": first, "mean": mean}
                    parts["first+mean"] = torch.cat([first, mean], dim=1)
                    for pooling in POOLINGS:
                        key = (split, pooling, layer)
                        found.setdefault(key, []).append(parts[pooling].numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def beside_scikit_learn(task: Task, report: RunReport, home: Path) -> list[Checked]:
    """Chips of the run, and logistic regression with C by validation loss, refitted on both."""
    states, labels = plain_states(task, home), {s: r.labels for s, r in task.splits.items()}
    found = []
    for pooling in POOLINGS:
        for layer in CHECKED:
            one: dict[Split, NDArray[np.float32]] = {
                split: states[split, pooling, layer] for split in task.splits
            }
            losses = [
                log_loss(
                    labels["validation"],
                    _fitted(one["train"], labels["train"], c).predict_proba(one["validation"]),
                    labels=np.unique(labels["train"]),
                )
                for c in STRENGTHS
            ]
            both = np.concatenate([one["train"], one["validation"]])
            known = np.concatenate([labels["train"], labels["validation"]])
            model = _fitted(both, known, STRENGTHS[int(np.argmin(losses))])
            theirs = float(np.mean(model.predict(one["test"]) == labels["test"]))
            score = report.score_at(Cut(layer, ChipKey.sound(pooling)), "test")
            found.append(Checked(pooling, layer, score.accuracy, theirs))
    return found


def _fitted(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> Any:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1_000))
    return model.fit(features, labels)


@dataclass(frozen=True)
class Speed:
    """How fast pictures are read, in float32: medians of rounds in turns."""

    ours: float
    """Pictures a second."""
    beside: dict[str, float]
    """How many times as many as another loop reads, by its name."""

    @property
    def words(self) -> str:
        """As the page says it."""
        others = "".join(f", {ratio:.2f} times {name}" for name, ratio in self.beside.items())
        return f"{self.ours:.1f} pictures a second in float32{others}"


def reading_speed(task: Task, config: RunConfig, home: Path, rounds: int = 3) -> Speed:
    """Read the same pictures in turns: here, in a plain loop, and by timm where it is there."""
    folder = find_model(BACKBONE, home)
    backbone, reader = open_vision(folder, config, home, torch.float32)
    plain: Any = AutoModel.from_pretrained(folder.path, dtype=torch.float32).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder.path, backend="pil")
    names = task.splits["train"].texts[:TIMED]
    vectors = [Vector("block", pooling) for pooling in POOLINGS]

    def ours() -> None:
        with pooling_pass(backbone, 0, vectors) as forward:
            rows = reader.encode(names)
            for start in range(0, len(rows), 4):
                forward(rows[start : start + 4])

    def theirs() -> None:
        store = Pictures(home / "data" / "pictures")
        with torch.inference_mode():
            for start in range(0, len(names), BATCH):
                shown = [store.open(one) for one in names[start : start + BATCH]]
                pixels = processor(shown, return_tensors="pt")["pixel_values"]
                for state in plain(pixel_values=pixels, output_hidden_states=True).hidden_states:
                    normed = plain.layernorm(state)
                    torch.cat([normed[:, 0], normed[:, 1:].mean(dim=1)], dim=1)

    others = {"the plain loop": theirs}
    with suppress(ImportError):
        others["timm's"] = _timm_loop(names, home)
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        own = _seconds(ours)
        taken.setdefault("", []).append(len(names) / own)
        for name, loop in others.items():
            taken.setdefault(name, []).append(_seconds(loop) / own)
    return Speed(median(taken.pop("")), {name: median(found) for name, found in taken.items()})


def _timm_loop(names: Sequence[str], home: Path) -> Callable[[], None]:
    """All blocks' states by timm: the same shape, its own transforms. Weights do not matter here.

    Raises:
        ImportError: If timm, or torchvision that it needs, is not installed.
    """
    timm: Any = importlib.import_module("timm")
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224).eval()
    settings = timm.data.resolve_model_data_config(model) | {"input_size": (3, 224, 224)}
    transform = timm.data.create_transform(**settings)

    def loop() -> None:
        store = Pictures(home / "data" / "pictures")
        with torch.inference_mode():
            for start in range(0, len(names), BATCH):
                shown = [store.open(one) for one in names[start : start + BATCH]]
                pixels = torch.stack([transform(one) for one in shown])
                for patches, prefix in model.forward_intermediates(
                    pixels,
                    norm=True,
                    output_fmt="NLC",
                    return_prefix_tokens=True,
                    intermediates_only=True,
                ):
                    torch.cat([prefix[:, 0], patches.mean(dim=1)], dim=1)

    return loop


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def set_lines(
    report: RunReport, checked: Sequence[Checked], speed: Speed, first_point: float | None
) -> list[str]:
    """One set's tables."""
    task, controls = report.task, report.controls
    keys = sorted(report.chips, key=lambda key: key.by_paper)
    names = [_column(key) for key in keys]
    first = "" if first_point is None else f"First point of the curve after {first_point:.0f} s. "
    lines = [
        "",
        f"### {task.name}",
        "",
        f"{task.n_classes} classes; {task.n_train:,} training, {task.n_validation:,} validation, "
        f"{task.n_test:,} test pictures. Majority {_percent(controls.majority)}, "
        + ", ".join(f"{name} {_percent(value)}" for name, value in controls.beside.items())
        + f". {first}Reading took {report.timing.extract_s:.0f} s, fitting "
        f"{report.timing.fit_s:.0f} s, all {report.timing.total_s:.0f} s; {speed.words}.",
        "",
        f"| layer | {' | '.join(names)} |",
        f"| ---: | {' | '.join(['---:'] * len(names))} |",
    ]
    for layer in range(report.backbone.n_layers):
        row = [report.score_at(Cut(layer, key), "test").accuracy for key in keys]
        lines.append(f"| {layer} | {' | '.join(map(_percent, row))} |")
    gaps = [100 * (one.ours - one.theirs) for one in checked]
    lines += [
        "",
        "Less scikit-learn's accuracy on the same pictures, points: "
        + "; ".join(
            f"{one.pooling} layer {one.layer} {gap:+.1f}"
            for one, gap in zip(checked, gaps, strict=True)
        )
        + f". Mean {np.mean(gaps):+.2f}, largest {max(map(abs, gaps)):.1f}.",
        "",
        _findings(report),
    ]
    return lines


def _column(key: ChipKey) -> str:
    kind = "" if key.kind == "linear" else f" {key.kind}"
    return f"{key.pooling}{kind}{' as published' if key.by_paper else ''}"


def _findings(report: RunReport) -> str:
    """What the paper says of pictures, beside what is found here."""
    last = report.backbone.n_layers - 1

    def test(key: ChipKey) -> list[float]:
        return [report.score_at(Cut(i, key), "test").accuracy for i in range(last + 1)]

    ours = test(ChipKey.sound("first"))
    best, half = int(np.argmax(ours)), ours[last // 2]
    paper = {key.kind: test(key) for key in report.chips if key.by_paper}
    mlp = test(ChipKey.sound("first", "mlp"))
    return (
        f"Class token, on test: best at layer {best} of {last + 1} ({_percent(ours[best])}), the "
        f"last layer {_percent(ours[last])}; layer {last // 2} has {_percent(half / ours[best])} % "
        f"of the best. MLP chips at the best layer of each: as published "
        f"{_percent(max(paper['mlp']))}, ours {_percent(max(mlp))}; linear as published "
        f"{_percent(max(paper['linear']))}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def config_of(name: str, options: Any) -> RunConfig:
    """What is trained on a set."""
    return RunConfig.checked(
        backbone=BACKBONE,
        data=str(options.data / name),
        poolings=POOLINGS,
        chips=("linear", "mlp"),
        preset="published",
        max_train=options.max_train,
        max_validation=200,
        max_test=options.max_test,
    )


def measured(config: RunConfig, home: Path) -> list[str]:
    """One set: train or read the run, and measure beside it."""
    folder = RunFolder(home / "runs" / f"pictures-{Path(config.data).name}")
    points: list[float] = []
    began = time.perf_counter()
    report = trained(config, home, folder, lambda _points: points.append(time.perf_counter()))
    first_point = points[0] - began if points else None
    task = load_task(config, home, silent)
    checked = beside_scikit_learn(task, report, home)
    return set_lines(report, checked, reading_speed(task, config, home), first_point)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, read, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--max-train", type=int, default=500)
    parser.add_argument("--max-test", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args(arguments)
    home = home_dir()
    lines = [
        "Made by `python -m benchmarks.pictures DATA_FOLDER`; not by hand. "
        f"{BACKBONE} (whether the maker of its wheel tuned it is not known), test accuracy",
        "in % of the chip of every layer: linear ones on class token, mean of the patches and "
        "both, an MLP of the sound recipe, and both kinds as published (raw states). Beside",
        "them scikit-learn's logistic regression on states of a plain float32 loop, C chosen by "
        "validation loss.",
    ]
    for name in options.sets:
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        lines += measured(config_of(name, options), home)
        write_section(options.out, "Pictures", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
