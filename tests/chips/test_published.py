"""The paper's recipe: step for step what torch's own layers and optimiser do, row by row."""

import pytest
import torch

from chipviz.chips import published
from chipviz.chips.published import fit_pictures, fit_published


def rows_of(features):
    return lambda start, stop: features[:, start:stop]


def plainly(kind, features, labels, n_classes, first):
    """METHODS of the paper in plain torch: one chip, one row at a time, from given weights."""
    width = features.shape[-1]
    layers = (
        [torch.nn.Linear(width, 256), torch.nn.ReLU(), torch.nn.Linear(256, n_classes)]
        if kind == "mlp"
        else [torch.nn.Linear(width, n_classes)]
    )
    network = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), first, strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.01
    )
    for row, label in zip(features, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(network(row[None]), label[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return list(network.parameters())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_every_step_is_the_papers(kind, monkeypatch):
    features, labels = 5 * torch.randn(3, 50, 12), torch.randint(0, 4, (50,))
    begun = []
    initial = published.initial

    def remembered(*arguments):
        begun.extend(initial(*arguments))
        return [tensor.clone() for tensor in begun]

    monkeypatch.setattr(published, "initial", remembered)
    chip = fit_published(kind, rows_of(features), labels, 4, seed=1, block_rows=16)
    for layer in range(3):
        first = [tensor[layer] for tensor in begun]
        truth = plainly(kind, features[layer], labels, 4, first)
        own = chip.at(layer)
        found = [own.hidden_weight, own.hidden_bias, own.weight, own.bias]
        for ours, theirs in zip([t for t in found if t is not None], truth, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=2e-6, rtol=1e-5)


def test_it_begins_as_torchs_linear_layers_do():
    begun = published.initial(200, 64, 0, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert begun[0].abs().max() <= 64**-0.5
    assert begun[0].std().item() == pytest.approx(
        torch.nn.Linear(64, 4096).weight.std().item(), rel=0.05
    )


def test_rows_beyond_the_limit_are_not_read():
    features, labels = torch.randn(1, 50, 6), torch.randint(0, 2, (50,))
    read, done = [], []

    def watched(start, stop):
        read.append(stop)
        return features[:, start:stop]

    def look(rows, chip):
        done.append((rows, chip.weight.clone()))

    whole = fit_published("linear", watched, labels, 2, seed=0, max_rows=20, on_rows=look)
    assert max(read) == 20
    assert done[-1][0] == 20
    part = fit_published("linear", rows_of(features[:, :20]), labels[:20], 2, seed=0)
    assert torch.equal(whole.weight, part.weight)
    for rows, weight in done[:-1]:  # seen on the way: what training on so many rows ends with
        fewer = fit_published("linear", rows_of(features[:, :rows]), labels[:rows], 2, seed=0)
        assert torch.equal(weight, fewer.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_pictures_are_learned_in_the_papers_steps(kind, monkeypatch):
    """Batches of 512 in the given order, AdamW with its own betas, 1e-3, hidden as wide as D."""
    features, labels = 5 * torch.randn(2, 700, 10), torch.randint(0, 4, (700,))
    begun = []
    initial = published.initial

    def remembered(*arguments):
        made = initial(*arguments)
        begun.extend(tensor.clone() for tensor in made)
        return made

    monkeypatch.setattr(published, "initial", remembered)
    done = []
    chip = fit_pictures(kind, rows_of(features), labels, 4, seed=1, epochs=3, on_epoch=done.append)
    assert done == [1, 2, 3]
    for layer in range(2):
        inner = [torch.nn.Linear(10, 10), torch.nn.ReLU()] if kind == "mlp" else []
        network = torch.nn.Sequential(*inner, torch.nn.Linear(10, 4))
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), begun, strict=True):
                parameter.copy_(value[layer])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(3):
            for rows in (slice(0, 512), slice(512, 700)):
                loss = torch.nn.functional.cross_entropy(
                    network(features[layer, rows]), labels[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        own = chip.at(layer)
        found = [own.hidden_weight, own.hidden_bias, own.weight, own.bias]
        for ours, theirs in zip(
            [t for t in found if t is not None], network.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs.detach(), atol=2e-5, rtol=1e-4)
