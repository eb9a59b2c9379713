"""The whole line with pictures: from class folders to a verified bundle, by page and command."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from chipviz import experiment, preview
from chipviz.backbones.opening import reopen
from chipviz.bundle.asked import rows_of_run
from chipviz.bundle.classifier import load
from chipviz.bundle.export import export
from chipviz.bundle.metadata import read_metadata
from chipviz.chips import picture_controls
from chipviz.chips.chip import Chips
from chipviz.chips.patches import read_patches
from chipviz.chips.picture_controls import colour_histogram, grey_pixels
from chipviz.cli import inputs
from chipviz.config import CutSpec, RunConfig
from chipviz.data.from_table import load_task
from chipviz.data.pictures import Pictures, is_reference
from chipviz.data.processor import PictureReader
from chipviz.data.task import refuse_kind
from chipviz.errors import ChipvizError, ConfigError
from chipviz.features.forward import forward_pooled
from chipviz.files import PROJECT
from chipviz.keys import ChipKey, Cut
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder
from chipviz.ui import neuron_view
from tests.here import verified_here
from tests.seeing import COLOURS, NAMED, class_folders, picture


def trained(home, backbone, data, **options):
    config = RunConfig.checked(backbone=str(backbone), data=str(data), folds=1, **options)
    folder = RunFolder(home / "runs" / "run")
    folder.path.mkdir(parents=True)
    points = []
    report = experiment.run(
        config,
        home=home,
        run_id="run",
        folder=folder,
        progress=silent,
        on_points=points.extend,
    )
    return SimpleNamespace(
        home=home, config=config, folder=folder, report=report, points=points, data=data
    )


@pytest.fixture(scope="module", params=["dinov2", "siglip_vision_model"])
def run(request, tmp_path_factory):
    """A run on three colours, which every layer can tell apart."""
    root = tmp_path_factory.mktemp("seeing")
    NAMED[request.param].build(root / request.param)
    data = class_folders(root / "colours", 30)
    return trained(root / "home", root / request.param, data)


@pytest.fixture(scope="module")
def stc_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeing-stc")
    NAMED["vit"].build(root / "vit")
    data = class_folders(root / "colours", 30)
    return trained(root / "home", root / "vit", data, stc=True, poolings=["first", "mean"])


def test_chips_tell_colours_apart_and_the_controls_say_that_colours_suffice(run):
    report = run.report
    assert report.task.kind == "image"
    has_class = report.backbone.name == "dinov2"
    poolings = ["first", "mean", "first+mean"] if has_class else ["mean"]
    assert sorted({key.pooling for key in report.chips}) == sorted(poolings)
    best = max(s.accuracy for s in report.scores if s.split == "test" and s.layer >= 0)
    assert best > 0.9
    controls = report.controls
    assert controls.colours > 0.9
    assert set(controls.beside) == {"grey pixels", "colours"}
    assert (controls.tfidf, controls.zero_shot) == (None, None)
    assert run.points  # a curve grew


def test_sizes_are_those_of_the_states(run):
    for cost in run.report.costs:
        width = 64 if cost.pooling == "first+mean" else 32
        # a stock class has a bias; features are normed, so the chip itself needs none
        assert cost.chip_parameters == 3 * width + (3 if cost.bundle == "image" else 0)
        assert cost.bundle == ("image" if cost.pooling == "first+mean" else "chipviz")


def test_patches_are_asked_what_their_states_say(run):
    backbone, reader = reopen(run.config, run.report, home=run.home, folder=run.folder)
    chips = Chips.load(run.folder.chips, backbone.folder.fingerprint)
    source = run.folder.read_examples("test")[0].text
    for key in run.report.chips:
        cut = Cut(2, key)
        found = read_patches(
            backbone, reader, chips, source, cut=cut, label_names=run.report.task.label_names
        )
        assert found.grid == (4, 4)
        assert (found.width, found.height) == (40, 28)
        normed = normed_states(backbone, reader.pixels(reader.open(source)), 2)
        patches = normed[backbone.view.n_prefix :]
        if key.pooling == "first+mean":
            patches = torch.cat([normed[:1].expand_as(patches), patches], dim=1)
        truth = chips.at(cut).probabilities(patches)
        assert found.label_index[2] == truth.argmax(dim=1).tolist()
        assert np.allclose(found.confidence[2], truth.amax(dim=1), atol=2e-2)
        pooled = forward_pooled(backbone, reader.encode([source]), 0, [key.vector])[0]
        for layer in range(4):
            whole = chips.at(Cut(layer, key)).probabilities(pooled[layer + 1])[0]
            assert np.allclose(found.by_layer[layer], whole, atol=1e-3)


def normed_states(backbone, pixels, layer):
    """A layer's states of one picture by a hook of our own, shape (T, D)."""
    states = []
    handle = backbone.blocks[layer].register_forward_hook(
        lambda _m, _a, out: states.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.inference_mode():
        backbone.model(pixel_values=pixels[None].to(backbone.dtype))
    handle.remove()
    return backbone.apply_final_norm(states[0])[0].float()


@pytest.mark.parametrize("word", ["stc", "sparse"])
def test_patches_of_chips_that_read_neurons(stc_run, word):
    run = stc_run
    backbone, reader = reopen(run.config, run.report, home=run.home, folder=run.folder)
    chips = Chips.load(run.folder.chips, backbone.folder.fingerprint)
    examples = run.folder.read_examples("test")[:6]
    keys = [key for key in run.report.chips if key.word == word]
    assert keys
    predictions = run.folder.read_predictions()
    for key in keys:
        cut = Cut(3, key)
        for i, example in enumerate(examples):
            found = read_patches(
                backbone, reader, chips, example.text, cut=cut, label_names=["a", "b", "c"]
            )
            assert int(np.argmax(found.by_layer[3])) == predictions.at(cut, "test")[i]


def test_a_cut_is_built_verified_and_predicts_files(run, tmp_path):
    key = run.report.chips[-1]
    built = experiment.build(
        run.folder,
        CutSpec.at(Cut(1, key)),
        home=run.home,
        out=tmp_path / "bundle",
        progress=silent,
    )
    assert built.n_verified == run.report.task.n_validation
    assert built.max_difference < 1e-3
    files = (tmp_path / "bundle").glob("*.safetensors")
    stored = sum(t.numel() for file in files for t in load_file(file).values())
    assert stored == built.n_parameters == run.report.cost_at(Cut(1, key)).n_parameters
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "image-classification" in card
    assert "An image classifier" in card
    right = 0
    for i, name in enumerate(COLOURS):
        file = tmp_path / f"{name}.png"
        picture(COLOURS[name], 900 + i).save(file)
        (said,) = load(tmp_path / "bundle").predict([file])
        right += said.label == name
    assert right == 3
    out = tmp_path / "onnx"
    rows = rows_of_run(read_metadata(tmp_path / "bundle"), run.home)
    assert len(rows) >= 9
    done = export(tmp_path / "bundle", "onnx", out, rows=rows, progress=silent)
    assert done.n_agree == done.n_checked
    assert done.max_difference < 1e-5
    program = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert program
    lines = program.group(1).replace("PATH", str(out)).replace("picture.jpg", str(file))
    told = []
    exec(lines, {"print": told.append})  # noqa: S102 - our own card
    assert told == [[load(tmp_path / "bundle").predict([file])[0].label]]


def chipviz(home, *words):
    command = [sys.executable, "-m", "chipviz", "--home", str(home), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=home
    )
    return done.stdout, done.stderr


def test_the_command_line_sees(run, tmp_path):
    with verified_here():
        experiment.build(
            run.folder,
            CutSpec.at(Cut(2, run.report.chips[0])),
            home=run.home,
            out=tmp_path / "bundle",
            progress=silent,
        )
    folder = tmp_path / "shown"
    folder.mkdir()
    for name in ("red", "blue"):
        picture(COLOURS[name], 7).save(folder / f"{name}.png")
    out, _ = chipviz(run.home, "predict", tmp_path / "bundle", "--image", folder, "--json")
    said = {p["file"].split("/")[-1]: p["label"] for p in json.loads(out)["predictions"]}
    assert said == {"blue.png": "blue", "red.png": "red"}
    with pytest.raises(ConfigError, match="Pictures are read here"):
        refuse_kind(run.report.task.kind, "text")
    with pytest.raises(ConfigError, match="There is no picture"):
        inputs.pictures([tmp_path / "no.png"])
    out, error = chipviz(
        run.home, "inspect", "--backbone", run.config.backbone, "--data", run.data, "--json"
    )
    seen = json.loads(out)
    assert (seen["kind"], seen["lengths"], seen["examples"]) == ("image", None, [])
    assert {one["label"] for one in seen["pictures"]} == set(COLOURS)
    assert "torchvision" not in error


def test_a_preview_shows_one_of_each_class_first(run):
    found = preview.inspect(run.config, home=run.home)
    first = [one.label for one in found.pictures[:3]]
    assert sorted(first) == sorted(COLOURS)
    store = Pictures(run.home / "data" / "pictures")
    for one in found.pictures:
        assert store.open(one.reference).size == (one.width, one.height)
        assert one.seen == (0, 0, 1, 1)  # this processor crops nothing
    words = "\n".join(preview.in_words(found))
    assert "pictures" in words
    assert "texts" not in words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"poolings": ["last"]}, "has no pooling last"),
        ({"device_map": "auto"}, "not spread over devices"),
        ({"template": "Look: {text}"}, "without a template"),
        ({"max_length": 64}, "have no length limit"),
    ],
)
def test_settings_of_texts_are_refused(run, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        trained(tmp_path / "home", run.config.backbone, run.data, **options)


def test_the_papers_recipe_reads_raw_states_and_its_bundles_repeat_its_answers(run, tmp_path):
    found = trained(
        tmp_path / "home", run.config.backbone, run.data, preset="published", poolings=["mean"]
    )
    read = "first" if found.report.backbone.name == "dinov2" else "mean"
    by_paper = [key for key in found.report.chips if key.by_paper]
    assert [key.name for key in by_paper] == [f"linear.raw-{read}", f"mlp.raw-{read}"]
    last = found.report.backbone.n_layers - 1
    reached = [found.report.score_at(Cut(last, key), "test").accuracy for key in by_paper]
    assert max(reached) > 0.8
    cut = Cut(2, by_paper[1])
    backbone, reader = reopen(found.config, found.report, home=found.home, folder=found.folder)
    chips = Chips.load(found.folder.chips, backbone.folder.fingerprint)
    assert chips.at(cut).hidden_weight.shape == (32, 32)  # as wide as the model
    examples = found.folder.read_examples("test")
    names = found.report.task.label_names
    shown = read_patches(backbone, reader, chips, examples[0].text, cut=cut, label_names=names)
    stored = found.folder.read_predictions().at(cut, "test")
    assert int(np.argmax(shown.by_layer[2])) == stored[0]
    with verified_here():
        bundle = experiment.build(
            found.folder, CutSpec.at(cut), home=found.home, out=tmp_path / "b", progress=silent
        )
    assert bundle.kind == "chipviz"
    assert bundle.max_difference < 1e-4


def test_poolings_may_be_named(run, tmp_path):
    has_class = run.report.backbone.name == "dinov2"
    named = ["max", "first+mean"] if has_class else ["max"]
    found = trained(tmp_path / "home", run.config.backbone, run.data, poolings=named, max_train=20)
    assert sorted({key.pooling for key in found.report.chips}) == sorted(named)


def test_folds_judge_pictures_and_their_controls_by_the_same_pictures(run, monkeypatch):
    task = load_task(run.config, run.home, silent)
    train, validation = (task.splits[name] for name in ("train", "validation"))
    n = len(train) + len(validation)
    folded = replace(task, fold=np.arange(n) % 3)
    reader = PictureReader(None, Pictures(run.home / "data" / "pictures"))
    seen = []

    def fitted(features, labels, strength):
        seen.append(len(labels))
        return LogisticRegression(C=strength).fit(features, labels)

    monkeypatch.setattr(picture_controls, "_fitted", fitted)
    picture_controls.measure_pictures(folded, reader)
    assert max(seen) == n
    seen.clear()
    monkeypatch.setattr(picture_controls, "MOST", len(train) - 8)
    picture_controls.measure_pictures(folded, reader)
    assert max(seen) == n - 8  # fewer pictures, and folds all the same
    assert len(set(seen)) > 1


def test_the_pictures_that_excite_a_neuron_are_shown_as_pictures(stc_run, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(stc_run.home))
    found = stc_run.folder.read_neurons()
    strongest = found.neurons[0].strongest
    assert all(map(is_reference, strongest))
    shown = neuron_view.strongest_html(strongest, "pictures")
    assert shown.count("<img src=") == len(strongest)
    assert strongest[0] not in shown
    assert "<li>&lt;b&gt;" in neuron_view.strongest_html(["<b>"], "texts")


def test_settings_of_pictures_are_refused_of_texts(tiny_backbone_folder, toy_csv, tmp_path, run):
    with pytest.raises(ConfigError, match=r"has no pooling first\+mean"):
        trained(tmp_path / "one", tiny_backbone_folder, toy_csv, poolings=["first+mean"])
    with pytest.raises(ChipvizError, match="reads texts, and the data has pictures"):
        trained(tmp_path / "two", tiny_backbone_folder, run.data)
    with pytest.raises(ChipvizError, match="reads pictures, and the data has texts"):
        trained(tmp_path / "three", run.config.backbone, toy_csv)


def test_a_model_without_class_token_has_no_first(tmp_path):
    NAMED["siglip_vision_model"].build(tmp_path / "siglip")
    data = class_folders(tmp_path / "colours", 5)
    with pytest.raises(ConfigError, match="Without a class token it has no pooling first"):
        trained(tmp_path / "home", tmp_path / "siglip", data, poolings=["first"])


def test_controls_see_what_they_say_they_see():
    red, blue = picture(COLOURS["red"], 1), picture(COLOURS["blue"], 1)
    assert colour_histogram(red).sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(colour_histogram(red) - colour_histogram(blue)).sum() > 1
    turned = red.rotate(180)
    assert np.allclose(colour_histogram(red), colour_histogram(turned), atol=0.05)
    assert grey_pixels(red).shape == (256,)
    assert grey_pixels(red).max() <= 1
    assert not np.allclose(grey_pixels(red), grey_pixels(turned), atol=0.01)


def test_a_chip_of_another_pooling_is_a_chip_of_its_own():
    key = ChipKey.sound("first+mean")
    assert ChipKey.parse(key.name) == key
    assert key.vector.n_states == 2
