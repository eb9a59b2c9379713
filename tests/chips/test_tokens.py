"""Tokens: what a layer's chip says at each token, against chips applied by hand."""

import pytest
import torch

from chipviz.chips.chip import Chip, Chips
from chipviz.chips.tokens import read_tokens, settled_layer
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.data.task import Examples
from chipviz.keys import ChipKey, Cut
from tests.families import load_backbone

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def opened(tiny_backbone_folder):
    import numpy as np

    backbone = load_backbone(tiny_backbone_folder, "tiny", dtype=torch.float32, device="cpu")
    rows = Examples(["we saw the old house", "a goal"] * 20, None, np.zeros(40, dtype=np.int64))
    prompt = bake(load_tokenizer(tiny_backbone_folder), "say {text} now", 60, rows)
    torch.manual_seed(3)
    keys = (ChipKey.sound("last"), ChipKey.sound("mean"), ChipKey.published("linear"))
    stacks = {key: Chip(torch.randn(5, 3, 32)) for key in keys}
    return backbone, prompt, Chips(stacks)


def test_the_answer_for_the_text_is_the_chip_on_the_pooled_states(opened):
    backbone, prompt, chips = opened
    text = "we saw a goal"
    ids = torch.tensor(prompt.encode([text]))
    states = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states
    for pooling in ("last", "mean"):
        cut = Cut(1, ChipKey.sound(pooling))
        read = read_tokens(backbone, prompt, chips, text, cut=cut, label_names=NAMES)
        normed = backbone.apply_final_norm(states[2])[0]
        pooled = normed[-1] if pooling == "last" else normed.mean(dim=0)
        truth = (chips.at(cut).weight @ pooled).softmax(dim=0)
        torch.testing.assert_close(torch.tensor(read.by_layer[1]), truth, atol=1e-4, rtol=0)
        alone = read_tokens(backbone, prompt, chips, text, cut=cut, label_names=NAMES, single=True)
        single = (normed @ chips.at(cut).weight.T).softmax(dim=-1)
        torch.testing.assert_close(torch.tensor(alone.at_cut), single, atol=1e-4, rtol=0)
        so_far = torch.stack([normed[: i + 1].mean(dim=0) for i in range(len(normed))])
        asked = normed if pooling == "last" else so_far
        at_token = (asked @ chips.at(cut).weight.T).softmax(dim=-1)
        assert read.at_cut[-1] == read.by_layer[1]  # the last tint is the verdict
        torch.testing.assert_close(torch.tensor(read.at_cut), at_token, atol=1e-4, rtol=0)
        assert read.label_index[1] == at_token.argmax(dim=-1).tolist()
    published = Cut(1, ChipKey.published("linear"))
    raw = read_tokens(backbone, prompt, chips, text, cut=published, label_names=NAMES)
    truth = (chips.at(published).weight @ states[2][0, -1]).softmax(dim=0)
    torch.testing.assert_close(torch.tensor(raw.by_layer[1]), truth, atol=1e-4, rtol=0)


def test_the_pieces_of_the_text_join_to_the_text_and_the_template_stands_around(opened):
    backbone, prompt, chips = opened
    text = "Résumé: <script>alert(1)</script> 汉字"
    read = read_tokens(
        backbone, prompt, chips, text, cut=Cut(0, ChipKey.sound("last")), label_names=NAMES
    )
    inside = [t for t in read.tokens if t.in_text]
    covered = sorted({i for t in inside for i in range(t.start, t.end)})
    assert covered == list(range(len(text)))
    assert all(t.text == text[t.start : t.end] for t in inside)
    outside = "".join(t.text for t in read.tokens if not t.in_text)
    assert outside.split() == ["say", "now"]


@pytest.mark.parametrize(
    ("answers", "settled"), [([1, 1, 1], 0), ([0, 1, 1], 1), ([1, 0, 1], 2), ([0, 0, 1], 2)]
)
def test_an_answer_is_settled_where_it_no_longer_changes(answers, settled):
    assert settled_layer(torch.tensor(answers)) == settled
