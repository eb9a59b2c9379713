"""Pruning: the cut model computes, to the bit, what the chip was trained on."""

import pytest
import torch

from chipviz.errors import BackboneError, ConfigError
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector
from chipviz.pruning.cut import cut_config, cut_weights, impossible_cuts, no_cut_notices
from tests.backbones.sweep import tiny_model
from tests.families import NAMED, load_backbone

VECTORS = [Vector.named("last"), Vector.named("mean")]


@pytest.mark.parametrize("cut_layer", [0, 1, 3])
def test_e1_pruned_backbone_gives_the_features_the_chip_was_trained_on(family, cut_layer):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    config = cut_config(backbone, cut_layer)
    pruned = type(backbone.model)(config).eval()
    pruned.load_state_dict(cut_weights(backbone, cut_layer))
    ids = torch.tensor([[5, 6, 7, 8, 20]])
    with torch.inference_mode():
        states = pruned(input_ids=ids).last_hidden_state
        trained_on = forward_pooled(backbone, ids.tolist(), 1, VECTORS)
    torch.testing.assert_close(states[:, -1], trained_on[0][cut_layer + 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(states.mean(dim=1), trained_on[1][cut_layer + 1], atol=1e-6, rtol=0)


def test_every_list_with_one_entry_a_layer_is_cut(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    config = cut_config(backbone, 0)
    assert config.num_hidden_layers == 1
    lists = [v for v in config.to_dict().values() if isinstance(v, list)]
    assert all(len(v) != 4 for v in lists)
    assert backbone.config.num_hidden_layers == 4, "the backbone's own config stays as it is"


def test_a_layer_that_does_not_exist_is_refused(tmp_path):
    backbone = load_backbone(
        NAMED["llama"].build(tmp_path), "llama", device="cpu", dtype=torch.float32
    )
    with pytest.raises(ConfigError, match="layers are 0 to 3"):
        cut_config(backbone, 4)


def test_cuts_that_a_family_builds_otherwise_are_known_before_anything_is_read(tmp_path):
    """OLMo hybrid wants an attention layer among those kept: its first stands at layer 1."""
    tiny_model("olmo_hybrid").save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, "olmo", dtype=torch.float32, device="cpu")
    found = impossible_cuts(backbone)
    assert list(found) == [0]
    assert "at least one attention layer" in found[0]
    (notice,) = no_cut_notices(found, "olmo")
    assert (notice.code, notice.n) == ("layers-without-cut", 1)
    assert not no_cut_notices({}, "olmo")


def test_a_family_whose_layers_know_their_number_is_refused(tmp_path):
    tiny_model("minicpm3").save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, "minicpm3", dtype=torch.float32, device="cpu")
    with pytest.raises(BackboneError, match=r"after any layer but its last: layers\.0\.residual"):
        impossible_cuts(backbone)
