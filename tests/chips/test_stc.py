"""Sparsify, then classify: what eta names, planted neurons, and depths that see no deeper."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips.chip import Chip
from chipviz.chips.joiner import look
from chipviz.chips.rows import Rows
from chipviz.chips.sparse import choose
from chipviz.chips.stc import (
    ETAS,
    Aggregator,
    Neurons,
    importance,
    layer_weights,
    reached,
)
from chipviz.data.task import Examples, Task
from chipviz.keys import STC, ChipKey, Site, Vector
from chipviz.results.neurons import SparsifyReport

SITES = get_args(Site)
N_LAYERS, WIDTHS = 6, {"block": 12, "ffn_in": 30}
KEY = ChipKey(STC, "all", "mean", "sparse")
SIZES = {"train": 400, "validation": 200, "test": 150}


class Stored:
    """Features in memory, as `Features` reads them. Notes which splits were asked for."""

    n_layers, widths, sizes = N_LAYERS, WIDTHS, SIZES

    def __init__(self, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.labels = {s: torch.randint(0, 3, (n,), generator=random) for s, n in SIZES.items()}
        self.values = {
            (split, site, layer): torch.randn(n, WIDTHS[site], generator=random) * 5 + 2
            for split, n in SIZES.items()
            for site in WIDTHS
            for layer in range(-1, N_LAYERS)
        }
        for (split, site, layer), value in self.values.items():
            if site == "ffn_in" and layer == -1:
                value.zero_()
            if (site, layer) == ("ffn_in", 2):
                value[:, 17] += 9 * (self.labels[split] == 1)
            if (site, layer) == ("block", 4):
                value[:, 3] += 9 * (self.labels[split] == 2)
        self.asked = set()

    def read(self, split, vector, layer, start=0, stop=None):
        self.asked.add(split)
        return self.values[split, vector.site, layer][start:stop]


def task_of(stored):
    splits = {
        split: Examples([f"text {i}" for i in range(n)], None, stored.labels[split].numpy())
        for split, n in SIZES.items()
    }
    return Task("toy", ("a", "b", "c"), splits)


@pytest.fixture(scope="module")
def fitted():
    stored = Stored()
    rows = Rows(stored, task_of(stored), torch.device("cpu"))
    probes = {}
    for site in WIDTHS:
        vector, layers = Vector(site, "mean"), range(-1, N_LAYERS)
        read, held = (rows.reader(split, vector, layers) for split in ("train", "validation"))
        found = choose(read, rows.labels("train"), held, rows.labels("validation"), 3)
        probes[site] = Chip(
            found.solution.weight,
            found.solution.bias,
            mean=found.scaler.mean[:, 0],
            scale=found.scaler.scale[:, 0],
        )
    neurons = Neurons.of(probes)
    aggregator = Aggregator(rows, KEY, neurons)
    return SimpleNamespace(
        stored=stored,
        rows=rows,
        probes=probes,
        neurons=neurons,
        aggregator=aggregator,
        found=aggregator.search(refit=True),
    )


@pytest.mark.parametrize("eta", ETAS)
def test_the_neurons_of_eta_are_the_fewest_that_reach_it(eta):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    weight[:, 7:20] = 0
    carried = [sum(float(w) ** 2 for w in weight[:, j]) for j in range(40)]
    taken, held = set(), 0.0
    while held < eta * sum(carried):  # the one that crosses is in
        strongest = max(set(range(40)) - taken, key=lambda j: carried[j])
        taken.add(strongest)
        held += carried[strongest]
    chosen = reached(importance(weight)) < eta
    assert set(chosen.nonzero()[:, 0].tolist()) == taken
    assert not taken & set(range(7, 20))


def test_sizes_count_weights_without_their_sign():
    weight = torch.tensor([[3.0, -2.0, 0.0], [0.0, 2.0, 1.0]])
    assert importance(weight).tolist() == [9.0, 8.0, 1.0]
    assert importance(weight, "sizes").tolist() == [3.0, 4.0, 1.0]


def test_a_weight_of_a_column_is_a_lighter_penalty_on_it():
    """Against scikit-learn's saga on columns that were multiplied by hand."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] + 0.3 * draw.normal(size=300) > 0).astype(int)
    weight = torch.tensor([0.1, 1.0, 1.0, 0.5, 1.0, 0.1])
    features, labels = torch.from_numpy(x)[None], torch.from_numpy(y)

    def read(start, stop):
        return features[:, start:stop]

    found = choose(read, labels, read, labels, 2, column_weight=weight, tolerance=1e-3)
    standard = (x - x.mean(0)) / x.std(0) * weight.numpy()
    strength = 1 / (300 * float(found.solution.penalty[0]))
    peer = LogisticRegression(C=strength, l1_ratio=1, solver="saga", tol=1e-6, max_iter=20_000)
    said = peer.fit(standard, y).predict_proba(standard)
    chip = Chip(
        found.solution.weight,
        found.solution.bias,
        mean=found.scaler.mean[:, 0],
        scale=found.scaler.scale[:, 0],
    ).at(0)
    np.testing.assert_allclose(chip.probabilities(features[0]), said, atol=0.02)


def test_layers_weigh_as_their_chips_do_on_validation():
    weights = layer_weights(torch.tensor([0.5, 0.9, 0.7, 0.52]))
    torch.testing.assert_close(weights, torch.tensor([0.1, 1.0, 0.5, 0.1]))
    assert layer_weights(torch.tensor([0.6, 0.6])).tolist() == [1.0, 1.0]


def test_a_layer_without_weights_gives_no_neurons():
    assert (reached(torch.zeros(3, 9)) > 1).all()


def test_planted_neurons_are_found_at_their_layers_and_sites(fitted):
    last = fitted.found.chip.at(N_LAYERS).kept()
    found = {(SITES[s], layer, column) for s, layer, column in last.neurons.tolist()}
    assert {("ffn_in", 2, 17), ("block", 4, 3)} <= found
    size = last.weight.abs().amax(dim=0)
    strongest = {tuple(last.neurons[i].tolist()) for i in size.topk(2).indices}
    assert strongest == {(SITES.index("ffn_in"), 2, 17), (SITES.index("block"), 4, 3)}
    accuracies = {a.layer: a.accuracy for a in fitted.found.tried if a.layer in (1, 3, 5)}
    assert accuracies[1] < accuracies[3] < accuracies[5]


def test_importances_are_those_of_the_weights_that_are_kept(fitted):
    for site, layer, column in fitted.neurons.places.tolist():
        weight = fitted.probes[SITES[site]].weight[layer + 1]
        carried = weight.square().sum(dim=0)
        before = carried[carried > carried[column]].sum() / carried.sum()
        assert float(before) < max(ETAS)
        assert carried[column] > 0


@pytest.mark.parametrize("stack", ["chip", "refit"])
def test_the_classifier_of_a_depth_reads_nothing_above_it(fitted, stack):
    poisoned = Stored()
    chips = getattr(fitted.found, stack)
    for depth in range(-1, N_LAYERS):
        chip = chips.at(depth + 1)
        deeper = chip.neurons[:, 1] > depth
        assert (chip.weight[:, deeper] == 0).all()
        assert chip.kept().deepest <= depth
        clean = fitted.rows.probabilities(chip, "test", KEY.vector, depth)
        for (split, site, layer), value in fitted.stored.values.items():
            poison = torch.full_like(value, 1e6) if layer > depth else value
            poisoned.values[split, site, layer] = poison
        rows = Rows(poisoned, fitted.rows.task, torch.device("cpu"))
        kept = chip.kept()
        np.testing.assert_allclose(
            rows.probabilities(kept, "test", KEY.vector, depth), clean, atol=1e-5
        )


def test_a_classifier_without_its_idle_neurons_says_the_same(fitted):
    chip = fitted.found.chip.at(N_LAYERS)
    kept = chip.kept()
    assert 0 < len(kept.neurons) < len(chip.neurons)
    for split in ("validation", "test"):
        np.testing.assert_allclose(
            fitted.rows.probabilities(kept, split, KEY.vector, N_LAYERS - 1),
            fitted.rows.probabilities(chip, split, KEY.vector, N_LAYERS - 1),
            atol=1e-6,
        )


def test_the_test_split_is_not_read_while_anything_is_chosen():
    stored = Stored(1)
    rows = Rows(stored, task_of(stored), torch.device("cpu"))
    vector = Vector("block", "mean")
    read, held = (rows.reader(s, vector, range(-1, N_LAYERS)) for s in ("train", "validation"))
    found = choose(read, rows.labels("train"), held, rows.labels("validation"), 3)
    probe = Chip(
        found.solution.weight,
        found.solution.bias,
        mean=found.scaler.mean[:, 0],
        scale=found.scaler.scale[:, 0],
    )
    Aggregator(rows, ChipKey(STC, "block", "mean", "sparse"), Neurons.of({"block": probe})).search(
        refit=True
    )
    look(rows, ChipKey.sparse(vector), probe)
    assert stored.asked == {"train", "validation"}


def test_the_search_ends_near_the_best_of_the_whole_grid(fitted):
    grid = [(depth, eta) for eta in ETAS for depth in range(-1, N_LAYERS)]
    whole = fitted.aggregator.fit(grid)
    best = float(whole.accuracies.max())
    found = max(a.accuracy for a in fitted.found.tried)
    assert found >= best - 0.02
    assert len(fitted.found.tried) < len(grid)


def test_the_neurons_that_are_told_of_a_depth_are_those_of_its_classifier(fitted):
    chosen = [one for one in fitted.found.tried if one.chosen]
    assert [one.layer for one in chosen] == list(range(-1, N_LAYERS))
    told = SparsifyReport(aggregates=fitted.found.tried, neurons=[], layers=[])
    for layer in range(-1, N_LAYERS):
        chip = fitted.found.chip.at(layer + 1).kept()
        assert told.n_read(KEY, layer) == len(chip.neurons)


def test_what_a_person_looks_at_counts_every_text(fitted):
    found, shares = look(
        fitted.rows, ChipKey.sparse(Vector("ffn_in", "mean")), fitted.probes["ffn_in"]
    )
    assert [share.layer for share in shares] == list(range(N_LAYERS))
    planted = next(n for n in found if (n.layer, n.column) == (2, 17))
    counts = np.asarray(planted.counts)
    assert counts.sum() == SIZES["validation"]
    labels = fitted.stored.labels["validation"].numpy()
    np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(labels, minlength=3))
    values = fitted.stored.values["validation", "ffn_in", 2][:, 17].numpy()
    per_bin, _ = np.histogram(values, bins=np.asarray(planted.edges))
    assert abs(counts.sum(axis=0) - per_bin).sum() <= 2  # a value on an edge may go either way
    assert planted.strongest[0] == f"text {int(values.argmax())}"
    assert shares[2].top_tenth > 0.5
