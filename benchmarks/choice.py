"""`python -m benchmarks.choice DATA_FOLDER`: what the choice of a cut rests on.

Draws few labelled texts many times, chooses a cut with each way of using them, and asks the test
texts what came of it. Writes a section of docs/results.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.stored import RESULTS, write_section
from chipviz.backbones.backbone import Backbone, load_backbone
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.find import find_model
from chipviz.chips.chip import Chips
from chipviz.chips.rows import Rows
from chipviz.chips.scoring import score
from chipviz.chips.training import Trainer
from chipviz.config import DEFAULT_FOLDS, RunConfig, home_dir
from chipviz.data.from_table import load_task
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.data.splits import fold_of, stratified_order
from chipviz.data.task import Examples, Task
from chipviz.features.forward import pooling_pass
from chipviz.keys import ChipKey, Cut, Vector
from chipviz.parallel import Pool
from chipviz.progress import silent
from chipviz.results import metrics
from chipviz.results.metrics import Score
from chipviz.results.selection import select

SETS = ("sst2", "subj", "banking77", "bbc_news")
SIZES = (300, 1_000)
HELD_OUT = 0.2
"""Share of the labelled texts that are the validation split."""
POOL, TEST = 3_000, 1_000
"""Texts that draws are taken from, and that they are tested on, at most."""
WAYS = ("hold-out", "hold-out, refit", "folds, refit")
RULES = ("validate", "within")


@dataclass(frozen=True)
class Outcome:
    """What one way of choosing came to on one draw."""

    data: str
    n: int
    draw: int
    way: str
    rule: str
    layer: int
    test_accuracy: float
    best_test_accuracy: float
    """Of the layer that is best on test, among the same chips."""


class InMemory:
    """Hidden states of some rows, as a fit reads them from disk."""

    def __init__(self, states: dict[str, Tensor], vector: Vector) -> None:
        self._states = states
        self.n_layers = len(states["test"]) - 1
        self.widths = {vector.site: states["test"].shape[-1]}

    def read(self, split: str, _vector: Vector, layer: int, start: int, stop: int) -> Tensor:
        """Rows of one layer, shape (stop - start, D). Layer -1 is the embedding."""
        return self._states[split][layer + 1, start:stop]


def states_of(backbone: Backbone, prompt: Any, rows: Examples, vector: Vector) -> Tensor:
    """Pooled states of every text, shape (L + 1, N, D)."""
    ids = prompt.encode(rows.texts, rows.pairs)
    found = torch.empty(backbone.n_layers + 1, len(rows), backbone.hidden_size)
    with pooling_pass(backbone, prompt.tokenizer.pad_token_id, [vector]) as forward:
        for batch in batches(list(map(len, ids)), batch_tokens(backbone.device)):
            found[:, batch] = forward([ids[row] for row in batch])[0]
    return found


def outcomes(
    task: Task, pool: Tensor, test: Tensor, key: ChipKey, n: int, draw: int
) -> Iterator[Outcome]:
    """Choose and test once in every way, on one draw of `n` labelled texts."""
    rng = np.random.default_rng(1_000 * n + draw)
    order = stratified_order(task.splits["train"].labels, rng)[:n]
    n_held = round(HELD_OUT * n)
    parts = {"validation": order[:n_held], "train": order[n_held:]}
    splits = {name: task.splits["train"].take(rows) for name, rows in parts.items()}
    drawn = Task(task.name, task.label_names, cast(Any, splits | {"test": task.splits["test"]}))
    states = {name: pool[:, torch.from_numpy(rows)] for name, rows in parts.items()}
    features = cast(Any, InMemory(states | {"test": test}, key.vector))
    for folded in (False, True):
        fold = fold_of(splits["train"].joined(splits["validation"]), DEFAULT_FOLDS, draw)
        trained, chips = _fit(replace(drawn, fold=fold if folded else None), features, key)
        for way, scores in _ways(trained, chips, features, drawn, key, folded):
            for rule in RULES:
                chosen = select(scores, cast(Any, rule)).cut
                on_test = {s.layer: s.accuracy for s in scores if s.split == "test"}
                best = max(value for layer, value in on_test.items() if layer >= 0)
                layer = chosen.layer
                yield Outcome(task.name, n, draw, way, rule, layer, on_test[layer], best)


def _fit(task: Task, features: Any, key: ChipKey) -> tuple[list[Score], Chips]:
    config = RunConfig.checked(backbone="x", data="y", poolings=(key.pooling,))
    place = torch.device("cpu")
    with Pool(place) as pool:
        trainer = Trainer(task, config, place, pool, silent, lambda _: None)
        chips = trainer.fit(features)
        rows = Rows(features, task, place)
        return score(rows, chips, config.seed, silent).scores, chips


def _ways(
    scores: list[Score], chips: Chips, features: Any, task: Task, key: ChipKey, folded: bool
) -> Iterator[tuple[str, list[Score]]]:
    """Score tables: with the shipped chips on test, and with those of the training rows alone."""
    yield WAYS[2 if folded else 1], scores
    if folded:
        return
    labels = task.splits["test"].labels
    before = []
    for row in scores:
        if row.split == "test":
            chip = chips.at(Cut(row.layer, key), train_only=True)
            said = chip.logits(features.read("test", key.vector, row.layer, 0, len(labels)))
            right = float(np.mean(said.argmax(dim=1).numpy() == labels))
            before.append(row.model_copy(update={"accuracy": right}))
        else:
            before.append(row)
    yield WAYS[0], before


def measure(folder: Path, n_draws: int, sizes: Sequence[int], pooling: str) -> Iterator[Outcome]:
    """All sets, draw by draw: what was measured when somebody stops it is whole draws."""
    backbone = load_backbone(find_model("smollm2-135m", home_dir()))
    key = ChipKey.named(pooling, "linear")
    read = {name: _read(backbone, folder / name, key.vector) for name in SETS}
    metrics.N_RESAMPLES = 2  # nobody looks at intervals here
    for draw in range(n_draws):
        for name, (task, pool, test) in read.items():
            for n in sizes:
                sys.stderr.write(f"draw {draw + 1} of {n_draws}: {name}, {n} texts\n")
                yield from outcomes(task, pool, test, key, n, draw)


def _read(backbone: Backbone, folder: Path, vector: Vector) -> tuple[Task, Tensor, Tensor]:
    """A set, and the states of its training and test texts."""
    config = RunConfig.checked(
        backbone="x", data=str(folder), max_length=64, max_train=POOL, max_test=TEST
    )
    task = load_task(config, home_dir(), silent)
    tokenizer = load_tokenizer(backbone.folder.path)
    prompt = bake(tokenizer, task.template, config.max_length, task.splits["train"])
    train, test = (
        states_of(backbone, prompt, task.splits[split], vector)
        for split in cast(Any, ("train", "test"))
    )
    return task, train, test


def table(found: Sequence[Outcome]) -> str:
    """Means and spreads over draws, as Markdown."""
    lines = [
        "| set | labelled texts | rule | way | test accuracy | lost to the best layer | layer |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    cells = list(dict.fromkeys((o.data, o.n, o.rule) for o in found))
    for data, n, rule in cells:
        for way in WAYS:
            of = [o for o in found if (o.data, o.n, o.rule, o.way) == (data, n, rule, way)]
            accuracy = [100 * o.test_accuracy for o in of]
            lost = [100 * (o.best_test_accuracy - o.test_accuracy) for o in of]
            layers = [float(o.layer) for o in of]
            lines.append(
                f"| {data} | {n:,} | {rule} | {way} | {_spread(accuracy)} | {_spread(lost)} | "
                f"{_spread(layers)} |"
            )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"


def section(found: Sequence[Outcome], n_draws: int, pooling: str) -> list[str]:
    """A section of docs/results.md."""
    return [
        f"Made by `python -m benchmarks.choice DATA_FOLDER --draws {n_draws}`; not by hand. "
        f"SmolLM2-135M, {pooling} of all tokens,",
        f"at most 64 tokens, no template. Each row: {n_draws} draws of so many labelled texts, "
        "mean ± standard",
        "deviation. *hold-out* fits on four fifths, and a fifth chooses strength and layer; "
        "*refit* fits the chosen",
        "strength once more on all; *folds* asks every labelled text of a chip that was fitted "
        f"on the other {DEFAULT_FOLDS - 1} of",
        f"{DEFAULT_FOLDS} folds. Accuracy in %, on up to {TEST:,} test texts that had no part "
        "in it; the best layer is the",
        "best on these very texts, of the same chips.",
        "",
        table(found),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of sst2, subj, banking77 and bbc_news")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = []
    for outcome in measure(options.data, options.draws, options.sizes, options.pooling):
        found.append(outcome)
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()
    lines = section(found, options.draws, options.pooling)
    write_section(options.out, "What a choice rests on", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
