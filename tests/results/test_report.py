"""A report says of a run what its tables hold, and comes back from JSON unchanged."""

import json
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from chipviz.config import Rule
from chipviz.errors import ConfigError
from chipviz.keys import ChipKey, Cut
from chipviz.results.report import Example, RunReport
from chipviz.results.run_folder import Predictions, RunFolder
from tests.example_run import CHIPS, LAYERS, correct, report_of, write_files

RUN = "20261121-235959-4f2a"
RULES = [rule for rule in get_args(Rule) if rule != "manual"]
BOTH_KINDS = (*CHIPS, ChipKey.sound("mean", "mlp"))


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
    chip = {"recipe", "site", "pooling", "chip"}
    place = {"layer", "split"} | chip
    assert set(values["scores"][0]) == measured | place | {
        "n",
        "repeats",
        "auroc",
        "average_precision",
    }
    assert set(values["controls"]) == {
        "majority",
        "embedding",
        "tfidf",
        "tfidf_whole",
        "pixels",
        "colours",
        "zero_shot",
        "n_zero_shot",
    }
    chosen = {"cut_layer", "why", "validation_accuracy", "test_accuracy"} | chip
    ratios = {"layer_ratio", "parameter_ratio"}
    assert set(values["selection"]) == set(RULES)
    assert all(set(said) == chosen | ratios for said in values["selection"].values())


@pytest.mark.parametrize("layer", [-1, 0, LAYERS - 1])
def test_a_score_is_found_by_its_own_layer_pooling_and_split(report, layer):
    cut = Cut(layer, ChipKey.sound("mean"))
    found = report.score_at(cut, "test")
    assert (found.cut, found.split) == (cut, "test")


@pytest.mark.parametrize("rule", RULES)
def test_a_choice_is_joined_with_the_score_and_the_cost_of_its_own_layer(report, rule):
    chosen = report.select(rule, correct=correct())
    cost, score = report.cost_at(chosen.cut), report.score_at(chosen.cut, "test")
    assert chosen.test_accuracy == score.accuracy
    assert chosen.validation_accuracy == report.score_at(chosen.cut, "validation").accuracy
    assert chosen.layer_ratio == pytest.approx((LAYERS - 1 - chosen.cut_layer) / LAYERS)
    assert chosen.parameter_ratio == cost.parameter_ratio


def test_a_manual_choice_reaches_every_layer(report):
    for layer in range(LAYERS):
        assert report.select("manual", layer=layer, pooling="last").cut_layer == layer


def test_chips_of_two_kinds_on_one_pooling_keep_their_own_scores_and_costs():
    report = report_of(RUN, chips=BOTH_KINDS)
    for kind in ("linear", "mlp"):
        for layer in (0, LAYERS - 1):
            cut = Cut(layer, ChipKey.sound("mean", kind))
            assert report.score_at(cut, "test").cut == report.cost_at(cut).cut == cut
        chosen = report.select("validate", chip=kind)
        cost = report.cost_at(chosen.cut)
        assert (chosen.chip, chosen.parameter_ratio) == (kind, cost.parameter_ratio)


def test_a_chip_that_was_not_trained_is_refused_by_name(report):
    with pytest.raises(ConfigError, match="no chip of pooling max"):
        report.select("within", pooling="max")
    with pytest.raises(ConfigError, match="kind mlp"):
        report.select("within", chip="mlp")


def test_a_record_of_an_earlier_version_calls_the_published_recipe_a_pooling(report):
    values = json.loads(report.scores[0].model_dump_json())
    old = {name: values[name] for name in values if name not in ("recipe", "site")}
    score = type(report.scores[0]).model_validate(old | {"pooling": "raw", "chip": "mlp"})
    assert score.key == ChipKey.published("mlp")


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
        cost = bare.cost_at(chosen.cut)
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
    RunFolder(tmp_path).write_examples("test", kept)
    assert RunFolder(tmp_path).read_examples("test") == kept


def test_a_run_that_keeps_no_examples_yet_has_none(tmp_path):
    assert RunFolder(tmp_path).read_examples("test") == []


def test_predictions_are_read_as_they_were_kept(tmp_path):
    labels = {"test": np.array([0, 1, 2], dtype=np.int32)}
    keys = (ChipKey.sound("last"), ChipKey.published("mlp"))
    classes = {
        ("test", key): np.arange(i, 6 + i, dtype=np.int32).reshape(2, 3)
        for i, key in enumerate(keys)
    }
    RunFolder(tmp_path).write_predictions(Predictions(labels, classes))
    found = RunFolder(tmp_path).read_predictions()
    assert found.classes.keys() == classes.keys()
    assert all((found.classes[key] == classes[key]).all() for key in classes)
    assert (found.labels["test"] == labels["test"]).all()
    assert found.at(Cut(1, keys[0]), "test").tolist() == [3, 4, 5]


def test_what_each_chip_got_right_comes_from_its_own_predictions(tmp_path):
    """Layer by layer, against the drawn hits that the predictions were made of."""
    write_files(RunFolder(tmp_path), [Example(text="a", label=i % 5) for i in range(400)])
    found, hits = RunFolder(tmp_path).read_predictions().correct, correct()
    assert set(found) == set(hits)
    assert all((found[key] == hits[key]).all() for key in hits)
