"""`python -m benchmarks.joined DATA_FOLDER`: does joining layers beat the best of them?

Trains whole runs with Sparsify-then-Classify and reads their reports. Writes docs/stc.md, a set at
a time: what was measured when somebody stops it is there. A run that is there already is read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.stored import ROOT, finished, trained
from chipviz.config import RunConfig, home_dir
from chipviz.keys import STC, ChipKey, Cut
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder

SETS = ("sst2", "imdb", "subj", "bbc_news", "20newsgroups", "banking77")
BACKBONES = ("minilm-l6", "smollm2-135m")
MAX_LENGTH = 64
FEWER = {("smollm2-135m", "banking77"): 1_000}
"""Training texts where 77 classes on 30 layers would take half a day."""


@dataclass(frozen=True)
class Outcome:
    """One way of choosing a chip on validation, and what it reaches on test."""

    backbone: str
    data: str
    n_train: int
    way: str
    layer: int
    n_layers: int
    n_numbers: int
    """Numbers that the chip reads."""
    accuracy: float
    low: float
    high: float


def outcomes(report: RunReport, folder: RunFolder) -> list[Outcome]:
    """Every way, of one run."""
    n_layers, width = report.backbone.n_layers, report.backbone.hidden_size
    found = folder.read_neurons()
    assert found is not None  # the run joined neurons

    def best(name: str, wanted: Callable[[ChipKey, int], bool]) -> Outcome:
        scores = [
            s
            for s in report.scores
            if s.split == "validation" and s.layer >= 0 and wanted(s.key, s.layer)
        ]
        chosen = max(scores, key=lambda s: (s.accuracy, -s.layer))
        key, layer = chosen.key, chosen.layer
        test = report.score_at(Cut(layer, key), "test")
        return Outcome(
            report.backbone.name,
            report.task.name,
            report.task.n_train,
            name,
            layer,
            n_layers,
            width if key.kind == "linear" else found.n_read(key, layer),
            test.accuracy,
            test.accuracy_low,
            test.accuracy_high,
        )

    part = round(0.6 * n_layers) - 1
    last = n_layers - 1
    return [
        best("last layer, mean", lambda k, i: i == last and k == ChipKey.sound("mean")),
        best("best single chip", lambda k, _: k.word == "linear"),
        best("best L1 chip", lambda k, _: k.word == "sparse"),
        best("joined, 60 % of the layers", lambda k, i: k.recipe == STC and i <= part),
        best("joined, all layers", lambda k, i: k.recipe == STC and i <= last),
    ]


def page(found: Sequence[Outcome], max_train: int) -> str:
    """docs/stc.md."""
    lines = [
        "# Does joining layers beat the best of them?",
        "",
        f"Made by `python -m benchmarks.joined DATA_FOLDER --max-train {max_train}`; not by hand. "
        f"At most {max_train:,} training",
        f"texts, {MAX_LENGTH} tokens, no template, poolings that suit the backbone, sites block "
        "and ffn_in. Chip, site, pooling, eta,",
        "penalty and depth are chosen on validation; accuracy in % on test with its 95 % interval. "
        "The paper reports about",
        "one point for joined layers over the best one.",
        "",
        "| backbone | set | texts | chosen among | layer | numbers read | test accuracy | "
        "to single |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        same = [o for o in found if (o.backbone, o.data) == (one.backbone, one.data)]
        single = next(o.accuracy for o in same if o.way == "best single chip")
        lines.append(
            f"| {one.backbone} | {one.data} | {one.n_train:,} | {one.way} | {one.layer} of "
            f"{one.n_layers} | {one.n_numbers:,} | {100 * one.accuracy:.1f} "
            f"({100 * one.low:.1f} to {100 * one.high:.1f}) | "
            f"{100 * (one.accuracy - single):+.1f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, read, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joined", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--max-train", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "stc.md")
    parser.add_argument("--stored", action="store_true", help="write what is there, train nothing")
    options = parser.parse_args(arguments)
    found: list[Outcome] = []
    for backbone in options.backbones:
        for name in options.sets:
            sys.stderr.write(f"{backbone}, {name}\n")
            config = RunConfig.checked(
                backbone=backbone,
                data=str(options.data / name),
                max_train=min(options.max_train, FEWER.get((backbone, name), options.max_train)),
                max_validation=500,
                max_test=1_000,
                max_length=MAX_LENGTH,
                stc=True,
            )
            home = home_dir()
            folder = RunFolder(home / "runs" / f"joined-{backbone}-{name}")
            report = finished(config, folder) if options.stored else trained(config, home, folder)
            if report is None:
                continue
            found += outcomes(report, folder)
            options.out.write_text(page(found, options.max_train), "utf-8")
            sys.stdout.write(json.dumps([asdict(one) for one in found[-5:]]) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
