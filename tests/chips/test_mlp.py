"""MLP chips: learn what a line cannot, stop by validation, and never depend on their neighbours."""

import pytest
import torch

from chipviz.chips import mlp
from chipviz.chips.mlp import fit_mlp
from chipviz.progress import Cancelled


def rows_of(features):
    return lambda start, stop: features[:, start:stop]


def ring(n, seed, width=6):
    """Two classes, one around the other: no line parts them."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=random)
    angle = 6.283 * torch.rand(n, generator=random)
    radius = 1.0 + 2.0 * labels + 0.2 * torch.randn(n, generator=random)
    plane = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    noise = torch.randn(n, width - 2, generator=random)
    # Far from the origin and unequal in scale, as hidden states are.
    return torch.cat([100 + 30 * plane, noise], dim=1)[None], labels


def fit(train, validation, **options):
    (features, labels), (held_out, truth) = train, validation
    return fit_mlp(rows_of(features), labels, rows_of(held_out), truth, 2, seed=0, **options)


def accuracy(chip, features, labels):
    return (chip.logits(features).argmax(dim=-1) == labels).float().mean(dim=-1)


def test_an_mlp_learns_what_no_line_can():
    chip = fit(ring(600, 0), ring(200, 1))
    features, labels = ring(500, 2)
    assert accuracy(chip, features, labels).item() > 0.95
    assert chip.weight.shape == (1, 2, 256)


def test_layers_fitted_side_by_side_do_not_touch_each_other():
    one, noise = ring(300, 0), torch.randn(1, 300, 6)
    held_out = ring(100, 1)
    both = fit(
        (torch.cat([one[0], noise]), one[1]),
        (torch.cat([held_out[0], torch.randn(1, 100, 6)]), held_out[1]),
    )
    features, labels = ring(400, 2)
    assert accuracy(both.at(0), features[0], labels).item() > 0.9
    said = accuracy(both.at(1), torch.randn(400, 6), labels).item()
    assert said == pytest.approx(0.5, abs=0.1)


def test_the_weights_kept_are_those_of_the_best_validation_loss():
    """More epochs than the best one needs change nothing: the snapshot stays."""
    train, validation = ring(40, 0, width=40), ring(100, 1, width=40)  # few rows: it overfits
    epochs = []
    short = fit(train, validation, on_epoch=lambda: epochs.append(1))
    long = fit(train, validation, patience=20)
    loss = torch.nn.functional.cross_entropy(long.logits(validation[0])[0], validation[1])
    other = torch.nn.functional.cross_entropy(short.logits(validation[0])[0], validation[1])
    assert loss <= other + 1e-6
    assert len(epochs) < mlp.MAX_EPOCHS


def test_the_same_seed_gives_the_same_chip_and_another_seed_another():
    train, validation = ring(120, 0), ring(60, 1)
    (features, labels), (held_out, truth) = train, validation
    fits = [
        fit_mlp(rows_of(features), labels, rows_of(held_out), truth, 2, seed=seed).weight
        for seed in (3, 3, 4)
    ]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def test_rows_of_no_weight_do_not_count():
    (features, labels), validation = ring(400, 0), ring(200, 1)
    wrong = labels.clone()
    wrong[::2] = 1 - wrong[::2]
    weight = torch.ones(400)
    weight[::2] = 0.0
    chip = fit((features, wrong), validation, row_weight=2 * weight)
    rows, truth = ring(400, 2)
    assert accuracy(chip, rows, truth).item() > 0.9


def test_blocks_of_rows_are_enough():
    chip = fit(ring(600, 0), ring(200, 1), block_rows=100)
    features, labels = ring(500, 2)
    assert accuracy(chip, features, labels).item() > 0.95


def test_it_stops_when_asked_to():
    def stop():
        raise Cancelled

    with pytest.raises(Cancelled):
        fit(ring(60, 0), ring(30, 1), on_epoch=stop)
