"""Cost: counts against really cut models, memory against a count by hand; never a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from chipviz.backbones.backbone import Backbone
from chipviz.chips.chip import Chip, Chips
from chipviz.errors import ConfigError
from chipviz.keys import ChipKey
from chipviz.pruning import cost
from chipviz.pruning.cut import cut_config, cut_weights
from tests.example_run import report_of
from tests.families import NAMED, load_backbone

TOKENS = 12


def count(module):
    return sum(p.numel() for p in module.parameters())


def load(folder, name, dtype=torch.float32):
    return load_backbone(folder, name, dtype=dtype, device="cpu")


def loaded(name, folder, **changes):
    """A random model of one family with a changed configuration."""
    return load(NAMED[name].build(folder, **changes), name)


def costs_of(backbone, bundle="sequence"):
    measurement = cost.measure(backbone, TOKENS)
    key = ChipKey.sound("last")
    chips = Chips({key: Chip(torch.zeros(backbone.n_layers + 1, 3, backbone.hidden_size))})
    layers = cost.cut_costs(backbone, chips, {key: bundle}, TOKENS, measurement)
    return cost.dense_cost(backbone, TOKENS, measurement), layers


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_the_parts_sum_to_the_published_model(name, tied, tmp_path):
    backbone = loaded(name, tmp_path, tie_word_embeddings=tied)
    published = AutoModelForCausalLM.from_config(backbone.config)
    inside = {id(p) for p in published.base_model.parameters()}
    found = cost.parts(backbone)
    named = found.embedding + sum(found.blocks) + found.final_norm + found.lm_head + found.other
    assert named == backbone.folder.n_published == count(published)
    assert found.lm_head == sum(p.numel() for p in published.parameters() if id(p) not in inside)
    tables = [m for m in published.base_model.modules() if isinstance(m, nn.Embedding)]
    assert found.embedding == sum(map(count, tables))
    assert found.blocks == [count(block) for block in backbone.blocks]
    assert found.tied == tied


def test_e2_each_cut_counts_what_the_really_cut_model_holds(family):
    name, folder, _ = family
    backbone = load(folder, name)
    _, layers = costs_of(backbone, bundle="token")
    for layer, found in enumerate(layers):
        cut = type(backbone.model)(cut_config(backbone, layer))
        cut.load_state_dict(cut_weights(backbone, layer))
        chip = 3 * backbone.hidden_size + 3  # with the bias of its class
        assert found.chip_parameters == chip
        assert found.n_parameters == count(cut) + chip
        assert found.weight_bytes == 4 * found.n_parameters
        removed = backbone.folder.n_published - found.n_parameters
        assert found.parameter_ratio == pytest.approx(removed / backbone.folder.n_published)


def test_flops_are_those_that_torch_counts(family):
    """Attention included; the rotary table, counted by torch alone, is within the tolerance."""
    name, folder, model = family
    backbone = load(folder, name)
    dense, layers = costs_of(backbone)
    ids = torch.ones((1, TOKENS), dtype=torch.int64)
    for layer, found in enumerate(layers):
        cut = type(backbone.model)(cut_config(backbone, layer)).eval()
        counted = flops(cut, ids) / TOKENS + 2 * 3 * backbone.hidden_size  # and the chip
        assert found.flops_per_token == pytest.approx(counted, rel=0.015)
    # Of an encoder the classifier runs no head for masked words; bert's pooler is not asked either.
    whole = model if name != "bert" else type(backbone.model)(model.config, add_pooling_layer=False)
    assert dense.flops_per_token == pytest.approx(flops(whole.eval(), ids) / TOKENS, rel=0.015)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_flops_of_a_mixture_are_those_of_the_experts_that_are_asked(name, tmp_path):
    backbone = loaded(name, tmp_path)
    backbone.model.set_experts_implementation("eager")
    _, layers = costs_of(backbone)
    ids = torch.ones((1, TOKENS), dtype=torch.int64)
    counted = flops(backbone.model, ids) / TOKENS + 2 * 3 * backbone.hidden_size
    assert layers[-1].flops_per_token == pytest.approx(counted, rel=0.03)


def flops(model, ids):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # torch has no formula for the fused kernel of CPUs
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return counter.get_total_flops()


# --- measured -----------------------------------------------------------------------------------


def test_one_measurement_gives_every_cut_and_leaves_the_model_as_it_was(family):
    name, folder, _ = family
    backbone = load(folder, name)
    ids = torch.tensor([[5, 6, 7]])
    before = backbone.model(input_ids=ids).last_hidden_state
    found = cost.measure(backbone, TOKENS, batch=2)
    assert len(found.latency_s) == len(found.peak_bytes) == backbone.n_layers
    assert min(found.latency_s) > 0
    # Every pass reaches the blocks in order and the head last, and so do the medians.
    assert found.latency_s == sorted(found.latency_s)
    assert found.latency_s[-1] < found.dense_latency_s
    assert cost.REPEATS[0] <= found.how.repeats <= cost.REPEATS[1]
    assert (found.how.batch, found.how.n_tokens) == (2, TOKENS)
    assert (found.how.device, found.how.dtype) == ("cpu", "float32")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules()]
    assert set(hooks) == {0}
    assert torch.equal(backbone.model(input_ids=ids).last_hidden_state, before)


def test_peak_memory_holds_the_weights_and_grows_with_depth(family):
    name, folder, _ = family
    backbone = load(folder, name)
    dense, layers = costs_of(backbone)
    peaks = [found.peak_bytes for found in layers]
    assert all(found.peak_bytes > found.weight_bytes for found in layers)
    assert peaks == sorted(peaks)
    assert dense.peak_bytes > dense.weight_bytes
    rounded = cost.measure(load(folder, name, torch.bfloat16), TOKENS)
    assert rounded.how.dtype == "bfloat16"
    assert rounded.peak_bytes[-1] < 0.75 * peaks[-1], "weights are counted as they are held"


class Widen(nn.Module):
    """One block: D -> `width` -> D, nothing kept."""

    def __init__(self, size, width):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(size, width))
        self.down = nn.Parameter(torch.zeros(width, size))

    def forward(self, hidden):
        wide = hidden @ self.up
        return wide @ self.down


class Plain(nn.Module):
    """A model whose every byte can be counted by hand."""

    def __init__(self, vocabulary, size, widths):
        super().__init__()
        self.table = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList(Widen(size, width) for width in widths)
        text = SimpleNamespace(vocab_size=vocabulary, hidden_size=size, tie_word_embeddings=True)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, **_):
        hidden = self.table(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("vocabulary", [11, 3_000])
def test_peak_memory_is_what_a_count_by_hand_finds(batch, vocabulary):
    size, widths, tokens = 8, (16, 64, 32), 5
    model = Plain(vocabulary, size, widths).requires_grad_(False)
    backbone = Backbone(
        folder=SimpleNamespace(stored_dtype=torch.float32, n_published=count(model)),
        model=model,
        blocks=model.blocks,
        final_norm=None,
    )
    found = cost.measure(backbone, tokens, batch=batch)
    table = 4 * vocabulary * size
    widest, weights = 0, table
    for peak, width in zip(found.peak_bytes, widths, strict=True):
        weights += 4 * 2 * size * width
        widest = max(widest, width)
        # The widest moment so far: a block's input, its wide state and its output.
        assert peak == weights + 4 * batch * tokens * (size + widest + size)
    head = 4 * batch * (size + vocabulary)  # one position's state and its logits
    activations = max(found.peak_bytes[-1] - weights, head)
    assert found.dense_peak_bytes == weights + activations
    assert (activations == head) == (vocabulary == 3_000)


def test_the_typical_length_is_that_of_the_median_prompt_of_the_first_thousand():
    assert cost.typical_length([3, 40, 5]) == 5
    assert cost.typical_length([2, 3]) == 2
    assert cost.typical_length([7] * 1_000 + [50] * 5_000) == 7


def test_a_budget_of_latency_needs_a_measured_run_and_memory_falls_back_to_weights():
    report = report_of("run")
    blank = {"latency_s": None, "peak_bytes": None}
    old = report.model_copy(
        update={
            "dense": report.dense.model_copy(update=blank),
            "costs": [found.model_copy(update=blank) for found in report.costs],
        }
    )
    with pytest.raises(ConfigError, match="latency of this run was not measured"):
        old.select("budget", budget="latency=20ms")
    chosen = old.select("budget", budget="memory=50%")
    found = old.cost_at(chosen.cut)
    assert found.weight_bytes <= old.dense.weight_bytes / 2
    slow = [
        c.model_copy(update={"latency_s": 0.01 * (c.layer + 1), "peak_bytes": 10**9 + c.layer})
        for c in report.costs
    ]
    new = report.model_copy(update={"costs": slow})
    assert new.select("budget", budget="latency=20ms").cut_layer <= 1
    assert new.select("budget", budget="memory=1000000000").cut_layer == 0
