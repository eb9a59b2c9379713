"""Training: every chip of a run, its repeats and its weights, and layers fitted side by side."""

import numpy as np
import pytest
import torch

from chipviz.backbones.opening import open_backbone
from chipviz.chips.chip import Chips
from chipviz.chips.judge import joined, with_constant
from chipviz.chips.linear import fit_linear
from chipviz.chips.live import live_sizes
from chipviz.chips.rows import Rows
from chipviz.config import RunConfig
from chipviz.data.from_table import load_task
from chipviz.features.extract import extract
from chipviz.keys import ChipKey, Cut
from chipviz.progress import silent
from tests import families
from tests.test_experiment import run, write_csv


def test_the_published_recipe_stands_beside_the_sound_one(tiny_backbone_folder, toy_csv, tmp_path):
    points = []
    report, folder = run(
        tmp_path,
        tiny_backbone_folder,
        toy_csv,
        preset="published",
        poolings=("last",),
        on_points=points.extend,
    )
    assert report.preset == "published"
    published = ChipKey.published("mlp")
    curve = {(p.n_train, p.cut.layer): p.accuracy for p in points if p.cut.chip == published}
    sizes = sorted({n_train for n_train, _ in curve})
    assert len(sizes) == 8  # a learning curve: what the chips knew on the way
    assert sizes[-1] == report.task.n_train
    assert len(curve) == 8 * report.backbone.n_layers
    last = Cut(3, ChipKey.sound("last"))
    assert set(report.chips) == {last.chip, published, ChipKey.published("linear")}
    sound = report.score_at(last, "test").accuracy
    alone, _ = run(
        tmp_path, tiny_backbone_folder, toy_csv, poolings=("last",), folds=1, name="alone"
    )
    assert alone.score_at(last, "test").accuracy == sound
    chips = Chips.load(folder.chips, _fingerprint(tiny_backbone_folder))
    assert chips.stacks[published].tensors().keys() == {
        *("weight", "bias", "hidden_weight", "hidden_bias")
    }


def test_repeats_spread_around_the_first_fit_and_change_nothing_else(
    tiny_backbone_folder, toy_csv, tmp_path
):
    options = {"poolings": ("mean",), "chips": ("linear", "mlp"), "max_train": 60}
    one, _ = run(tmp_path, tiny_backbone_folder, toy_csv, name="one", **options)
    three, _ = run(tmp_path, tiny_backbone_folder, toy_csv, name="three", repeats=3, **options)
    assert three.timing.n_tokens == 0  # all fits share one extraction
    for before, after in zip(one.scores, three.scores, strict=True):
        assert before.accuracy == after.accuracy
        assert (len(before.repeats), len(after.repeats)) == (0, 2)
    spread = [max(s.repeats) - min(s.repeats) for s in three.scores if s.layer >= 0]
    assert max(spread) > 0
    for chip in ("linear", "mlp"):
        deep = three.score_at(Cut(3, ChipKey.sound("mean", chip)), "test")
        assert np.mean(deep.repeats) == pytest.approx(deep.accuracy, abs=0.25)


def test_shipped_chips_are_fitted_on_all_labelled_texts_at_the_strength_that_was_chosen(
    tiny_backbone_folder, toy_csv, tmp_path
):
    """Against a fit from scratch on the rows of both splits; the validation curve stays."""
    options = {"poolings": ("mean",), "max_train": 60, "max_validation": 30, "folds": 1}
    refitted, folder = run(tmp_path, tiny_backbone_folder, toy_csv, name="refit", **options)
    alone, other = run(tmp_path, tiny_backbone_folder, toy_csv, name="no", refit=False, **options)
    assert (refitted.refit, alone.refit) == (True, False)
    key = ChipKey.sound("mean")
    for layer in range(4):
        cut = Cut(layer, key)
        assert refitted.score_at(cut, "validation") == alone.score_at(cut, "validation")
    assert {
        rule: chosen.cut for rule, chosen in refitted.selection.items() if rule != "oracle"
    } == {rule: chosen.cut for rule, chosen in alone.selection.items() if rule != "oracle"}
    fingerprint = _fingerprint(tiny_backbone_folder)
    shipped, before = (Chips.load(f.chips, fingerprint) for f in (folder, other))
    assert shipped.strengths == before.strengths
    rows = _rows(tmp_path, tiny_backbone_folder, toy_csv, options)
    train, validation = rows.labels("train"), rows.labels("validation")
    layer = 3
    read = joined(*(rows.reader(s, key.vector, [layer]) for s in ("train", "validation")), 60)
    scratch = fit_linear(
        read,
        torch.cat([train, validation]),
        3,
        strengths=[shipped.strengths[key][layer + 1]],
        tolerance=1e-9,
    )[0, 0]
    ours, theirs = shipped.at(Cut(layer, key)).weight, before.at(Cut(layer, key)).weight
    assert (ours - scratch).norm() < 0.05 * (ours - theirs).norm()


def _rows(home, backbone_folder, data, options):
    """Features and labels as a run with these settings reads them."""
    config = RunConfig.checked(
        backbone=str(backbone_folder), data=str(data), template="{text} :", max_length=24, **options
    )
    task = load_task(config, home, silent)
    backbone, prompt = open_backbone(config, task, home=home, progress=silent)
    features = extract(backbone, prompt, task, home, vectors=config.vectors).features
    return Rows(features, task, torch.device("cpu"))


def test_rows_of_two_readers_are_read_as_one():
    first, second = torch.randn(2, 7, 3), torch.randn(2, 5, 3)
    both = torch.cat([first, second], dim=1)
    read = joined(
        lambda start, stop: first[:, start:stop], lambda start, stop: second[:, start:stop], 7
    )
    for start in range(12):
        for stop in range(start + 1, 13):
            assert torch.equal(read(start, stop), both[:, start:stop])


def test_balanced_weights_give_a_rare_class_its_say(tiny_backbone_folder, tmp_path):
    """One class in twelve, told by one word that is sometimes missing: recall rises."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(600):
        rare = i % 12 == 0
        word = "goal" if rare and draw.random() < 0.6 else "bank"
        rows.append((f"we saw the {word} near a river {i}", "rare" if rare else "common"))
    data = write_csv(tmp_path / "rare.csv", rows)
    recall = {}
    for class_weight in ("none", "balanced"):
        report, folder = run(
            tmp_path,
            tiny_backbone_folder,
            data,
            name=class_weight,
            class_weight=class_weight,
            poolings=("mean",),
        )
        stored, rare = folder.read_predictions(), report.task.label_names.index("rare")
        truth = stored.labels["test"] == rare
        said = stored.at(Cut(3, ChipKey.sound("mean")), "test") == rare
        recall[class_weight] = said[truth].mean()
    assert recall["balanced"] > recall["none"]


def _fingerprint(folder):
    from tests.families import load_backbone

    return load_backbone(folder, "tiny", device="cpu").folder.fingerprint


def test_a_bias_learns_the_shares_of_the_classes_from_states_that_say_nothing():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 2000, 8, generator=draw)
    rows -= rows.mean(dim=1, keepdim=True)
    labels = (torch.arange(2000) % 10 == 0).long()

    def plain(start, stop):
        return rows[:, start:stop]

    def shares(read):
        weight = fit_linear(read, labels, 2, strengths=[1.0])[0, 0]
        return (read(0, 2000)[0] @ weight.mT).softmax(dim=-1).mean(dim=0)

    # Where the gradient of an (almost) free bias vanishes, mean probability is the share.
    torch.testing.assert_close(
        shares(with_constant(plain))[1], torch.tensor(0.1), rtol=0, atol=2e-3
    )
    assert shares(plain)[1] > 0.4


def test_chips_have_a_bias_where_no_final_norm_is(tiny_backbone_folder, toy_csv, tmp_path):
    encoder = families.NAMED["bert"].build(tmp_path / "bert")
    families.add_words(families.NAMED["bert"], encoder)
    for folder, biased in ((encoder, True), (tiny_backbone_folder, False)):
        home = tmp_path / str(biased)
        _, stored = run(home, folder, toy_csv, poolings=("mean",), repeats=2)
        chips = Chips.load(stored.chips, _fingerprint(folder))
        assert (chips.stacks[ChipKey.sound("mean")].bias is not None) is biased


def test_the_live_curve_has_sizes_that_grow_to_all_texts():
    assert live_sizes(1_000) == [39, 59, 88, 132, 198, 297, 445, 667, 1_000]
    assert live_sizes(20) == [20]
    for n_train in (1, 31, 33, 50, 20_000):
        sizes = live_sizes(n_train)
        assert sizes[-1] == n_train
        assert sizes == sorted(set(sizes))
        assert sum(sizes) < 3.1 * n_train
