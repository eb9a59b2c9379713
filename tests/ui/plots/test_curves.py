import json
from itertools import pairwise

import numpy as np
import pytest

from chipviz.keys import ChipKey, Cut
from chipviz.ui.plots import curves, heatmaps
from chipviz.ui.plots.theme import CLASS_COLOURS, DARK, DASHES, SERIES, spread, tint
from tests.example_run import (
    CHIPS,
    DENSE,
    LABELS,
    LAYERS,
    accuracy_of,
    at,
    last_points,
    points,
    report_of,
)

REPORT = report_of("20261121-235959-4f2a")
MANY_CHIPS = [
    ChipKey.named(pooling, kind)
    for pooling in ("last", "mean", "first", "max", "raw")
    for kind in ("linear", "mlp")
]
MANY = report_of("20261121-235959-4f2b", chips=MANY_CHIPS, n_again=4)


def _trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def _lines(figure):
    return [trace for trace in figure.data if trace.customdata is not None]


def _opacity(colour):
    return float(colour.rstrip(")").rsplit(",", 1)[1])


def _texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


@pytest.mark.parametrize("key", CHIPS)
def test_the_curve_shows_every_layers_validation_accuracy_in_percent(key):
    figure = curves.curve_figure(REPORT, cut=at(8))
    line = _trace(figure, key.pooling)
    truth = [round(200 * accuracy_of(layer, key)) / 2 for layer in range(LAYERS)]
    assert list(line.x) == list(range(LAYERS))
    assert list(line.y) == pytest.approx(truth)
    assert line.line.color == SERIES[key.vector]
    assert line.marker.size == 9


def test_a_point_names_its_layer_and_chip_and_picked_reads_it_back():
    for figure in (
        curves.curve_figure(MANY, cut=at(8)),
        curves.size_figure(MANY, cut=at(8)),
    ):
        hits = [curves.picked([{"customdata": t.customdata[21]}]) for t in _lines(figure)]
        assert set(hits) == {Cut(21, key) for key in MANY_CHIPS}
    assert curves.picked([]) is None
    assert curves.picked([{"x": 3, "y": 4}]) is None
    assert curves.picked([{"customdata": [3, "nonsense", "linear"]}]) is None
    assert curves.picked([{"customdata": [3, "mean", "nonsense"]}]) is None
    assert curves.picked([{"customdata": [3, "mean"]}]) is None


def test_each_chip_has_its_own_colour_and_dash():
    lines = _lines(curves.curve_figure(MANY, cut=at(8)))
    assert len(lines) == len({(t.line.color, t.line.dash) for t in lines}) == 10
    for line in lines:
        key = ChipKey.named(*line.customdata[0][1:])
        assert (line.line.color, line.line.dash) == (SERIES[key.vector], DASHES[key.kind])
        truth = MANY.score_at(Cut(17, key), "validation")
        assert line.y[17] == pytest.approx(100 * truth.accuracy)


def test_what_the_paper_published_is_called_so_and_the_preset_is_named():
    figure = curves.curve_figure(MANY, cut=at(8))
    published = {t.name for t in _lines(figure) if t.customdata[0][1] == "raw"}
    assert published == {"raw, as published", "raw, MLP, as published"}
    assert all("as published" in text for text in _trace(figure, "raw, as published").text)
    assert "preset sound, beside it as published" in figure.layout.title.subtitle.text
    ends = [text for text in _texts(figure) if "published" in text]
    assert len(ends) == 2
    alone = curves.curve_figure(REPORT, cut=at(8))
    assert "published" not in json.dumps(json.loads(alone.to_json()))


def test_of_many_curves_only_the_chip_at_the_cut_is_strong_and_banded():
    figure = curves.curve_figure(MANY, cut=at(8, "max", "mlp"))
    assert [t.name for t in _lines(figure) if t.opacity == 1] == ["max, MLP"]
    assert [t.name for t in figure.data if t.fill] == [
        "max, MLP, 95 % interval",
        "max, MLP, 5 fits",
    ]
    both = curves.curve_figure(REPORT, cut=at(8))
    assert [t.opacity for t in _lines(both)] == [1, 1]


@pytest.mark.parametrize("report", [REPORT, MANY], ids=["two", "ten"])
def test_no_two_labels_at_the_ends_of_lines_overlap(report):
    figure = curves.curve_figure(report, cut=at(8))
    low, high = figure.layout.yaxis.range
    places = sorted(a.y for a in figure.layout.annotations if a.xanchor == "left" and a.y)
    plot = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    assert len(places) == len(_lines(figure)) + 4
    assert low < places[0] < places[-1] < high
    gaps = [(b - a) / (high - low) * plot for a, b in pairwise(places)]
    assert min(gaps) >= 14.5


def test_several_fits_span_a_stronger_band_that_is_labelled():
    figure = curves.curve_figure(MANY, cut=at(8))
    score = MANY.score_at(at(8), "validation")
    band = _trace(figure, "mean, 5 fits")
    assert band.y[8] == pytest.approx(100 * max(score.accuracy, *score.repeats))
    assert list(reversed(band.y))[8] == pytest.approx(100 * min(score.accuracy, *score.repeats))
    pale = _trace(figure, "mean, 95 % interval")
    assert _opacity(band.fillcolor) > 2 * _opacity(pale.fillcolor)
    assert "spread of 5 fits" in figure.layout.title.subtitle.text
    assert "5 fits 94.3-97.1" in _trace(figure, "mean").text[8]
    once = curves.curve_figure(REPORT, cut=at(8))
    assert "fits" not in once.layout.title.subtitle.text
    assert not [t for t in once.data if "fits" in (t.name or "")]


def test_the_band_is_the_interval_of_the_scores():
    figure = curves.curve_figure(REPORT, cut=at(8))
    band = _trace(figure, "mean, 95 % interval")
    score = REPORT.score_at(at(8), "validation")
    assert band.y[8] == pytest.approx(100 * score.accuracy_high)
    assert list(reversed(band.y))[8] == pytest.approx(100 * score.accuracy_low)
    assert band.fillcolor.endswith("0.15)")


def test_everything_right_of_the_cut_is_washed_out():
    figure = curves.curve_figure(REPORT, cut=at(12, "last"))
    box = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (box.x0, box.opacity) == (12.5, 0.65)
    assert box.x1 >= LAYERS - 1
    ring = _trace(figure, "the cut")
    assert ring.x[0] == 12
    assert ring.y[0] == pytest.approx(100 * accuracy_of(12, at(12, "last").chip), abs=0.3)
    assert "<b>cut at layer 12</b>" in _texts(figure)


def test_controls_and_both_line_ends_are_named():
    said = " ".join(_texts(curves.curve_figure(REPORT, cut=at(8))))
    for words in ("majority 22.5", "embedding 89.5", "TF-IDF 94.5", "last layer 93.5"):
        assert words in said
    assert "<b>last</b>" in said
    assert "<b>mean</b>" in said


def test_the_top_axis_says_the_share_of_parameters_kept():
    axis = curves.curve_figure(REPORT, cut=at(8)).layout.xaxis2
    layer = axis.tickvals[1]
    kept = 100 * REPORT.cost_at(at(layer)).n_parameters / DENSE
    assert axis.ticktext[1] == f"{kept:.0f}"
    assert axis.title.text == "parameters kept, %"


def test_the_subtitle_says_split_n_and_preset():
    title = curves.curve_figure(REPORT, cut=at(8)).layout.title
    assert title.subtitle.text.startswith("validation, n = 200, preset sound")


def test_the_growing_curve_keeps_its_axes_and_one_ghost_of_the_state_before():
    early, late = curves.live_figure(points(160), total=800), curves.live_figure(points(640))
    assert early.layout.xaxis.range == late.layout.xaxis.range
    assert early.layout.yaxis.range == late.layout.yaxis.range
    assert early.layout.title.subtitle.text == "validation, after 160 of 800 texts"
    ghosts = [trace for trace in late.data if trace.opacity < 0.5]
    assert [trace.name for trace in ghosts] == ["last, after 560 texts", "mean, after 560 texts"]
    assert len(late.data) == 4


def test_chips_that_are_fitted_at_the_end_join_the_growing_curve():
    cuts = (at(0), at(0, "mean", "mlp"), at(0, "raw"))
    chips = [cut.chip for cut in cuts]
    late = [point for point in points() if point.n_train > 600]
    figure = curves.live_figure(late + last_points(chips))
    now = {t.name: t for t in figure.data if t.opacity == 1}
    assert set(now) == {
        f"{name}, after 800 texts" for name in ("last", "mean", "mean, MLP", "raw, as published")
    }
    assert now["mean, MLP, after 800 texts"].line.dash == "dash"
    raw = now["raw, as published, after 800 texts"]
    assert raw.y[3] == pytest.approx(100 * accuracy_of(3, at(3, "raw").chip))
    assert min(raw.y) > figure.layout.yaxis.range[0]


def test_the_growing_curve_is_equal_while_no_new_point_exists():
    assert curves.live_figure(points(320)) == curves.live_figure(points(320))
    assert "waiting" in curves.live_figure([]).layout.title.subtitle.text


def test_accuracy_against_size_has_the_parameters_of_each_cut_on_x():
    figure = curves.size_figure(REPORT, cut=at(8))
    kept = [100 * REPORT.cost_at(at(layer)).n_parameters / DENSE for layer in range(LAYERS)]
    assert list(_trace(figure, "mean").x) == pytest.approx(kept)
    assert _trace(figure, "the cut").x[0] == pytest.approx(kept[8])


def test_the_learning_curve_is_the_history_of_the_cut_layer():
    figure = curves.learning_figure(points(), cut=at(8))
    assert [trace.name for trace in figure.data] == ["mean, layer 29", "mean, layer 8"]
    line = _trace(figure, "mean, layer 8")
    assert list(line.x) == list(range(80, 801, 80))
    truth = [100 * (accuracy_of(8, at(8).chip) - 20 / n) for n in line.x]
    assert list(line.y) == pytest.approx(truth)


def test_confusion_shows_counts_by_true_row_and_predicted_column():
    counts = np.array([[8, 2], [1, 9]])
    figure = heatmaps.confusion_figure(counts, ["a", "b"], subtitle="test")
    heat = figure.data[0]
    assert np.array_equal(heat.text, counts)
    assert heat.z[0][1] == pytest.approx(0.2)
    assert heat.customdata[0][1] == "a read as b"


def test_text_from_data_never_becomes_a_tag_in_a_figure():
    evil = "<img src=x onerror=alert(1)>"
    confusion = heatmaps.confusion_figure(np.eye(2, dtype=int), [evil, "b"], subtitle="t")
    tokens = heatmaps.token_map_figure([evil], [[0]], [[0.5]], [evil], cut_layer=0, slots=[0])
    named = REPORT.model_copy(update={"task": REPORT.task.model_copy(update={"name": evil})})
    curve = curves.curve_figure(named, cut=at(8))
    for figure in (confusion, tokens, curve):
        assert "<img" not in json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


def test_the_token_map_codes_class_by_colour_and_confidence_by_strength():
    figure = heatmaps.token_map_figure(
        ["a", "b"],
        [[0, 3], [1, 1]],
        [[0.2, 0.9], [1.0, 0.0]],
        LABELS,
        cut_layer=0,
        slots=heatmaps.class_slots(5, answer=0, truth=None),
        look=DARK,
    )
    heat = figure.data[0]
    assert np.allclose(heat.z, [[0.2, 3.9], [1.999, 1.0]])
    assert heat.zmax == len(CLASS_COLOURS)
    assert heat.text[0][1] == "layer 0 - b - sport 90 %"
    assert any(shape.y0 == 0.5 for shape in figure.layout.shapes)


def test_more_than_eight_classes_are_right_wrong_and_other():
    slots = heatmaps.class_slots(20, answer=3, truth=5)
    assert (slots[5], slots[3], slots[0]) == (2, 5, 7)
    assert heatmaps.class_slots(20, answer=3, truth=None)[3] == 2
    assert heatmaps.class_slots(8, answer=3, truth=5) == list(range(8))


def test_labels_are_spread_and_tints_grow_with_confidence():
    assert spread([90.0, 91.0, 20.0], gap=4, low=0, high=100) == [88.5, 92.5, 20.0]
    crowd = sorted(spread([94.0, 94.0, 93.0, 90.0, 50.0], gap=3, low=0, high=100))
    assert all(b - a >= 3 - 1e-9 for a, b in pairwise(crowd))
    assert spread([99.0, 99.5, 100.0], gap=4, low=0, high=100) == [92.0, 96.0, 100.0]
    assert spread([0.0, 1.0, 50.0], gap=4, low=0, high=100) == [0.0, 4.0, 50.0]
    tight = spread([50.0] * 5, gap=40, low=0, high=100)
    assert tight == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert tint("#000000", 0.0) > tint("#000000", 0.5) > tint("#000000", 1.0)
