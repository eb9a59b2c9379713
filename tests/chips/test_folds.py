"""Cross-validation: every labelled text is judged by a chip that has not seen it."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.chips import judge
from chipviz.chips.chip import Chips
from chipviz.chips.linear import STRENGTHS, Turn
from chipviz.chips.recipes import Block, judge_of, sound
from chipviz.config import RunConfig
from chipviz.data.splits import fold_of
from chipviz.data.task import Examples
from chipviz.errors import ConfigError
from chipviz.keys import ChipKey, Cut
from tests.chips.test_linear import drawn, rows_of
from tests.test_experiment import run

MEAN = ChipKey.sound("mean")


class Rows:
    """Features of one layer in memory: the first as training rows, the rest as validation rows."""

    def __init__(self, features, labels, n_train):
        self.parts = {
            "train": (features[:n_train], labels[:n_train]),
            "validation": (features[n_train:], labels[n_train:]),
        }
        self.task = SimpleNamespace(n_classes=int(labels.max()) + 1)

    def labels(self, split):
        return self.parts[split][1]

    def reader(self, split, _vector, _layers):
        return rows_of(self.parts[split][0][None])


def block_of(features, labels, n_train, fold, **settings):
    config = RunConfig.checked(backbone="x", data="y", **settings)
    rows: Any = Rows(features, labels, n_train)
    meter: Any = SimpleNamespace(advance=lambda *_: None)
    return Block(rows, MEAN, range(1), config, False, meter, fold)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("size", [(150, 12, 2), (120, 40, 5)], ids=str)
def test_each_text_is_judged_as_scikit_learn_fitted_on_the_other_folds_judges_it(
    size, balanced, monkeypatch
):
    monkeypatch.setattr(judge, "FOLD_TOLERANCE", 1e-8)
    features, labels = drawn(*size, seed=1)
    if balanced:
        labels = torch.where(labels == 1, torch.randint(2, labels.shape), labels)
    fold = torch.arange(len(labels)) % 4
    weight = "balanced" if balanced else "none"
    block = block_of(features, labels, 100, fold, class_weight=weight)
    fitted = sound(block)
    assert fitted.held_out is not None
    turned = Turn.of(rows_of(features[None]), len(labels)).into(features[None])[0].double().numpy()
    for one in range(4):
        inside, held = (fold != one).numpy(), (fold == one).numpy()
        truth = LogisticRegression(
            C=fitted.strengths[0],
            fit_intercept=False,
            tol=1e-10,
            max_iter=20_000,
            class_weight="balanced" if balanced else None,
        ).fit(turned[inside], labels[inside])
        said = truth.predict_proba(turned[held])
        if len(truth.classes_) == 2:  # scikit-learn penalises one vector, we one for each class
            said = two_vectors(
                turned[inside], labels[inside], fitted.strengths[0], turned[held], weight
            )
        np.testing.assert_allclose(fitted.held_out[0][held].numpy(), said, atol=2e-3)


def two_vectors(train, labels, strength, asked, weight):
    """Two classes with a vector each: as scikit-learn with half the penalty on their difference."""
    model = LogisticRegression(
        C=2 * strength,
        fit_intercept=False,
        tol=1e-10,
        max_iter=20_000,
        class_weight=None if weight == "none" else weight,
    )
    return model.fit(train, labels).predict_proba(asked)


def test_the_shipped_chip_is_fitted_on_all_labelled_texts():
    features, labels = drawn(120, 16, 3, seed=2)
    fold = torch.arange(120) % 5
    folded = sound(block_of(features, labels, 90, fold))
    alone = sound(block_of(features, labels, 90, None))
    assert alone.held_out is None
    assert alone.refit is not None
    if folded.strengths == alone.strengths:
        torch.testing.assert_close(folded.chip.weight, alone.refit.weight, atol=1e-3, rtol=1e-2)


def test_the_grid_goes_on_where_its_end_is_chosen():
    """Noise alone wants ever stronger penalties; texts that stand apart ever weaker ones."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 30, generator=random) + 3
    labels = torch.arange(200) % 2
    apart = noise + 40 * labels[:, None] * (torch.arange(30) == 0)
    ends = [sound(block_of(x, labels, 150, None)).strengths[0] for x in (noise, apart)]
    assert ends[0] < STRENGTHS[0]
    assert ends[1] > STRENGTHS[-1]
    for features, end in zip((noise, apart), ends, strict=True):
        block = block_of(features, labels, 150, None)
        verdicts = judge_of(block).ask(torch.tensor([[end, *STRENGTHS]]))
        losses = [float(verdict.losses[0]) for verdict in verdicts]
        assert losses[0] <= min(losses[1:]) + 1e-6


def test_no_fold_parts_what_belongs_together_and_classes_are_spread():
    texts = [f"text {i // 2}" if i % 2 else f"TEXT  {i // 2}" for i in range(60)]
    labels = np.arange(60) // 2 % 3
    groups = [str(i // 4) for i in range(60)]
    fold = fold_of(Examples(texts, None, labels), 5, seed=0)
    assert (fold[::2] == fold[1::2]).all()
    counts = np.array([np.bincount(labels[fold == one], minlength=3) for one in range(5)])
    assert counts.max() - counts.min() <= 2
    grouped = fold_of(Examples(texts, None, labels, groups), 5, seed=0)
    assert all(len(set(grouped[i : i + 4])) == 1 for i in range(0, 60, 4))
    tied = [*groups[:58], "0", "14"]  # one text in two groups ties them together
    fold = fold_of(Examples(texts, None, labels, tied), 5, seed=0)
    assert fold[0] == fold[56] == fold[58]


def test_scores_and_predictions_are_about_all_labelled_texts(
    tiny_backbone_folder, toy_csv, tmp_path
):
    """By default, where few validation texts were taken from the training rows."""
    options = {"poolings": ("mean",), "max_train": 60, "max_validation": 30}
    folded, folder = run(tmp_path, tiny_backbone_folder, toy_csv, name="folds", **options)
    plain, _ = run(tmp_path, tiny_backbone_folder, toy_csv, name="plain", folds=1, **options)
    cut = Cut(2, MEAN)
    assert (folded.folds, plain.folds) == (5, 1)
    assert folded.score_at(cut, "validation").n == 90
    assert plain.score_at(cut, "validation").n == 30
    assert folded.score_at(cut, "test").n == plain.score_at(cut, "test").n
    assert folded.refit
    found = folder.read_predictions()
    assert len(found.labels["validation"]) == 90
    for layer in range(4):
        right = found.at(Cut(layer, MEAN), "validation") == found.labels["validation"]
        score = folded.score_at(Cut(layer, MEAN), "validation")
        assert score.accuracy == pytest.approx(float(right.mean()))
    assert folded.controls_validation is not None
    assert not Chips({}).held_out


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"chips": ("linear", "mlp")}, "chips"),
        ({"preset": "published"}, "preset"),
        ({"repeats": 3}, "repeats"),
        ({"refit": False}, "refit"),
    ],
)
def test_folds_are_refused_where_there_are_none_and_left_out_where_nobody_asked(settings, field):
    config = RunConfig.checked(backbone="x", data="y", **cast(Any, settings))
    assert config.n_folds(n_validation=100, made=True) == 1
    asked = config.model_copy(update={"folds": 3})
    with pytest.raises(ConfigError, match="Folds are for linear chips") as caught:
        asked.n_folds(n_validation=100, made=True)
    assert field in caught.value.fields


def test_folds_come_by_themselves_for_few_texts_of_a_source_without_validation_split():
    config = RunConfig.checked(backbone="x", data="y")
    assert config.n_folds(n_validation=999, made=True) == 5
    assert config.n_folds(n_validation=1_000, made=True) == 1
    assert config.n_folds(n_validation=100, made=False) == 1
    assert config.model_copy(update={"folds": 3}).n_folds(n_validation=10**6, made=False) == 3
