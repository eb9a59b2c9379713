"""Early exits, thresholds and rounded weights of bundles, beside the dense model text by text."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from chipviz import experiment
from chipviz.backbones.backbone import pad
from chipviz.bundle import adaptive
from chipviz.bundle.adaptive import Exits, log_odds
from chipviz.bundle.classifier import load
from chipviz.bundle.dense import exactly
from chipviz.bundle.extras import choose_extras
from chipviz.bundle.verify import verify, write_sums
from chipviz.chips.chip import Chip, Chips
from chipviz.config import CutSpec
from chipviz.data.from_table import load_task
from chipviz.errors import BundleError, ConfigError, TaskError
from chipviz.features.forward import forward_pooled
from chipviz.keys import ChipKey, Cut, Vector
from chipviz.progress import silent
from chipviz.results.exits import ExitPlan, ExitScore
from tests.bundle.test_save import run
from tests.cli.test_cli import chipviz
from tests.families import ALL, load_backbone, planted_rows
from tests.here import verified_here

NOBODY = ExitScore(
    n=1,
    accuracy=1,
    accuracy_low=1,
    accuracy_high=1,
    fixed_accuracy=1,
    mean_layers=1,
    shares=[],
)


def plan_of(layers, threshold):
    return ExitPlan(
        layers=layers,
        temperatures=[1.0 + 0.2 * i for i in range(len(layers))],
        threshold=threshold,
        margin=0.02,
        validation=NOBODY,
        test=NOBODY,
        fixed_layer=layers[-1],
    )


def drawn_ids(n, longest, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 390, size=draw.integers(2, longest)).tolist() for _ in range(n)]


@pytest.fixture(scope="module", params=ALL, ids=lambda family: family.name)
def backbone(request, tmp_path_factory):
    folder = request.param.build(tmp_path_factory.mktemp("family"))
    return load_backbone(folder, request.param.name)


def leaving(odds, threshold):
    """The exit of each text, from log-odds (E, N)."""
    leave = odds >= threshold
    leave[-1] = True
    return leave.int().argmax(dim=0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_each_text_leaves_where_it_would_alone_and_nothing_more_is_computed(backbone, pooling):
    """Beside plain passes of the dense model, text by text; blocks see only who is inside."""
    vector, layers = Vector("block", pooling), [0, 1, 3]
    draw = torch.Generator().manual_seed(3)
    chips = Chip(torch.randn(3, 3, 32, generator=draw))
    ids = drawn_ids(9, 12)
    dense = torch.cat([forward_pooled(backbone, [one], 2, [vector])[0] for one in ids], dim=1)
    logits = torch.stack([chips.at(i).logits(dense[layer + 1]) for i, layer in enumerate(layers)])
    logits /= torch.tensor([1.0, 1.2, 1.4])[:, None, None]
    odds = torch.stack([log_odds(one) for one in logits])
    at, threshold = max(
        (
            (leaving(odds, float(tried) + 1e-4), float(tried) + 1e-4)
            for tried in odds[:2].flatten().sort().values
        ),
        key=lambda found: len(found[0].unique()),
    )
    assert len(at.unique()) > 1, "the texts must leave at several exits"
    exits = Exits(backbone, vector, chips, plan_of(layers, threshold))
    entered = []
    handles = [
        block.register_forward_hook(
            lambda _block, _args, out: entered.append(
                len(out if isinstance(out, torch.Tensor) else out[0])
            )
        )
        for block in backbone.blocks
    ]
    said = exits.answer(*pad(ids, 2, torch.device("cpu")))
    for handle in handles:
        handle.remove()
    assert said.exits.tolist() == at.tolist()
    truth = logits[at, range(9)].softmax(dim=1)
    torch.testing.assert_close(said.probabilities, truth, atol=1e-5, rtol=0)
    inside = [9, int((at > 0).sum()), int((at > 1).sum()), int((at > 1).sum())]
    assert entered == [n for n in inside if n]


def test_a_batch_as_long_as_it_is_wide_is_told_apart(backbone):
    """What belongs to texts is known by its first dimension; here tokens have the same number."""
    vector, draw = Vector("block", "last"), torch.Generator().manual_seed(4)
    chips = Chip(torch.randn(2, 3, 32, generator=draw))
    ids = [row[:6] for row in drawn_ids(60, 12) if len(row) >= 6][:6]
    exits = Exits(backbone, vector, chips, plan_of([1, 3], 1.0))
    together = exits.answer(*pad(ids, 2, torch.device("cpu")))
    alone = [exits.answer(*pad([one], 2, torch.device("cpu"))) for one in ids]
    assert together.exits.tolist() == [int(one.exits) for one in alone]
    truth = torch.cat([one.probabilities for one in alone])
    torch.testing.assert_close(together.probabilities, truth, atol=1e-5, rtol=0)


def test_float32_is_a_visit_that_changes_no_number(backbone):
    """Rotary frequencies and single parameters in float32 would be rounded on the way back."""
    model = copy.deepcopy(backbone.model).to(torch.bfloat16)
    for module, kept in zip(model.modules(), backbone.model.modules(), strict=True):
        for name, value in kept._buffers.items():
            module._buffers[name] = value  # as loading leaves them
    next(model.parameters()).data = next(backbone.model.parameters()).data.clone()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = {name: value.clone() for name, value in tensors}
    with exactly(model):
        inside = [value for _, value in [*model.named_parameters(), *model.named_buffers()]]
        assert {v.dtype for v in inside if v.is_floating_point()} == {torch.float32}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


def test_all_may_leave_at_once_and_the_rest_of_the_model_rests(backbone):
    chips = Chip(torch.zeros(2, 3, 32))
    exits = Exits(backbone, Vector("block", "mean"), chips, plan_of([1, 3], -5.0))
    handle = backbone.blocks[2].register_forward_hook(lambda *_: pytest.fail("it ran on"))
    said = exits.answer(*pad(drawn_ids(4, 9), 2, torch.device("cpu")))
    handle.remove()
    assert said.exits.tolist() == [0] * 4


@pytest.fixture(scope="module")
def finished(tiny_backbone_folder, toy_csv, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return run(tiny_backbone_folder, toy_csv, home, poolings=("last", "mean", "max"))


@pytest.fixture(scope="module")
def binary(tiny_backbone_folder, tmp_path_factory):
    """The same texts, one class against the others."""
    rows = planted_rows(300)
    first = rows[0][1]
    lines = [f"{text},{'spam' if label == first else 'ham'}" for text, label in rows]
    data = tmp_path_factory.mktemp("binary") / "binary.csv"
    data.write_text("text,label\n" + "\n".join(lines) + "\n", "utf-8")
    return run(tiny_backbone_folder, data, tmp_path_factory.mktemp("home2"), poolings=("mean",))


def spec(pooling="mean", layer=3, **extras):
    return CutSpec.at(Cut(layer, ChipKey.sound(pooling))).asking(**extras)


def build(finished, out, cut):
    _, _, home, folder = finished
    with verified_here():
        return experiment.build(folder, cut, home=home, out=out, progress=silent)


@pytest.fixture(scope="module")
def with_exits(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exits") / "bundle"
    return build(finished, out, spec("max", exit_margin=0.02)), out


def test_a_bundle_with_exits_answers_as_its_run_planned(finished, with_exits):
    config, report, home, folder = finished
    about, out = with_exits
    classifier = load(out, adaptive=True)
    plan = classifier.metadata.exits
    task = load_task(config, home, silent)
    texts, labels = task.splits["test"].texts, task.splits["test"].labels
    found = classifier.predict(texts)
    shares = [sum(p.layer == layer for p in found) / len(found) for layer in plan.layers]
    assert min(plan.test.shares) > 0, "some must leave at every exit"
    # The run may compute in bfloat16: a text on the border may fall to the other side.
    np.testing.assert_allclose(shares, plan.test.shares, atol=0.1)
    names = report.task.label_names
    right = np.mean([p.label == names[label] for p, label in zip(found, labels, strict=True)])
    assert right == pytest.approx(plan.test.accuracy, abs=0.05)
    assert about.files["exits.safetensors"] > 0
    chips = Chips.load(folder.chips, classifier_fingerprint(out))
    stored = load_file(out / "exits.safetensors")["weight"]
    for i, layer in enumerate(plan.layers):
        torch.testing.assert_close(stored[i], chips.at(Cut(layer, ChipKey.sound("max"))).weight)


def classifier_fingerprint(out):
    return json.loads((out / "chip.json").read_text())["backbone"]["fingerprint"]


def test_stock_loaders_and_plain_predictions_do_not_see_the_exits(finished, tmp_path):
    out = tmp_path / "bundle"
    about = build(finished, out, spec("last", exit_margin=0.03))
    assert about.kind == "sequence"
    plain = load(out).predict(["we saw the goal"])[0]
    assert plain.layer is None
    stock = pipeline("text-classification", str(out))("we saw the goal")[0]
    assert stock["label"] == plain.label
    assert stock["score"] == pytest.approx(plain.score, abs=1e-5)
    verify(out)


def test_the_card_says_what_exits_do(with_exits):
    _, out = with_exits
    text, plan = (out / "README.md").read_text(), load(out).metadata.exits
    assert "## Early exits" in text
    assert f"runs through {plan.test.mean_layers:.1f} of 4 layers" in text
    assert ("do not pay here" in text) != plan.pays
    assert "| computed in float32 | 8 | 16 of 16 |" in text


def test_the_command_line_lets_texts_leave(with_exits, tmp_path):
    _, out = with_exits
    file = tmp_path / "texts.txt"
    file.write_text("we saw the goal\nthe bank of a river\n")
    said = chipviz(tmp_path, "predict", out, "--file", file, "--adaptive", "--json").json[
        "predictions"
    ]
    truth = load(out, adaptive=True).predict(file.read_text().splitlines())
    assert [one["layer"] for one in said] == [one.layer for one in truth]
    assert [one["label"] for one in said] == [one.label for one in truth]


def test_exits_that_were_altered_are_refused(with_exits, tmp_path):
    _, out = with_exits
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    weight = load_file(copy / "exits.safetensors")["weight"]
    save_file({"weight": weight[:, :, :5].contiguous()}, copy / "exits.safetensors")
    with pytest.raises(BundleError, match="is not what its checksum says"):
        verify(copy)
    write_sums(copy)
    with pytest.raises(BundleError, match="does not fit"):
        load(copy, adaptive=True)
    (copy / "exits.safetensors").unlink()
    with pytest.raises(BundleError):
        load(copy, adaptive=True)


def test_exits_are_checked_before_a_bundle_gets_its_name(finished, tmp_path, monkeypatch):
    """A family whose blocks cannot work on fewer texts would be found out."""
    monkeypatch.setattr(adaptive, "_picked", lambda _batch, value: value)
    out = tmp_path / "bundle"
    with pytest.raises(BundleError, match="do not work with this model"):
        build(finished, out, spec("max", exit_margin=0.02))
    assert not out.exists()


def test_what_cannot_have_exits_is_refused(finished, binary, tmp_path):
    plain = tmp_path / "plain"
    build(finished, plain, spec())
    with pytest.raises(BundleError, match="no early exits"):
        load(plain, adaptive=True)
    with pytest.raises(ConfigError, match="a threshold moves that"):
        build(binary, tmp_path / "both", spec(exit_margin=0.1, threshold="fpr=10%"))
    with pytest.raises(ConfigError, match="without a threshold"):
        build(binary, tmp_path / "alone", spec(positive="spam"))
    with pytest.raises(ConfigError, match="exit_margin"):
        spec(exit_margin=1.5)
    assert not any((tmp_path / name).exists() for name in ("both", "alone"))


def test_a_threshold_decides_in_predict_and_nowhere_else(binary, tmp_path):
    config, report, home, _ = binary
    out = tmp_path / "bundle"
    build(binary, out, spec(threshold="cost=1:50", positive="spam"))
    classifier = load(out)
    threshold = classifier.metadata.threshold
    task = load_task(config, home, silent)
    found = classifier.predict(task.splits["test"].texts)
    spam = report.task.label_names.index("spam")
    assert threshold.positive == spam
    said = np.array([p.label == "spam" for p in found])
    assert said.tolist() == [p.probabilities["spam"] >= threshold.at for p in found]
    likelier = np.array([p.probabilities["spam"] >= 0.5 for p in found])
    assert said.sum() > likelier.sum(), "a dear miss makes it say spam more often"
    assert all(p.score == p.probabilities[p.label] for p in found)
    truth = task.splits["test"].labels == spam
    assert said[~truth].mean() == pytest.approx(threshold.test.false_positive_rate, abs=0.05)
    assert said[truth].mean() == pytest.approx(threshold.test.true_positive_rate, abs=0.05)
    assert "## Threshold" in (out / "README.md").read_text()
    verify(out)


@pytest.mark.parametrize("pooling", ["last", "max"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_and_the_chip_never(finished, tmp_path, dtype, pooling):
    out = tmp_path / "bundle"
    about = build(finished, out, spec(pooling, layer=1, dtype=dtype))
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    chip = "score.weight" if pooling == "last" else "weight"
    assert tensors.pop(chip).dtype == torch.float32
    assert {value.dtype for value in tensors.values()} == {getattr(torch, dtype)}
    _, report, _, folder = finished
    dense = report.cost_at(Cut(1, ChipKey.sound(pooling)))
    assert about.weight_bytes < 0.6 * dense.weight_bytes
    read = sum(value.numel() * value.element_size() for value in tensors.values())
    assert about.weight_bytes == read + 4 * dense.chip_parameters
    drift = json.loads((out / "chip.json").read_text())["drift"]
    assert drift[0]["what"] == f"weights rounded to {dtype}"
    assert 0 < drift[0]["max_difference"] < 0.2
    whole = tmp_path / "whole"
    build(finished, whole, spec(pooling, layer=1))
    texts = [row.text for row in folder.read_examples("validation")]
    rounded, exact = load(out).predict(texts), load(whole).predict(texts)
    moved = max(
        abs(one.probabilities[name] - other.probabilities[name])
        for one, other in zip(rounded, exact, strict=True)
        for name in one.probabilities
    )
    assert moved == pytest.approx(drift[0]["max_difference"], rel=0.2, abs=1e-4)
    assert f"| weights rounded to {dtype} |" in (out / "README.md").read_text()


def test_pictures_leave_nowhere_early(finished):
    _, report, _, folder = finished
    pictures = report.model_copy(update={"task": report.task.model_copy(update={"kind": "image"})})
    with pytest.raises((ConfigError, TaskError)):
        choose_extras(spec(exit_margin=0.1), pictures, folder)
