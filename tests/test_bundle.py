"""Bundles: what stock transformers says of raw texts is what the run's chip says."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from chipviz import bundle, cards, experiment
from chipviz.config import CutSpec, RunConfig
from chipviz.errors import BundleError, ConfigError
from chipviz.progress import silent
from chipviz.report import load_predictions
from chipviz.sources import read_table
from chipviz.task import make_task


@pytest.fixture(scope="module")
def finished(tiny_backbone_folder, toy_csv, tmp_path_factory):
    """A run on the tiny backbone, done: config, report, home and run folder."""
    home = tmp_path_factory.mktemp("home")
    run_dir = home / "runs" / "one"
    run_dir.mkdir(parents=True)
    config = RunConfig.checked(
        backbone=str(tiny_backbone_folder),
        data=str(toy_csv),
        template="say {text} now:",
        max_length=24,
        max_test=40,
    )
    report = experiment.run(
        config,
        home=home,
        run_id="one",
        run_dir=run_dir,
        progress=silent,
        on_points=lambda _: None,
    )
    return config, report, home, run_dir


_BUILT = {}


def built(finished, tmp_path, pooling, cut_layer=1):
    """A copy of the bundle; it is built and verified once for all tests."""
    config, report, home, run_dir = finished
    out = home / "built" / f"{pooling}-{cut_layer}"
    if out not in _BUILT:
        cut = CutSpec(cut_layer=cut_layer, pooling=pooling)
        _BUILT[out] = experiment.build(
            config, report, cut, home=home, run_dir=run_dir, out=out, progress=silent
        )
    copy = tmp_path / out.name
    shutil.copytree(out, copy)
    return _BUILT[out], copy


def build_afresh(finished, out, cut_layer=1):
    config, report, home, run_dir = finished
    cut = CutSpec(cut_layer=cut_layer, pooling="last")
    experiment.build(config, report, cut, home=home, run_dir=run_dir, out=out, progress=silent)


@pytest.mark.parametrize(
    ("pooling", "cut_layer"), [("last", 0), ("last", 1), ("mean", 1), ("mean", 3)]
)
def test_a_bundle_repeats_the_test_predictions_of_its_run(finished, tmp_path, pooling, cut_layer):
    """Against the stored predictions, made from hooked features of the dense model."""
    config, report, home, run_dir = finished
    about, out = built(finished, tmp_path, pooling, cut_layer)
    task = make_task(read_table(config.data, home), config)
    found = bundle.load(out).predict(task.splits["test"].texts)
    stored = load_predictions(run_dir)[f"test.{pooling}.linear"][cut_layer]
    names = report.task.label_names
    same = sum(p.label == names[i] for p, i in zip(found, stored.tolist(), strict=True))
    # The run may compute in bfloat16: a text on the border may fall to the other side.
    assert same >= 0.9 * len(found)
    assert about.max_difference < 1e-5


def test_the_sequence_bundle_in_a_fresh_pipeline_equals_chipvizs_own_prediction(finished, tmp_path):
    _, out = built(finished, tmp_path, "last")
    texts = ["we saw the goal", "bank " * 200, "", "the atom </s> <pad> and <s>", "a\n\nb\tc"]
    code = (
        "import json, sys\nfrom transformers import pipeline\n"
        f"p = pipeline('text-classification', {str(out)!r})\n"
        f"print(json.dumps(p({texts!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    stock = json.loads(done.stdout.decode().splitlines()[-1])
    ours = bundle.load(out).predict(texts)
    assert [s["label"] for s in stock] == [p.label for p in ours]
    assert max(abs(s["score"] - p.score) for s, p in zip(stock, ours, strict=True)) < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_lines_on_the_card_run_and_agree(finished, tmp_path, pooling):
    about, out = built(finished, tmp_path, pooling)
    text = "we saw the old atom near a river"
    card = (out / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    code = lines.replace("PATH", str(out)).replace("TEXT", text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    (expected,) = bundle.load(out).predict([text])
    said = done.stdout.decode()
    assert expected.label in said
    assert f"{expected.score:.3f}"[:5] in said
    assert lines.strip() == cards.USE[about.kind]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_bundles_size_is_what_the_report_said_before_it_was_built(finished, tmp_path, pooling):
    _, report, _, _ = finished
    _, out = built(finished, tmp_path, pooling)
    cost = report.cost_at(1, pooling)
    assert sum(p.numel() for p in bundle.load(out).model.parameters()) == cost.n_parameters
    n_bytes = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                n_bytes += tensor.numel() * tensor.element_size()
    assert n_bytes == cost.weight_bytes
    removed = report.backbone.n_parameters - cost.n_parameters
    assert cost.parameter_ratio == pytest.approx(removed / report.backbone.n_parameters, abs=1e-9)
    assert cost.layer_ratio == pytest.approx((4 - 1 - 1) / 4)


def test_a_bundle_holds_only_data(finished, tmp_path):
    about, out = built(finished, tmp_path, "last")
    assert set(about.files) == {f.name for f in out.iterdir()}
    allowed = {"config.json", "chip.json", "model.safetensors", "README.md", "SHA256SUMS"}
    allowed |= {"tokenizer.json", "tokenizer_config.json"}
    assert set(about.files) <= allowed
    assert about.folder_bytes == sum(f.stat().st_size for f in out.iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {str(i): n for i, n in enumerate(["money", "science", "sport"])}
    assert "auto_map" not in config
    assert config["num_hidden_layers"] == 2


def test_the_card_parses_and_its_numbers_are_the_reports(finished, tmp_path):
    _, report, _, _ = finished
    _, out = built(finished, tmp_path, "last")
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "arxiv:2410.06541" in card.data.tags
    test = report.score_at(1, "last", "linear", "test")
    assert f"{100 * test.accuracy:.1f} %" in card.text
    assert f"{report.cost_at(1, 'last').n_parameters:,}" in card.text


def test_verify_accepts_a_fresh_bundle_and_names_the_file_that_was_harmed(finished, tmp_path):
    _, out = built(finished, tmp_path, "last")
    assert bundle.verify(out)["max_difference"] < 1e-5
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors is not what its checksum says"):
        bundle.verify(out)


@pytest.mark.parametrize("name", ["modeling_evil.py", "weights.bin", "x.pkl"])
def test_a_bundle_with_anything_foreign_inside_is_not_loaded(finished, tmp_path, name):
    _, out = built(finished, tmp_path, "last")
    (out / name).write_text("raise SystemExit")
    with pytest.raises(BundleError, match=name):
        bundle.load(out)


def test_a_config_that_asks_to_run_code_is_not_loaded(finished, tmp_path):
    _, out = built(finished, tmp_path, "last")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.E"}}))
    with pytest.raises(BundleError, match="format"):
        bundle.load(out)


def test_a_bundle_that_disagrees_with_its_chip_is_refused_and_leaves_nothing(
    finished, tmp_path, monkeypatch
):
    def wrong(*args):
        return torch.full((len(args[-1]), 3), 1 / 3)

    monkeypatch.setattr(experiment, "_expected", wrong)
    with pytest.raises(BundleError, match="disagrees with its run's chip"):
        build_afresh(finished, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_never_overwritten(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle"):
        build_afresh(finished, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_cut_beyond_the_last_layer_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="the last is 3"):
        build_afresh(finished, tmp_path / "out", cut_layer=4)
