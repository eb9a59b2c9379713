"""Rules name the shallowest layer that keeps their promise, and look at validation alone."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipviz.config import DEFAULT_MARGIN, Rule
from chipviz.errors import ConfigError
from chipviz.keys import ChipKey, Cut
from chipviz.results.metrics import Score, paired_lower_bound
from chipviz.results.selection import (
    DEFAULT_BUDGET,
    Budget,
    fixed_layer,
    parse_budget,
    select,
)

N = 200
RULES = tuple(rule for rule in get_args(Rule) if rule != "manual")
TOWARDS_THE_BEST = ("within", "non-inferior", "elbow")
"""Rules that give up accuracy for depth, and so never cut deeper than the best layer."""
DRASTIC = [0.30, 0.50, 0.52, 0.90, 0.95, 0.95, 0.91]
SLOW = [0.50 + 0.04 * layer for layer in range(11)]


def point(layer, accuracy, *, pooling="last", chip="linear", split="validation", log_loss=1.0):
    ends = dict.fromkeys(("accuracy", "macro_f1", "log_loss", "ece"), accuracy)
    intervals = {f"{name}_{end}": at for name, at in ends.items() for end in ("low", "high")}
    return Score(
        layer=layer,
        pooling=pooling,
        chip=chip,
        split=split,
        n=N,
        accuracy=accuracy,
        macro_f1=accuracy,
        log_loss=log_loss,
        ece=0.0,
        **intervals,
    )


def curve(accuracies, **where):
    return [point(layer, value, **where) for layer, value in enumerate(accuracies)]


def hits_of(table):
    """Drawn answers with the accuracies of the table: hard texts are mostly hard for all chips."""
    draw = np.random.default_rng(0)
    hard = draw.random(N)
    found = {}
    for s in sorted(table, key=lambda s: (s.key.name, s.layer)):
        row = np.zeros(N, dtype=bool)
        row[np.argsort(hard + 0.1 * draw.random(N))[: round(N * s.accuracy)]] = True
        found.setdefault(s.key, []).append(row)
    return {key: np.stack(rows) for key, rows in found.items()}


@dataclass(frozen=True)
class World:
    """A score table with what the rules ask for beside it."""

    table: list

    @cached_property
    def hits(self):
        return hits_of(s for s in self.table if s.split == "validation")

    def choose(self, rule, **options):
        cuts = {s.cut for s in self.table}
        costs = {cut: 10.0 * cut.layer + 5.0 * (cut.chip.kind == "mlp") for cut in cuts}
        given = {"correct": self.hits}
        given |= {"costs": costs, "budget": Budget("parameters", 40.0, "40 parameters")}
        return select(self.table, rule, **(given | options))


ACCURACIES = st.lists(st.integers(0, N).map(lambda n: n / N), min_size=1, max_size=30)
"""What 200 validation texts can say of each layer."""


@st.composite
def worlds(draw):
    """Up to four chips on the same few layers: drawn curves with ties, rises, falls and noise."""
    n_layers = draw(st.integers(1, 9))
    levels = st.sampled_from([0.25, 0.3, 0.6, 0.85, 0.9, 0.905, 0.91, 0.95])
    values = st.lists(levels, min_size=n_layers, max_size=n_layers)
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(["linear", "mlp"]), st.sampled_from(["last", "mean"])),
            min_size=1,
            unique=True,
        )
    )
    table = []
    for chip, pooling in keys:
        table += curve(draw(values), pooling=pooling, chip=chip)
        table += curve(draw(values), pooling=pooling, chip=chip, split="test")
    return World(table)


def accuracy_at(world, choice, split="validation"):
    (found,) = (s for s in world.table if (s.cut, s.split) == (choice.cut, split))
    return found.accuracy


# What each rule says of curves whose answer is known.


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        pytest.param(
            DRASTIC, {"validate": 4, "within": 4, "non-inferior": 4, "elbow": 3}, id="drastic"
        ),
        pytest.param(
            SLOW, {"validate": 10, "within": 10, "non-inferior": 10, "elbow": 9}, id="slow rise"
        ),
        pytest.param(
            [0.25] * 8, dict.fromkeys([*TOWARDS_THE_BEST, "validate"], 0), id="flat at chance"
        ),
        pytest.param(
            [0.9, 0.8, 0.7, 0.6], dict.fromkeys([*TOWARDS_THE_BEST, "validate"], 0), id="falling"
        ),
        pytest.param([0.5], dict.fromkeys(["validate", *TOWARDS_THE_BEST], 0), id="single layer"),
        pytest.param([0.94, 0.3, 0.95], {"validate": 2, "within": 0, "elbow": 0}, id="dip"),
        pytest.param(
            [0.3, 0.9, 0.902, 0.899, 0.901, 0.905, 0.903],
            {"validate": 5, "within": 1, "elbow": 1},
            id="noise on a plateau",
        ),
        pytest.param([1.0] * 4, dict.fromkeys([*TOWARDS_THE_BEST, "validate"], 0), id="all right"),
    ],
)
def test_every_rule_answers_a_drawn_curve_as_a_reader_would(accuracies, expected):
    world = World(curve(accuracies))
    assert {rule: world.choose(rule).cut.layer for rule in expected} == expected


def test_validate_takes_the_best_layer_and_says_its_accuracy():
    chosen = select(curve(DRASTIC), "validate")
    assert (chosen.cut.layer, chosen.validation_accuracy) == (4, 0.95)
    assert "95.0 %" in chosen.why


def test_within_takes_the_shallowest_layer_near_the_best_and_says_both():
    chosen = select(curve(DRASTIC), "within", tolerance=0.05)
    assert chosen.cut.layer == 3
    assert "within 5 points" in chosen.why
    assert "layer 4" in chosen.why


def test_a_layer_exactly_at_the_tolerance_is_within_it_whatever_floats_say():
    assert 0.9 - 0.3 > 0.6
    assert select(curve([0.6, 0.9]), "within", tolerance=0.3).cut.layer == 0


def test_elbow_says_the_rise_or_that_there_is_none():
    assert "90 % of the way from 30.0 % up to 95.0 %" in select(curve(DRASTIC), "elbow").why
    assert "never rises" in select(curve([0.25] * 5), "elbow").why


def test_elbow_reads_one_curve_that_of_the_best_score():
    slow, early = curve(SLOW), curve([0.1, 0.85], pooling="mean")
    assert select(slow + early, "elbow") == select(slow, "elbow")


def test_fixed_takes_the_depth_of_the_paper():
    assert [fixed_layer(n) for n in (32, 40)] == [20, 25]
    chosen = select(curve([0.1] * 32), "fixed")
    assert chosen.cut.layer == 20
    assert "5/8 of 32" in chosen.why


@given(st.integers(1, 200))
def test_the_fixed_depth_is_a_layer_of_every_model(n_layers):
    assert 0 <= fixed_layer(n_layers) < n_layers


# Laws of all rules, on drawn tables.


@given(ACCURACIES, st.floats(0, 0.5))
def test_within_is_never_deeper_than_needed_and_keeps_its_promise(accuracies, tolerance):
    chosen = select(curve(accuracies), "within", tolerance=tolerance)
    floor = max(accuracies) - tolerance
    assert chosen.validation_accuracy == accuracies[chosen.cut.layer]
    assert chosen.validation_accuracy >= floor - 1e-9
    assert all(value < floor + 1e-9 for value in accuracies[: chosen.cut.layer])


@given(ACCURACIES)
def test_elbow_is_never_deeper_than_needed_and_keeps_its_promise(accuracies):
    chosen = select(curve(accuracies), "elbow")
    rising = accuracies[: accuracies.index(max(accuracies)) + 1]
    goal = min(rising) + 0.9 * (max(rising) - min(rising))
    assert accuracies[chosen.cut.layer] >= goal - 1e-9
    assert all(value < goal + 1e-9 for value in accuracies[: chosen.cut.layer])


@given(ACCURACIES)
def test_validate_gives_the_first_of_the_best_layers(accuracies):
    assert select(curve(accuracies), "validate").cut.layer == accuracies.index(max(accuracies))


@given(worlds())
def test_no_rule_that_gives_up_accuracy_cuts_deeper_than_the_best_layer(world):
    best = world.choose("validate").cut.layer
    assert all(world.choose(rule).cut.layer <= best for rule in TOWARDS_THE_BEST)
    nothing = {"tolerance": 0.0, "margin": 0.0}
    assert all(
        world.choose(rule, **nothing).cut.layer == best for rule in ("within", "non-inferior")
    )


@given(worlds())
def test_non_inferior_is_the_shallowest_layer_that_passes_its_own_test(world):
    hits = world.hits
    top, chosen = world.choose("validate"), world.choose("non-inferior")
    best = hits[top.cut.chip][top.cut.layer]

    def passes(cut):
        return paired_lower_bound(hits[cut.chip][cut.layer], best) > -DEFAULT_MARGIN

    assert chosen.cut == top.cut or passes(chosen.cut)
    shallower = (Cut(layer, key) for key in hits for layer in range(chosen.cut.layer))
    assert not any(map(passes, shallower))


@given(worlds(), st.data())
def test_a_useless_deeper_layer_changes_no_choice(world, data):
    rows = [s for s in world.table if s.split == "validation"]
    most, deeper = max(s.accuracy for s in rows), 1 + max(s.layer for s in rows)
    levels = st.sampled_from([value for value in (0.25, 0.6, 0.85, most) if value <= most])
    chips = sorted({s.key for s in rows}, key=lambda key: key.name)
    useless = [
        point(deeper, data.draw(levels), chip=key.kind, pooling=key.pooling) for key in chips
    ]
    short, longer = World(rows), World(rows + useless)
    hits = {key: np.vstack([short.hits[key], longer.hits[key][deeper:]]) for key in short.hits}
    for rule in ("validate", *TOWARDS_THE_BEST, "budget"):
        assert longer.choose(rule, correct=hits) == short.choose(rule)


@given(worlds(), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_table_changes_no_choice(world, draw, same_loss):
    if not same_loss:
        table = enumerate(world.table)
        world = World([row.model_copy(update={"log_loss": float(i)}) for i, row in table])
    shuffled = World(draw.sample(world.table, len(world.table)))
    assert all(world.choose(rule) == shuffled.choose(rule) for rule in RULES)


@given(worlds())
def test_test_scores_train_scores_and_the_embedding_change_no_choice_but_the_oracles(world):
    rows = [s for s in world.table if s.split == "validation"]
    noise = [s for s in world.table if s.split == "test"]
    noise += [point(0, 1.0, split="train"), point(-1, 1.0), point(-1, 1.0, split="test")]
    bare = World(rows)
    for rule in set(RULES) - {"oracle"}:
        assert World(noise + rows).choose(rule, correct=bare.hits) == bare.choose(rule)


@given(worlds(), st.randoms(use_true_random=False))
def test_the_oracle_looks_at_test_alone_and_still_says_its_validation_accuracy(world, draw):
    chosen = world.choose("oracle")
    tested = [s for s in world.table if s.split == "test"]
    assert accuracy_at(world, chosen, "test") == max(s.accuracy for s in tested)
    assert chosen.validation_accuracy == accuracy_at(world, chosen)
    assert "chosen on test" in chosen.why
    others = [s for s in world.table if s.split == "validation"]
    values = draw.sample([s.accuracy for s in others], len(others))
    redrawn = [
        point(s.layer, v, pooling=s.pooling, chip=s.chip)
        for s, v in zip(others, values, strict=True)
    ]
    assert World(tested + redrawn).choose("oracle").cut == chosen.cut


@settings(max_examples=20)
@given(worlds())
def test_naming_chips_is_choosing_from_that_part_of_the_table(world):
    hits = world.hits
    for key in {s.key for s in world.table}:
        part = World([s for s in world.table if s.key == key])
        for rule in RULES:
            named = world.choose(rule, chips=[key])
            assert named == part.choose(rule, correct=hits)
            assert named.cut.chip == key


@given(worlds())
def test_every_choice_is_a_row_of_the_table_and_says_its_own_accuracy(world):
    for rule in RULES:
        chosen = world.choose(rule)
        assert chosen.rule == rule
        assert chosen.validation_accuracy == accuracy_at(world, chosen)
        assert chosen.why


def test_a_tie_of_poolings_at_one_layer_goes_to_the_lower_log_loss():
    table = [point(2, 0.9, log_loss=0.4), point(2, 0.9, pooling="mean", log_loss=0.3)]
    assert select(table, "validate").cut.chip.pooling == "mean"
    assert select(table, "within").cut.chip.pooling == "mean"


def test_a_tie_in_everything_goes_to_the_linear_chip():
    table = [point(2, 0.9, chip="mlp"), point(2, 0.9)]
    for rows in (table, table[::-1]):
        assert select(rows, "validate").cut.chip.kind == "linear"


def test_a_shallower_layer_of_another_pooling_wins_the_tie():
    table = curve([0.1, 0.2, 0.9]) + curve([0.1, 0.9, 0.3], pooling="mean")
    chosen = select(table, "validate")
    assert chosen.cut == Cut(1, ChipKey.sound("mean"))


# Non-inferior


def test_hits_are_compared_in_pairs_not_as_two_accuracies():
    """Two chips of the same accuracies: one misses the texts the best misses, the other others."""
    n = 10 * N
    best = np.arange(n) >= 200
    alike, other = np.arange(n) >= 210, np.arange(n) < n - 210
    assert alike.mean() == other.mean()
    assert paired_lower_bound(alike, best) > -DEFAULT_MARGIN > paired_lower_bound(other, best)
    table = curve([other.mean(), alike.mean(), best.mean()])
    hits = {ChipKey.sound("last"): np.stack([other, alike, best])}
    assert select(table, "non-inferior", correct=hits).cut.layer == 1


def test_non_inferior_says_its_margin_and_its_confidence():
    why = World(curve(DRASTIC)).choose("non-inferior", margin=0.1).why
    assert "loses less than 10 points" in why
    assert "(95.0 % at layer 4, last)" in why
    assert "97.5 % confidence (Tango's score interval, n = 200)" in why


@pytest.mark.parametrize("accuracies", [DRASTIC, [0.5]])
def test_non_inferior_without_predictions_is_refused(accuracies):
    with pytest.raises(ConfigError, match="needs the predictions"):
        select(curve(accuracies), "non-inferior")


# Budget.

DENSE = {"parameters": 200e6, "memory": 400e6, "latency": 0.05}


@pytest.mark.parametrize(
    ("text", "quantity", "most"),
    [
        ("parameters=80M", "parameters", 80e6),
        ("parameters=1.5b", "parameters", 1.5e9),
        ("parameters=500K", "parameters", 500e3),
        ("parameters=1234", "parameters", 1234),
        ("memory=300MB", "memory", 300e6),
        ("memory=2 GB", "memory", 2e9),
        ("memory=20kb", "memory", 20e3),
        ("memory=7", "memory", 7),
        ("latency=20ms", "latency", 0.02),
        (" Latency = 1.5 S ", "latency", 1.5),
        ("parameters=50%", "parameters", 100e6),
        ("memory=12.5 %", "memory", 50e6),
        ("latency=100%", "latency", 0.05),
    ],
)
def test_a_budget_is_read_in_every_unit_and_as_a_share(text, quantity, most):
    budget = parse_budget(text, DENSE)
    assert (budget.quantity, budget.most) == (quantity, pytest.approx(most))


def test_a_budget_keeps_the_number_that_the_user_wrote():
    words = [parse_budget(t, DENSE).words for t in ("parameters=134515008", "memory=300mb")]
    assert words == ["134515008 parameters", "300 MB"]
    assert parse_budget("latency=50%", DENSE).words == "50 % of the dense latency"


@pytest.mark.parametrize(
    "text",
    [
        *["", "80M", "parameters", "parameters=", "parameters=M", "parameters=-80M", "=80M"],
        *["parameters=80MB", "memory=300M", "memory=300MiB", "latency=20", "latency=20h"],
        *["params=80M", "parameters=1,5M", "parameters=1e9", "parameters=nan", "memory=0x10"],
        *["parameters=80M memory=300MB", "parameters=" + "9" * 400, "\x00", "parameters==8"],
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        parse_budget(text, DENSE)
    assert "parameters=80M" in refused.value.hint
    assert len(refused.value.message) < 120


@given(st.text("parmetslncyo=0123.,%MKGBs -\n\u0663", max_size=24))
def test_any_text_is_a_budget_or_refused(text):
    with suppress(ConfigError):
        assert parse_budget(text, DENSE).most >= 0


@pytest.mark.parametrize("text", ["latency=20ms", "latency=50%"])
def test_a_budget_of_what_was_not_measured_is_refused(text):
    with pytest.raises(ConfigError, match=r"latency of this run was not measured"):
        parse_budget(text, DENSE | {"latency": None})


def test_the_default_budget_can_be_read():
    assert parse_budget(DEFAULT_BUDGET, DENSE).most == 100e6


@given(worlds(), st.integers(0, 9).flatmap(lambda k: st.sampled_from([10 * k + 4.9, 10 * k + 5.0])))
def test_budget_is_the_best_of_what_fits_and_never_costs_more(world, most):
    budget = Budget("parameters", most, "so much")
    rows = [s for s in world.table if s.split == "validation"]
    costs = {s.cut: 10.0 * s.layer + 5.0 for s in rows}
    fitting = [s for s in rows if costs[s.cut] <= most]
    if not fitting:
        with pytest.raises(ConfigError, match="No cut fits so much"):
            world.choose("budget", budget=budget, costs=costs)
        return
    chosen = world.choose("budget", budget=budget, costs=costs)
    assert costs[chosen.cut] <= most
    assert chosen.validation_accuracy == max(s.accuracy for s in fitting)
    assert chosen.cut.layer == min(
        s.layer for s in fitting if s.accuracy == chosen.validation_accuracy
    )
    assert "so much" in chosen.why


@pytest.mark.parametrize(
    ("quantity", "smallest"),
    [("parameters", "5,000 parameters"), ("memory", "5,000 bytes"), ("latency", "5e+06 ms")],
)
def test_a_budget_too_small_names_the_smallest_cut_that_may_be_chosen(quantity, smallest):
    table = curve([0.5, 0.6]) + curve([0.5, 0.6], pooling="mean")
    last = ChipKey.sound("last")
    costs = {s.cut: 1000.0 for s in table if s.key != last}
    costs |= {Cut(layer, last): 5000.0 + layer for layer in (0, 1)}
    with pytest.raises(ConfigError, match="No cut fits 10 x") as refused:
        select(table, "budget", chips=[last], budget=Budget(quantity, 10.0, "10 x"), costs=costs)
    assert smallest in refused.value.hint


def test_rule_budget_without_a_budget_is_refused():
    with pytest.raises(ConfigError, match="needs a budget"):
        select(curve(DRASTIC), "budget")


# Manual, and what is refused.


def test_manual_takes_the_users_layer_and_its_best_pooling():
    table = curve([0.5, 0.6]) + curve([0.7, 0.8], pooling="mean")
    chosen = select(table, "manual", layer=0)
    assert (chosen.cut, chosen.why) == (Cut(0, ChipKey.sound("mean")), "chosen by hand")


@pytest.mark.parametrize("layer", [-2, -1, 7, 10_000])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(layer):
    with pytest.raises(ConfigError, match=rf"Layer {layer} does not exist, layers are 0 to 6"):
        select(curve(DRASTIC), "manual", layer=layer)


def test_manual_without_a_layer_is_refused():
    with pytest.raises(ConfigError, match="needs a layer") as refused:
        select(curve(DRASTIC), "manual")
    assert "0 to 6" in refused.value.hint


@pytest.mark.parametrize(("rule", "name"), [("within", "tolerance"), ("non-inferior", "margin")])
@pytest.mark.parametrize("value", [-0.1, 1.0, 5.0, float("nan")])
def test_a_share_that_is_none_is_refused(rule, name, value):
    with pytest.raises(ConfigError, match=f"{name} is"):
        World(curve(DRASTIC)).choose(rule, **{name: value})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scores", [[], [point(0, 1.0, split="test")], [point(-1, 1.0)]])
def test_a_table_without_validation_scores_is_refused(rule, scores):
    with pytest.raises(ConfigError, match="No validation score"):
        select(scores, rule)


def test_an_oracle_without_test_scores_is_refused():
    with pytest.raises(ConfigError, match="No test score"):
        select(curve(DRASTIC), "oracle")


@given(worlds(), st.data())
def test_no_rule_chooses_a_layer_that_cannot_be_cut_after(world, data):
    last = max(s.layer for s in world.table)
    no_cut = dict.fromkeys(data.draw(st.sets(st.integers(0, last - 1))) if last else (), "why")
    left = World([s for s in world.table if s.layer not in no_cut])
    for rule in RULES:
        with suppress(ConfigError):
            chosen = world.choose(rule, no_cut=no_cut)
            assert chosen.cut.layer not in no_cut
            if rule == "validate":  # as if these layers had never been tried
                assert chosen == select(left.table, rule)
    for layer in no_cut:
        with pytest.raises(ConfigError, match=f"cannot be cut after layer {layer}: why"):
            world.choose("manual", layer=layer, no_cut=no_cut)


def test_the_fixed_depth_moves_on_to_a_layer_that_can_be_cut_after():
    table = curve([0.5] * 8)
    assert select(table, "fixed", no_cut={5: "why", 6: "why"}).cut.layer == 7
    assert "next layer" in select(table, "fixed", no_cut={5: "why"}).why
