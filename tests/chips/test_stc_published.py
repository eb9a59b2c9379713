"""Sparsify-then-Classify as published: against scikit-learn by hand, and its faults left out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips import stc_published
from chipviz.chips.rows import Rows
from chipviz.chips.stc import ETAS, Neurons
from chipviz.chips.stc_published import JOINED, PENALTIES, PROBE, fit, probes, stopped_early
from chipviz.data.task import Examples, Task
from chipviz.keys import STC_PUBLISHED, ChipKey, Vector

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

N_LAYERS, WIDTH = 4, 15
SIZES = {"train": 200, "validation": 80, "test": 60}
KEY = ChipKey(STC_PUBLISHED, "raw", "mean", "sparse")


class Stored:
    """Features in memory of two classes, one neuron of layer 2 planted."""

    n_layers, sizes = N_LAYERS, SIZES

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.labels = {s: torch.randint(0, 2, (n,), generator=random) for s, n in SIZES.items()}
        self.values = {
            (split, layer): torch.randn(n, WIDTH, generator=random) * 3 + 1
            for split, n in SIZES.items()
            for layer in range(-1, N_LAYERS)
        }
        for split in SIZES:
            self.values[split, 2][:, 11] += 9 * self.labels[split]
        self.asked = set()

    def read(self, split, vector, layer, start=0, stop=None):
        assert vector == KEY.vector
        self.asked.add(split)
        return self.values[split, layer][start:stop]


@pytest.fixture(scope="module")
def found():
    stored = Stored()
    splits = {
        split: Examples([f"text {i}" for i in range(n)], None, stored.labels[split].numpy())
        for split, n in SIZES.items()
    }
    rows = Rows(stored, Task("toy", ("a", "b"), splits), torch.device("cpu"))
    layers = range(-1, N_LAYERS)
    read, held = (rows.reader(s, KEY.vector, layers) for s in ("train", "validation"))
    depths = []
    with stopped_early():
        chip, penalties = probes(read, rows.labels("train"), held, rows.labels("validation"))
        neurons = Neurons.of({"raw": chip})
        joined = stc_published.join(rows, KEY, neurons, depths.append)
    return SimpleNamespace(
        stored=stored,
        rows=rows,
        chip=chip,
        penalties=penalties,
        neurons=neurons,
        joined=joined,
        depths=depths,
    )


def by_hand(x, y, passes):
    """Every classifier that the recipe looks at: penalty, weights, bias, in order."""
    for penalty in (0.1, 0.2, 1, 10, 100):
        model = LogisticRegression(
            C=penalty,
            l1_ratio=1,
            solver="saga",
            max_iter=passes[0],
            warm_start=True,
            random_state=42,
        )
        for _ in range(passes[1]):
            model.fit(x, y)
            yield penalty, model.coef_[0].copy(), float(model.intercept_[0])


@pytest.mark.parametrize(("passes", "numbers"), [(PROBE, (4, 16)), (JOINED, (2, 32))])
def test_a_fit_keeps_the_best_of_its_looks_and_not_the_last(passes, numbers):
    draw = np.random.default_rng(3)
    x, held = (draw.normal(size=(n, 12)).astype(np.float32) * 4 for n in (90, 60))
    y, truth = (
        (rows[:, 0] + draw.normal(size=len(rows)) * 3 > 0).astype(np.int64) for rows in (x, held)
    )
    found = fit(x, y, held, truth, passes)
    looks = list(by_hand(x, y, numbers))
    right = [float(np.mean((held @ w + b > 0) == truth)) for _, w, b in looks]
    best = int(np.argmax(right))  # the first of equals
    assert found.accuracy == right[best]
    assert found.penalty == looks[best][0]
    np.testing.assert_allclose(found.weight, looks[best][1], atol=1e-6)
    assert abs(found.bias - looks[best][2]) < 1e-6
    assert right[-1] < found.accuracy  # what the public code would have kept


def test_a_probe_says_what_scikit_learn_says(found):
    chip, stored = found.chip.at(3), found.stored
    labels = stored.labels["validation"].numpy()
    said = chip.probabilities(stored.values["validation", 2])
    assert len(found.penalties) == N_LAYERS + 1
    assert set(found.penalties) <= set(PENALTIES)
    again = fit(
        stored.values["train", 2].numpy(),
        stored.labels["train"].numpy(),
        stored.values["validation", 2].numpy(),
        labels,
        PROBE,
    )
    logit = stored.values["validation", 2].numpy() @ again.weight + again.bias
    np.testing.assert_allclose(said[:, 1], 1 / (1 + np.exp(-logit)), atol=1e-5)
    assert abs(float(np.mean(said.argmax(dim=1).numpy() == labels)) - again.accuracy) < 1e-9


def test_the_planted_neuron_carries_the_joined_classifier(found):
    last = found.joined.chip.at(N_LAYERS).kept()
    strongest = int(last.weight.abs().amax(dim=0).argmax())
    assert last.neurons[strongest].tolist()[1:] == [2, 11]
    accuracies = {one.layer: one.accuracy for one in found.joined.tried if one.chosen}
    assert accuracies[1] + 0.1 < accuracies[2]


def test_every_eta_is_tried_at_every_depth_and_the_best_is_kept(found):
    layers = range(-1, N_LAYERS)
    assert found.depths == list(layers)
    for layer in layers:
        here = [one for one in found.joined.tried if one.layer == layer]
        sets = {found.neurons.up_to(layer, eta).numpy().tobytes() for eta in ETAS}
        assert len(here) == len(sets)  # where an eta adds no neuron there is nothing new to fit
        (chosen,) = [one for one in here if one.chosen]
        assert chosen.accuracy == max(one.accuracy for one in here)
        chip = found.joined.chip.at(layer + 1)
        assert int((chip.weight != 0).any(dim=0).sum()) == chosen.n_used
        assert chosen.n_selected == int(found.neurons.up_to(layer, chosen.eta).sum())
        right = found.rows.accuracy(chip, "validation", KEY.vector, layer)
        assert right == pytest.approx(chosen.accuracy)


def test_a_depth_reads_nothing_above_it_and_nobody_reads_the_test_texts(found):
    for layer in range(-1, N_LAYERS):
        chip = found.joined.chip.at(layer + 1)
        assert chip.kept().deepest <= layer
    assert found.stored.asked == {"train", "validation"}


def test_a_depth_without_a_neuron_answers_as_often_as_the_classes_occur(found):
    rows = found.rows
    none = Neurons(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0))
    joined = stc_published.join(rows, KEY, none, lambda _depth: None)
    share = float(found.stored.labels["train"].float().mean())
    said = joined.chip.at(1).probabilities(torch.zeros(2, 0))
    np.testing.assert_allclose(said[:, 1], share, atol=1e-6)


def test_its_names_are_told_apart_from_ours():
    vector = Vector("ffn_in", "mean")
    keys = [
        ChipKey.sparse(vector),
        ChipKey.sparse(vector, "published"),
        ChipKey("stc", "ffn_in", "mean", "sparse"),
        ChipKey(STC_PUBLISHED, "ffn_in", "mean", "sparse"),
        KEY,
        ChipKey.sparse(KEY.vector, "published"),
        ChipKey.published("mlp"),
    ]
    assert [ChipKey.parse(key.name) for key in keys] == keys
    assert len({key.name for key in keys}) == len(keys)
    for name in ("stc.raw", "stc-published.mean", "stc-published.all-mean", "sparse.raw-mean"):
        with pytest.raises(ValueError, match=r"is no kind|names no"):
            ChipKey.parse(name)
