"""What a bundle may have beside its chip, asked for on the Bundle page."""

import numpy as np
import pytest

from chipviz.config import CutSpec
from chipviz.results.exits import plan_exits
from chipviz.results.thresholds import choose_threshold
from chipviz.runs.store import Store
from tests.example_run import at as cut
from tests.example_run import finished_run
from tests.page_driver import button, open_page, text_of


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


def widget(widgets, key):
    return next(one for one in widgets if one.key == key)


def spec_built(at, store, run_id):
    button(at, "build").click().run()
    (bundle,) = store.bundles(run_id)
    return bundle.cut


def test_nothing_is_asked_for_unless_somebody_does(store):
    job = finished_run(store)
    at = open_page("bundle", run=job.run_id, cut="8", pooling="mean")
    found = spec_built(at, store, job.run_id)
    assert found == CutSpec.at(cut(8), found.rule)


def test_exits_and_weights_reach_the_build_and_are_shown_before(store):
    job = finished_run(store)
    at = open_page("bundle", run=job.run_id, cut="12", pooling="mean")
    widget(at.toggle, "bundle_exits").set_value(True).run()
    widget(at.number_input, "bundle_margin").set_value(3.0).run()
    widget(at.selectbox, "bundle_dtype").set_value("float16").run()
    plan = plan_exits(store.folder(job.run_id).read_predictions(), cut(12), 0.03)
    assert f"runs through {plan.test.mean_layers:.1f} of 13 layers" in text_of(at)
    (table,) = (one.value for one in at.dataframe if "layer" in one.value)
    assert table["layer"].tolist() == plan.layers
    found = spec_built(at, store, job.run_id)
    assert (found.exit_margin, found.dtype) == (0.03, "float16")
    assert found.cut == cut(12)


def test_a_threshold_is_offered_where_there_are_two_classes(store):
    several = finished_run(store)
    at = open_page("bundle", run=several.run_id, cut="8", pooling="mean")
    assert not [one for one in at.selectbox if one.key == "bundle_answer"]
    job = finished_run(store, label_names=["ham", "<b>spam"])
    folder = store.folder(job.run_id)
    said = folder.read_predictions()
    for values in [*said.labels.values(), *said.classes.values()]:
        np.minimum(values, 1, out=values)
    folder.write_predictions(said)
    at = open_page("bundle", run=job.run_id, cut="8", pooling="mean")
    widget(at.selectbox, "bundle_answer").set_value("false alarms").run()
    widget(at.number_input, "bundle_rate").set_value(10.0).run()
    chosen = choose_threshold(said, cut(8), "fpr=10%", ["ham", "<b>spam"], "<b>spam")
    shown = text_of(at).replace("\\", "")
    assert f"from a probability of {chosen.at:.4f} on" in shown
    found = spec_built(at, store, job.run_id)
    assert (found.threshold, found.positive) == ("fpr=10%", "<b>spam")


def test_a_run_of_an_older_version_says_what_it_lacks(store):
    job = finished_run(store)
    folder = store.folder(job.run_id)
    said = folder.read_predictions()
    said.temperatures.clear()
    folder.write_predictions(said)
    at = open_page("bundle", run=job.run_id, cut="8", pooling="mean")
    assert "need a run of this version" in text_of(at)
    assert not [one for one in at.toggle if one.key == "bundle_exits"]
