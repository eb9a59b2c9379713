"""Laws of compared runs: the same texts, ratios of the model they come from, paired differences."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from chipviz.errors import ConfigError
from chipviz.keys import Cut
from chipviz.results.compare import (
    Compared,
    as_markdown,
    compare,
    paired_difference,
    reference_of,
)
from chipviz.results.models import Ancestor, Lineage
from chipviz.results.run_folder import Predictions
from tests.example_run import DENSE, LAYERS, report_of


def run(run_id="20261127-000000-0000", lineage=None, asked=None, texts="same", seed=0, **backbone):
    report = report_of(run_id)
    named = report.backbone.model_copy(update={"lineage": lineage, **backbone})
    task = report.task.model_copy(update={"test_fingerprint": texts})
    report = report.model_copy(update={"backbone": named, "task": task})
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 5, 400).astype(np.int32)
    classes = {}
    for split in ("validation", "test"):
        n = 200 if split == "validation" else 400
        for key in report.chips:
            rows = np.stack([labels[:n]] * LAYERS)
            for layer in range(LAYERS):
                accuracy = report.score_at(Cut(layer, key), split).accuracy
                wrong = draw.permutation(n)[: round(n * (1 - accuracy))]
                rows[layer, wrong] = (rows[layer, wrong] + 1) % 5
            classes[split, key] = rows
    truth = {"validation": labels[:200], "test": labels}
    return Compared(report, Predictions(truth, classes, asked))


def test_a_difference_is_paired_and_its_interval_is_scipys():
    draw = np.random.default_rng(0)
    one = draw.random(300) < 0.9
    other = one ^ (draw.random(300) < 0.1)
    difference, low, high = paired_difference(one, other)
    gain = one.astype(float) - other
    assert difference == pytest.approx(gain.mean())
    peer = bootstrap((gain,), np.mean, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=0.006)
    # Of two that err on the same texts the interval is a point, however often they err.
    assert paired_difference(one, one) == (0.0, 0.0, 0.0)


def test_a_made_models_ratios_are_of_the_model_that_it_was_made_of():
    root = Ancestor(name="root", n_layers=2 * LAYERS, n_parameters=2 * DENSE)
    child = run(lineage=Lineage(parent="x", method="top", root=root), name="half")
    whole = next(row for row in compare([child]) if row.mark == "whole")
    assert whole.layer_ratio == pytest.approx(0.5)
    assert whole.parameter_ratio == pytest.approx(1 - whole.n_parameters / (2 * DENSE))
    dense = next(row for row in compare([run()]) if row.mark == "whole")
    assert dense.layer_ratio == 0
    assert (dense.difference, dense.difference_low, dense.difference_high) == (0, 0, 0)


def test_the_reference_is_the_first_run_on_a_model_that_nobody_made():
    root = Ancestor(name="root", n_layers=LAYERS, n_parameters=DENSE)
    made = run("a", lineage=Lineage(parent="x", method="top", root=root))
    dense, later = run("b"), run("c")
    assert reference_of([made, dense, later]) is dense
    small = run("d", lineage=made.report.backbone.lineage, n_parameters=DENSE // 2)
    assert reference_of([small, made]) is made


def test_a_row_says_what_the_model_itself_answers_of_the_texts_it_was_asked():
    compared = run()
    asked = compared.predictions.labels["test"][:100].copy()
    asked[:25] = (asked[:25] + 1) % 5
    row = compare([Compared(compared.report, run(asked=asked).predictions)])[-1]
    assert (row.mark, row.n, row.accuracy) == ("itself", 100, 0.75)
    assert row.chip == ""


@pytest.mark.parametrize(
    ("texts", "said"), [("other", "were tested on other texts"), (None, "of an older version")]
)
def test_runs_of_other_texts_are_refused(texts, said):
    with pytest.raises(ConfigError, match=said):
        compare([run("a"), run("b", texts=texts)])


def test_names_end_no_cell_of_the_markdown():
    table = as_markdown(compare([run(name="a|b\n<script>`[x](y)")]))
    assert len(table.splitlines()) == 2 + 2
    assert {line.count("|") for line in table.splitlines()} == {8}
    assert "<script>" not in table
