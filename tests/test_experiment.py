"""The line, whole: planted labels are learned, shuffled ones are not, the test split waits."""

import json
import random

import pytest
import torch

from chipviz import experiment
from chipviz.backbones import backbone as backbone_module
from chipviz.backbones import batching
from chipviz.chips.chip import Chips
from chipviz.chips.live import live_sizes
from chipviz.config import RunConfig
from chipviz.features.cache import used_by
from chipviz.keys import ChipKey, Cut
from chipviz.progress import Cancelled, silent
from chipviz.results.run_folder import RunFolder
from tests.conftest import planted_rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Small chunks, and one dtype: each home measures its own, and two homes are compared here."""
    monkeypatch.setattr(backbone_module, "_measure_dtype", lambda _: torch.float32)
    monkeypatch.setattr(batching, "BATCH_TOKENS", {"cpu": 400})
    monkeypatch.setattr(batching, "FIRST_BATCHES", 1)
    monkeypatch.setattr(batching, "CHUNK_BATCHES", 2)
    monkeypatch.setattr(batching, "MOST_BATCHES", 2)


def run(folder, backbone, data, *, progress=silent, name="one", on_points=lambda _: None, **more):
    run_folder = RunFolder(folder / "runs" / name)
    run_folder.path.mkdir(parents=True, exist_ok=True)
    config = RunConfig.checked(
        backbone=str(backbone),
        data=str(data),
        **{"template": "{text} :", "max_length": 24, **more},
    )
    report = experiment.run(
        config,
        home=folder,
        run_id=name,
        folder=run_folder,
        progress=progress,
        on_points=on_points,
    )
    return report, run_folder


def write_csv(path, rows):
    path.write_text("text,label\n" + "\n".join(f"{t},{label}" for t, label in rows) + "\n", "utf-8")
    return path


def test_a_planted_label_is_learned_and_beats_the_majority(tiny_backbone_folder, toy_csv, tmp_path):
    report, folder = run(tmp_path, tiny_backbone_folder, toy_csv)
    best = report.selection["validate"]
    assert best.test_accuracy > report.controls.majority + 0.3
    assert report.controls.tfidf > 0.9
    assert len(folder.read_examples("test")) == report.task.n_test
    predicted = folder.read_predictions().classes["test", ChipKey.sound("mean")]
    assert predicted.shape == (4, report.task.n_test)


def test_shuffled_labels_score_at_chance(tiny_backbone_folder, tmp_path):
    """90 test texts in 3 equal classes: above 0.5 has a chance of about 1 in 2,000 a chip."""
    rows = planted_rows(450)
    labels = [label for _, label in rows]
    random.Random(1).shuffle(labels)
    data = write_csv(tmp_path / "noise.csv", zip((t for t, _ in rows), labels, strict=True))
    report, _ = run(tmp_path, tiny_backbone_folder, data)
    test = [s.accuracy for s in report.scores if s.split == "test"]
    assert max(test) < 0.52
    assert sum(test) / len(test) == pytest.approx(1 / 3, abs=0.08)


def test_the_test_split_is_untouched_until_the_end(
    tiny_backbone_folder, toy_csv, tmp_path, monkeypatch
):
    """With other test labels every chip and every choice stays the same to the bit."""
    honest, honest_dir = run(tmp_path, tiny_backbone_folder, toy_csv)
    load_task = experiment.load_task

    def with_other_test_labels(config, home, progress):
        task = load_task(config, home, progress)
        task.splits["test"].labels[:] = (task.splits["test"].labels + 1) % 3
        return task

    monkeypatch.setattr(experiment, "load_task", with_other_test_labels)
    other, other_dir = run(tmp_path, tiny_backbone_folder, toy_csv, name="other")
    for kept in (lambda f: f.chips, lambda f: f.examples("validation")):
        assert kept(honest_dir).read_bytes() == kept(other_dir).read_bytes()
    for rule, chosen in honest.selection.items():
        if rule == "oracle":  # the one that says it looks
            continue
        assert other.selection[rule].model_dump(exclude={"test_accuracy"}) == chosen.model_dump(
            exclude={"test_accuracy"}
        )
    assert [s for s in honest.scores if s.split == "validation"] == [
        s for s in other.scores if s.split == "validation"
    ]
    assert [s for s in honest.scores if s.split == "test"] != [
        s for s in other.scores if s.split == "test"
    ]


@pytest.mark.parametrize("stop_at", [6, 14, 25])
def test_a_stopped_run_resumed_ends_with_the_scores_of_an_unbroken_one(
    tiny_backbone_folder, toy_csv, tmp_path, stop_at
):
    whole, whole_dir = run(tmp_path / "a", tiny_backbone_folder, toy_csv)
    calls = []

    def stop(progress):
        calls.append(progress)
        if len(calls) == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path / "b", tiny_backbone_folder, toy_csv, progress=stop)
    again, again_dir = run(tmp_path / "b", tiny_backbone_folder, toy_csv)
    assert again.scores == whole.scores
    assert again.selection == whole.selection
    assert again_dir.chips.read_bytes() == whole_dir.chips.read_bytes()


def test_a_run_notes_which_features_it_uses_before_it_reads(
    tiny_backbone_folder, toy_csv, tmp_path
):
    def stop(progress):
        if progress.stage == "extracting":
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path, tiny_backbone_folder, toy_csv, progress=stop, name="stopped")
    run(tmp_path, tiny_backbone_folder, toy_csv, name="last", poolings=("last",))
    run(tmp_path, tiny_backbone_folder, toy_csv, name="other", template="{text} ?")
    keys = [used_by(RunFolder(tmp_path / "runs" / name)) for name in ("stopped", "last", "other")]
    assert keys[0] == keys[1] != keys[2]
    stored = {folder.name for folder in (tmp_path / "features").iterdir() if folder.is_dir()}
    assert stored == set(keys)


def test_the_curve_grows_while_features_still_arrive(tiny_backbone_folder, toy_csv, tmp_path):
    events = []
    report, _ = run(
        tmp_path,
        tiny_backbone_folder,
        toy_csv,
        progress=lambda p: events.append(p.stage),
        on_points=lambda points: events.append(sorted({p.n_train for p in points})),
    )
    sizes = [e[0] for e in events if isinstance(e, list) and e]
    assert sizes == sorted(sizes)
    assert sorted(set(sizes)) == live_sizes(report.task.n_train)
    assert len(set(sizes)) >= 3
    first, last_read = events.index([sizes[0]]), len(events) - events[::-1].index("extracting")
    assert first < last_read
    timing = report.timing
    steps = timing.load_s + timing.extract_s + timing.fit_s
    assert 0 < timing.fit_s < steps <= timing.total_s


def test_every_layer_and_pooling_is_scored_on_both_splits(tiny_backbone_folder, toy_csv, tmp_path):
    report, folder = run(tmp_path, tiny_backbone_folder, toy_csv)
    keys = {(s.layer, s.pooling, s.split) for s in report.scores}
    assert keys == {
        (layer, pooling, split)
        for layer in (-1, 0, 1, 2, 3)
        for pooling in ("last", "mean")
        for split in ("validation", "test")
    }
    assert folder.read_report() == report
    stored, cut = folder.read_predictions(), Cut(2, ChipKey.sound("last"))
    hits = (stored.at(cut, "test") == stored.labels["test"]).mean()
    assert hits == pytest.approx(report.score_at(cut, "test").accuracy)
    chips = Chips.load(folder.chips, _fingerprint(tiny_backbone_folder))
    assert len(chips.stacks[ChipKey.sound("mean")].weight) == 5


def test_limits_take_a_stratified_sample_and_one_pooling_is_enough(
    tiny_backbone_folder, toy_csv, tmp_path
):
    report, _ = run(
        tmp_path,
        tiny_backbone_folder,
        toy_csv,
        poolings=("mean",),
        max_train=30,
        max_validation=12,
        max_test=15,
    )
    assert (report.task.n_train, report.task.n_validation, report.task.n_test) == (30, 12, 15)
    assert {s.pooling for s in report.scores} == {"mean"}
    assert json.loads(report.model_dump_json())["selection"]["fixed"]["cut_layer"] == 2


def _fingerprint(folder):
    from tests.families import load_backbone

    return load_backbone(folder, "tiny", device="cpu").folder.fingerprint
