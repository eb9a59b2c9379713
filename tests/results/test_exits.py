"""Temperatures, early exits and thresholds, each beside a plain re-computation."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.metrics import roc_curve

from chipviz.errors import ConfigError
from chipviz.keys import ChipKey, Cut
from chipviz.results.calibration import COLDEST, fit_temperature, log_odds
from chipviz.results.exits import MOST_EXITS, NEVER, exit_layers, plan_exits, trade_off
from chipviz.results.metrics import paired_lower_bound
from chipviz.results.run_folder import Predictions, RunFolder
from chipviz.results.thresholds import choose_threshold

KEY = ChipKey.sound("mean")
LAYERS = 12


def drawn(n=400, n_classes=3, seed=0, sharpness=3.0):
    """Probabilities of a chip that is right more often the surer it is, and the labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * sharpness
    labels = np.array([rng.choice(n_classes, p=softmax(row / 2)) for row in logits])
    return softmax(logits, axis=1).astype(np.float32), labels


def said(n_classes=3, seed=0, n=400):
    """A run whose deeper chips are better and surer."""
    found = Predictions({}, {})
    rng = np.random.default_rng(seed)
    temperatures = []
    for split in ("validation", "test"):
        labels = rng.integers(n_classes, size=n)
        found.labels[split] = labels.astype(np.int32)
        classes, sure = [], []
        for layer in range(LAYERS):
            logits = rng.normal(size=(n, n_classes))
            easy = rng.random(n) < 0.3 + 0.06 * layer
            logits[np.arange(n), labels] += np.where(easy, 6.0, 0.5)
            shares = softmax(logits, axis=1)
            if split == "validation":
                temperatures.append(fit_temperature(shares, labels))
            classes.append(shares.argmax(axis=1).astype(np.int32))
            sure.append(log_odds(shares, temperatures[layer]))
        found.classes[split, KEY], found.sure[split, KEY] = np.stack(classes), np.stack(sure)
    found.temperatures[KEY] = np.array(temperatures, dtype=np.float32)
    return found


@pytest.mark.parametrize(("n_classes", "sharpness"), [(2, 3.0), (5, 1.0), (40, 6.0)])
def test_the_temperature_is_that_of_a_general_minimiser(n_classes, sharpness):
    shares, labels = drawn(n_classes=n_classes, sharpness=sharpness)
    logits = np.log(shares.astype(np.float64))

    def loss(log_t):
        tempered = log_softmax(logits / np.exp(log_t), axis=1)
        return -tempered[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    found = fit_temperature(shares, labels)
    assert loss(np.log(found)) == pytest.approx(best.fun, abs=1e-6)
    assert found == pytest.approx(float(np.exp(best.x)), rel=5e-3)


def test_a_chip_without_errors_is_not_cooled_for_ever():
    shares, _ = drawn()
    assert fit_temperature(shares, shares.argmax(axis=1)) == pytest.approx(COLDEST, rel=1e-2)


def test_log_odds_are_those_of_the_tempered_probabilities():
    shares, _ = drawn(n_classes=4)
    tempered = softmax(np.log(shares.astype(np.float64)) / 1.7, axis=1).max(axis=1)
    np.testing.assert_allclose(log_odds(shares, 1.7), np.log(tempered / (1 - tempered)), atol=1e-3)


def test_log_odds_tell_sure_from_surer_where_probabilities_are_all_one():
    shares = softmax(np.array([[40.0, 0.0], [60.0, 0.0]]), axis=1).astype(np.float32)
    assert shares[0, 0] == shares[1, 0] == 1
    assert log_odds(shares, 0.5).tolist() == pytest.approx([80.0, 120.0], rel=1e-4)


@pytest.mark.parametrize("cut", [0, 1, 4, 11, 29])
def test_exits_are_spread_evenly_and_end_at_the_cut(cut):
    layers = exit_layers(cut)
    assert layers[-1] == cut
    assert len(layers) == min(MOST_EXITS, cut + 1)
    gaps = np.diff([-1, *layers])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def by_hand(found, split, layers, threshold):
    """Each text through the exits, one by one."""
    right, ran, left = [], [], [0] * len(layers)
    for i, label in enumerate(found.labels[split]):
        for exit_, layer in enumerate(layers):
            if exit_ == len(layers) - 1 or found.sure[split, KEY][layer, i] >= threshold:
                right.append(found.classes[split, KEY][layer, i] == label)
                ran.append(layer + 1)
                left[exit_] += 1
                break
    return np.array(right), np.mean(ran), np.array(left) / len(right)


def test_a_plan_is_what_texts_do_one_by_one():
    found = said()
    plan = plan_exits(found, Cut(11, KEY), 0.03)
    for split, score in (("validation", plan.validation), ("test", plan.test)):
        right, ran, left = by_hand(found, split, plan.layers, plan.threshold)
        assert score.accuracy == pytest.approx(right.mean())
        assert score.mean_layers == pytest.approx(ran)
        assert score.shares == pytest.approx(left.tolist())
        assert score.accuracy_low < score.accuracy < score.accuracy_high
    assert plan.temperatures == pytest.approx(found.temperatures[KEY][plan.layers].tolist())
    assert plan.pays
    assert plan.validation.mean_layers < 11


@pytest.mark.parametrize("margin", [0.02, 0.03, 0.05])
def test_the_threshold_passes_the_test_and_no_safer_one_fails(margin):
    found = said(seed=3)
    plan = plan_exits(found, Cut(11, KEY), margin)
    fixed = found.classes["validation", KEY][11] == found.labels["validation"]
    tried = [t for t, _, _ in trade_off(found, Cut(11, KEY), "validation") if t >= plan.threshold]
    assert plan.threshold in tried
    for threshold in tried:
        right, _, _ = by_hand(found, "validation", plan.layers, threshold)
        assert threshold == NEVER or paired_lower_bound(right, fixed) > -margin
    for layer in range(plan.fixed_layer, 11):
        right = found.classes["validation", KEY][layer] == found.labels["validation"]
        assert paired_lower_bound(right, fixed) > -margin


def test_the_test_split_does_not_move_the_plan():
    found, other = said(), said()
    other.classes["test", KEY][:] = 0
    other.sure["test", KEY][:] = 50
    plans = [plan_exits(one, Cut(11, KEY), 0.03) for one in (found, other)]
    assert plans[0].threshold == plans[1].threshold
    assert plans[0].test != plans[1].test


def test_too_few_texts_let_nobody_leave_early():
    plan = plan_exits(said(n=40), Cut(11, KEY), 0.02)
    assert plan.threshold == NEVER
    assert plan.validation.mean_layers == 12
    assert not plan.pays


def test_a_plan_needs_confidences_and_chips_of_one_layer():
    found = said()
    with pytest.raises(ConfigError, match="several layers"):
        plan_exits(found, Cut(3, ChipKey("stc", "block", "mean", "sparse")))
    found.temperatures.clear()
    with pytest.raises(ConfigError, match="older version"):
        plan_exits(found, Cut(3, KEY))
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        plan_exits(said(), Cut(3, KEY), 1.0)


def test_confidences_survive_the_file(tmp_path):
    found = said()
    RunFolder(tmp_path).write_predictions(found)
    back = RunFolder(tmp_path).read_predictions()
    assert plan_exits(back, Cut(11, KEY)) == plan_exits(found, Cut(11, KEY))
    assert back.classes.keys() == found.classes.keys()


NAMES = ["ham", "spam"]


def shares_of(found, split, layer, positive):
    """Untempered probability of a class, from log-odds."""
    odds = found.sure[split, KEY][layer].astype(np.float64) * float(found.temperatures[KEY][layer])
    signed = np.where(found.classes[split, KEY][layer] == positive, odds, -odds)
    return np.exp(signed - logsumexp(np.stack([signed, np.zeros_like(signed)]), axis=0))


@pytest.mark.parametrize("positive", [None, "ham"])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_a_rate_of_false_alarms_is_kept_as_scikit_learn_counts_it(rate, positive):
    found = said(n_classes=2)
    chosen = choose_threshold(found, Cut(4, KEY), f"fpr={100 * rate:g}%", NAMES, positive)
    wanted = NAMES.index(positive) if positive else 1
    truth = found.labels["validation"] == wanted
    shares = shares_of(found, "validation", 4, wanted)
    fpr, tpr, _ = roc_curve(truth, shares, drop_intermediate=False)
    best = tpr[fpr <= rate].max()  # the most that a threshold with so few false alarms finds
    assert chosen.validation.false_positive_rate <= rate
    assert chosen.validation.true_positive_rate == pytest.approx(best)
    rows = np.stack([1 - shares, shares] if wanted else [shares, 1 - shares], axis=1)
    decided = np.array([chosen.decide(row) for row in rows.tolist()])
    assert np.mean(decided[~truth] == wanted) == chosen.validation.false_positive_rate


def test_costs_choose_the_cheapest_threshold():
    found = said(n_classes=2, seed=5)
    chosen = choose_threshold(found, Cut(2, KEY), "cost=1:10", NAMES)
    truth = found.labels["validation"] == 1
    shares = shares_of(found, "validation", 2, 1)

    def cost(at):
        yes = shares >= at
        return (yes & ~truth).sum() + 10 * (~yes & truth).sum()

    assert cost(chosen.at) == min(cost(at) for at in [0.0, *shares, 1.1])
    dear = choose_threshold(found, Cut(2, KEY), "cost=10:1", NAMES)
    assert dear.at > chosen.at


@pytest.mark.parametrize(
    ("rule", "names", "positive", "words"),
    [
        ("fpr", NAMES, None, "cannot be read"),
        ("fpr=0%", NAMES, None, "cannot be read"),
        ("fpr=100%", NAMES, None, "cannot be read"),
        ("cost=0:1", NAMES, None, "cannot be read"),
        ("fpr=0.1%", NAMES, None, "too few"),
        ("fpr=5%", ["a", "b", "c"], None, "two classes"),
        ("fpr=5%", NAMES, "eggs", "no class 'eggs'"),
    ],
)
def test_thresholds_that_cannot_be_had_are_refused(rule, names, positive, words):
    with pytest.raises(ConfigError, match=words):
        choose_threshold(said(n_classes=2), Cut(2, KEY), rule, names, positive)
