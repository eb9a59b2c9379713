"""Every page without a browser: empty, normal, broken, and one thing a person does on it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chipviz import config
from chipviz.config import RunConfig
from chipviz.errors import ConfigError, JobError
from chipviz.progress import Progress
from chipviz.results.answers import Prediction
from chipviz.runs.model_client import Inference
from chipviz.runs.questions import Predict, TablePart
from chipviz.runs.store import Store
from chipviz.ui import formatting, token_view, uploads
from tests.example_run import (
    EVIL,
    LABELS,
    active_run,
    built_bundle,
    finished_run,
    token_reading,
)
from tests.example_run import at as cut
from tests.page_driver import ROOT, button, html_of, open_page, text_of

CHIPS = [cut(0, *named).chip for named in (("last",), ("mean",), ("mean", "mlp"), ("max",))]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


@pytest.fixture
def asked(monkeypatch):
    """Requests that reached the inference process, which answers at once."""
    requests = []

    def answer(_self, question, _kind):
        requests.append(question)
        if question.op == "predict":
            shares = dict(zip(LABELS, [0.9, 0.04, 0.03, 0.02, 0.01], strict=True))
            return [Prediction("business", 0.9, shares)]
        return token_reading(question.text, question.cut.layer)

    monkeypatch.setattr(Inference, "ask", answer)
    return requests


# home


@pytest.mark.usefixtures("store")
def test_an_empty_home_says_what_to_do_first():
    at = open_page("runs")
    assert "No runs yet" in text_of(at)
    assert button(at, "try_it").label.startswith("Try it: BBC news on SmolLM2")


def test_the_example_button_queues_exactly_the_embedded_example(store):
    at = open_page("runs")
    button(at, "try_it").click().run()
    (job,) = store.runs()
    assert job.state == "queued"
    assert job.config == RunConfig.checked(**config.EXAMPLE)


def test_home_lists_each_run_with_status_accuracy_and_savings(store):
    done = finished_run(store)
    active_run(store)
    page = html_of(open_page("runs"))
    best = store.report(done.run_id).selection["within"]
    assert f"{100 * best.test_accuracy:.1f} % at layer {best.cut_layer} of 30" in page
    assert "58 % fewer parameters" in page
    assert "extracting 37 %" in page
    assert "1,940 tokens/s · 0:18 left" in page
    assert "best so far 89.5 %" in page


def test_a_run_is_deleted_only_after_the_question(store):
    job = finished_run(store)
    at = open_page("runs")
    assert store.runs()
    button(at, f"delete_{job.run_id}").click().run()
    assert store.runs() == []
    assert not store.folder(job.run_id).path.exists()


def test_an_interrupted_run_offers_resume_and_is_queued_again(store):
    job = active_run(store)
    store.finish(job.job_id, "interrupted", message="gone")
    at = open_page("runs")
    assert "interrupted at 37 %" in html_of(at)
    button(at, f"resume_{job.run_id}").click().run()
    assert store.get(job.job_id).state == "queued"


# train


def test_the_form_starts_the_run_it_describes(store):
    at = open_page("train")
    at.text_area(key="template_True").set_value("{text}\nTopic:")
    at.number_input(key="max_train_True").set_value(100)
    at.run()
    button(at, "start").click().run()
    (job,) = store.runs()
    assert job.config.template == "{text}\nTopic:"
    assert job.config.max_train == 100
    assert job.config.backbone == "smollm2-135m"


def test_options_of_the_form_reach_the_run(store):
    at = open_page("train")
    at.multiselect(key="poolings").set_value(["first", "max"])
    at.multiselect(key="chips").set_value(["linear", "mlp"])
    next(c for c in at.get("button_group") if c.key == "preset").set_value("published")
    at.toggle(key="balanced").set_value(True)
    at.number_input(key="repeats").set_value(5)
    at.toggle(key="spread").set_value(True)
    at.run()
    button(at, "start").click().run()
    (job,) = store.runs()
    assert [v.name for v in job.config.vectors] == ["raw", "first", "max"]
    assert job.config.chips == ("linear", "mlp")
    assert (job.config.class_weight, job.config.repeats) == ("balanced", 5)
    assert job.config.device_map == "auto"


def test_the_form_left_alone_asks_for_the_embedded_example(store):
    at = open_page("train")
    said = text_of(at)
    assert "draws the validation rows from the evaluation split" in said
    assert "picks the best layer on the test texts" in said
    button(at, "start").click().run()
    (job,) = store.runs()
    assert job.config == RunConfig.checked(**config.EXAMPLE)


def test_a_wrong_setting_is_said_in_words_and_starts_nothing(store):
    at = open_page("train")
    at.multiselect(key="chips").set_value([]).run()
    assert button(at, "start").disabled
    assert "name at least one" in text_of(at).replace("\\", "")
    assert store.runs() == []


def test_the_live_view_shows_stage_pace_curve_and_stops_the_run(store):
    job = active_run(store)
    at = open_page("train", run=job.run_id)
    assert "reading 520 of 1,400 texts" in html_of(at)
    assert "after 320 of 800 texts" in at.get("plotly_chart")[0].proto.spec
    button(at, "stop_run").click().run()
    assert store.get(job.job_id).stop_requested or store.get(job.job_id).state != "extracting"


def test_a_failed_run_says_why_and_what_to_do(store):
    job = active_run(store)
    store.finish(job.job_id, "failed", message="No column 'label'.", hint="Name it *here*.")
    said = text_of(open_page("train", run=job.run_id)).replace("\\", "")
    assert "No column 'label'." in said
    assert "Name it *here*." in said


@pytest.mark.parametrize("ending", ["stopped", "interrupted"])
def test_a_run_that_ended_early_keeps_its_curve_and_offers_resume(store, ending):
    job = active_run(store)
    store.finish(job.job_id, ending)
    at = open_page("train", run=job.run_id)
    assert "resume goes on" in text_of(at)
    assert at.get("plotly_chart")
    assert button(at, "resume_run")


def test_a_run_without_a_heartbeat_is_called_stalled(store):
    job = active_run(store)
    store.move(job.job_id, expect={"extracting"}, to="extracting", heartbeat=1.0)
    assert "Stalled" in text_of(open_page("train", run=job.run_id))


def test_an_upload_gets_a_made_up_name_and_the_same_content_the_same_one(tmp_path):
    first = uploads.save(tmp_path, "../../My Reviews!.CSV", b"text,label\n")
    again = uploads.save(tmp_path, "../../My Reviews!.CSV", b"text,label\n")
    assert first == again
    assert first.parent == tmp_path / "data" / "uploads"
    assert re.fullmatch(r"my-reviews-[0-9a-f]{16}\.csv", first.name)
    assert first.read_bytes() == b"text,label\n"
    with pytest.raises(ConfigError, match="is not one of csv"):
        uploads.save(tmp_path, "model.pkl", b"")


# tokens


def test_the_first_test_text_is_shown_on_class_tints_with_its_label(store, asked):
    job = finished_run(store)
    at = open_page("tokens", run=job.run_id)
    page = html_of(at)
    assert asked[0].text.startswith("Shares rose")
    assert re.search(r'class="cv-t cv-c0-\d" title="business \d+ %">Shares<', page)
    assert "business</span>80.0 %, which is right" in page
    assert 'Settled at layer <span class="cv-accent">7</span>' in page


def test_the_words_are_asked_of_the_chip_at_the_cut(store, asked):
    job = finished_run(store, chips=CHIPS)
    open_page("tokens", run=job.run_id, cut="4", pooling="mean", chip="mlp")
    assert asked[0].cut.chip.name == "mlp.mean"
    open_page("tokens", run=job.run_id, cut="4", pooling="mean")
    assert asked[1].cut.chip.name == "linear.mean"


def test_moving_the_cut_recolours_without_asking_again(store, asked):
    job = finished_run(store)
    at = open_page("tokens", run=job.run_id)
    before = html_of(at)
    at.slider(key="cut").set_value(2).run()
    assert html_of(at) != before
    assert len(asked) == 1


def test_another_text_is_asked_about_and_an_empty_one_is_not(store, asked):
    job = finished_run(store)
    at = open_page("tokens", run=job.run_id)
    at.text_area[0].set_value("A new text").run()
    assert asked[-1].text == "A new text"
    at.text_area[0].set_value("  ").run()
    assert "Write or paste a text" in text_of(at)
    assert len(asked) == 2


def test_an_error_of_the_inference_process_is_shown_as_message_and_hint(store, monkeypatch):
    def refuse(_self, _question, _kind):
        raise JobError("The backbone is gone.", "Fetch it again.")

    monkeypatch.setattr(Inference, "ask", refuse)
    job = finished_run(store, text="A text nobody asked about before")
    said = text_of(open_page("tokens", run=job.run_id)).replace("\\", "")
    assert "The backbone is gone." in said
    assert "Fetch it again." in said


@pytest.mark.usefixtures("asked")
def test_hostile_text_reaches_the_page_only_escaped(store):
    job = finished_run(store, text=EVIL, label_names=[EVIL, *LABELS[1:]])
    for page in ("runs", "layers", "tokens", "bundle"):
        at = open_page(page, run=job.run_id)
        body = re.sub(r"<style>.*?</style>", "", html_of(at), flags=re.S)
        assert "<img" not in body
        assert "<script" not in body
        for element in at.get("markdown"):
            assert "<img" not in element.value
    assert "&lt;script&gt;" in html_of(open_page("tokens", run=job.run_id))


def test_a_hostile_name_of_a_data_file_shows_as_written(store):
    name = "<img src=x onerror=1>[x](javascript:1).csv"
    job = store.create_run(RunConfig.checked(backbone="b", data=name))
    assert "&lt;img src=x onerror=1&gt;" in html_of(open_page("runs"))
    heading = open_page("train", run=job.run_id).header[0].value
    assert "](" not in heading
    assert "<img" not in heading.replace("\\<", "")


def test_words_keep_the_text_whole_and_strike_what_was_not_read():
    text = "one two <b>three</b> four"
    answer = token_reading("one two <b>three</b>", 8)
    shown = token_view.coloured(answer, text, 8, list(range(5)))
    bare = re.sub(r"<[^>]+>", "", shown)
    assert "one two &lt;b&gt;three&lt;/b&gt; four" in bare
    assert '<span class="cv-rest" title="beyond the length limit: not read"> four</span>' in shown
    assert '<span class="cv-frame">News:</span>' in shown


def test_markdown_marks_in_foreign_text_show_as_written():
    assert formatting.plain("![x](http://y) :red[a] $b$") == (
        "\\!\\[x\\]\\(http\u2060\\://y\\) \\:red\\[a\\] \\$b\\$"
    )


# bundle


def test_the_bundle_page_says_what_will_be_built_and_queues_it_with_the_rule(store):
    job = finished_run(store)
    best = store.report(job.run_id).selection["within"]
    at = open_page("bundle", run=job.run_id)
    assert "A **token** bundle, layers 0 to 7 of 30" in text_of(at)
    button(at, "build").click().run()
    (bundle,) = store.bundles(job.run_id)
    assert (bundle.cut.cut_layer, bundle.cut.pooling) == (best.cut_layer, best.pooling)
    assert bundle.cut.rule == "within"


def test_a_last_token_cut_is_a_sequence_bundle(store):
    job = finished_run(store)
    said = text_of(open_page("bundle", run=job.run_id, cut="21", pooling="last"))
    assert "A **sequence** bundle, layers 0 to 21 of 30" in said


def test_a_cut_that_no_stock_class_holds_is_a_chipviz_bundle_of_its_chip(store):
    job = finished_run(store, chips=CHIPS)
    at = open_page("bundle", run=job.run_id, cut="12", pooling="mean", chip="mlp")
    assert "A **chipviz** bundle, layers 0 to 12 of 30" in text_of(at)
    button(at, "build").click().run()
    (bundle,) = store.bundles(job.run_id)
    assert bundle.cut == config.CutSpec(cut_layer=12, pooling="mean", chip="mlp", rule="manual")


def test_a_build_at_work_shows_progress_and_can_be_stopped(store):
    job = finished_run(store)
    bundle = store.create_bundle(job.run_id, config.CutSpec(cut_layer=8, pooling="mean"))
    store.claim(bundle.job_id)
    store.report_progress(bundle.job_id, Progress("verifying", "checking 12 of 64 texts", 12, 64))
    at = open_page("bundle", run=job.run_id)
    assert "checking 12 of 64 texts" in html_of(at)
    assert button(at, "stop_build")
    assert not [b for b in at.button if b.key == "build"]


def test_a_failed_build_says_why(store):
    job = finished_run(store)
    bundle = store.create_bundle(job.run_id, config.CutSpec(cut_layer=8, pooling="mean"))
    store.claim(bundle.job_id)
    store.finish(bundle.job_id, "failed", message="Text 7 differs by 0.2.", hint="Report it.")
    said = text_of(open_page("bundle", run=job.run_id)).replace("\\", "")
    assert "Text 7 differs by 0.2." in said


def test_a_built_bundle_shows_verification_files_a_signed_link_and_code(store):
    job = finished_run(store)
    bundle = built_bundle(store, job.run_id)
    at = open_page("bundle", run=job.run_id)
    assert "64 of 64 agree, largest difference 2e-07" in text_of(at)
    link = at.get("link_button")[0].proto
    assert link.url.startswith("/bundles/")
    assert "MB" in link.label
    code = " ".join(block.value for block in at.code)
    assert bundle.bundle.path in code
    assert "AutoModelForTokenClassification" in code


def test_a_text_is_classified_by_the_bundle_itself(store, asked):
    job = finished_run(store)
    bundle = built_bundle(store, job.run_id)
    at = open_page("bundle", run=job.run_id)
    at.text_area(key="try_text").set_value("Shares rose")
    next(b for b in at.button if b.label == "Classify").click().run()
    assert asked[-1] == Predict(bundle.bundle.path, ["Shares rose"], None)
    assert "90.0 %" in html_of(at)


def test_a_table_is_classified_a_part_at_a_time_and_given_back(store, monkeypatch, tmp_path):
    job = finished_run(store)
    bundle = built_bundle(store, job.run_id)
    out, requests = tmp_path / "done.csv", []

    def answer(_self, question, _kind):
        requests.append(question)
        out.write_text("text,label\nShares rose,business\n")
        return TablePart(str(out), len(requests), finished=len(requests) == 3)

    monkeypatch.setattr(Inference, "ask", answer)
    at = open_page("bundle", run=job.run_id)
    assert button(at, "try_table_go").disabled
    at.file_uploader(key="try_table").set_value(("a.csv", b"text\nShares rose\n", "text/csv"))
    at.run()
    at.checkbox(key="try_shares").check()
    button(at, "try_table_go").click().run()
    assert len(requests) == 3
    assert len(set(requests)) == 1
    assert (requests[0].path, requests[0].probabilities) == (bundle.bundle.path, True)
    assert Path(requests[0].file).read_bytes() == b"text\nShares rose\n"
    assert at.get("download_button")[0].proto.label.startswith("Download (")
    at.checkbox(key="try_shares").uncheck().run()  # another question: nothing to give back yet
    assert not at.get("download_button")


def test_a_bundle_of_two_texts_asks_for_both_and_says_how_they_are_given(store, asked):
    job = finished_run(store, template="{text}\nSecond: {text_pair}")
    bundle = built_bundle(store, job.run_id)
    at = open_page("bundle", run=job.run_id)
    (lines,) = [block.value for block in at.code if "AutoModel" in block.value]
    compile(lines, "lines", "exec")
    assert 'read("TEXT", "SECOND TEXT", ' in lines
    assert repr(bundle.bundle.path) in lines
    at.text_area(key="try_text").set_value("Shares rose")
    at.text_area(key="try_pair").set_value("They fell")
    next(b for b in at.button if b.label == "Classify").click().run()
    assert (asked[-1].texts, asked[-1].text_pairs) == (["Shares rose"], ["They fell"])


# rules for all pages


def test_pages_never_load_torch_or_transformers():
    code = (
        "import sys, pkgutil, importlib, chipviz.ui\n"
        "names = [m.name for m in pkgutil.iter_modules(chipviz.ui.__path__)]\n"
        "[importlib.import_module(f'chipviz.ui.{n}') for n in names if n != 'main']\n"
        "assert len(names) > 5\n"
        "bad = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{bad} was loaded' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_page_switches_html_escaping_off():
    sources = [*ROOT.glob("pages/*.py"), *ROOT.glob("chipviz/**/*.py"), ROOT / "app.py"]
    for path in sources:
        assert "unsafe_allow" not in path.read_text("utf-8"), path
