"""Backbone: the parts are found by structure, and watching sees what transformers computes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
)

from chipviz.backbones import backbone as backbone_module
from chipviz.backbones.backbone import fast_dtype, pad, watch_layers
from chipviz.backbones.structure import find_blocks, find_norm_and_causality
from chipviz.errors import BackboneError
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector
from chipviz.pruning.cut import cut_config, cut_weights
from tests.families import NAMED, SMALL, load_backbone


def test_watched_and_read_layers_are_the_hidden_states_of_transformers(family):
    """hidden_states holds block outputs, and after the last block the normed output."""
    name, folder, model = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    ids, mask = pad([[5, 6, 7, 8], [9, 10]], 1, backbone.device)
    seen = {}
    with torch.inference_mode(), watch_layers(backbone, lambda layer, h: seen.update({layer: h})):
        backbone.forward(ids, mask)
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert sorted(seen) == [-1, 0, 1, 2, 3]
    real = mask.bool()
    for layer in (-1, 0, 1, 2):
        got = seen[layer][real]
        torch.testing.assert_close(got, expected.hidden_states[layer + 1][real], atol=1e-5, rtol=0)
    last = backbone.apply_final_norm(seen[3])[real]
    torch.testing.assert_close(last, expected.hidden_states[4][real], atol=1e-5, rtol=0)


def test_encoders_have_no_final_norm_and_decoders_have_one(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    assert (backbone.final_norm is None) == (name == "bert")


def test_published_parameters_count_a_tied_head_once(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    if name == "bert":
        return
    published = AutoModelForCausalLM.from_pretrained(folder)
    assert backbone.folder.n_published == published.num_parameters()


def test_watching_leaves_no_hook_behind_even_after_an_error(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    with pytest.raises(RuntimeError, match="stop"), watch_layers(backbone, lambda *_: None):
        raise RuntimeError("stop")
    hooks = [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in backbone.blocks]
    assert hooks == [0, 0, 0, 0]


def test_the_fingerprint_changes_with_one_weight_matrix(family, tmp_path):
    name, folder, model = family
    before = load_backbone(folder, name, dtype=torch.float32, device="cpu").folder.fingerprint
    assert (
        before == load_backbone(folder, name, dtype=torch.bfloat16, device="cpu").folder.fingerprint
    )
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    next(other.parameters()).data.mul_(1.01)
    other.save_pretrained(tmp_path)
    assert (
        before
        != load_backbone(tmp_path, name, dtype=torch.float32, device="cpu").folder.fingerprint
    )


def test_a_model_without_a_block_list_is_refused():
    model = torch.nn.Module()
    model.config = LlamaConfig(num_hidden_layers=7)
    with pytest.raises(BackboneError, match="no list of 7 blocks"):
        find_blocks(model, "x")


def test_of_a_model_that_sees_as_well_the_part_that_reads_is_taken(tmp_path):
    """Gemma 3 as published from 4B on: vision beside the language model."""
    text = SMALL | NAMED["gemma3_text"].config
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, "sees", dtype=torch.float32, device="cpu")
    assert backbone.n_layers == 4
    assert backbone.folder.n_published == whole.num_parameters()
    ids = [5, 9, 30]
    states = whole(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    got = forward_pooled(backbone, [ids], 2, [Vector.named("last")])[0]
    torch.testing.assert_close(got[-1, 0], states[-1][0, -1], atol=1e-5, rtol=0)
    cut = type(backbone.model)(cut_config(backbone, 1)).eval()
    cut.load_state_dict(cut_weights(backbone, 1))
    state = cut(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(state, got[2, 0], atol=1e-6, rtol=0)


class _Odd(torch.nn.Module):
    """Four blocks that do not make a chain, in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.config = LlamaConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2)
        self.table = torch.nn.Embedding(self.config.vocab_size, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.twin = torch.nn.ModuleList(torch.nn.Linear(8, 2) for _ in range(4))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids, **_):
        hidden = self.table(input_ids)
        for i, block in enumerate(self.blocks):
            if self.way == "skips" and i == 2:
                continue
            hidden = block(hidden)
            if self.way == "between" and i == 1:
                hidden = hidden + 1
        if self.way == "fails":
            raise ValueError("needs decoder_input_ids")
        if self.way == "after":
            hidden = self.head(hidden) + 1
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("skips", "do not run once each"),
        ("between", "something stands between two of its blocks"),
        ("after", "more than a norm stands after its last block"),
        ("fails", "does not run on tokens alone"),
    ],
)
def test_a_model_that_is_no_chain_of_blocks_is_refused(way, said):
    model = _Odd(way).eval()
    with pytest.raises(BackboneError, match=said) as refused:
        find_norm_and_causality(model, find_blocks(model), "odd")
    assert refused.value.fields == ("blocks",)


def test_a_path_names_the_list_that_is_not_the_heaviest_and_only_a_list_that_is_there():
    model = _Odd("")
    assert find_blocks(model) is model.blocks
    assert find_blocks(model, path="twin") is model.twin
    assert find_blocks(model, path="transformer.twin") is model.twin
    for path in ("nosuch", "head", "win", ""):
        with pytest.raises(BackboneError, match=f"no list of 4 blocks at '{path}'"):
            find_blocks(model, path=path)


def test_padding_stands_on_the_right_with_a_mask():
    tokens, mask = pad([[3, 4, 5], [6]], 0, torch.device("cpu"))
    assert tokens.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_dtype_is_measured_once_and_remembered(tmp_path, monkeypatch):
    answers = [torch.bfloat16, torch.float32]
    monkeypatch.setattr(backbone_module, "_measure_dtype", lambda _: answers.pop(0))
    device = torch.device("cpu")
    assert [fast_dtype(device, tmp_path) for _ in range(3)] == [torch.bfloat16] * 3
    (tmp_path / "fast_dtype.json").write_text("broken")
    assert fast_dtype(device, tmp_path) == torch.float32
    assert [f.name for f in tmp_path.iterdir()] == ["fast_dtype.json"]


@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_a_model_spread_over_places_reads_the_same_states(tiny_backbone_folder, away):
    """Half of the blocks elsewhere: on another "device", or put away to disk."""
    whole = load_backbone(tiny_backbone_folder, "tiny", dtype=torch.float32, device="cpu")
    places = {"embed_tokens": "cpu", "rotary_emb": "cpu", "norm": away}
    places |= {f"layers.{i}": "cpu" if i < 2 else away for i in range(4)}
    spread = load_backbone(tiny_backbone_folder, "tiny", dtype=torch.float32, device_map=places)
    ids = [[5, 9, 30], [7, 8, 9, 10, 11]]
    vectors = tuple(map(Vector.named, ("last", "mean", "raw")))
    truth = forward_pooled(whole, ids, 2, vectors)
    torch.testing.assert_close(forward_pooled(spread, ids, 2, vectors), truth)
