"""Sparsify-then-Classify to the end: run, cut, bundle, tokens, command line, on tiny models."""

import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chipviz import experiment
from chipviz.bundle import load
from chipviz.bundle.export import export
from chipviz.bundle.verify import in_fresh_process, verify
from chipviz.chips.chip import Chips
from chipviz.chips.tokens import read_tokens
from chipviz.config import CutSpec, RunConfig
from chipviz.data.from_table import load_task
from chipviz.errors import BundleError, ConfigError
from chipviz.features.forward import forward_pooled
from chipviz.keys import STC, ChipKey, Cut, Site, Vector
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder
from tests.cli.test_cli import chipviz
from tests.families import CLASSES, NAMED, planted_rows
from tests.here import verified_here

SITES = get_args(Site)
BOTH = ChipKey(STC, "all", "mean", "sparse")


def run(backbone_folder, data, home, **options):
    config = RunConfig.checked(
        backbone=str(backbone_folder),
        data=str(data),
        max_length=24,
        stc=True,
        dtype="float32",  # as bundles are compared, whatever is fast on this machine
        **options,
    )
    folder = RunFolder(home / "runs" / "stc")
    folder.path.mkdir(parents=True)
    report = experiment.run(
        config, home=home, run_id="stc", folder=folder, progress=silent, on_points=lambda _p: None
    )
    return config, report, home, folder


@pytest.fixture(scope="module")
def finished(tiny_backbone_folder, toy_csv, tmp_path_factory):
    return run(tiny_backbone_folder, toy_csv, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def finished_published(tiny_backbone_folder, tmp_path_factory):
    """Of two classes, as published beside our own."""
    root = tmp_path_factory.mktemp("published")
    rows = [f"{text},{label}" for text, label in planted_rows(150) if label in list(CLASSES)[:2]]
    (root / "two.csv").write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    options = {"preset": "published", "poolings": ("mean",), "sites": ("block",)}
    return run(tiny_backbone_folder, root / "two.csv", root / "home", **options)


@pytest.fixture(scope="module")
def finished_encoder(tiny_tokenizer_folder, toy_csv, tmp_path_factory):
    folder = NAMED["bert"].build(tmp_path_factory.mktemp("tiny-bert"), initializer_range=0.2)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    home = tmp_path_factory.mktemp("home-bert")
    return run(folder, toy_csv, home, sites=("gate", "ffn_out"), poolings=("mean",))


_BUILT = {}


def built(finished, out, key, layer):
    """A copy of the bundle, which is built and verified once for all tests."""
    _, _, home, folder = finished
    place = home / "built" / f"{key.name}-{layer}"
    if place not in _BUILT:
        spec = CutSpec.at(Cut(layer, key))
        with verified_here():
            _BUILT[place] = experiment.build(folder, spec, home=home, out=place, progress=silent)
    shutil.copytree(place, out)
    return _BUILT[place]


def reopened(finished):
    from chipviz.backbones.opening import reopen

    config, report, home, folder = finished
    backbone, prompt = reopen(config, report, home=home, folder=folder)
    return backbone, prompt, Chips.load(folder.chips, backbone.folder.fingerprint)


def test_every_curve_of_the_recipe_is_scored_on_every_layer(finished):
    config, report, _, folder = finished
    assert {key.recipe for key in report.chips} == {"sound", "stc"}
    assert BOTH in report.chips
    assert len(report.chips) == len(config.resolved(causal=True).chip_keys)
    for key in report.chips:
        layers = [s.layer for s in report.scores if s.key == key and s.split == "test"]
        assert sorted(layers) == list(range(-1, report.backbone.n_layers))
    found = folder.read_neurons()
    assert {a.site for a in found.aggregates} == {"block", "ffn_in", "all"}
    assert {s.layer for s in found.layers} == set(range(report.backbone.n_layers))
    best = max(s.accuracy for s in report.scores if s.key == BOTH and s.split == "test")
    assert best > 0.8  # the planted word


@pytest.mark.parametrize("layer", [0, 2])
def test_a_bundle_that_joins_layers_repeats_the_predictions_of_its_run(finished, tmp_path, layer):
    config, report, home, folder = finished
    bundle = built(finished, tmp_path / "out", BOTH, layer)
    assert bundle.kind == "chipviz"
    assert bundle.max_difference < 1e-4
    texts = load_task(config, home, silent).splits["test"].texts[:64]
    stored = folder.read_predictions().at(Cut(layer, BOTH), "test")[: len(texts)]
    names = report.task.label_names
    said = [names.index(p.label) for p in load(tmp_path / "out").predict(texts)]
    assert said == stored.tolist()
    fresh = in_fresh_process(tmp_path / "out", "chipviz", [(text, None) for text in texts])
    assert np.argmax(fresh, axis=1).tolist() == stored.tolist()
    assert verify(tmp_path / "out")["n_texts"] > 0


def test_a_bundle_keeps_the_neurons_it_reads_and_the_layers_they_are_in(finished, tmp_path):
    _, report, _, _ = finished
    *_, chips = reopened(finished)
    for layer in (0, 2):
        chip = chips.at(Cut(layer, BOTH)).kept()
        built(finished, tmp_path / str(layer), BOTH, layer)
        stored = load_file(tmp_path / str(layer) / "chip.safetensors")
        torch.testing.assert_close(stored["neurons"], chip.neurons)
        assert not (stored["weight"] == 0).all(dim=0).any()
        config = json.loads((tmp_path / str(layer) / "config.json").read_text())
        assert config["num_hidden_layers"] == max(0, chip.deepest) + 1 <= layer + 1
        cost = report.cost_at(Cut(layer, BOTH))
        weights = load_file(tmp_path / str(layer) / "model.safetensors")
        n_parameters = sum(w.numel() for w in (*weights.values(), *stored.values()))
        assert cost.n_parameters == n_parameters


def test_a_sparse_chip_is_stock_where_the_stock_class_has_a_bias(finished, tmp_path):
    mean = built(finished, tmp_path / "mean", ChipKey.sparse(Vector("block", "mean")), 1)
    assert mean.kind == "token"
    ffn = built(finished, tmp_path / "ffn", ChipKey.sparse(Vector("ffn_in", "last")), 1)
    assert ffn.kind == "chipviz"
    assert max(mean.max_difference, ffn.max_difference) < 1e-4


def test_neurons_of_several_layers_go_into_a_graph(finished, tmp_path):
    built(finished, tmp_path / "bundle", BOTH, 2)
    said = export(tmp_path / "bundle", "onnx", tmp_path / "out", rows=[], progress=silent)
    assert said.n_agree == said.n_checked
    assert said.max_difference < 1e-5


@pytest.mark.parametrize("site", ["gate", "ffn_out", "all"])
def test_an_encoder_is_read_at_its_own_sites(finished_encoder, tmp_path, site):
    config, report, home, folder = finished_encoder
    key = ChipKey(STC, site, "mean", "sparse")
    assert built(finished_encoder, tmp_path / "out", key, 2).max_difference < 1e-4
    texts = load_task(config, home, silent).splits["test"].texts[:20]
    stored = folder.read_predictions().at(Cut(2, key), "test")[:20]
    said = [report.task.label_names.index(p.label) for p in load(tmp_path / "out").predict(texts)]
    assert said == stored.tolist()


def test_the_recipe_as_published_stands_beside_ours_and_no_rule_prefers_it(finished_published):
    _, report, _, folder = finished_published
    assert {key.name for key in report.chips if key.lucky} == {
        "sparse-published.raw-mean",
        "stc-published.raw-mean",
    }
    assert all(
        not chosen.key.lucky
        for chosen in report.choices(folder.read_predictions().correct).values()
    )
    assert report.select("validate", recipe="stc-published").key.lucky
    found = folder.read_neurons()
    for key in report.chips:
        if key.kind == "sparse":
            layers = range(report.backbone.n_layers)
            assert all(found.n_read(key, layer) >= 0 for layer in layers)


@pytest.mark.parametrize("name", ["stc-published.raw-mean", "sparse-published.raw-mean"])
def test_a_bundle_of_the_recipe_as_published_repeats_its_run(finished_published, tmp_path, name):
    config, report, home, folder = finished_published
    key = ChipKey.parse(name)
    bundle = built(finished_published, tmp_path / "out", key, 2)
    assert bundle.max_difference < 1e-4
    texts = load_task(config, home, silent).splits["test"].texts[:64]
    stored = folder.read_predictions().at(Cut(2, key), "test")[: len(texts)]
    said = [report.task.label_names.index(p.label) for p in load(tmp_path / "out").predict(texts)]
    assert said == stored.tolist()
    backbone, prompt, chips = reopened(finished_published)
    reading = read_tokens(
        backbone, prompt, chips, texts[0], cut=Cut(2, key), label_names=report.task.label_names
    )
    assert int(np.argmax(reading.by_layer[2])) == stored[0]


def test_the_recipe_as_published_is_for_two_classes(tiny_backbone_folder, toy_csv, tmp_path):
    with pytest.raises(ConfigError, match="is for two classes, and these are 3") as refused:
        run(tiny_backbone_folder, toy_csv, tmp_path, preset="published")
    assert refused.value.fields == ("preset", "stc")


@pytest.mark.parametrize(
    "harm",
    [
        lambda n: n.index_fill(1, torch.tensor([2]), 10_000),
        lambda n: n.index_fill(1, torch.tensor([1]), 7),
        lambda n: n.index_fill(1, torch.tensor([0]), 99),
        lambda n: -n - 2,
        lambda n: n[:, :2].contiguous(),
    ],
)
def test_a_bundle_that_names_neurons_its_model_has_not_is_refused(finished, tmp_path, harm):
    from safetensors.torch import save_file

    built(finished, tmp_path / "out", BOTH, 2)
    path = tmp_path / "out" / "chip.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"neurons": harm(tensors["neurons"])}, path)
    with pytest.raises(BundleError):
        load(tmp_path / "out").predict(["a text"])


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("key", [BOTH, ChipKey.sparse(Vector("ffn_in", "mean"))])
def test_what_is_said_at_tokens_is_what_neurons_say_by_hand(finished, key, single):
    backbone, prompt, chips = reopened(finished)
    text, cut = "we saw the old goal near a river", Cut(2, key)
    reading = read_tokens(
        backbone, prompt, chips, text, cut=cut, label_names=["a", "b", "c"], single=single
    )
    (ids,) = prompt.encode([text])
    vectors = [Vector(site, "last") for site in ("block", "ffn_in")]
    # In a causal model the state at a token is that of the text up to it.
    up_to = [forward_pooled(backbone, [ids[: t + 1]], 2, vectors) for t in range(len(ids))]
    for layer in range(backbone.n_layers):
        chip = chips.at(Cut(layer, key)).of_neurons(key.site, layer)
        values = torch.stack(
            [
                torch.stack(
                    [
                        states[0 if SITES[s] == "block" else 1][at + 1, 0, column]
                        for s, at, column in chip.neurons.tolist()
                    ]
                )
                if len(chip.neurons)
                else torch.empty(0)
                for states in up_to
            ]
        )
        counts = torch.arange(1, len(ids) + 1)[:, None]
        asked = values if single else values.cumsum(0) / counts
        said = chip.probabilities(asked).max(dim=1)
        assert reading.label_index[layer] == said.indices.tolist()
        np.testing.assert_allclose(reading.confidence[layer], said.values, atol=2e-4)
    whole = chips.at(cut).of_neurons(key.site, 2)
    assert len(reading.by_layer) == backbone.n_layers
    assert whole.deepest <= 2


def test_the_command_line_takes_the_recipe(tiny_backbone_folder, toy_csv, tmp_path):
    home, out = tmp_path / "home", tmp_path / "bundle"
    train = ["train", "--backbone", tiny_backbone_folder, "--data", toy_csv, "--stc"]
    train += ["--max-length", "24", "--sites", "block,ffn_out", "--pooling", "mean", "--json"]
    report = chipviz(home, *train).json
    assert {(s["recipe"], s["site"], s["chip"]) for s in report["scores"]} == {
        ("sound", "block", "linear"),
        ("sound", "block", "sparse"),
        ("sound", "ffn_out", "sparse"),
        ("stc", "block", "sparse"),
        ("stc", "ffn_out", "sparse"),
        ("stc", "all", "sparse"),
    }
    run_id = report["run_id"]
    cut = ["cut", run_id, "--rule", "within", "--recipe", "stc", "--site", "all", "--out", out]
    bundle = chipviz(home, *cut, "--json").json
    assert (bundle["recipe"], bundle["site"], bundle["kind"]) == ("stc", "all", "chipviz")
    said = chipviz(home, "predict", out, "--text", "a goal", "--json").json["predictions"]
    assert said[0]["label"] in report["task"]["label_names"]
    ask = ["tokens", run_id, "--text", "a goal", "--recipe", "stc", "--layer", "2", "--single"]
    assert len(chipviz(home, *ask, "--json").json["label_index"]) == 4
    assert "all-mean stc" in chipviz(home, "show", run_id).out
    wrong = ["cut", run_id, "--rule", "within", "--recipe", "published", "--out", out]
    assert "recipe published" in chipviz(home, *wrong).refusal


def test_a_site_that_a_family_lacks_is_one_sentence(tmp_path, toy_csv, tiny_tokenizer_folder):
    folder = NAMED["mixtral"].build(tmp_path / "mixtral")
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    ended = chipviz(tmp_path, "train", "--backbone", folder, "--data", toy_csv, "--stc")
    assert "has no site ffn_in: layer 0 is a mixture of experts" in ended.refusal
    assert "--sites" in ended.err
    assert not list(tmp_path.rglob("*.npy"))


def test_a_killed_or_stopped_run_ends_with_the_same_chips(
    finished, tiny_backbone_folder, toy_csv, tmp_path
):
    *_, folder = finished
    *_, again = run(tiny_backbone_folder, toy_csv, tmp_path)
    assert again.chips.read_bytes() == folder.chips.read_bytes()
    assert again.neurons.read_bytes() == folder.neurons.read_bytes()
