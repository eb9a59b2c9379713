"""`python -m benchmarks.tables DATA_FOLDER`: chips beside pruned and tuned models.

Tables 1, 3 and 9 of Chip-Tuning (arXiv:2410.06541) at the scale of two cores: what a model answers
by itself, what LoRA adds, what every way to prune leaves, and the same chip on all of them. Makes
models, trains runs, reads their reports, and writes a section of docs/results.md after each: what
was measured when somebody stops it is there.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.stored import RESULTS, finished, made, trained, write_section
from chipviz.config import RunConfig, home_dir
from chipviz.keys import Cut
from chipviz.results.compare import Compared, paired_difference
from chipviz.results.metrics import wilson_interval
from chipviz.results.models import Method, ModelSpec, made_folder
from chipviz.results.run_folder import RunFolder

TEMPLATES = {
    "sst2": "Review: {text}\nSentiment:",
    "subj": "Sentence: {text}\nSubjective or objective:",
    "bbc_news": "News: {text}\nTopic of this article:",
    "banking77": "Question: {text}\nTopic of this question:",
}
METHODS: tuple[Method, ...] = (
    "angular",
    "influence",
    "llm-pruner",
    "slicegpt",
    "laco",
    "laco-released",
    "blockpruner",
    "greedy",
    "top",
    "bottom",
    "middle",
    "alternate",
)
HEADING = "Chips beside pruned and tuned models"


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    layers: int
    n_train: int
    n_test: int
    epochs: int


@dataclass(frozen=True)
class Line:
    """One answer to a set's test texts."""

    model: str
    answered_by: str
    layers_left: int
    share_left: float
    """Of the dense model's parameters."""
    accuracy: float
    low: float
    high: float
    difference: tuple[float, float, float]
    """To the best chip on the dense model's last layer, with its interval."""


def config_of(data: Path, backbone: str, sizes: Sizes) -> RunConfig:
    """Settings of a run: the same texts for every backbone."""
    return RunConfig.checked(
        backbone=backbone,
        data=str(data),
        template=TEMPLATES[data.name],
        max_length=128,
        max_train=sizes.n_train,
        max_validation=200,
        max_test=sizes.n_test,
        folds=1,
    )


def pruned_spec(backbone: str, method: Method, layers: int) -> ModelSpec:
    """As `benchmarks.pruned` makes it, under the same name."""
    return ModelSpec.checked(
        name=f"bench-{method}-plain",
        backbone=backbone,
        method=method,
        layers=layers,
        fit={"tokens": 400_000, "batch": 8},
    )


def tuned_spec(backbone: str, data: Path, sizes: Sizes) -> ModelSpec:
    """LoRA on a set, of any backbone."""
    return ModelSpec.checked(
        name=f"lora-{data.name}-{Path(backbone).name}",
        backbone=backbone,
        method="lora",
        task=config_of(data, backbone, sizes),
        fit={"epochs": sizes.epochs},
    )


def compared(data: Path, backbone: str, sizes: Sizes, home: Path, train: bool) -> Compared | None:
    """A run on a backbone. None if it is not there and shall not be trained."""
    folder = RunFolder(home / "runs" / f"tables-{Path(backbone).name}-{data.name}")
    config = config_of(data, backbone, sizes)
    report = trained(config, home, folder) if train else finished(config, folder)
    return None if report is None else Compared(report, folder.read_predictions())


def lines_of(runs: Sequence[tuple[str, Compared]], sizes: Sizes) -> Iterator[Line]:
    """Every answer of every run, the dense one first."""
    dense = runs[0][1]
    reference = dense.predictions.at(dense.whole, "test") == dense.predictions.labels["test"]
    n_layers = dense.report.backbone.n_layers
    for name, run in runs:
        labels = run.predictions.labels["test"]
        last = run.report.backbone.n_layers - 1
        cuts = {"chip on the last layer": best_up_to(run, last, last)}
        if run is dense:
            kept = n_layers - sizes.layers - 1
            cuts[f"chip, cut to {kept + 1} blocks"] = best_up_to(run, 0, kept)
        cuts["chip, cut where it is best"] = best_up_to(run, 0, last)
        if run.predictions.asked is not None:
            right = run.predictions.asked == labels[: len(run.predictions.asked)]
            parameters = run.report.backbone.n_parameters
            yield _line(run, name, "itself", last, parameters, right, reference[: len(right)])
        for said, cut in cuts.items():
            right = run.predictions.at(cut, "test") == labels
            parameters = run.report.cost_at(cut).n_parameters
            yield _line(run, name, said, cut.layer, parameters, right, reference)


def best_up_to(run: Compared, first: int, last: int) -> Cut:
    """The chip that validation prefers on a range of layers, both included."""
    scores = [s for s in run.report.scores if s.split == "validation" and first <= s.layer <= last]
    return max(scores, key=lambda s: (s.accuracy, -s.layer)).cut


def _line(
    run: Compared,
    name: str,
    answered_by: str,
    layer: int,
    n_parameters: int,
    right: NDArray[np.bool_],
    reference: NDArray[np.bool_],
) -> Line:
    low, high = wilson_interval(int(right.sum()), len(right))
    return Line(
        model=name,
        answered_by=answered_by,
        layers_left=layer + 1,
        share_left=n_parameters / run.root.n_parameters,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        difference=paired_difference(right, reference),
    )


def section(found: dict[str, list[Line]], sizes: Sizes, backbone: str) -> list[str]:
    """A table for each set."""
    lines = [
        "Made by `python -m benchmarks.tables DATA_FOLDER`; not by hand. "
        f"{Path(backbone).name}; *pruned* models lost {sizes.layers} blocks or as",
        f"many parameters, chosen on BBC news. {sizes.n_train:,} training, 200 validation and "
        f"{sizes.n_test:,} test texts, the same for all. LoRA: "
        f"{sizes.epochs} epochs at most, on the",
        "training texts, every matrix, merged. *itself* answers with the likeliest label word. "
        "Chips are linear; pooling and",
        "layer are chosen on validation. Accuracy in % with its 95 % interval; the difference to "
        "the best chip on the dense model's last",
        "layer is paired. `CT` in the paper's tables is a chip that is cut.",
    ]
    for data, answers in found.items():
        lines += [
            "",
            f"### {data}",
            "",
            "| model | answered by | blocks read | parameters left | accuracy | to dense chip |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for one in answers:
            change, low, high = (100 * value for value in one.difference)
            lines.append(
                f"| {one.model} | {one.answered_by} | {one.layers_left} | "
                f"{100 * one.share_left:.1f} % | {100 * one.accuracy:.1f} "
                f"({100 * one.low:.1f} to {100 * one.high:.1f}) | "
                f"{change:+.1f} ({low:+.1f} to {high:+.1f}) |"
            )
    return lines


@dataclass(frozen=True)
class Step:
    """One row of work: a backbone on a set."""

    data: Path
    name: str
    backbone: str
    specs: tuple[ModelSpec, ...]
    """What has to be made first."""


def steps_of(
    data: Sequence[Path], backbone: str, methods: Sequence[Method], sizes: Sizes
) -> Iterator[Step]:
    """The dense model on every set, then every method on every set: breadth first."""
    for method in (None, *methods):
        spec = method and pruned_spec(backbone, method, sizes.layers)
        before = (spec,) if spec else ()
        base, name = (spec.name, str(method)) if spec else (backbone, "dense")
        for one in data:
            yield Step(one, name, base, before)
            tuned = tuned_spec(base, one, sizes)
            yield Step(one, f"{name}, LoRA", tuned.name, (*before, tuned))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, train, read, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of the data sets")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--sets", nargs="+", default=list(TEMPLATES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--max-train", type=int, default=600)
    parser.add_argument("--max-test", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stored", action="store_true", help="write what is there, make nothing")
    options: Any = parser.parse_args(arguments)
    sizes = Sizes(options.layers, options.max_train, options.max_test, options.epochs)
    home = home_dir()
    data = [options.data / name for name in options.sets]
    runs: dict[str, list[tuple[str, Compared]]] = {}
    for step in steps_of(data, options.backbone, options.methods, sizes):
        sys.stdout.write(f"{step.data.name}, {step.name}\n")
        sys.stdout.flush()
        if not options.stored:
            for spec in step.specs:
                made(spec, home)
        elif step.specs and made_folder(home, step.backbone) is None:
            continue
        run = compared(step.data, step.backbone, sizes, home, train=not options.stored)
        if run is None:
            continue
        runs.setdefault(step.data.name, []).append((step.name, run))
        found = {name: list(lines_of(some, sizes)) for name, some in runs.items()}
        write_section(options.out, HEADING, section(found, sizes, options.backbone))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
