"""A report says of a run what its tables hold, and comes back from JSON unchanged."""

import json
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from chipviz.config import Rule
from chipviz.errors import ConfigError
from chipviz.report import Example, RunReport, load_correct, load_examples, load_predictions
from tests.example_run import CHIPS, LAYERS, correct, report_of, write_files

RUN = "20261121-235959-4f2a"
RULES = [rule for rule in get_args(Rule) if rule != "manual"]
BOTH_KINDS = (*CHIPS, ("mlp", "mean"))


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
    measured = {"accuracy", "macro_f1", "log_loss", "ece"}
    measured |= {f"{name}_{end}" for name in measured for end in ("low", "high")}
    place = {"layer", "pooling", "chip", "split"}
    assert set(values["scores"][0]) == measured | place | {"n", "repeats"}
    assert set(values["controls"]) == {"majority", "embedding", "tfidf"}
    chosen = {"cut_layer", "pooling", "chip", "why", "validation_accuracy", "test_accuracy"}
    ratios = {"layer_ratio", "parameter_ratio"}
    assert set(values["selection"]) == set(RULES)
    assert all(set(said) == chosen | ratios for said in values["selection"].values())


@pytest.mark.parametrize("layer", [-1, 0, LAYERS - 1])
def test_a_score_is_found_by_its_own_layer_pooling_and_split(report, layer):
    found = report.score_at(layer, "mean", "linear", "test")
    assert (found.layer, found.pooling, found.split) == (layer, "mean", "test")


@pytest.mark.parametrize("rule", RULES)
def test_a_choice_is_joined_with_the_score_and_the_cost_of_its_own_layer(report, rule):
    chosen = report.select(rule, correct=correct())
    cost = report.cost_at(chosen.cut_layer, chosen.pooling, chosen.chip)
    score = report.score_at(chosen.cut_layer, chosen.pooling, chosen.chip, "test")
    assert chosen == report.selection[rule]
    assert chosen.test_accuracy == score.accuracy
    on_validation = report.score_at(chosen.cut_layer, chosen.pooling, chosen.chip, "validation")
    assert chosen.validation_accuracy == on_validation.accuracy
    assert chosen.layer_ratio == pytest.approx((LAYERS - 1 - chosen.cut_layer) / LAYERS)
    assert chosen.parameter_ratio == cost.parameter_ratio


def test_a_manual_choice_reaches_every_layer(report):
    for layer in range(LAYERS):
        assert report.select("manual", layer=layer, pooling="last").cut_layer == layer


def test_chips_of_two_kinds_on_one_pooling_keep_their_own_scores_and_costs():
    report = report_of(RUN, chips=BOTH_KINDS)
    for kind in ("linear", "mlp"):
        for layer in (0, LAYERS - 1):
            assert report.score_at(layer, "mean", kind, "test").chip == kind
            cost = report.cost_at(layer, "mean", kind)
            assert (cost.layer, cost.chip) == (layer, kind)
        chosen = report.select("validate", chip=kind)
        cost = report.cost_at(chosen.cut_layer, chosen.pooling, kind)
        assert (chosen.chip, chosen.parameter_ratio) == (kind, cost.parameter_ratio)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_budget_limits_what_the_chosen_cut_costs(report, share):
    for quantity, field in (("parameters", "n_parameters"), ("memory", "weight_bytes")):
        bare = report.model_copy(
            update={
                "dense": report.dense.model_copy(update={"peak_bytes": None}),
                "costs": [c.model_copy(update={"peak_bytes": None}) for c in report.costs],
            }
        )
        chosen = bare.select("budget", budget=f"{quantity}={100 * share:g}%")
        cost = bare.cost_at(chosen.cut_layer, chosen.pooling, chosen.chip)
        assert getattr(cost, field) <= share * getattr(bare.dense, field)


def test_the_default_budget_is_half_of_the_parameters(report):
    assert report.select("budget") == report.select("budget", budget="parameters=50%")


def test_a_budget_of_what_was_not_measured_is_refused(report):
    dense = report.dense.model_copy(update={"latency_s": None})
    with pytest.raises(ConfigError, match="latency of this run"):
        report.model_copy(update={"dense": dense}).select("budget", budget="latency=20ms")


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


def test_what_each_chip_got_right_comes_from_its_own_predictions(tmp_path):
    """Layer by layer, against the drawn hits that the predictions were made of."""
    write_files(tmp_path, [Example(text="a", label=i % 5) for i in range(400)])
    found, hits = load_correct(tmp_path), correct()
    assert set(found) == set(hits)
    assert all((found[key] == hits[key]).all() for key in hits)


def test_what_each_chip_got_right_agrees_with_its_scores(report):
    for (kind, pooling), hits in correct().items():
        for layer in range(LAYERS):
            score = report.score_at(layer, pooling, kind, "validation")
            assert hits[layer].mean() == pytest.approx(score.accuracy)
