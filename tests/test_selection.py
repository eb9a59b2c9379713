"""Rules name the shallowest layer that keeps their promise, and look at validation alone."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chipviz.errors import ConfigError
from chipviz.metrics import Score
from chipviz.selection import fixed_layer, select

ACCURACIES = st.lists(st.integers(0, 200).map(lambda n: n / 200), min_size=1, max_size=40)
"""What 200 validation texts can say of each layer."""


def point(layer, accuracy, *, pooling="last", split="validation", log_loss=1.0):
    return Score(
        layer=layer,
        pooling=pooling,
        chip="linear",
        split=split,
        n=200,
        accuracy=accuracy,
        accuracy_low=accuracy,
        accuracy_high=accuracy,
        macro_f1=accuracy,
        log_loss=log_loss,
        ece=0.0,
    )


def curve(accuracies, pooling="last"):
    return [point(layer, value, pooling=pooling) for layer, value in enumerate(accuracies)]


DRASTIC = [0.30, 0.50, 0.52, 0.90, 0.95, 0.95, 0.91]


def test_validate_takes_the_best_layer_and_says_its_accuracy():
    chosen = select(curve(DRASTIC), "validate")
    assert (chosen.cut_layer, chosen.validation_accuracy) == (4, 0.95)
    assert "95.0 %" in chosen.why


def test_within_takes_the_shallowest_layer_near_the_best_and_says_both():
    chosen = select(curve(DRASTIC), "within", tolerance=0.05)
    assert chosen.cut_layer == 3
    assert "within 5 points" in chosen.why
    assert "layer 4" in chosen.why


def test_fixed_takes_the_depth_of_the_paper():
    assert [fixed_layer(n) for n in (32, 40)] == [20, 25]
    chosen = select(curve([0.1] * 32), "fixed")
    assert chosen.cut_layer == 20
    assert "5/8 of 32" in chosen.why


@given(st.integers(1, 200))
def test_the_fixed_depth_is_a_layer_of_every_model(n_layers):
    assert 0 <= fixed_layer(n_layers) < n_layers


@given(ACCURACIES, st.floats(0, 0.5))
def test_within_is_never_deeper_than_needed_and_keeps_its_promise(accuracies, tolerance):
    chosen = select(curve(accuracies), "within", tolerance=tolerance)
    floor = max(accuracies) - tolerance
    assert chosen.validation_accuracy == accuracies[chosen.cut_layer]
    assert chosen.validation_accuracy >= floor - 1e-9
    assert all(value < floor + 1e-9 for value in accuracies[: chosen.cut_layer])


@given(ACCURACIES)
def test_validate_gives_the_first_of_the_best_layers(accuracies):
    assert select(curve(accuracies), "validate").cut_layer == accuracies.index(max(accuracies))


@given(ACCURACIES)
def test_within_is_never_deeper_than_validate_and_is_it_at_no_tolerance(accuracies):
    table = curve(accuracies)
    best = select(table, "validate").cut_layer
    assert select(table, "within").cut_layer <= best
    assert select(table, "within", tolerance=0.0).cut_layer == best


@given(ACCURACIES, st.data())
def test_a_useless_deep_layer_changes_no_choice(accuracies, data):
    useless = data.draw(st.floats(0, max(accuracies)))
    longer = [*accuracies, useless]
    for rule in ("validate", "within"):
        before, after = select(curve(accuracies), rule), select(curve(longer), rule)
        assert before == after


@given(ACCURACIES, st.randoms(use_true_random=False))
def test_the_order_of_the_table_changes_no_choice(accuracies, draw):
    table = curve(accuracies) + curve(accuracies[::-1], pooling="mean")
    for i, row in enumerate(table):
        object.__setattr__(row, "log_loss", float(i))
    shuffled = draw.sample(table, len(table))
    for rule in ("validate", "within", "fixed"):
        assert select(table, rule) == select(shuffled, rule)


@given(ACCURACIES, ACCURACIES)
def test_test_scores_and_the_embedding_change_no_choice(accuracies, others):
    assume(len(others) <= len(accuracies))
    table = curve(accuracies)
    noise = [point(layer, value, split="test") for layer, value in enumerate(others)]
    noise += [point(-1, 1.0), point(-1, 1.0, split="test")]
    for rule in ("validate", "within", "fixed"):
        assert select(noise + table, rule) == select(table, rule)


def test_a_tie_of_poolings_at_one_layer_goes_to_the_lower_log_loss():
    table = [point(2, 0.9, log_loss=0.4), point(2, 0.9, pooling="mean", log_loss=0.3)]
    assert select(table, "validate").pooling == "mean"
    assert select(table, "within").pooling == "mean"


def test_a_shallower_layer_of_another_pooling_wins_the_tie():
    table = curve([0.1, 0.2, 0.9]) + curve([0.1, 0.9, 0.3], pooling="mean")
    chosen = select(table, "validate")
    assert (chosen.cut_layer, chosen.pooling) == (1, "mean")


def test_a_named_pooling_is_the_only_one_looked_at():
    table = curve(DRASTIC) + curve([0.99] * 7, pooling="mean")
    assert select(table, "within", pooling="last").pooling == "last"
    assert select(table, "within").cut_layer == 0


def test_manual_takes_the_users_layer_and_its_best_pooling():
    table = curve([0.5, 0.6]) + curve([0.7, 0.8], pooling="mean")
    chosen = select(table, "manual", layer=0)
    assert (chosen.cut_layer, chosen.pooling, chosen.why) == (0, "mean", "chosen by hand")


@pytest.mark.parametrize("layer", [-2, -1, 7, 10_000])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(layer):
    with pytest.raises(ConfigError, match=rf"Layer {layer} does not exist, layers are 0 to 6"):
        select(curve(DRASTIC), "manual", layer=layer)


def test_manual_without_a_layer_is_refused():
    with pytest.raises(ConfigError, match="needs a layer") as refused:
        select(curve(DRASTIC), "manual")
    assert "0 to 6" in refused.value.hint


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 5.0, float("nan")])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    with pytest.raises(ConfigError, match="tolerance is"):
        select(curve(DRASTIC), "within", tolerance=tolerance)


@pytest.mark.parametrize("scores", [[], [point(0, 1.0, split="test")], [point(-1, 1.0)]])
def test_a_table_without_validation_scores_is_refused(scores):
    with pytest.raises(ConfigError, match="No validation score"):
        select(scores, "validate")


def test_a_pooling_that_was_not_trained_is_refused_by_name():
    with pytest.raises(ConfigError, match="pooling mean"):
        select(curve(DRASTIC), "within", pooling="mean")
