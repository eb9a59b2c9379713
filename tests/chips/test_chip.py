"""Chips: what they compute, and that they come back from disk as they were."""

import pytest
import torch

from chipviz.chips.chip import Chip, Chips
from chipviz.errors import SourceError
from chipviz.keys import ChipKey, Cut

LAST, PUBLISHED = ChipKey.sound("last"), ChipKey.published("mlp")


def mlp(*lead):
    return Chip(
        torch.randn(*lead, 3, 8),
        torch.randn(*lead, 3),
        torch.randn(*lead, 8, 5),
        torch.randn(*lead, 8),
    )


def test_chips_compute_what_torchs_own_layers_do():
    chip, features = mlp(), torch.randn(7, 5)
    assert chip.hidden_weight is not None
    network = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.Softmax(dim=-1)
    )
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    own = (chip.hidden_weight, chip.hidden_bias, chip.weight, chip.bias)
    network.load_state_dict(dict(zip(names, own, strict=True)))
    torch.testing.assert_close(chip.probabilities(features), network(features))
    linear = Chip(chip.hidden_weight)
    torch.testing.assert_close(linear.logits(features), features @ chip.hidden_weight.T)


def test_a_stack_answers_as_its_members_do():
    stack, features = mlp(4), torch.randn(4, 7, 5)
    whole = stack.logits(features)
    for i in range(4):
        torch.testing.assert_close(whole[i], stack.at(i).logits(features[i]))
    both = Chip.cat([stack, stack])
    torch.testing.assert_close(both.logits(torch.cat([features, features]))[4:], whole)
    assert stack.at(0).n_parameters == 3 * 8 + 3 + 8 * 5 + 8


def test_chips_come_back_from_disk_as_they_were_and_only_for_their_backbone(tmp_path):
    chips = Chips(
        {LAST: Chip(torch.randn(4, 3, 5)), PUBLISHED: mlp(4)},
        {LAST: [1.0, 2.0, 0.1, 4.0]},
    )
    path = tmp_path / "chips.safetensors"
    chips.save(path, "abc")
    again = Chips.load(path, "abc")
    assert again.strengths == chips.strengths
    for key, stack in chips.stacks.items():
        found = again.stacks[key].tensors()
        assert found.keys() == stack.tensors().keys()
        assert all(torch.equal(found[name], value) for name, value in stack.tensors().items())
    assert torch.equal(again.at(Cut(-1, LAST)).weight, chips.stacks[LAST].weight[0])
    with pytest.raises(SourceError, match="another backbone"):
        Chips.load(path, "abd")
    with pytest.raises(IndexError, match="-1 to 2"):
        chips.at(Cut(3, LAST))
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
