"""Backbones in which padding reaches real tokens are read without it: texts see no neighbours."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from chipviz.backbones.batching import batches
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector
from tests.families import NAMED, load_backbone

MIXING = {
    "fnet": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
    "convbert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "embedding_size": 16,
        "conv_kernel_size": 5,
        "head_ratio": 2,
    },
}
MEAN = Vector.named("mean")


def load(name, folder):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=200, max_position_embeddings=64, **MIXING[name])
    AutoModel.from_config(config).save_pretrained(folder)
    return load_backbone(folder, name, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", MIXING)
def test_a_text_has_the_same_states_alone_and_among_others(name, tmp_path):
    backbone = load(name, tmp_path)
    assert not backbone.padded
    ids = [[7, 8, 9], list(range(20, 34)), [11, 12, 13], [5] * 9]
    alone = torch.cat([forward_pooled(backbone, [row], 0, [MEAN])[0] for row in ids], dim=1)
    together = torch.empty_like(alone)
    for rows in batches([len(row) for row in ids], 1_024, padded=backbone.padded):
        together[:, rows] = forward_pooled(backbone, [ids[row] for row in rows], 0, [MEAN])[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    mixed = forward_pooled(backbone, ids, 0, [MEAN])[0]
    assert (mixed - alone).abs().max() > 1e-3  # or nothing would be wrong with padding


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "modernbert"])
def test_padding_is_no_matter_where_attention_masks_it(name, tmp_path):
    assert load_backbone(NAMED[name].build(tmp_path), name, dtype=torch.float32).padded
