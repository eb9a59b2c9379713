"""Load: many sessions, long runs and huge tasks leave pages quick and messages small.

The letter and number in a test's name are those of the list that these tests go through.
"""

import numpy as np
import psutil
import pytest

from chipviz.keys import ChipKey, Cut
from chipviz.results.metrics import CurvePoint
from chipviz.runs.store import Store
from chipviz.ui import guard, result_tabs
from chipviz.ui.plots import curves, heatmaps
from tests.example_run import active_run, finished_run, points
from tests.here import answered_here
from tests.page_driver import html_of, open_page, open_tab, text_of
from tests.withstand.servers import Tab, serving

MESSAGE = 1_000_000
"""Bytes that no message to a browser may have."""
LONG = [f"class {i} " + "of a name that does not end " * 8 for i in range(1_000)]


def size_of(figure):
    return len(figure.to_json().encode())


def sizes(element):
    """Bytes of every part of a page."""
    children = getattr(element, "children", None)
    if children:
        for child in children.values():
            yield from sizes(child)
    elif hasattr(element, "proto") and element.proto is not None:
        yield element.proto.ByteSize()


def test_l4_a_curve_of_96_layers_200_steps_and_4_chips_is_a_small_message():
    chips = [ChipKey.sound(name) for name in ("last", "mean", "first", "max")]
    points = [
        CurvePoint(40 * step, Cut(layer, chip), 0.5 + layer / 300)
        for step in range(1, 201)
        for layer in range(96)
        for chip in chips
    ]
    assert size_of(curves.live_figure(points)) < 500 * 1024
    learning = curves.learning_figure(points, cut=Cut(5, chips[0]))
    assert size_of(learning) < 500 * 1024


def test_l4_a_coarse_map_of_a_thousand_classes_is_small_and_counts_every_text():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (1_000, 1_000))
    figure = heatmaps.coarse_confusion_figure(counts, LONG, subtitle="")
    assert size_of(figure) < MESSAGE
    drawn = np.asarray(figure.data[0].text, dtype=int)
    assert drawn.shape == (heatmaps.MAX_CLASSES, heatmaps.MAX_CLASSES)
    assert drawn.sum() == counts.sum()
    assert drawn[3, 7] == counts[60:80, 140:160].sum()


@pytest.mark.parametrize("n", [51, 77, 999])
def test_l4_a_coarse_map_counts_every_text_of_any_number_of_classes(n):
    counts = np.ones((n, n), dtype=int)
    figure = heatmaps.coarse_confusion_figure(counts, LONG[:n], subtitle="")
    assert np.asarray(figure.data[0].text, dtype=int).sum() == n * n


def test_l4_a_map_of_a_long_text_is_small_and_says_what_it_leaves_out():
    n_layers, n_tokens = 96, 8_000
    figure = heatmaps.token_map_figure(
        [f"token {t}" for t in range(n_tokens)],
        [[0] * n_tokens] * n_layers,
        [[0.5] * n_tokens] * n_layers,
        LONG,
        cut_layer=3,
        slots=[0] * len(LONG),
    )
    assert size_of(figure) < MESSAGE
    assert "the first 104 of 8,000 tokens" in figure.to_json()


def test_l4_no_page_of_a_huge_task_sends_a_large_message(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    store = Store(tmp_path)
    job = finished_run(store, label_names=LONG, text="a very long text " * 200_000)
    for page in ("runs", "train", "layers", "tokens", "bundle"):
        with answered_here():
            at = open_page(page, run=job.run_id)
        assert max(sizes(at.main)) < MESSAGE, page
    at = open_page("layers", run=job.run_id)
    for view in result_tabs.VIEWS:
        open_tab(at, view)
        assert max(sizes(at.main)) < MESSAGE, view
        assert not at.exception
    open_tab(at, "Confusion")
    assert "1,000 classes" in text_of(at).replace("\\", "")


def few(upto):
    """The states of a curve that are drawn while it grows: the first and the last two."""
    return [p for p in points(upto) if p.n_train in (80, upto - 80, upto)]


def test_l1_the_ends_of_a_curve_are_drawn_as_the_whole_of_it(tmp_path):
    store = Store(tmp_path)
    job = active_run(store)
    store.add_points(job.run_id, points(800))
    ends = store.points(job.run_id, ends_only=True)
    assert len(ends) == len(few(800))
    assert all(point in ends for point in few(800))
    whole = curves.live_figure(store.points(job.run_id))
    assert curves.live_figure(ends).to_json() == whole.to_json()


def test_l1_a_live_curve_is_drawn_once_a_state_for_all_who_watch(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    store = Store(tmp_path)
    job = active_run(store)
    drawn = []
    draw = curves.live_figure
    monkeypatch.setattr(
        curves,
        "live_figure",
        lambda points, **how: drawn.append(len(points)) or draw(points, **how),
    )
    for _ in range(2):
        at = open_page("train", run=job.run_id)
        at.run()
    store.add_points(job.run_id, points(400))
    at.run()
    assert drawn == [len(few(320)), len(few(400))]


def test_l1_a_point_that_is_replaced_changes_the_mark_of_its_curve(tmp_path):
    store = Store(tmp_path)
    job = active_run(store)
    mark = store.points_mark(job.run_id)
    assert mark[:2] == (len(points(320)), 320)
    first = points(320)[0]
    store.add_points(job.run_id, [first])
    assert store.points_mark(job.run_id) == mark
    store.add_points(job.run_id, [CurvePoint(first.n_train, first.cut, first.accuracy + 0.01)])
    assert store.points_mark(job.run_id) != mark


def test_l1_of_a_long_list_only_the_runs_at_work_tick(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    store = Store(tmp_path)
    finished_run(store)
    active_run(store)
    live = []
    ticking = guard.live
    monkeypatch.setattr(
        guard,
        "live",
        lambda view, every: live.append((view.__name__, every)) or ticking(view, every),
    )
    at = open_page("runs")
    assert len(set(live)) == 2
    assert {name for name, _ in live} == {"_watch", "_live_row"}
    assert html_of(at).count('class="cv-name"') == 2
    assert list(store.states().items()) == [(run.run_id, run.state) for run in store.runs()]


def test_l1_uploads_that_no_page_asked_for_are_not_read(tmp_path):
    with serving(tmp_path) as (port, process), Tab.open(port) as tab:
        (asked,) = tab.upload_addresses(1)
        unasked = f"/_stcore/upload_file/{tab.session_id}/00000000-0000-4000-8000-00000000000"
        server = psutil.Process(process.pid)
        before = server.memory_info().rss
        for i in range(8):
            assert tab.upload(f"{unasked}{i}", b"x" * (60 << 20)) == 403
        assert server.memory_info().rss - before < 60 << 20
        assert tab.upload(asked, b"text,label\n") == 204
