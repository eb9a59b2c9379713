"""The form of a new run without a browser: columns, outlook and preview, and what stops a start."""

import csv
import io
import re

import pytest

from chipviz.errors import JobError
from chipviz.preview import LeftOut, PromptPreview
from chipviz.runs.model_client import Inference
from chipviz.runs.model_process import Answerer
from chipviz.runs.store import Store
from chipviz.ui import data_step, lookups, prompt_step
from tests.conftest import planted_rows
from tests.example_run import EVIL
from tests.page_driver import button, html_of, open_page, text_of

ODD = ("Nr", "Was steht da?", "wohin damit?")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


@pytest.fixture
def asked(store, monkeypatch):
    """What was asked; the answers are the real ones, found in this process."""
    seen, answerer = [], Answerer(store.home)

    def ask(_self, question, _kind, _timeout_s=0, _waiting=None):
        seen.append(question.op)
        return answerer.answer(question)

    monkeypatch.setattr(Inference, "ask", ask)
    lookups.forget()
    return seen


def table(header=ODD, rows=None):
    file = io.StringIO()
    rows = rows or [(i, text, label) for i, (text, label) in enumerate(planted_rows(90))]
    csv.writer(file).writerows([header, *rows])
    return file.getvalue().encode()


def choose(at, key, value):
    next(c for c in at.get("button_group") if c.key == key).set_value(value)
    return at.run()


def upload(at, name, content):
    at.file_uploader[0].set_value((name, content, "text/csv"))
    return at.run()


def box(at, label):
    return next(b for b in at.selectbox if b.label == label)


@pytest.fixture
def form(asked, tiny_backbone_folder):
    """The form with a tiny backbone, where a file can be uploaded."""
    assert asked == []
    at = choose(open_page("train"), "backbone_source", "File or folder")
    at.text_input(key="backbone_path").set_value(str(tiny_backbone_folder))
    return choose(at, "data_source", "Upload")


def test_columns_of_odd_names_are_asked_for_and_what_is_guessed_is_named_so(form, store):
    at = upload(form, "odd.csv", table())
    assert box(at, "Label column").options == list(ODD)
    assert box(at, "Label column").value is None
    assert "No label column was found" in text_of(at).replace("\\", "")
    assert button(at, "start").disabled
    at = box(at, "Label column").select(ODD[2]).run()
    assert box(at, "Text column").options == [ODD[0], f"{ODD[1]} (guessed)"]
    button(at, "start").click().run()
    (job,) = store.runs()
    assert (job.config.label, job.config.text) == (ODD[2], None)
    assert job.config.poolings == ()


def test_a_guess_can_be_overruled(form, store):
    rows = [(text, "words", label) for text, label in planted_rows(90)]
    at = upload(form, "two.csv", table(("text", "text_pair", "label"), rows))
    assert box(at, "Second text column").value == "text_pair"
    at = box(at, "Second text column").select("(none)").run()
    button(at, "start").click().run()
    (job,) = store.runs()
    config = job.config
    assert (config.text, config.text_pair, config.label) == ("text", None, "label")
    assert job.config.choices is None


def test_the_preview_marks_the_probed_tokens_and_counts_the_texts(form):
    at = upload(form, "toy.csv", table(("row", "text", "label")))
    at.text_area(key="template_False").set_value("say {text} now:").run()
    page = html_of(at)
    assert len(re.findall(r'<mark class="cv-probed cv-p-last" title="[^"]*">:</mark>', page)) == 3
    assert "63 train (made here), 9 validation" not in page
    assert "9 validation (made here), 18 test (made here)" in page
    assert '<i style="width:100.0%">' in page
    (chart,) = at.get("plotly_chart")
    assert "90 prompts, median" in chart.proto.spec
    assert "4</b><span>layers, 32 wide" in page


def test_texts_that_stand_in_two_splits_are_counted_and_splits_that_were_found_are_not_made(
    form, tmp_path
):
    rows = planted_rows(60)
    splits = {"train": rows[:40], "validation": rows[40:50], "test": [rows[0], *rows[50:]]}
    for name, some in splits.items():
        (tmp_path / f"{name}.csv").write_bytes(table(("text", "label"), some))
    at = choose(form, "data_source", "File or folder")
    at.text_input(key="data_path").set_value(str(tmp_path)).run()
    page = html_of(at)
    assert "texts: 40 train, 10 validation, 11 test<" in page
    assert "<b>1</b><span>texts that stand in two splits: 1 in train and test</span>" in page


def test_an_option_that_changes_no_prompt_asks_nothing_again(form, asked):
    at = upload(form, "toy.csv", table(("row", "text", "label")))
    before = list(asked)
    assert before.count("preview") == 1
    at.toggle(key="balanced").set_value(True).run()
    at.multiselect(key="chips").set_value(["linear", "mlp"]).run()
    assert asked == before
    at.number_input(key="limit_False").set_value(12).run()
    assert asked == [*before, "preview"]


def test_a_broken_file_is_said_with_a_hint_and_nothing_starts(form):
    at = upload(form, "broken.csv", b"text,label\nfine,a\nbroken,b,c\n")
    said = text_of(at).replace("\\", "")
    assert "line 3 has 3 cells, expected 2" in said
    assert "Check that it is a well-formed .csv file" in said
    assert button(at, "start").disabled
    at = upload(at, "whole.csv", table(("row", "text", "label")))
    assert not button(at, "start").disabled


def test_a_file_that_changes_is_looked_at_again(form, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n")
    at = choose(form, "data_source", "File or folder")
    at.text_input(key="data_path").set_value(str(path)).run()
    assert "holds no rows" in text_of(at).replace("\\", "")
    path.write_bytes(table(("row", "text", "label")))
    at.run()
    assert not button(at, "start").disabled


def test_a_backbone_that_is_none_is_said_in_its_step(form, tmp_path):
    at = upload(form, "toy.csv", table(("row", "text", "label")))
    at.text_input(key="backbone_path").set_value(str(tmp_path)).run()
    assert "holds no config.json" in text_of(at).replace("\\", "")
    assert button(at, "start").disabled


def test_a_backbone_too_large_for_memory_is_refused_unless_it_is_spread(form, monkeypatch):
    monkeypatch.setattr("chipviz.backbones.memory.free_memory", lambda _: 1000)
    lookups.forget()
    at = upload(form, "toy.csv", table(("row", "text", "label")))
    said = text_of(at).replace("\\", "")
    assert "needs about" in said
    assert "See Spread over devices" in said
    assert button(at, "start").disabled
    at.toggle(key="spread").set_value(True).run()
    assert not button(at, "start").disabled


def test_what_must_be_fetched_is_looked_at_only_when_asked_for(asked):
    at = choose(open_page("train"), "data_source", "Hub")
    at.text_input(key="data_hub").set_value("owner/name").run()
    assert asked == []
    assert not button(at, "start").disabled
    button(at, "prepare_data").click().run()
    assert asked == ["columns"]
    assert "is not on this machine" in text_of(at).replace("\\", "")
    assert button(at, "start").disabled


def test_a_process_that_broke_down_is_asked_anew_and_a_refusal_is_not(form, asked, monkeypatch):
    def die(_self, _question, _kind, _timeout_s=0, _waiting=None):
        raise JobError("It ended.", "Try again.")

    with monkeypatch.context() as broken:
        broken.setattr(Inference, "ask", die)
        at = upload(form, "broken.csv", b"text,label\n")
        assert "It ended" in text_of(at)
    before = len(asked)
    at.run()
    assert "holds no rows" in text_of(at).replace("\\", "")
    at.run()
    assert asked[before:] == ["columns"]


@pytest.mark.usefixtures("store")
def test_long_work_is_never_begun_by_looking(tmp_path):
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    for folder, name in ((adapter, "adapter_config.json"), (model, "config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    fetched = tmp_path / "home" / "backbones" / "minilm-l6"
    fetched.mkdir(parents=True)
    for source, here in {
        str(model): True,
        str(tmp_path / "nowhere"): True,  # that it is missing is said at once
        "minilm-l6": True,
        "smollm2-135m": False,
        "owner/name": False,
        "../home/backbones/minilm-l6": True,
        str(adapter): False,
        str(tmp_path / "x.gguf"): False,
    }.items():
        assert lookups.is_here("backbones", source) is here, source


def test_the_advanced_options_reach_the_run(form, store):
    at = upload(form, "toy.csv", table(("row", "text", "label")))
    at.selectbox(key="dtype").select("float32")
    at.text_input(key="blocks").set_value("model.layers").run()
    button(at, "start").click().run()
    (job,) = store.runs()
    assert (job.config.dtype, job.config.blocks) == ("float32", "model.layers")


def test_hostile_texts_labels_and_columns_reach_the_form_only_escaped(form):
    rows = [
        (f"{EVIL} {text}", EVIL if label == "sport" else label) for text, label in planted_rows(90)
    ]
    at = upload(form, f"{EVIL}.csv", table((EVIL, "label"), rows))
    body = re.sub(r"<style>.*?</style>", "", html_of(at), flags=re.S)
    assert "&lt;script&gt;" in body
    assert "<script" not in body
    assert "<img" not in body
    for element in at.get("markdown"):
        assert "<img" not in element.value


def test_a_token_of_white_space_and_a_piece_of_a_word_are_marked_visibly():
    def drawn(prompt, tokens, *ends):
        last = len(tokens) - 1
        probed = {"last": (last, last + 1), "mean": (0, last + 1)}
        left_out = tuple(LeftOut(end[:20], len(end)) for end in ends)
        return prompt_step.prompt_html(PromptPreview(prompt, tokens, probed, "a", left_out))

    assert ">⏎</mark>" in drawn("one\n", ["one", "\n"])
    assert "token</mark>" not in drawn("tokenise", ["token", "##ise"])
    assert "token<mark" in drawn("tokenise", ["token", "##ise"])
    long = drawn("x" * 5000 + ":", ["x", ":"])
    assert "3,500 characters" in long
    assert "<s>" not in long
    cut = drawn("tokens", ["tokens"], "<b>gone", "y" * 3000)
    assert "<s>&lt;b&gt;gone</s> <" in cut
    assert "left out by the limit, 7 characters" in cut
    assert "yy</s> … <" in cut
    assert "left out by the limit, 3,000 characters" in cut
    assert ">:</mark>" in long


def test_many_labels_are_counted_rather_than_drawn():
    counts = {f"label {i}": i for i in range(40)}
    drawn = data_step.label_bars(counts)
    assert drawn.count('cv-bar"') == data_step.MAX_BARS
    assert drawn.index("label 39") < drawn.index("label 38")
    assert "28 labels more" in drawn


# --- what the form held comes back --------------------------------------------------------------


def filled(at):
    """A form with something of every kind in it. Returns its session."""
    choose(at, "data_source", "Upload")
    upload(at, "odd.csv", table())
    box(at, "Label column").set_value("wohin damit?").run()
    at.text_area[0].set_value("Text: {text}\nKind:").run()
    at.number_input(key="limit_False").set_value(48).run()
    at.multiselect(key="poolings").set_value(["last", "max"]).run()
    at.toggle(key="balanced").set_value(True).run()
    at.number_input(key="folds").set_value(3).run()
    at.number_input(key="max_train_False").set_value(40).run()
    return at


def started(at, store):
    """The settings of the run that the form starts."""
    button(at, "start").click().run()
    return store.runs()[0].config


@pytest.mark.usefixtures("asked")
def test_a_filled_form_survives_a_reload_and_starts_the_same_run(store):
    at = filled(open_page("train"))
    name = at.query_params["draft"]
    again = open_page("train", draft=name)  # another session, the same address
    assert text_of(again).count("Choose the one") == 0
    assert again.text_area[0].value == "Text: {text}\nKind:"
    assert again.number_input(key="folds").value == 3
    first, second = started(at, store), started(again, store)
    assert first == second
    assert (first.label, first.max_length, first.poolings) == ("wohin damit?", 48, ("last", "max"))
    assert (first.class_weight, first.folds, first.max_train) == ("balanced", 3, 40)
    assert first.data.endswith(".csv")


@pytest.mark.usefixtures("asked")
def test_an_untouched_form_leaves_nothing_and_start_over_forgets(store):
    at = open_page("train")
    assert "draft" not in at.query_params
    assert not (store.home / "drafts").exists()
    at.number_input(key="seed").set_value(7).run()
    assert "draft" in at.query_params
    button(at, "over").click().run()
    assert at.number_input(key="seed").value == 0
    assert "draft" not in at.query_params


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"data_source": "Nowhere", "preset": 7, "seed": -4, "limit_True": 0, "folds": "x"}',
        '{"poolings": ["last", "evil"], "dtype": ["float32"], "evil": 1, "start": true}',
        '{"template_True": 7, "max_train_True": true, "backbone_embedded": "other"}',
    ],
)
def test_a_draft_that_was_altered_is_read_as_far_as_it_fits(store, content):
    (store.home / "drafts").mkdir()
    (store.home / "drafts" / "0123456789ab.json").write_text(content)
    at = open_page("train", draft="0123456789ab")
    assert not button(at, "start").disabled
    assert at.number_input(key="seed").value == 0


@pytest.mark.usefixtures("asked", "store")
@pytest.mark.parametrize("name", ["../../etc/passwd", "0123456789ab", "", "x" * 12])
def test_a_draft_that_is_not_there_is_an_empty_form(name):
    assert not button(open_page("train", draft=name), "start").disabled
