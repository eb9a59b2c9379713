"""Laws of models whose parts are not their class's: what goes, what is left, who loads it."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from chipviz import experiment
from chipviz.backbones import answers, surgery
from chipviz.backbones.backbone import load_backbone, watch_layers
from chipviz.backbones.find import find_model
from chipviz.backbones.language_model import load_language_model, skipping, watch_blocks
from chipviz.backbones.model_folder import open_folder
from chipviz.bundle import load
from chipviz.bundle.join import join
from chipviz.bundle.verify import verify
from chipviz.config import CutSpec, RunConfig
from chipviz.errors import BackboneError, BundleError, ConfigError
from chipviz.files import PROJECT
from chipviz.keys import ChipKey, Cut
from chipviz.progress import silent
from chipviz.pruning import ranking, slicing, units, width
from chipviz.pruning.make import make
from chipviz.pruning.units import Unit
from chipviz.results.models import ModelSpec, made_folder
from chipviz.results.run_folder import RunFolder
from tests.families import NAMED, make_tokenizer

ROWS = torch.randint(3, 400, (6, 16), generator=torch.Generator().manual_seed(0))
WITH_UNITS = ("llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "falcon", "mixtral")
WITH_HEADS = ("llama", "qwen3", "mistral", "gemma2")


def loaded(name, folder, **options):
    path = folder / f"{name}-{len(options)}"
    if not path.exists():
        NAMED[name].build(path, **options)
    return load_language_model(open_folder(path, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", WITH_UNITS)
def test_without_both_units_a_block_is_passed_by(folder, name):
    model = loaded(name, folder)
    places = units.find_units(model)
    assert len(places) == 2 * model.n_layers
    with skipping(model, [1]):
        expected = model.logits(ROWS)
    both = [Unit(1, "attention"), Unit(1, "mlp")]
    with units.without_units(model, both, places):
        torch.testing.assert_close(model.logits(ROWS), expected, rtol=1e-4, atol=1e-4)
    surgery.operate(model.base, units.surgery_without(model, both))
    torch.testing.assert_close(model.logits(ROWS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_the_first_unit_to_go_really_costs_least(folder, name):
    """Against a unit whose matrices that write to the residual are zero."""
    model = loaded(name, folder)
    places = units.find_units(model)

    def loss(unit):
        fresh = loaded(name, folder)
        module = fresh.base.get_submodule(places[unit].module)
        for parameter in module.parameters():
            parameter.data.zero_()
        logits = fresh.logits(ROWS)
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten()))

    first, *_ = units.choose_units(model, ROWS, 1)
    assert first == min(places, key=loss)


def test_units_go_until_the_parameters_are_gone(folder):
    model = loaded("llama", folder)
    gone = units.choose_units(model, ROWS, 10_000)
    before = model.n_parameters
    surgery.operate(model.base, units.surgery_without(model, gone[:-1]))
    assert before - model.n_parameters < 10_000
    again = loaded("llama", folder)
    surgery.operate(again.base, units.surgery_without(again, gone))
    assert before - again.n_parameters >= 10_000


def test_greedy_stops_when_it_is_told():
    found = ranking.greedy(["a", "b", "c"], 3, lambda gone: -len(gone), enough=lambda g: len(g) > 1)
    assert found == ["c", "b"]  # of equal ones the last


@pytest.mark.parametrize("name", WITH_HEADS)
def test_planted_dead_heads_and_channels_go_first(folder, name):
    model = loaded(name, folder, num_hidden_layers=8)
    wide = width.find_wide(model)
    dead_channels = range(0, 60, 5)  # and the second pair of heads that share keys
    own = len(model.base.get_parameter(f"{wide[3].queries}.weight")) // 2
    for found in wide:
        model.base.get_parameter(f"{found.output}.weight").data[:, own:] *= 1e-6
        model.base.get_parameter(f"{found.queries}.weight").data[own:] *= 1e-6
        for kind in (found.keys, found.values):
            weight = model.base.get_parameter(f"{kind}.weight").data
            weight[len(weight) // 2 :] *= 1e-6
        for channel in dead_channels:
            model.base.get_parameter(f"{found.narrowing}.weight").data[:, channel] *= 1e-6
    before = {n: p.detach().clone() for n, p in model.base.named_parameters()}
    dense = model.logits(ROWS)
    n_touched = 8 - 1  # the first of eight keeps its width; the last half of one does not
    per_head = 2 * own * 32 + 2 * (own // (own // 8)) * 32
    target = n_touched * (per_head + 12 * 3 * 32)
    width.narrowed(model, ROWS, target)
    torch.testing.assert_close(model.logits(ROWS), dense, rtol=1e-2, atol=1e-2)
    query = model.base.get_parameter(f"{wide[3].queries}.weight")
    assert torch.equal(query, before[f"{wide[3].queries}.weight"][:own])
    down = model.base.get_parameter(f"{wide[3].narrowing}.weight")
    stay = [c for c in range(64) if c not in dead_channels]
    assert torch.equal(down, before[f"{wide[3].narrowing}.weight"][:, stay])
    untouched = model.base.get_parameter(f"{wide[0].queries}.weight")
    assert torch.equal(untouched, before[f"{wide[0].queries}.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_slicing_nothing_changes_no_logit(folder, name):
    model = loaded(name, folder)
    dense = model.logits(ROWS)
    whole, found = slicing.sliced(model, ROWS, 32)
    torch.testing.assert_close(whole.logits(ROWS), dense, rtol=0, atol=1e-4)
    assert len(found.modules) == 2 * model.n_layers


def test_slicing_cuts_what_the_states_do_not_use(folder):
    """A model whose residual stream lives in 24 of 32 dimensions loses nothing of them."""
    model = loaded("llama", folder)
    basis = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(1)))[0]
    keep = basis @ basis.T
    model.model.get_input_embeddings().weight.data @= keep
    for stream in slicing.find_streams(model):
        for name in stream.writers:
            weight = model.base.get_parameter(f"{name}.weight")
            weight.data = keep @ weight.data
    dense = model.logits(ROWS)
    narrow, _ = slicing.sliced(model, ROWS, 24)
    torch.testing.assert_close(narrow.logits(ROWS), dense, rtol=0, atol=1e-3)
    worse, _ = slicing.sliced(loaded("llama", folder), ROWS, 24)
    assert (worse.logits(ROWS) - dense).abs().max() > 0.1


def test_importance_is_the_first_order_term(folder):
    model = loaded("llama", folder)
    wide = width.find_wide(model)
    scores, name = width.importances(model, wide, ROWS), wide[1].narrowing
    weight = model.base.get_parameter(f"{name}.weight")
    weight.requires_grad_(True)
    logits = model.logits(ROWS)
    cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten()).backward()
    torch.testing.assert_close(scores[name], (weight * weight.grad).abs().detach())
    weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "call", "said"),
    [
        ("gpt2", lambda m: width.narrowed(m, ROWS, 100), "no separate matrices"),
        ("gpt_neox", lambda m: width.narrowed(m, ROWS, 100), "no separate matrices"),
        ("gpt2", lambda m: slicing.sliced(m, ROWS, 24), "SliceGPT does not cover gpt2"),
        ("gemma2", lambda m: slicing.sliced(m, ROWS, 24), "no plain RMS norms"),
        ("opt", units.find_units, "has 3 of them"),
        ("bloom", units.find_units, "add more than their units"),
    ],
)
def test_what_a_method_does_not_cover_it_says(folder, name, call, said):
    with pytest.raises(BackboneError, match=said):
        call(loaded(name, folder))


def test_a_norm_over_all_heads_is_no_fault_of_the_user(folder):
    model = loaded("olmo2", folder)
    n_heads = 2 * 32 * 32 * 2  # more than its channels alone have
    with pytest.raises(BackboneError, match="when some of its heads are gone"):
        width.narrowed(model, ROWS, 4 * n_heads)


# --- folders, runs and bundles ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["blockpruner", "slicegpt", "llm-pruner"])
def operated(request, tmp_path_factory, toy_csv):
    """A made model of each method, 6 layers before, in a home."""
    work = tmp_path_factory.mktemp(request.param)
    parent = NAMED["llama"].build(
        work / "parent", num_hidden_layers=6, initializer_range=0.2, tie_word_embeddings=True
    )
    make_tokenizer("bytes").save_pretrained(parent)
    home = work / "home"
    spec = ModelSpec.checked(
        name="narrow",
        backbone=str(parent),
        method=request.param,
        ratio=0.3,
        calibrate=str(toy_csv),
        length=16,
    )
    record = make(spec, home=home, scratch=work / "scratch", progress=silent)
    return parent, home, record


def test_a_fresh_process_measures_what_the_record_says(operated, toy_csv):
    _, home, record = operated
    command = [sys.executable, "-m", "chipviz", "--home", str(home), "evaluate"]
    command += ["--backbone", "narrow", "--perplexity", str(toy_csv), "--length", "16", "--json"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(record.perplexity_after, rel=1e-4)


def test_the_true_ratio_is_counted_and_near_what_was_asked(operated):
    parent, home, record = operated
    whole, narrow = open_folder(parent, "parent"), find_model("narrow", home)
    assert narrow.n_published == record.n_parameters
    stored = load_file(made_folder(home, "narrow") / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == record.n_parameters
    assert 1 - record.n_parameters / whole.n_published == pytest.approx(0.3, abs=0.1)


def test_the_backbone_alone_has_the_states_of_the_whole_model(operated):
    _, home, _ = operated
    folder = find_model("narrow", home)
    backbone, model = load_backbone(folder, device="cpu"), load_language_model(folder)
    states, expected = [], []
    with watch_layers(backbone, lambda _i, h: states.append(h)), torch.inference_mode():
        backbone.forward(ROWS, torch.ones_like(ROWS))
    watch_blocks(model, ROWS, lambda _i, _before, after: expected.append(after))
    for one, other in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(one, other)


def test_answers_are_read_without_a_cache_that_counts_wrong(operated):
    _, home, _ = operated
    model = load_language_model(find_model("narrow", home))
    prompts, words = [[5, 6, 7], [8, 9]], [[10], [11, 12]]
    found = answers.read_answers(model, prompts, words).likelihood
    scores = model.logits(torch.tensor([[8, 9, 11, 12]]))[0].log_softmax(-1)
    assert found[1, 1] == pytest.approx(float(scores[1, 11] + scores[2, 12]), abs=1e-4)


def test_chips_are_trained_and_a_bundle_carries_the_changes(operated, toy_csv, tmp_path):
    _, home, _ = operated
    config = RunConfig.checked(backbone="narrow", data=str(toy_csv), max_length=24, dtype="float32")
    run = RunFolder(home / "runs" / "narrow")
    if not run.path.exists():
        run.path.mkdir(parents=True)
        experiment.run(
            config,
            home=home,
            run_id="narrow",
            folder=run,
            progress=silent,
            on_points=lambda _: None,
        )
    report = run.read_report()
    assert report.backbone.lineage.root.n_layers == 6
    assert report.controls.zero_shot is not None
    key = ChipKey.sound("mean")
    cut = Cut(3, key)
    built = experiment.build(run, CutSpec.at(cut), home=home, out=tmp_path / "out", progress=silent)
    assert built.kind == "chipviz"
    assert built.max_difference < 1e-4
    assert verify(tmp_path / "out")["n_texts"] > 0
    weights = {**load_file(tmp_path / "out" / "model.safetensors")}
    weights |= load_file(tmp_path / "out" / "chip.safetensors")
    assert sum(w.numel() for w in weights.values()) == report.cost_at(cut).n_parameters
    assert len(load(tmp_path / "out").predict(["we saw a goal"])) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: parent" in card
    assert "in the end from `parent` of 6 layers" in card
    assert "stock code cannot load it" in (made_folder(home, "narrow") / "README.md").read_text()
    changed = surgery.read_surgery(tmp_path / "out").modules
    assert changed
    assert all(int(name.split(".")[1]) <= 3 for name in changed)
    with pytest.raises(BundleError, match="modules of its backbone were replaced"):
        join([tmp_path / "out"] * 2, tmp_path / "joined", home=home, progress=silent)


def test_what_was_operated_on_is_not_pruned_again(operated, toy_csv):
    _, home, _ = operated
    spec = ModelSpec.checked(
        name="again", backbone="narrow", method="top", layers=1, calibrate=str(toy_csv), length=16
    )
    with pytest.raises(ConfigError, match="it cannot be pruned again"):
        make(spec, home=home, scratch=home / "scratch", progress=silent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds no JSON object"),
        ('{"format": 2, "method": "x", "modules": {}}', "format"),
        ('{"format": 1, "method": "x", "modules": {"layers.0.mlp": {"kind": "code"}}}', "kind"),
        (
            '{"format": 1, "method": "x", "modules": {"layers.99": {"kind": "nothing"}}}',
            "which this model has not",
        ),
    ],
)
def test_a_strangers_surgery_is_refused(operated, tmp_path, text, said):
    _, home, _ = operated
    folder = tmp_path / "foreign"
    shutil.copytree(made_folder(home, "narrow"), folder)
    (folder / "surgery.json").write_text(text)
    with pytest.raises(BackboneError, match=said):
        open_folder(folder, "foreign")


def test_a_damaged_shape_is_refused(operated, tmp_path):
    _, home, record = operated
    folder = tmp_path / "foreign"
    shutil.copytree(made_folder(home, "narrow"), folder)
    found = json.loads((folder / "surgery.json").read_text())
    name = "layers.2.mlp.down_proj"
    found["modules"][name] = {"kind": "linear", "inner": 7, "outer": 32}
    (folder / "surgery.json").write_text(json.dumps(found))
    with pytest.raises(BackboneError):
        load_backbone(open_folder(folder, "foreign"), device="cpu")
    assert math.isfinite(record.perplexity_after)
