"""Backbone: the parts are found by structure, and watching sees what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from chipviz import backbone as backbone_module
from chipviz.backbone import fast_dtype, find_blocks, load_backbone, pad, watch_layers
from chipviz.errors import BackboneError
from chipviz.features import forward_pooled


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
    last = backbone.read(seen[3])[real]
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
    assert backbone.n_published == published.num_parameters()


def test_watching_leaves_no_hook_behind_even_after_an_error(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    with pytest.raises(RuntimeError, match="stop"), watch_layers(backbone, lambda *_: None):
        raise RuntimeError("stop")
    hooks = [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in backbone.blocks]
    assert hooks == [0, 0, 0, 0]


def test_the_fingerprint_changes_with_one_weight_matrix(family, tmp_path):
    name, folder, model = family
    before = load_backbone(folder, name, dtype=torch.float32, device="cpu").fingerprint
    assert before == load_backbone(folder, name, dtype=torch.bfloat16, device="cpu").fingerprint
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    next(other.parameters()).data.mul_(1.01)
    other.save_pretrained(tmp_path)
    assert before != load_backbone(tmp_path, name, dtype=torch.float32, device="cpu").fingerprint


def test_a_model_without_a_block_list_is_refused():
    model = torch.nn.Module()
    model.config = LlamaConfig(num_hidden_layers=7)
    with pytest.raises(BackboneError, match="no list of 7 blocks"):
        find_blocks(model, "x")


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
    poolings = ("last", "mean", "raw")
    truth = forward_pooled(whole, ids, 2, poolings)
    torch.testing.assert_close(forward_pooled(spread, ids, 2, poolings), truth)
