"""Every family the paper's users may bring: loaded, read, baked, cut, saved and loaded again.

That features equal `output_hidden_states` is held in test_features, over the same families.
"""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from chipviz.bundle import save
from chipviz.bundle.kinds import Cutting
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.prompt import bake, load_tokenizer, segment_break
from chipviz.data.task import Examples
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector
from chipviz.pruning.cut import cut_config, cut_weights
from tests.example_run import report_of
from tests.families import ALL, add_words, load_backbone
from tests.here import said_here

TEXTS = ["the old red house near a river", "the bank lost money on Tuesday"] * 5
SAMPLE = Examples(TEXTS, None, np.zeros(10, dtype=np.int64))
TEMPLATE = "News: {text}\nTopic of this article:"
IDS = [[5, 9, 30, 31, 32, 33, 34, 35, 36, 37, 38], [7, 8, 20]]


@pytest.fixture(scope="module", params=ALL, ids=lambda family: family.name)
def found(request, tmp_path_factory):
    """A family, its published model and what chipviz makes of its folder."""
    folder = tmp_path_factory.mktemp(request.param.name)
    model = request.param.published()
    model.save_pretrained(folder)
    add_words(request.param, folder)
    backbone = load_backbone(folder, request.param.name, dtype=torch.float32, device="cpu")
    return request.param, model, backbone


def test_the_parts_are_found_by_structure(found):
    family, model, backbone = found
    assert backbone.blocks is backbone.model.get_submodule(family.blocks)
    assert backbone.n_layers == len(backbone.blocks) == 4
    norm = backbone.model.get_submodule(family.norm) if family.norm else None
    assert backbone.final_norm is norm
    assert backbone.causal == family.causal
    assert backbone.hidden_size == 32
    if family.causal:
        assert backbone.folder.n_published == sum(p.numel() for p in model.parameters())


def test_rounding_does_not_make_a_model_causal_or_not(found):
    family, _, backbone = found
    rounded = load_backbone(backbone.folder.path, "x", dtype=torch.bfloat16, device="cpu")
    assert rounded.causal == family.causal


def test_a_path_names_the_same_blocks_as_the_base_or_the_published_model_does(found):
    family, model, backbone = found
    for path in (family.blocks, f"{model.base_model_prefix}.{family.blocks}"):
        again = load_backbone(backbone.folder.path, "x", device="cpu", blocks_path=path)
        assert again.blocks is again.model.get_submodule(family.blocks)


@pytest.mark.parametrize("cut_layer", [0, 2, 3])
def test_a_cut_saved_and_loaded_again_gives_the_full_models_states(found, cut_layer, tmp_path):
    family, model, backbone = found
    config = cut_config(backbone, cut_layer)
    pruned = type(backbone.model)(config)
    pruned.load_state_dict(cut_weights(backbone, cut_layer))
    pruned.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, family.name, dtype=torch.float32, device="cpu")
    assert again.n_layers == cut_layer + 1
    norm = backbone.model.get_submodule(family.norm) if family.norm else torch.nn.Identity()
    for ids in map(torch.tensor, IDS):
        with torch.inference_mode():
            full = model(input_ids=ids[None], output_hidden_states=True).hidden_states
            state = full[-1] if cut_layer == 3 else norm(full[cut_layer + 1])
            cut = again.model(input_ids=ids[None]).last_hidden_state
        torch.testing.assert_close(cut, state, atol=1e-6, rtol=0)


def test_the_template_is_baked_as_the_family_wants_it_and_survives_any_text(found, tmp_path):
    """What the family puts around a text stands once; a long text loses nothing but itself."""
    family, _, backbone = found
    plain = load_tokenizer(backbone.folder.path)
    prompt = bake(plain, TEMPLATE, 40, SAMPLE)
    special = set(plain.all_special_ids) - {plain.unk_token_id}
    bare = plain("a", add_special_tokens=False)["input_ids"]
    whole = plain("a")["input_ids"]
    at = whole.index(bare[0])
    before, after = whole[:at], whole[at + len(bare) :]
    topic = plain("a\nTopic of this article:", add_special_tokens=False)["input_ids"][len(bare) :]
    for text in ("the bank", "red " * 10_000, "x" * 10_000, "", "é \U0001f600\n\n"):
        (ids,) = prompt.encode([text])
        assert ids[: len(before)] == before
        assert ids[len(ids) - len(after) - len(topic) :] == topic + after
        assert sum(token in special for token in ids) == len(before) + len(after)
    assert len(prompt.encode(["red " * 10_000])[0]) < 80
    prompt.save(tmp_path)
    AutoConfig.from_pretrained(backbone.folder.path).save_pretrained(tmp_path)
    # Of a Qwen2, stock code takes no other class: its bundles are read by chipviz.
    stock = (PreTrainedTokenizerFast if family.name == "qwen2" else AutoTokenizer).from_pretrained(
        tmp_path
    )
    for text in (*TEXTS[:2], "red " * 500, "", "</s> [SEP] <pad>"):
        assert [stock(text)["input_ids"]] == prompt.encode([text])


PAIRS = [("the old red house", "a goal"), ("the bank [SEP] </s> lost", "who went?"), ("", "é\n")]
TWO = Examples(TEXTS, ["who went near the river"] * 10, np.zeros(10, dtype=np.int64))


def test_two_texts_without_a_template_stand_as_encoders_have_them_and_else_on_two_lines(
    found, tmp_path
):
    """Against the encoding of pairs by the family's own tokenizer, what else it says included."""
    family, _, backbone = found
    plain = load_tokenizer(backbone.folder.path)
    prompt = bake(plain, None, 64, TWO)
    prompt.save(tmp_path)
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    plain.split_special_tokens = True  # a text is data, in the law too
    for text, pair in PAIRS:
        found_here = prompt.encode([text], [pair])[0]
        assert stock(text, pair)["input_ids"] == found_here
        if family.causal:
            template = bake(plain, "{text}\n{text_pair}", 64, TWO)
            assert found_here == template.encode([text], [pair])[0]
        else:
            assert dict(stock(text, pair)) == dict(plain(text, pair))
            assert dict(stock(text)).keys() == dict(plain(text)).keys()


def test_two_texts_are_read_as_the_stock_model_reads_what_the_stock_tokenizer_says(found):
    """Segments included, of which BERT and ELECTRA learn two; padding beside a longer pair too."""
    family, _, backbone = found
    if family.causal:
        return
    plain = load_tokenizer(backbone.folder.path)
    prompt = bake(plain, None, 64, TWO)
    plain.split_special_tokens = True
    backbone = load_backbone(
        backbone.folder, "x", dtype=torch.float32, device="cpu", sep=segment_break(prompt.tokenizer)
    )
    ids = prompt.encode(*map(list, zip(*PAIRS, strict=True)))
    together = forward_pooled(backbone, ids, prompt.tokenizer.pad_token_id, [Vector.named("mean")])[
        0
    ]
    for i, (text, pair) in enumerate(PAIRS):
        said = plain(text, pair, return_tensors="pt")
        with torch.inference_mode():
            states = backbone.model(**said, output_hidden_states=True).hidden_states
        for layer in (1, 2):
            truth = states[layer][0].mean(dim=0)
            if backbone.final_norm is not None:
                truth = backbone.final_norm(states[layer][0]).mean(dim=0)
            torch.testing.assert_close(together[layer, i], truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bundle_says_what_the_chip_says(found, pooling, bias, tmp_path, monkeypatch):
    """The bundle from disk, on raw texts, against the chip on hooked states of the dense model."""
    family, _, backbone = found
    draw = torch.Generator().manual_seed(3)
    chip = Chip(
        torch.randn(3, 32, generator=draw), torch.randn(3, generator=draw) if bias else None
    )
    prompt = bake(load_tokenizer(backbone.folder.path), TEMPLATE, 40, SAMPLE)
    report, cut = small_report(pooling), CutSpec(cut_layer=1, pooling=pooling)
    states = [
        forward_pooled(backbone, [ids], 2, [cut.key.vector])[0][2] for ids in prompt.encode(TEXTS)
    ]
    expected = chip.probabilities(torch.cat(states))
    monkeypatch.setattr(save, "in_fresh_process", said_here)
    check = [(text, None) for text in TEXTS]
    about = save.save(
        Cutting(backbone, prompt, chip, cut, report), tmp_path / "out", check, expected
    )
    assert about.max_difference < 1e-5
    stock = {"last": "sequence", "mean": "token"}
    assert about.kind in ("chipviz", stock.get(pooling))
    if pooling == "last" and family.causal and not bias and family.name != "qwen2":
        assert about.kind == "sequence"
    if not family.causal or pooling in ("first", "max"):
        assert about.kind == "chipviz"


def small_report(pooling):
    """A report with the classes of these chips; its figures belong to another pooling."""
    report = report_of("run")
    task = report.task.model_copy(update={"label_names": ["a", "b", "c"]})
    costs = [cost.model_copy(update={"pooling": pooling}) for cost in report.costs]
    scores = [score.model_copy(update={"pooling": pooling}) for score in report.scores]
    return report.model_copy(update={"task": task, "costs": costs, "scores": scores})
