"""Settings are checked once at the door, and come back from JSON as they went in."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chipviz.config import EXAMPLE, CutSpec, RunConfig, home_dir
from chipviz.errors import ConfigError

NEEDED = {"backbone": "tiny", "data": "toy.csv"}
SIZES = st.none() | st.integers(2, 10**6)


@given(
    backbone=st.text(min_size=1, max_size=40),
    template=st.none() | st.text(max_size=60),
    max_train=SIZES,
    max_length=st.integers(1, 10**5),
    poolings=st.sampled_from([("last",), ("mean",), ("last", "mean"), ("mean", "last")]),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_config_comes_back_from_json_as_it_went_in(**values):
    config = RunConfig.checked(data="toy", **values)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_the_example_is_a_config_that_takes_what_it_says():
    config = RunConfig.checked(**EXAMPLE)
    assert {name: getattr(config, name) for name in EXAMPLE} == EXAMPLE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", ""),
        ("backbone", "x" * 5000),
        ("data", ""),
        ("max_train", 1),
        ("max_validation", 0),
        ("max_test", -5),
        ("max_length", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("preset", "loud"),
        ("poolings", ("median",)),
        ("chips", ()),
        ("chips", ("forest",)),
        ("dtype", "int8"),
        ("blocks", "x" * 300),
        ("batch_size", 4),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_its_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}") as refused:
        RunConfig.checked(**{**NEEDED, field: value})
    assert field in refused.value.hint
    assert "\n" not in refused.value.message


def test_a_missing_setting_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"^data: "):
        RunConfig.checked(backbone="tiny")


def test_a_pooling_named_twice_counts_once_and_keeps_its_place():
    config = RunConfig.checked(**NEEDED, poolings=("mean", "last", "mean"))
    assert config.poolings == ("mean", "last")


@pytest.mark.parametrize(("causal", "own"), [(True, "last"), (False, "first")])
def test_poolings_that_nobody_named_are_those_that_suit_the_backbone(causal, own):
    config = RunConfig.checked(**NEEDED, preset="published")
    kept = [vector.name for vector in config.resolved(causal=causal).vectors]
    assert kept == ["raw", own, "mean"]
    named = RunConfig.checked(**NEEDED, poolings=("max",))
    assert named.resolved(causal=causal) is named


def test_a_config_cannot_be_changed_once_it_is_made():
    config = RunConfig.checked(**NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3


def test_a_cut_names_a_layer_from_zero():
    assert CutSpec(cut_layer=0, pooling="mean").rule == "manual"
    with pytest.raises(ValidationError, match="cut_layer"):
        CutSpec(cut_layer=-1, pooling="mean")


def test_home_is_what_was_asked_for_then_the_environment_then_the_users_folder(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "environment"))
    assert home_dir(tmp_path / "asked") == tmp_path / "asked"
    assert home_dir() == tmp_path / "environment"
    monkeypatch.delenv("CHIPVIZ_HOME")
    assert home_dir() == Path.home() / ".chipviz"


def test_home_does_not_move_when_the_working_folder_does(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert home_dir("here") == tmp_path / "here"


def test_every_setting_has_a_label_and_a_sentence_that_both_faces_show():
    for name, field in RunConfig.model_fields.items():
        assert field.title, name
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_settings_that_change_nothing_read_are_those_of_the_fit():
    assert set(RunConfig.model_fields) - RunConfig.reads() == {
        *("chips", "class_weight", "refit", "folds", "repeats"),
        *("importance", "layer_weights"),
    }
