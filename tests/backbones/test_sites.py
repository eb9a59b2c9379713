"""Feed-forward sites: what hooks of one's own on modules known by name see, on every family."""

import pytest
import torch

from chipviz.backbones.sites import FFN_SITES, find_sites
from chipviz.errors import BackboneError
from chipviz.features.forward import forward_neurons, forward_pooled
from chipviz.keys import Site, Vector
from tests.families import ALL, NAMED, SEVEN, load_backbone

IDS = [[5, 9, 30, 7, 11], [8, 3], [4, 6, 10, 20, 21, 22, 23]]
DOWN = {
    "llama": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "gemma3_text": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "bert": "output.dense",
}
"""The down projection of the seven, as their makers call it."""
ACT = {
    "llama": "mlp.act_fn",
    "qwen2": "mlp.act_fn",
    "gemma3_text": "mlp.act_fn",
    "gpt2": "mlp.act",
    "gpt_neox": "mlp.act",
    "opt": "activation_fn",
    "bert": "intermediate.intermediate_act_fn",
}
MIXTURES = ("gpt_oss", "mixtral")


def loaded(family, folder):
    return load_backbone(family.build(folder), family.name, dtype=torch.float32, device="cpu")


def seen_by_own_hooks(backbone, name, ids):
    """What flows at each site and layer, by hooks on modules that are known by name."""
    seen, handles = {}, []
    for layer, block in enumerate(backbone.blocks):
        down, act = (block.get_submodule(names[name]) for names in (DOWN, ACT))

        def note_down(_module, args, out, layer=layer):
            seen["ffn_in", layer], seen["ffn_out", layer] = args[0], out

        def note_gate(_module, _args, out, layer=layer):
            seen["gate", layer] = out

        handles.append(down.register_forward_hook(note_down))
        handles.append(act.register_forward_hook(note_gate))
    with torch.inference_mode():
        backbone.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", SEVEN, ids=lambda family: family.name)
def test_sites_are_the_tensors_that_a_hook_of_ones_own_sees(family, tmp_path):
    backbone = loaded(family, tmp_path)
    vectors = [Vector(site, pooling) for site in FFN_SITES for pooling in ("last", "mean", "max")]
    found = forward_pooled(backbone, IDS, 2, vectors)
    for row, ids in enumerate(IDS):
        seen = seen_by_own_hooks(backbone, family.name, ids)
        for vector, pooled in zip(vectors, found, strict=True):
            assert (pooled[0] == 0).all()  # the embedding has no such part
            for layer in range(backbone.n_layers):
                state = seen[vector.site, layer].reshape(len(ids), -1)
                truth = {"last": state[-1], "mean": state.mean(0), "max": state.max(0).values}
                torch.testing.assert_close(
                    pooled[layer + 1, row], truth[vector.pooling], atol=1e-5, rtol=0
                )


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_every_family_has_all_sites_but_mixtures_only_the_last(family, tmp_path):
    sites = find_sites(loaded(family, tmp_path))
    if family.name in MIXTURES:
        assert set(sites.modules) == {"ffn_out"}
        assert "mixture of experts" in sites.absent["gate"]
    else:
        assert set(sites.modules) == set(FFN_SITES)
        assert sites.widths["gate"] == sites.widths["ffn_in"] >= 64
    assert sites.widths["ffn_out"] == 32
    assert all(len(modules) == 4 for modules in sites.modules.values())


def test_a_gated_part_reads_its_activation_times_its_other_half(tmp_path):
    backbone = loaded(NAMED["llama"], tmp_path)
    gate, inside, out = (
        state[2]
        for state in forward_pooled(backbone, [[7]], 2, [Vector(s, "last") for s in FFN_SITES])
    )
    mlp = backbone.blocks[1].mlp
    torch.testing.assert_close(mlp.down_proj(inside), out)
    ratio = inside / gate
    block_in = torch.linalg.lstsq(mlp.up_proj.weight, ratio.T).solution
    torch.testing.assert_close(mlp.up_proj(block_in.T), ratio, atol=1e-3, rtol=1e-3)


def test_a_site_that_a_mixture_lacks_is_refused_in_words(tmp_path):
    backbone = loaded(NAMED["mixtral"], tmp_path)
    with pytest.raises(BackboneError, match="no site gate: layer 0 is a mixture") as refused:
        forward_pooled(backbone, IDS, 2, [Vector("gate", "mean")])
    assert refused.value.fields == ("sites",)
    assert "block, ffn_out" in refused.value.hint


def test_a_mixtures_output_is_that_of_its_whole_part(tmp_path):
    backbone = loaded(NAMED["mixtral"], tmp_path)
    seen = []
    handle = backbone.blocks[2].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.inference_mode():
        backbone.model(input_ids=torch.tensor([IDS[0]]))
    handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    (pooled,) = forward_pooled(backbone, [IDS[0]], 2, [Vector("ffn_out", "mean")])
    torch.testing.assert_close(
        pooled[3, 0], out.reshape(len(IDS[0]), -1).mean(0), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["last", "mean", "first", "max"])
def test_neurons_alone_are_the_columns_of_whole_vectors(pooling, tmp_path):
    backbone = loaded(NAMED["gpt2"], tmp_path)
    sites = ("block", "gate", "ffn_in", "ffn_out")
    whole = forward_pooled(backbone, IDS, 2, [Vector(site, pooling) for site in sites])
    names = list(Site.__args__)
    picked = [
        ("ffn_in", 3, 60),
        ("block", -1, 5),
        ("block", 2, 31),
        ("ffn_out", 0, 1),
        ("gate", 1, 8),
    ]
    places = torch.tensor([[names.index(s), layer, column] for s, layer, column in picked])
    got = forward_neurons(backbone, IDS, 2, pooling, places)
    truth = [whole[sites.index(s)][layer + 1, :, column] for s, layer, column in picked]
    torch.testing.assert_close(got, torch.stack(truth, dim=1), atol=1e-6, rtol=0)
    assert forward_neurons(backbone, IDS, 2, pooling, places[:0]).shape == (3, 0)
