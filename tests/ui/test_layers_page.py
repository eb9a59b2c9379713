"""The page of the curve: cut, chip, rules, savings and the views below, without a browser."""

import csv
import io

import pytest

from chipviz.runs.model_client import Inference
from chipviz.runs.store import Store
from chipviz.ui import cut as cut_widgets
from chipviz.ui import cut_summary, result_tabs, state
from tests.example_run import active_run, finished_run, report_of, token_reading
from tests.example_run import at as cut
from tests.page_driver import button, html_of, open_page, open_tab, text_of

REPORT = report_of("20261121-235959-4f2a")
CHIPS = [cut(0, *named).chip for named in (("last",), ("mean",), ("mean", "mlp"), ("max",))]
PUBLISHED = [cut(0, *named).chip for named in (("last",), ("raw",), ("raw", "mlp"))]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", ["layers", "tokens", "bundle"])
@pytest.mark.parametrize("run", ["20990101-000000-ffff", "../../etc", "<script>alert(1)</script>"])
def test_an_unknown_run_in_the_address_is_a_friendly_word(name, run):
    at = open_page(name, run=run)
    assert len(at.error) == 1


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", ["layers", "tokens", "bundle"])
def test_pages_of_a_result_say_what_to_do_first_when_there_is_none(name):
    assert "No finished run yet" in text_of(open_page(name))


def test_a_run_still_at_work_points_to_its_live_view(store):
    job = active_run(store)
    assert "still at work" in text_of(open_page("layers", run=job.run_id))


def test_layers_opens_at_the_cut_of_rule_within_and_says_so_in_the_address(store):
    job = finished_run(store)
    at = open_page("layers", run=job.run_id)
    best = store.report(job.run_id).selection["within"]
    assert at.slider(key="cut").value == best.cut_layer
    assert at.query_params["cut"] == str(best.cut_layer)
    assert at.query_params["pooling"] == best.pooling


def test_layers_that_cannot_be_cut_after_are_not_offered(store):
    job = finished_run(store)
    folder = store.folder(job.run_id)
    report = folder.read_report()
    no_cut = dict.fromkeys(range(12), "it wants an attention layer")
    backbone = report.backbone.model_copy(update={"no_cut": no_cut})
    report = report.model_copy(update={"backbone": backbone})
    chosen = report.choices(folder.read_predictions().correct)
    folder.write_report(report.model_copy(update={"selection": chosen}))
    at = open_page("layers", run=job.run_id, cut="3")
    assert not at.exception
    slider = at.select_slider(key="cut")
    assert slider.options == [str(layer) for layer in range(12, 30)]
    slider.set_value(14).run()
    assert at.query_params["cut"] == "14"


@pytest.mark.parametrize("bad", ["999", "abc", "<script>", "-1", "", "1e3", "٣"])
def test_a_bad_cut_in_the_address_falls_back_to_the_recommended_one(store, bad):
    job = finished_run(store)
    at = open_page("layers", run=job.run_id, cut=bad)
    assert at.slider(key="cut").value == store.report(job.run_id).selection["within"].cut_layer


def test_slider_savings_stack_figure_and_address_stay_in_step(store):
    job = finished_run(store)
    at = open_page("layers", run=job.run_id, cut="20", pooling="last")
    assert at.slider(key="cut").value == 20
    at.slider(key="cut").set_value(12).run()
    cost = store.report(job.run_id).cost_at(cut(12, "last"))
    page = html_of(at)
    assert at.query_params["cut"] == "12"
    assert 'Cut at layer <span class="cv-accent">12</span> of 30' in page
    assert "13 of 30 layers kept, 17 removed" in page
    assert f"{cost.n_parameters / 1e6:,.1f} M of 134.5 M" in page
    assert f"{100 * cost.layer_ratio:.1f} %" in page
    assert f"{100 * cost.parameter_ratio:.1f} %" in page
    assert "cut at layer 12" in at.get("plotly_chart")[0].proto.spec


def test_a_rule_button_sets_layer_and_pooling(store):
    job = finished_run(store)
    at = open_page("layers", run=job.run_id, cut="3", pooling="last")
    button(at, "rule_fixed").click().run()
    fixed = store.report(job.run_id).selection["fixed"]
    assert at.slider(key="cut").value == fixed.cut_layer
    assert at.query_params["pooling"] == fixed.pooling
    assert cut_widgets.sentence(fixed.why) in text_of(at).replace("\\", "")


def test_each_rule_has_a_button_with_its_sentence_and_the_oracle_has_none(store):
    job = finished_run(store, chips=CHIPS)
    at = open_page("layers", run=job.run_id)
    rules = {b.key.removeprefix("rule_"): b for b in at.button if b.key.startswith("rule_")}
    assert list(rules) == ["validate", "within", "non-inferior", "elbow", "budget", "fixed"]
    for name, shown in rules.items():
        choice = store.report(job.run_id).selection[name]
        assert f": layer {choice.cut_layer}, " in shown.label
        assert shown.help.replace("\\", "") == cut_widgets.sentence(choice.why)
    oracle = store.report(job.run_id).selection["oracle"]
    said = text_of(at).replace("\\", "")
    assert f"Oracle: layer {oracle.cut_layer}, {oracle.pooling}" in said
    assert "Chosen on test, for comparison only." in said


def test_a_cut_that_only_the_oracle_says_is_a_choice_by_hand():
    choices = dict(REPORT.selection)
    choices["oracle"] = choices["oracle"].model_copy(update={"cut_layer": 3})
    report = REPORT.model_copy(update={"selection": choices})
    there = cut(3, choices["oracle"].pooling)
    assert cut_widgets.rule_of(report, there) == "manual"
    assert cut_widgets.why(report, there) == "Chosen by hand."


def test_the_first_rule_says_why_and_the_others_at_the_cut_are_named():
    best = REPORT.selection["validate"]
    says = cut_widgets.why(REPORT, best.cut)
    assert says.startswith(cut_widgets.sentence(best.why))
    assert says.endswith("Same cut by Not worse and Elbow and Half the size.")
    assert cut_widgets.rule_of(REPORT, best.cut) == "validate"


def test_the_kind_of_chip_stands_in_the_address_and_linear_needs_no_word(store):
    job = finished_run(store, chips=CHIPS)
    at = open_page("layers", run=job.run_id, cut="12", pooling="mean", chip="mlp")
    choice = next(c for c in at.get("button_group") if c.key == "chip")
    assert choice.value == "mean, MLP"
    assert (at.query_params["pooling"], at.query_params["chip"]) == ("mean", "mlp")
    report = store.report(job.run_id)
    mlp = report.score_at(cut(12, "mean", "mlp"), "test")
    linear = report.score_at(cut(12), "test")
    assert mlp.accuracy != linear.accuracy
    assert f"<b>{100 * mlp.accuracy:.1f} %</b><span>test" in html_of(at)
    choice.set_value("max").run()
    assert at.query_params["pooling"] == "max"
    assert "chip" not in at.query_params
    assert at.slider(key="cut").value == 12
    assert f"{100 * report.score_at(cut(12, 'max'), 'test').accuracy:.1f} %" in html_of(at)


def test_one_chip_needs_no_choice_and_many_are_a_list(store):
    one = finished_run(store, chips=CHIPS[:1])
    at = open_page("layers", run=one.run_id)
    assert not [c for c in at.get("button_group") if c.key == "chip"]
    assert button(at, "rule_fixed").label == "Fixed 5/8: layer 19"
    at.slider(key="cut").set_value(5).run()
    assert (at.query_params["cut"], at.query_params["pooling"]) == ("5", "last")
    many = finished_run(store, chips=PUBLISHED)
    at = open_page("layers", run=many.run_id, cut="4")
    at.selectbox(key="chip").set_value("raw, MLP, as published").run()
    assert (at.query_params["pooling"], at.query_params["chip"]) == ("raw", "mlp")
    assert at.slider(key="cut").value == 4


def test_measured_time_and_memory_stand_with_how_they_were_measured(store):
    job = finished_run(store)
    page = open_page("layers", run=job.run_id, cut="12", pooling="last")
    assert "<b>2.5x faster</b><span>65 ms → 26 ms</span>" in html_of(page)
    assert "of 277 MB peak memory" in html_of(page)
    assert "1 text of 64 tokens, median of 5, on cpu in bfloat16" in text_of(page)


def test_what_was_not_measured_is_not_shown():
    bare = REPORT.model_copy(
        update={
            "dense": REPORT.dense.model_copy(update={"latency_s": None, "peak_bytes": None}),
            "costs": [
                c.model_copy(update={"latency_s": None, "peak_bytes": None}) for c in REPORT.costs
            ],
        }
    )
    shown = str(cut_summary.savings(bare, cut(12, "last")))
    assert "faster" not in shown
    assert "peak" not in shown
    assert "layer ratio" in shown
    assert "parameter ratio" in shown


def test_parts_at_the_cut_sum_to_the_published_model_and_the_cut_one():
    assert REPORT.parts
    there = cut(12, "last")
    rows = {
        words: int(count.replace(",", "")) for count, words in cut_summary.by_part(REPORT, there)
    }
    kept = sum(count for words, count in rows.items() if not words.endswith("removed"))
    chip = next(count for words, count in rows.items() if words.endswith("added"))
    assert sum(rows.values()) - chip == REPORT.backbone.n_parameters
    assert kept == REPORT.cost_at(cut(12, "last")).n_parameters


def test_the_table_as_csv_reads_back_as_the_scores():
    report = report_of("20261121-235959-4f2b", chips=CHIPS, n_again=2)
    rows = list(csv.DictReader(io.StringIO(result_tabs.scores_csv(report.scores))))
    assert len(rows) == len(report.scores)
    for row, score in zip(rows, report.scores, strict=True):
        assert (int(row["layer"]), row["pooling"], row["chip"], row["split"]) == (
            *(score.layer, score.pooling, score.chip, score.split),
        )
        assert float(row["ece_high"]) == score.ece_high
        assert tuple(map(float, row["repeats"].split())) == score.repeats


def test_a_chip_fitted_once_has_no_learning_curve_and_says_so(store):
    job = finished_run(store, chips=CHIPS)
    drawn = open_page("layers", run=job.run_id, cut="8", pooling="mean")
    open_tab(drawn, "Learning curve")
    assert "How many texts the chip needs: mean" in str(
        [c.proto.spec for c in drawn.get("plotly_chart")]
    )
    once = open_page("layers", run=job.run_id, cut="8", pooling="mean", chip="mlp")
    open_tab(once, "Learning curve")
    assert "fitted once" in text_of(once)
    assert len(once.get("plotly_chart")) == len(drawn.get("plotly_chart")) - 1


RULES = ("validate", "within", "non-inferior", "elbow", "budget", "fixed")


def test_a_table_shows_what_each_rule_trades_before_any_click(store):
    job = finished_run(store)
    report = store.report(job.run_id)
    page = html_of(open_page("layers", run=job.run_id))
    table = page[page.index('<div class="cv-rules">') :]
    rows = table[: table.index("</table>")].split("<tr")[2:]
    assert "(recommended)" in rows[0]
    assert len(rows) == 6
    predictions = store.folder(job.run_id).read_predictions()
    labels = predictions.labels["validation"]
    best = report.selection["validate"].cut
    for row, rule in zip(rows, ["within", "validate", *list(RULES)[2:]], strict=True):
        chosen = report.selection[rule]
        cost, score = report.cost_at(chosen.cut), report.score_at(chosen.cut, "validation")
        assert f"<td>{chosen.cut_layer}, " in row
        assert f"{100 * score.accuracy:.1f} % (" in row
        assert f"<td>{100 * cost.n_parameters / report.dense.n_parameters:.0f} %</td>" in row
        assert f"{report.dense.latency_s / cost.latency_s:.1f} x" in row
        if chosen.cut == best:
            assert "<td>best</td>" in row
            continue
        gap = (predictions.at(chosen.cut, "validation") == labels).mean()
        gap -= (predictions.at(best, "validation") == labels).mean()
        assert f"<td>{100 * gap:+.1f} (" in row


def test_the_cut_follows_to_the_other_pages_and_back(store, monkeypatch):
    monkeypatch.setattr(
        Inference, "ask", lambda _self, q, _kind: token_reading(q.text, q.cut.layer)
    )
    job = finished_run(store)
    at = open_page("layers", run=job.run_id)
    at.slider(key="cut").set_value(15).run()
    for page in ("tokens", "bundle", "layers"):
        at.switch_page(f"../../pages/{page}.py").run()
        assert not at.exception
        assert at.slider(key="cut").value == 15
        assert at.query_params["cut"] == "15"


def test_each_run_keeps_its_own_cut(store):
    one, two = finished_run(store), finished_run(store)
    at = open_page("layers", run=one.run_id)
    at.slider(key="cut").set_value(15).run()
    at.query_params.clear()
    at.query_params["run"] = two.run_id
    at.run()
    assert at.slider(key="cut").value == store.report(two.run_id).selection["within"].cut_layer
    at.query_params.clear()
    at.query_params["run"] = one.run_id
    at.run()
    assert at.slider(key="cut").value == 15


def test_an_address_names_a_cut_or_the_kept_one_fills_in():
    kept = cut(8, "mean")
    assert state.parse_cut({"cut": "20", "pooling": "last"}, REPORT, kept) == cut(20, "last")
    assert state.parse_cut({"cut": "20"}, REPORT, kept) == cut(20, "mean")
    assert state.parse_cut({"pooling": "last", "cut": "99"}, REPORT, kept) == cut(8, "last")
    assert state.parse_cut({"pooling": "max"}, REPORT, kept) is None
    assert state.parse_cut({"pooling": "mean", "chip": "mlp"}, REPORT, kept) is None
    assert state.parse_cut({}, REPORT, kept) is None


def test_an_address_without_a_kind_of_chip_means_linear():
    report = report_of("20261121-235959-4f2b", chips=CHIPS)
    kept = cut(8, "mean", "mlp")
    assert state.parse_cut({"pooling": "mean"}, report, kept) == cut(8, "mean")
    assert state.parse_cut({"cut": "20"}, report, kept) == cut(20, "mean", "mlp")
    assert state.parse_cut({"chip": "linear"}, report, kept) == cut(8, "mean")
    assert state.parse_cut({"pooling": "max", "chip": "mlp"}, report, kept) is None


def test_loss_is_called_unmeasurable_only_inside_the_interval_of_the_best(store):
    job = finished_run(store)
    near = text_of(open_page("layers", run=job.run_id, cut="7", pooling="mean"))
    far = text_of(open_page("layers", run=job.run_id, cut="5", pooling="mean"))
    best, here = (store.report(job.run_id).score_at(cut(layer), "test") for layer in (8, 5))
    assert here.accuracy < best.accuracy_low < here.accuracy_high
    assert "No measurable loss" in near
    assert "No measurable loss" not in far
    assert "points below the best chip" in far


def test_mistakes_and_confusion_come_from_the_chip_at_the_cut(store):
    job = finished_run(store)
    at = open_page("layers", run=job.run_id, cut="0", pooling="last")
    open_tab(at, "What the cut gets wrong")
    mistakes = next(frame.value for frame in at.dataframe if "truth" in frame.value)
    assert len(mistakes) == 50
    assert (mistakes["truth"] != mistakes["the chip says"]).all()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_mistakes_are_counted_for_the_kind_of_chip_at_the_cut(store, kind):
    job = finished_run(store, chips=CHIPS)
    found = store.folder(job.run_id).read_predictions()
    wrong = (found.at(cut(3, "mean", kind), "test") != found.labels["test"]).sum()
    other = {"linear": "mlp", "mlp": "linear"}[kind]
    assert wrong != (found.at(cut(3, "mean", other), "test") != found.labels["test"]).sum()
    at = open_page("layers", run=job.run_id, cut="3", pooling="mean", chip=kind)
    open_tab(at, "What the cut gets wrong")
    assert f"{wrong} of 400 test texts" in text_of(at)


def test_only_the_open_view_is_drawn(store):
    """A moved slider waits for the curve and one view, not for five."""
    job = finished_run(store)
    at = open_page("layers", run=job.run_id)
    assert len(at.get("plotly_chart")) == 2
    assert not at.dataframe
    open_tab(at, "Table")
    assert len(at.get("plotly_chart")) == 1
    assert len(at.dataframe) == 1
