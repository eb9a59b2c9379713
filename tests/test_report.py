"""A report says of a run what its tables hold, and comes back from JSON unchanged."""

import json

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from chipviz.report import Example, RunReport, load_examples, load_predictions
from tests.example_run import LAYERS, report_of

RUN = "20261121-235959-4f2a"


@pytest.fixture(scope="module")
def report():
    return report_of(RUN)


def test_a_report_comes_back_from_json_unchanged(report):
    assert RunReport.model_validate_json(report.model_dump_json()) == report


def test_a_report_has_the_keys_that_the_command_line_promises(report):
    values = json.loads(report.model_dump_json())
    top = {"run_id", "status", "preset", "backbone", "task", "timing", "scores", "controls"}
    assert top | {"selection"} <= set(values)
    assert set(values["backbone"]) >= {
        "name",
        "n_layers",
        "hidden_size",
        "n_parameters",
        "dtype",
        "device",
    }
    sizes = {"n_train", "n_validation", "n_test", "n_classes", "n_truncated", "max_length"}
    assert set(values["task"]) >= sizes | {"name", "label_names", "template"}
    seconds = {"load_s", "extract_s", "fit_s", "total_s"}
    assert set(values["timing"]) >= seconds | {"n_tokens", "tokens_per_s"}
    measured = {"n", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "log_loss", "ece"}
    assert set(values["scores"][0]) == measured | {"layer", "pooling", "chip", "split"}
    assert set(values["controls"]) == {"majority", "embedding", "tfidf"}
    chosen = {"cut_layer", "pooling", "chip", "why", "validation_accuracy", "test_accuracy"}
    ratios = {"layer_ratio", "parameter_ratio"}
    assert set(values["selection"]["within"]) == chosen | ratios


@pytest.mark.parametrize("layer", [-1, 0, LAYERS - 1])
def test_a_score_is_found_by_its_own_layer_pooling_and_split(report, layer):
    found = report.score_at(layer, "mean", "linear", "test")
    assert (found.layer, found.pooling, found.split) == (layer, "mean", "test")


@pytest.mark.parametrize("rule", ["validate", "within", "fixed"])
def test_a_choice_is_joined_with_the_score_and_the_cost_of_its_own_layer(report, rule):
    chosen = report.select(rule)
    cost = report.cost_at(chosen.cut_layer, chosen.pooling)
    score = report.score_at(chosen.cut_layer, chosen.pooling, chosen.chip, "test")
    assert chosen == report.selection[rule]
    assert chosen.test_accuracy == score.accuracy
    assert chosen.layer_ratio == pytest.approx((LAYERS - 1 - chosen.cut_layer) / LAYERS)
    assert chosen.parameter_ratio == cost.parameter_ratio


def test_a_manual_choice_reaches_every_layer(report):
    for layer in range(LAYERS):
        assert report.select("manual", layer=layer, pooling="last").cut_layer == layer


def test_a_report_with_a_field_nobody_knows_is_refused(report):
    values = json.loads(report.model_dump_json()) | {"surprise": 1}
    with pytest.raises(ValidationError, match="surprise"):
        RunReport.model_validate(values)


def test_examples_are_read_in_order_and_as_they_were(tmp_path):
    kept = [
        Example(text="two\nlines, \u2028 and a separator", label=1),
        Example(text="", text_pair="b", label=0),
    ]
    lines = "\n".join(example.model_dump_json() for example in kept)
    (tmp_path / "examples.jsonl").write_text(lines, "utf-8")
    assert load_examples(tmp_path) == kept


def test_a_run_that_keeps_no_examples_yet_has_none(tmp_path):
    assert load_examples(tmp_path) == []


def test_predictions_are_read_as_they_were_kept(tmp_path):
    kept = {
        "labels.test": np.array([0, 1, 2], dtype=np.int32),
        "test.last.linear": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    save_file(kept, tmp_path / "predictions.safetensors")
    found = load_predictions(tmp_path)
    assert set(found) == set(kept)
    assert all((found[name] == kept[name]).all() for name in kept)
