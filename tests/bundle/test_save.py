"""Bundles: what is loaded from the folder says of raw texts what the run's chip says."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from io import BytesIO

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer

from chipviz import experiment
from chipviz.bundle import card, curve, dense, kinds, save
from chipviz.bundle.classifier import load
from chipviz.bundle.verify import verify, write_sums
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec, RunConfig
from chipviz.data.from_table import load_task
from chipviz.data.prompt import bake
from chipviz.data.task import Examples
from chipviz.errors import BundleError, ConfigError
from chipviz.keys import ChipKey, Cut
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder
from tests.backbones.test_vetting import refuse_all_that_is_huge
from tests.families import NAMED, load_backbone, make_tokenizer
from tests.here import said_here, verified_here

ONE = Examples(["a"], None, np.zeros(1, dtype=np.int64))


def run(folder, data, home, **changes):
    """A run on a tiny backbone, done: config, report, home and run folder."""
    run_folder = RunFolder(home / "runs" / "one")
    run_folder.path.mkdir(parents=True)
    config = RunConfig.checked(
        backbone=str(folder),
        data=str(data),
        template="say {text} now:",
        max_length=24,
        max_test=40,
        **changes,
    )
    report = experiment.run(
        config,
        home=home,
        run_id="one",
        folder=run_folder,
        progress=silent,
        on_points=lambda _: None,
    )
    return config, report, home, run_folder


@pytest.fixture(scope="module")
def finished(tiny_backbone_folder, toy_csv, tmp_path_factory):
    return run(
        tiny_backbone_folder,
        toy_csv,
        tmp_path_factory.mktemp("home"),
        poolings=("last", "mean", "max"),
        chips=("linear", "mlp"),
        preset="published",
    )


@pytest.fixture(scope="module")
def finished_encoder(tiny_tokenizer_folder, toy_csv, tmp_path_factory):
    """The same on a random BERT of 4 layers, which has no final norm."""
    folder = NAMED["bert"].build(tmp_path_factory.mktemp("tiny-bert"), initializer_range=0.2)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    home = tmp_path_factory.mktemp("home-bert")
    return run(folder, toy_csv, home)  # poolings are left to the backbone


_BUILT = {}


def key_of(pooling, chip="linear"):
    """The published chips are asked for as `raw`, as on the command line."""
    return ChipKey.named(pooling, chip)


def spec(pooling, cut_layer=1, chip="linear", rule="manual"):
    return CutSpec.at(Cut(cut_layer, key_of(pooling, chip)), rule)


def built(finished, tmp_path, pooling, cut_layer=1, chip="linear", *, fresh=True):
    """A copy of the bundle; it is built and verified once for all tests.

    Tests that are about something else need no fresh process.
    """
    _, _, home, folder = finished
    out = home / "built" / f"{pooling}-{chip}-{cut_layer}"
    if out not in _BUILT:
        cut = spec(pooling, cut_layer, chip)
        with nullcontext() if fresh else verified_here():
            _BUILT[out] = experiment.build(folder, cut, home=home, out=out, progress=silent)
    copy = tmp_path / out.name
    shutil.copytree(out, copy)
    return _BUILT[out], copy


def build_afresh(finished, out, cut_layer=1):
    _, _, home, folder = finished
    cut = spec("last", cut_layer)
    experiment.build(folder, cut, home=home, out=out, progress=silent)


@pytest.mark.parametrize(
    ("pooling", "cut_layer"), [("last", 0), ("last", 1), ("mean", 1), ("mean", 3)]
)
def test_a_bundle_repeats_the_test_predictions_of_its_run(finished, tmp_path, pooling, cut_layer):
    """Against the stored predictions, made from hooked features of the dense model."""
    config, report, home, folder = finished
    about, out = built(finished, tmp_path, pooling, cut_layer)
    task = load_task(config, home, silent)
    found = load(out).predict(task.splits["test"].texts)
    stored = folder.read_predictions().at(Cut(cut_layer, key_of(pooling)), "test")
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
    ours = load(out).predict(texts)
    assert [s["label"] for s in stock] == [p.label for p in ours]
    assert max(abs(s["score"] - p.score) for s, p in zip(stock, ours, strict=True)) < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean", "raw"])
def test_the_lines_on_the_card_run_and_agree(finished, tmp_path, pooling):
    about, out = built(finished, tmp_path, pooling, chip="mlp" if pooling == "raw" else "linear")
    text = "we saw the old atom near a river"
    readme = (out / "README.md").read_text()
    lines = readme.split("```python\n")[1].split("```")[0]
    code = lines.replace("PATH", str(out)).replace("TEXT", text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    (expected,) = load(out).predict([text])
    said = done.stdout.decode()
    assert expected.label in said
    numbers = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", said)]
    assert any(number == pytest.approx(expected.score, abs=1e-5) for number in numbers)
    assert lines.strip() == card.use(about.kind, load(out).metadata.task)


@pytest.mark.parametrize("pooling", ["last", "mean", "raw"])
def test_e2_a_bundles_size_is_what_the_report_said_before_it_was_built(finished, tmp_path, pooling):
    _, report, _, _ = finished
    kind = "mlp" if pooling == "raw" else "linear"
    about, out = built(finished, tmp_path, pooling, chip=kind)
    cost = report.cost_at(Cut(1, key_of(pooling, kind)))
    assert cost.bundle == about.kind
    found = load(out)
    beside = found.reader.chip.n_parameters if found.reader else 0
    assert sum(p.numel() for p in found.model.parameters()) + beside == cost.n_parameters
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


@pytest.mark.parametrize(("pooling", "chip"), [("last", "linear"), ("raw", "mlp")])
def test_a_bundle_holds_only_data(finished, tmp_path, pooling, chip):
    about, out = built(finished, tmp_path, pooling, chip=chip)
    assert set(about.files) == {f.name for f in out.iterdir()}
    allowed = {"config.json", "chip.json", "model.safetensors", "README.md", "SHA256SUMS"}
    allowed |= {"tokenizer.json", "tokenizer_config.json", "curve.png"}
    allowed |= {"chip.safetensors"} if about.kind == "chipviz" else set()
    assert set(about.files) <= allowed
    assert about.folder_bytes == sum(f.stat().st_size for f in out.iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {str(i): n for i, n in enumerate(["money", "science", "sport"])}
    assert "auto_map" not in config
    assert config["num_hidden_layers"] == 2


def test_e3_the_card_parses_and_its_numbers_are_the_reports(finished, tmp_path):
    _, report, _, _ = finished
    _, out = built(finished, tmp_path, "last")
    written = ModelCard.load(out / "README.md")
    assert written.data.pipeline_tag == "text-classification"
    assert "arxiv:2410.06541" in written.data.tags
    assert written.data.license is None  # this backbone has no card to say it
    cut = Cut(1, key_of("last"))
    test = report.score_at(cut, "test")
    found = {r.metric_type: r.metric_value for r in written.data.eval_results}
    assert found == pytest.approx({"accuracy": test.accuracy, "f1": test.macro_f1}, abs=1e-4)
    assert {r.dataset_split for r in written.data.eval_results} == {"test"}
    assert "`python -m chipviz export PATH --to onnx --out DIR`" in written.text
    assert f"{100 * test.accuracy:.1f} %" in written.text
    assert f"{report.cost_at(cut).n_parameters:,}" in written.text


@pytest.mark.parametrize("cut_layer", [0, 2, 3])
def test_the_card_shows_the_curve_with_the_cut(finished, cut_layer):
    _, report, _, _ = finished
    picture = Image.open(BytesIO(curve.draw_curve(report, spec("mean", cut_layer))))
    assert picture.format == "PNG"
    left, top, right, bottom = curve._FRAME
    dark = np.asarray(picture.convert("L"))[top:bottom, left - 2 : right + 3] < 120
    line = int(dark.sum(axis=0).argmax()) - 2  # the column that is dark from top to bottom
    assert line == pytest.approx((right - left) * cut_layer / 3, abs=1.5)
    at_cut = report.score_at(Cut(cut_layer, key_of("mean")), "test").accuracy
    same = replace_scores(report, at_cut)
    assert curve.draw_curve(same, spec("mean", cut_layer)), "a flat curve is drawn too"


def replace_scores(report, accuracy):
    scores = [s.model_copy(update={"accuracy": accuracy}) for s in report.scores]
    return type(report).model_validate(report.model_dump() | {"scores": scores})


@pytest.mark.parametrize(
    ("pooling", "chip", "name"),
    [("last", "linear", "model.safetensors"), ("raw", "mlp", "chip.safetensors")],
)
def test_verify_accepts_a_fresh_bundle_and_names_the_file_that_was_harmed(
    finished, tmp_path, pooling, chip, name
):
    _, out = built(finished, tmp_path, pooling, chip=chip)
    assert verify(out)["max_difference"] < 1e-5
    content = bytearray((out / name).read_bytes())
    content[-3] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is not what its checksum says"):
        verify(out)


def with_metadata(out, **values):
    """Change the words of a bundle, and its sums so that nobody notices."""
    said = json.loads((out / "chip.json").read_text()) | values
    (out / "chip.json").write_text(json.dumps(said))
    write_sums_anew(out)


def write_sums_anew(out):
    (out / "SHA256SUMS").unlink(missing_ok=True)
    write_sums(out)


@pytest.mark.parametrize(
    "tests",
    [
        None,
        [],
        {},
        "x",
        [3],
        [{}],
        [{"text": 3, "probabilities": [0.5, 0.5]}],
        [{"text": "a", "probabilities": ["x", "y", "z"]}],
        [{"text": "a", "probabilities": [0.5]}],
        [{"text": "a", "probabilities": [float("nan")] * 3}],
        [{"text": "a", "probabilities": [0.3] * 3}] * 10_000,
        [{"text": "a" * 200_000, "probabilities": [0.3] * 3}],
    ],
)
def test_verify_refuses_a_test_that_is_none(finished, tmp_path, tests):
    _, out = built(finished, tmp_path, "last")
    with_metadata(out, self_test=tests)
    with pytest.raises(BundleError, match="holds no test of the bundle"):
        verify(out)


@pytest.mark.parametrize("sums", [b"", b"no sums", b"\xff\xfe", b"x  ../../etc/passwd\n", "pipe"])
def test_verify_refuses_sums_that_are_none(finished, tmp_path, sums):
    _, out = built(finished, tmp_path, "last")
    (out / "SHA256SUMS").unlink()
    if sums == "pipe":
        os.mkfifo(out / "SHA256SUMS")
    else:
        (out / "SHA256SUMS").write_bytes(sums)
    with pytest.raises(BundleError):
        verify(out)


def test_verify_refuses_words_nested_without_end(finished, tmp_path):
    _, out = built(finished, tmp_path, "last")
    (out / "chip.json").write_text("[" * 100_000 + "]" * 100_000)
    write_sums_anew(out)
    with pytest.raises(BundleError, match=r"unreadable chip\.json"):
        verify(out)


def test_verify_vets_before_it_reads_and_gives_up_after_a_time(finished, tmp_path, monkeypatch):
    _, out = built(finished, tmp_path, "last")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 10**6}))
    write_sums_anew(out)
    with pytest.raises(BundleError, match=r"describes|wider"):
        verify(out)
    (out / "config.json").write_text(json.dumps(config))
    write_sums_anew(out)
    monkeypatch.setitem(card.PROGRAMS, "sequence", "import time; time.sleep(60)")
    monkeypatch.setattr("chipviz.bundle.verify.PATIENCE_S", 0.5)
    with pytest.raises(BundleError, match="did not answer its own test"):
        verify(out)


def test_verify_holds_a_bundle_to_a_limit_of_memory(finished, tmp_path, monkeypatch):
    _, out = built(finished, tmp_path, "last")
    monkeypatch.setitem(card.PROGRAMS, "sequence", "bytearray(1 << 30); print([])")
    monkeypatch.setattr("chipviz.bundle.verify.MEMORY_BYTES", 256 << 20)
    with pytest.raises(BundleError, match="MemoryError"):
        verify(out)


@pytest.mark.parametrize("name", ["modeling_evil.py", "weights.bin", "x.pkl"])
def test_a_bundle_with_anything_foreign_inside_is_not_loaded(finished, tmp_path, name):
    _, out = built(finished, tmp_path, "last")
    (out / name).write_text("raise SystemExit")
    with pytest.raises(BundleError, match=name):
        load(out)


@pytest.mark.parametrize(("pooling", "chip"), [("last", "linear"), ("raw", "mlp")])
def test_a_config_that_asks_to_run_code_is_not_loaded(finished, tmp_path, pooling, chip):
    _, out = built(finished, tmp_path, pooling, chip=chip)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.E"}}))
    with pytest.raises(BundleError, match="format"):
        load(out)


@pytest.mark.parametrize(("pooling", "chip"), [("last", "linear"), ("raw", "mlp")])
def test_a_strangers_bundle_cannot_take_the_memory_of_the_machine(
    finished, tmp_path, pooling, chip
):
    _, out = built(finished, tmp_path, pooling, chip=chip)
    refuse_all_that_is_huge(out, tmp_path, ["chip.json", "config.json", "tokenizer.json"])


@pytest.mark.parametrize(
    ("pooling", "chip"), [("last", "linear"), ("mean", "linear"), ("raw", "mlp")]
)
@pytest.mark.parametrize("harm", ["missing", "unexpected"])
def test_a_bundle_with_other_weights_than_its_models_is_not_loaded(
    finished, tmp_path, pooling, chip, harm
):
    """Stock code would fill what is missing with random numbers, and predict."""
    _, out = built(finished, tmp_path, pooling, chip=chip)
    weights = load_file(out / "model.safetensors")
    name = next((n for n in weights if n == "score.weight"), max(weights))
    if harm == "missing":
        del weights[name]
    else:
        weights["layers.9.extra.weight"] = torch.zeros(2)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=f"{harm} weights"):
        load(out)


def test_a_bundle_whose_tokenizer_has_no_pad_token_is_not_loaded(finished, tmp_path):
    _, out = built(finished, tmp_path, "last")
    said = json.loads((out / "tokenizer_config.json").read_text())
    del said["pad_token"]
    (out / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(BundleError, match="no pad token"):
        load(out)


# --- the kind for what stock classes cannot hold ------------------------------------------------


def test_a_stock_class_holds_a_plain_chip_on_final_normed_states_and_ours_all_else(family):
    name, folder, _ = family
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    prompt = bake(make_tokenizer("bytes"), None, 24, ONE)
    weight, bias = torch.zeros(3, 32), torch.zeros(3)
    plain = Chip(weight)
    vectors = {name: key_of(name).vector for name in ("last", "mean", "first", "max", "raw")}
    found = {
        name: kinds.kind_of(backbone, prompt, vectors[name], plain) for name in ("last", "mean")
    }
    # Some token classes hide a dropout and a bias behind another name; encoders have layers of
    # their own before the classes; the tokenizers of Qwen2 cannot keep the length limit.
    assert found == {
        "last": "sequence" if name not in ("bert", "qwen2") else "chipviz",
        "mean": "token" if name == "llama" else "chipviz",
    }
    for pooling in ("first", "max", "raw"):
        assert kinds.kind_of(backbone, prompt, vectors[pooling], plain) == "chipviz"
    for other in (Chip(weight, bias), Chip(torch.zeros(3, 4), bias, torch.zeros(4, 32), bias)):
        assert kinds.kind_of(backbone, prompt, vectors["last"], other) == "chipviz"
    ends_in_pad = bake(make_tokenizer("bytes"), None, 24, ONE)
    pad = ends_in_pad.tokenizer.pad_token
    ends_in_pad.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {pad}", special_tokens=[(pad, ends_in_pad.tokenizer.pad_token_id)]
    )
    assert kinds.kind_of(backbone, ends_in_pad, vectors["last"], plain) == "chipviz"
    # The class for tokens has a place for a bias, that for sequences has none.
    assert kinds.kind_of(backbone, prompt, vectors["mean"], Chip(weight, bias)) == found["mean"]


def test_a_run_takes_the_poolings_that_suit_its_backbone_and_records_them(
    finished, finished_encoder
):
    _, report, _, _ = finished_encoder
    assert {score.pooling for score in report.scores} == {"first", "mean"}
    assert not report.backbone.causal
    assert finished[1].backbone.causal


def chip_said(states, tensors, kind, pooling, layer):
    """A chip by its formula, from one text's states (T, D), already normed or raw."""
    own = {name: tensors.get(f"{kind}.{pooling}.{name}") for name in Chip.__dataclass_fields__}
    own = {name: value[layer + 1] for name, value in own.items() if value is not None}
    pooled = {
        "raw": states[-1],
        "first": states[0],
        "mean": states.mean(dim=0),
        "max": states.amax(dim=0),
    }[pooling]
    if kind == "mlp":
        pooled = (own["hidden_weight"] @ pooled + own["hidden_bias"]).clamp_min(0)
    return (own["weight"] @ pooled + own.get("bias", 0)).softmax(dim=0)


@pytest.mark.parametrize(
    ("which", "pooling", "chip"),
    [
        ("finished", "raw", "linear"),
        ("finished", "raw", "mlp"),
        ("finished", "max", "linear"),
        ("finished", "mean", "mlp"),
        ("finished_encoder", "first", "linear"),
        ("finished_encoder", "mean", "linear"),
    ],
)
def test_our_own_kind_says_what_the_chip_says_of_the_dense_models_hidden_states(
    which, pooling, chip, tmp_path, request, monkeypatch
):
    """Against `output_hidden_states` of the whole model and the chip's formula, in float32."""
    config, _, home, folder = finished = request.getfixturevalue(which)
    monkeypatch.setattr(save, "in_fresh_process", said_here)
    cut = spec(pooling, 1, chip)
    about = experiment.build(folder, cut, home=home, out=tmp_path / "out", progress=silent)
    assert about.kind == "chipviz"
    assert about.max_difference < 1e-5
    dense = AutoModel.from_pretrained(config.backbone, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.prompt)
    tensors = load_file(folder.chips)
    texts = list(load_task(config, home, silent).splits["test"].texts)
    found = load(tmp_path / "out").predict(texts)
    assert finished[1].cost_at(cut.cut).bundle == "chipviz"
    for text, prediction in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            states = dense(input_ids=ids, output_hidden_states=True).hidden_states[2]
            if which == "finished" and pooling != "raw":
                states = dense.norm(states)
        expected = chip_said(states[0], tensors, chip, pooling, 1)
        said = torch.tensor(list(prediction.probabilities.values()))
        torch.testing.assert_close(said, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda own: own | {"surprise": torch.zeros(1)}, "holds no chip"),
        (lambda own: {name: own[name] for name in own if name != "weight"}, "holds no chip"),
        (lambda own: own | {"bias": torch.zeros(7)}, "does not fit"),
        (lambda own: {name: own[name] for name in own if name != "hidden_bias"}, "does not fit"),
        (lambda own: own | {"hidden_weight": torch.zeros(256, 31)}, "does not fit"),
        (None, "cannot be loaded"),
    ],
)
def test_a_chip_that_does_not_fit_its_model_is_not_loaded(finished, tmp_path, harm, reason):
    _, out = built(finished, tmp_path, "raw", chip="mlp")
    path = out / "chip.safetensors"
    if harm is None:
        path.write_bytes(b"not safetensors")
    else:
        save_file(harm(load_file(path)), path)
    with pytest.raises(BundleError, match=reason):
        load(out)


def test_the_card_names_the_backbone_without_its_revision_and_its_licence(finished):
    _, report, _, _ = finished
    named = {"name": "owner/name@v1", "licence": "apache-2.0"}
    report = report.model_copy(update={"backbone": report.backbone.model_copy(update=named)})
    cut = spec("raw", 1, "mlp")
    data = ModelCard(card.model_card(cut, report, "chipviz", 64, 0.0)).data
    assert (data.base_model, data.license) == ("owner/name", "apache-2.0")


@pytest.mark.parametrize(
    "name",
    ["plain", "a`b", "``<b>x</b>", "`<img src=x onerror=y>`", "a\n# b", "`", "`` ` ``", "\x1b[2J"],
)
def test_a_label_on_the_card_is_code_whatever_it_holds(name):
    """As a reader of CommonMark sees it: one span of code, and nothing beside it."""
    tokens = MarkdownIt().parse(f"Labels: {card._code(name)}.")
    (inline,) = [token for token in tokens if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    shown = " ".join(name.replace("\x1b", " ").split())
    assert inline.children[1].content.strip() == shown


@pytest.mark.parametrize("rule", ["within", "oracle"])
def test_the_card_never_lets_a_choice_on_test_pass_for_one_on_validation(finished, rule):
    _, report, _, _ = finished
    cut = spec("raw", 1, "mlp", rule)
    text = card.model_card(cut, report, "chipviz", 64, 0.0)
    assert ("on the test texts themselves" in text) == (rule == "oracle")
    assert "one MLP chip on the last token's raw hidden state" in text
    assert f"{report.dense.peak_bytes / 1e6:,.1f} MB" in text
    assert f"{1e3 * report.cost_at(cut.cut).latency_s:,.1f} ms" in text


def test_a_bundle_that_disagrees_with_its_chip_is_refused_and_leaves_nothing(
    finished, tmp_path, monkeypatch
):
    def wrong(*args):
        return torch.full((len(args[-1]), 3), 1 / 3)

    monkeypatch.setattr(dense, "expected", wrong)
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
