"""`python -m benchmarks.saving DATA_FOLDER`: early exits, and several tasks on one backbone.

For each set and backbone a run, its cut by rule *within*, and the same cut with early exits that
lose less than two points on validation. Test accuracy, layers that a text runs through, and time
beside the cut itself and beside the shallowest single cut that passes the same test; all of them
alternate in one process. Then the three tasks of a backbone in one folder, beside three bundles.
Writes a section of docs/results.md.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.stored import RESULTS, trained, write_section
from chipviz.bundle import build, load
from chipviz.bundle.join import join
from chipviz.bundle.joined import load_joined
from chipviz.config import CutSpec, RunConfig, home_dir
from chipviz.data.from_table import load_task
from chipviz.keys import Cut
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder

SETS = ("sst2", "banking77", "bbc_news")
BACKBONES = (("minilm-l6", "mean"), ("smollm2-135m", "last"))
N_TEXTS = 400
"""Test texts that are timed."""
REPEATS = 3
MARGIN = 0.02


def alternating(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, one after the other, again and again."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [median(own) for own in times]


def measure(config: RunConfig, home: Path, name: str) -> tuple[str, Path, list[str]]:
    """A run, its cuts, and the row of its table; its plain bundle and test texts."""
    folder = RunFolder(home / "runs" / name)
    report = trained(config, home, folder)
    cut = report.select("within").cut
    places = home / "runs" / name / "bundle"
    shutil.rmtree(places, ignore_errors=True)

    def built(out: Path, spec: CutSpec) -> Any:
        build.build(folder, spec, home=home, out=out, progress=silent)
        return load(out, adaptive=spec.exit_margin is not None)

    fixed = built(places / "cut", CutSpec.at(cut, "within"))
    early = built(places / "early", CutSpec.at(cut, "within").asking(exit_margin=MARGIN))
    plan = early.metadata.exits
    single = built(places / "single", CutSpec.at(Cut(plan.fixed_layer, cut.chip)))
    test = load_task(config, home, silent).splits["test"]
    texts, names = test.texts[:N_TEXTS], report.task.label_names
    accuracies, layers = [], 0.0
    for model in (fixed, early, single):
        found = model.predict(test.texts)
        right = [p.label == names[y] for p, y in zip(found, test.labels, strict=True)]
        accuracies.append(100 * float(np.mean(right)))
        if model is early:
            layers = float(np.mean([p.layer + 1 for p in found]))
    seconds = alternating([lambda m=m: m.predict(texts) for m in (fixed, early, single)])
    row = (
        f"| {report.task.name}, {config.backbone} | {cut.layer + 1} | {accuracies[0]:.1f} % "
        f"| {layers:.1f} | {accuracies[1]:.1f} % ({100 * plan.test.accuracy_low:.1f} to "
        f"{100 * plan.test.accuracy_high:.1f}) | {seconds[1] / seconds[0]:.2f} "
        f"| {plan.fixed_layer + 1} | {accuracies[2]:.1f} % | {seconds[2] / seconds[0]:.2f} |"
    )
    return row, places / "cut", list(texts)


def together(
    backbone: str, bundles: Sequence[Path], texts: dict[str, list[str]], home: Path
) -> list[str]:
    """All tasks of a backbone in one folder, beside a bundle each: a row for each set's texts."""
    out = home / "joined" / backbone
    shutil.rmtree(out, ignore_errors=True)
    done = join(bundles, out, home=home, progress=silent, names=SETS[: len(bundles)])
    whole, alone = load_joined(out), [load(bundle) for bundle in bundles]
    n_alone = sum(task.n_parameters for task in done.tasks)
    depths = ", ".join(str(task.cut_layer + 1) for task in done.tasks)
    rows = []
    for name, own in texts.items():
        calls = [lambda t=own: [m.predict(t) for m in alone], lambda t=own: whole.predict(t)]
        seconds = alternating(calls)
        rows.append(
            f"| {backbone}: {', '.join(task.name for task in done.tasks)} | {depths} "
            f"| {done.n_parameters / 1e6:.1f} M | {n_alone / 1e6:.1f} M | {name} "
            f"| {seconds[1] / seconds[0]:.2f} | {done.max_difference:.0e} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, cut, time, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--backbones", nargs="+", default=[name for name, _ in BACKBONES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args(arguments)
    home = home_dir()
    first = [
        "Made by `python -m benchmarks.saving DATA_FOLDER`; not by hand. Texts of 64 tokens at "
        "most, float32, two cores. The exits lose less than two points to the cut on validation",
        "with 97.5 % confidence; *single* is the shallowest cut that passes the same test. Times "
        f"are of {N_TEXTS} test texts, beside the cut itself.",
        "",
        "| run | layers of the cut | its test accuracy | layers run by exits | their test accuracy "
        "(95 % interval) | time | layers of *single* | its test accuracy | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    second = [
        "",
        "Several tasks of one prompt in one folder, beside a bundle each: time of all tasks for "
        f"{N_TEXTS} texts. Texts longer than a task's own limit are read for it alone,",
        "since each cuts them elsewhere: short ones share a pass, those of bbc_news do not.",
        "",
        "| backbone and tasks | layers | parameters | of the bundles | texts of | time | largest "
        "difference |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for backbone, pooling in BACKBONES:
        if backbone not in options.backbones:
            continue
        bundles: list[Path] = []
        texts: dict[str, list[str]] = {}
        for data in options.sets:
            name = f"saving-{data}-{backbone}"
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
            config = RunConfig.checked(
                backbone=backbone,
                data=str(options.data / data),
                poolings=(pooling,),
                dtype="float32",
                folds=1,
                max_length=64,
                max_train=1_000,
                max_validation=800,
                max_test=1_000,
            )
            row, bundle, texts[data] = measure(config, home, name)
            first.append(row)
            bundles.append(bundle)
            write_section(options.out, "Early exits and shared backbones", [*first, *second])
        second += together(backbone, bundles, texts, home)
        write_section(options.out, "Early exits and shared backbones", [*first, *second])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
