"""The command line: one JSON object or two lines of error, and the right exit status."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest

from chipviz.__main__ import run_command_line
from chipviz.cli import printing
from chipviz.cli.options import flag
from chipviz.config import CutSpec, Rule, RunConfig
from chipviz.errors import Notice, Refusal
from chipviz.keys import ChipKey, Cut, fields_of
from chipviz.results.report import BundleReport
from chipviz.runs import worker
from chipviz.runs.schema import summary
from chipviz.runs.store import Store
from tests.example_run import CHIPS, at, finished_run, report_of, token_reading

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "News: {text}\nTopic of this article:"


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self):
        """The one object on standard output."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def refusal(self):
        """The one `error:` and the one `hint:` line of a refused command."""
        assert self.status == 1, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        *_, error, hint = self.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert self.err.count("error: ") == self.err.count("hint: ") == 1
        return error


def chipviz(home, *arguments):
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["chipviz", "--home", str(home), *map(str, arguments)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            status = run_command_line()
        except SystemExit as end:
            status = end.code
    return Ended(int(status or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_backbone_folder, toy_csv):
    """A home with one finished run, and what `train --json` printed in a process of its own."""
    home = tmp_path_factory.mktemp("cli") / "home"
    command = [sys.executable, "-m", "chipviz", "--home", home, "train", "--json"]
    command += ["--backbone", tiny_backbone_folder, "--data", toy_csv, "--template", TEMPLATE]
    command += ["--max-length", "40", "--max-test", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return home, Ended(done.returncode, done.stdout, done.stderr).json


@pytest.fixture(scope="module")
def bundle(trained, tmp_path_factory):
    """The folder that `cut --rule within --pooling mean` wrote, and what it printed."""
    home, run = trained
    out = tmp_path_factory.mktemp("cut") / "bundle"
    options = ["--rule", "within", "--pooling", "mean", "--out", out, "--json"]
    return out, chipviz(home, "cut", run["run_id"], *options).json


def test_train_prints_the_whole_report_and_learns_the_planted_word(trained):
    _, run = trained
    assert run["status"] == "done"
    assert (run["preset"], run["backbone"]["n_layers"], run["task"]["n_classes"]) == ("sound", 4, 3)
    assert (run["task"]["template"], run["task"]["max_length"]) == (TEMPLATE, 40)
    assert set(run["task"]["label_names"]) == {"sport", "money", "science"}
    sizes = [run["task"][f"n_{split}"] for split in ("train", "validation", "test")]
    assert sizes == [210, 30, 40]
    keys = {(s["layer"], s["pooling"], s["chip"], s["split"]) for s in run["scores"]}
    assert keys == {
        (layer, pooling, "linear", split)
        for layer in range(-1, 4)
        for pooling in ("last", "mean")
        for split in ("validation", "test")
    }
    assert run["controls"]["embedding"] == run["controls"]["tfidf"] == 1.0  # the word is there
    assert run["controls"]["majority"] == pytest.approx(1 / 3, abs=0.02)
    assert set(run["selection"]) == set(RULES)
    assert run["timing"]["n_tokens"] > 0


def test_both_ratios_follow_from_the_shape_of_the_model(trained):
    _, run = trained
    for rule in run["selection"].values():
        assert rule["layer_ratio"] == pytest.approx((3 - rule["cut_layer"]) / 4)
        (cost,) = (
            cost
            for cost in run["costs"]
            if (cost["layer"], cost["pooling"]) == (rule["cut_layer"], rule["pooling"])
        )
        dense = run["backbone"]["n_parameters"]
        assert rule["parameter_ratio"] == pytest.approx(1 - cost["n_parameters"] / dense)


def test_show_says_what_train_said_and_runs_lists_it(trained):
    home, run = trained
    shown = chipviz(home, "show", run["run_id"], "--json").json
    assert {key: shown[key] for key in run if key != "bundles"} == {
        key: run[key] for key in run if key != "bundles"
    }
    (listed,) = chipviz(home, "runs", "--json").json["runs"]
    assert (listed["run_id"], listed["status"]) == (run["run_id"], "done")


def test_without_json_a_person_reads_the_same_numbers(trained):
    home, run = trained
    shown = chipviz(home, "show", run["run_id"]).out
    for rule, chosen in run["selection"].items():
        assert f"{rule}: layer {chosen['cut_layer']} {chosen['pooling']}" in shown
        assert chosen["why"] in shown
    assert run["run_id"] in chipviz(home, "runs").out
    assert "No runs yet" in chipviz(home / "other", "runs").out


def test_a_cut_is_a_bundle_of_the_size_that_the_run_promised(trained, bundle):
    _, run = trained
    out, cut = bundle
    (cost,) = (
        cost
        for cost in run["costs"]
        if (cost["layer"], cost["pooling"]) == (cut["cut_layer"], "mean")
    )
    assert (cut["kind"], cut["rule"], cut["path"]) == ("token", "within", str(out))
    assert (cut["n_parameters"], cut["weight_bytes"]) == (
        cost["n_parameters"],
        cost["weight_bytes"],
    )
    assert cut["n_verified"] > 30  # the validation texts, and those that end in control tokens
    assert cut["max_difference"] < 1e-3
    assert {path.name for path in out.iterdir()} == set(cut["files"])


def test_a_bundle_is_verified_and_an_altered_one_is_refused(trained, bundle, tmp_path):
    home, _ = trained
    out, cut = bundle
    assert chipviz(home, "verify", out, "--json").json["n_files"] == len(cut["files"]) - 1
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in out.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    (altered / "config.json").write_text((out / "config.json").read_text() + " ")
    refused = chipviz(home, "verify", altered)
    assert "config.json is not what its checksum says" in refused.refusal


def test_predict_names_the_class_of_each_text_in_order(trained, bundle, tmp_path):
    home, run = trained
    out, _ = bundle
    options = ["--text", "we saw the old goal near a river", "--text", "the red bank went on"]
    found = chipviz(home, "predict", out, *options, "--json").json["predictions"]
    assert [set(line) for line in found] == [{"label", "score"}] * 2
    assert all(line["label"] in run["task"]["label_names"] for line in found)
    (tmp_path / "texts.txt").write_text(f"{options[1]}\n{options[3]}\n")
    (tmp_path / "texts.json").write_text(json.dumps([options[1], options[3]]))
    for name in ("texts.txt", "texts.json"):
        written = tmp_path / f"{name}.jsonl"
        ended = chipviz(home, "predict", out, "--file", tmp_path / name, "--out", written)
        assert (ended.status, ended.out) == (0, "")
        lines = [json.loads(line) for line in written.read_text().splitlines()]
        assert [line["label"] for line in lines] == [line["label"] for line in found]


def test_tokens_gives_every_layers_answer_at_every_token(trained):
    home, run = trained
    text = "the red <s> bank"
    said = chipviz(home, "tokens", run["run_id"], "--text", text, "--layer", 2, "--json").json
    n_tokens = len(said["tokens"])
    assert "".join(t["text"] for t in said["tokens"] if t["in_text"]).strip() == text
    assert [len(row) for row in said["label_index"]] == [n_tokens] * 4
    assert [len(row) for row in said["confidence"]] == [n_tokens] * 4
    assert [len(row) for row in said["at_cut"]] == [3] * n_tokens
    assert [len(row) for row in said["by_layer"]] == [3] * 4
    assert said["layer"] == 2
    assert 0 <= said["settled_layer"] < 4
    assert said["label_names"] == run["task"]["label_names"]


def test_inspect_says_what_train_read_and_train_says_what_it_guessed(trained, toy_csv):
    home, run = trained
    options = ["--backbone", run["config"]["backbone"], "--data", toy_csv, "--template", TEMPLATE]
    options += ["--max-length", "40", "--max-test", "40", "--chip", "mlp", "--repeats", "2"]
    found = chipviz(home, "inspect", *options, "--json").json
    task = run["task"]
    assert found["columns"] == task["columns"] == {"text": "text", "label": "label"}
    assert found["guessed"] == task["guessed"] == ["text", "label"]
    assert task["made"] == ["validation", "test"]
    for split, rows in found["splits"].items():
        assert rows["n"] == task[f"n_{split}"]
        assert list(rows["label_counts"]) == task["label_names"]
    assert found["max_chars"] == task["max_chars"]
    assert all(example["tokens"][-1] == ":" for example in found["examples"])
    shown = chipviz(home, "inspect", *options).out
    said = "text = `text`, label = `label`, guessed"
    assert said in shown
    assert said in chipviz(home, "show", run["run_id"]).out


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def train(home, tiny_backbone_folder, toy_csv):
    """Try to train with some options other than good ones."""

    def attempt(**options):
        good = {"backbone": tiny_backbone_folder, "data": toy_csv}
        pairs = [(f"--{k.replace('_', '-')}", v) for k, v in {**good, **options}.items()]
        return chipviz(home, "train", *(part for pair in pairs for part in pair), "--json")

    return attempt


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "nosuch"}, "backbone nosuch"),
        ({"backbone": "two\nlines"}, "is no embedded backbone"),
        ({"data": "nosuch.csv"}, "no file or folder nosuch.csv"),
        ({"data": "x" * 300}, "is no embedded data set"),
        ({"label": "topic"}, "no column 'topic'; columns are 'text', 'label'"),
        ({"template": "Topic:"}, "holds {text} 0 times, expected 1"),
        ({"template": TEMPLATE, "max_length": 3}, "no room for text within the length limit of 3"),
        ({"pooling": "median"}, "take last, mean, first, max or first+mean"),
        ({"pooling": "last,raw"}, "preset published (got 'last, raw')"),
        ({"chip": "forest"}, "'linear', 'mlp' or 'sparse' (got 'forest')"),
        ({"max_train": 1}, "max_train"),
        ({"preset": "loud"}, "preset"),
    ],
)
def test_bad_input_to_train_is_one_error_and_one_hint(train, options, said):
    assert said in train(**options).refusal


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,topic\na b,\n", "Row 1 has no value in column 'topic'"),
        ("text,kind\na,b\n", "No label column was found; columns are 'text', 'kind'"),
        ("text,label\n" + "".join(f"text {i},x\n" for i in range(40)), "one class only, 'x'"),
        ("text,label\n", "holds no rows"),
        ("", "bad.csv holds no rows"),
    ],
)
def test_bad_data_is_one_error_and_one_hint(train, tmp_path, content, said, home):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    assert said in train(data=path).refusal
    kept = [file for file in home.rglob("*") if file.is_file() and "parsed" not in file.parts]
    assert [file.suffix for file in kept if file.suffix == ".parquet"] == []
    options = ["--backbone", "smollm2-135m", "--data", path, "--json"]
    assert said in chipviz(home, "inspect", *options).refusal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layer", "4"], "Layer 4 does not exist, layers are 0 to 3"),
        (["--layer", "-1"], "Layer -1 does not exist"),
        ([], "either --layer or --rule"),
        (["--layer", "1", "--rule", "within"], "either --layer or --rule"),
        (["--rule", "best"], "no rule 'best'"),
        (["--rule", "manual"], "needs a layer"),
        (["--rule", "within", "--pooling", "max"], "pooling max"),
        (["--rule", "within", "--chip", "mlp"], "kind mlp"),
    ],
)
def test_a_cut_that_does_not_exist_is_refused(trained, tmp_path, options, said):
    home, run = trained
    ended = chipviz(home, "cut", run["run_id"], *options, "--out", tmp_path / "cut")
    assert said in ended.refusal
    assert not (tmp_path / "cut").exists()


def test_a_cut_never_overwrites_what_is_no_bundle(trained, tmp_path):
    home, run = trained
    (tmp_path / "thesis.txt").write_text("three years")
    for out, said in ((tmp_path, "is no bundle"), (tmp_path / "thesis.txt" / "x", "thesis.txt")):
        ended = chipviz(home, "cut", run["run_id"], "--rule", "fixed", "--out", out)
        assert said in ended.refusal
    assert (tmp_path / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("run", ["nosuch", "../../etc", "20990101-000000-ffff", "", "a\nb"])
@pytest.mark.parametrize("command", ["show", "resume", "tokens", "cut"])
def test_a_run_that_does_not_exist_is_refused(home, tmp_path, command, run):
    more = {"tokens": ["--text", "x"], "cut": ["--rule", "fixed", "--out", tmp_path / "x"]}
    ended = chipviz(home, command, run, *more.get(command, []))
    assert "no run" in ended.refusal


def test_a_run_that_is_not_done_gives_no_cut_and_no_tokens(home, tmp_path):
    store = Store(home)
    job = store.create_run(RunConfig(backbone="tiny", data="toy"))
    for command in (
        ["cut", job.run_id, "--rule", "within", "--out", tmp_path / "x"],
        ["tokens", job.run_id, "--text", "x"],
    ):
        assert "is queued, not done" in chipviz(home, *command).refusal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "nosuch"], "is no bundle"),
        (["verify", "two\nlines"], "two lines is no bundle"),
        (["predict", "nosuch", "--text", "x"], "is no bundle"),
        (["predict", "nosuch"], "nothing to classify"),
        (["predict", "nosuch", "--file", "nosuch.txt"], "nosuch.txt cannot be read"),
        (["fetch", "nosuch"], "Nothing is embedded under the name 'nosuch'"),
    ],
)
def test_what_is_not_there_is_refused(home, arguments, said):
    assert said in chipviz(home, *arguments).refusal


def test_a_home_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be opened" in chipviz(tmp_path / "file", "runs").refusal


def test_predictions_that_cannot_be_written_are_refused_by_path(trained, bundle, tmp_path):
    home, _ = trained
    out, _ = bundle
    ended = chipviz(home, "predict", out, "--text", "x", "--out", tmp_path / "no" / "such.jsonl")
    assert "such.jsonl" in ended.refusal


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["train"], ["train", "--colour", "red"], ["show"], ["runs", "--json=1"]],
)
def test_wrong_usage_is_status_2_and_prints_nothing_on_standard_output(home, arguments):
    ended = chipviz(home, *arguments)
    assert ended.status == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err


def test_a_number_that_is_none_is_wrong_usage(train):
    assert train(seed="many").status == 2


def test_an_interrupt_is_status_130(train, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "work", interrupted)
    ended = train()
    assert ended.status == 130
    assert "Traceback" not in ended.err


def test_the_exit_status_is_that_of_the_process(home):
    command = [sys.executable, "-m", "chipviz", "--home", home, "show", "nosuch", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "no run 'nosuch'" in Ended(done.returncode, done.stdout, done.stderr).refusal


# Rules, on a drawn run: nothing is trained or built.

RULES = ("validate", "within", "non-inferior", "elbow", "budget", "fixed", "oracle")


@pytest.fixture
def drawn(home):
    """A home with one drawn run, and its report."""
    store = Store(home)
    return home, store.report(finished_run(store).run_id)


@pytest.fixture
def asked(monkeypatch):
    """What `experiment.build` was asked for; nothing is built."""
    specs = []

    def build(folder, cut, *, out, **_):
        specs.append(cut)
        cost = folder.read_report().cost_at(cut.cut)
        return BundleReport(
            path=str(out),
            kind="chipviz",
            cut_layer=cut.cut_layer,
            **fields_of(cut.key),
            n_parameters=cost.n_parameters,
            weight_bytes=cost.weight_bytes,
            folder_bytes=cost.weight_bytes,
            n_verified=64,
            max_difference=0.0,
            files={},
        )

    monkeypatch.setattr("chipviz.experiment.build", build)
    return specs


@pytest.mark.parametrize("rule", RULES)
def test_cut_by_a_rule_is_the_choice_that_the_run_reports(drawn, asked, tmp_path, rule):
    home, report = drawn
    said = chipviz(home, "cut", report.run_id, "--rule", rule, "--out", tmp_path, "--json").json
    chosen = report.selection[rule]
    assert asked == [CutSpec.at(chosen.cut, rule)]
    assert (said["rule"], said["why"]) == (rule, chosen.why)
    assert said["cut_layer"] == chosen.cut_layer


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        (["--rule", "within", "--tolerance", "0.05"], 4),
        (["--rule", "non-inferior", "--margin", "0.15"], 0),
        (["--rule", "non-inferior", "--margin", "0"], 8),
        (["--rule", "budget", "--budget", "parameters=50M"], 5),
        (["--rule", "within", "--pooling", "last", "--chip", "linear"], 21),
        (["--layer", "3", "--pooling", "last"], 3),
    ],
)
def test_cut_hands_a_rule_its_number_and_the_named_chip(drawn, asked, tmp_path, options, layer):
    home, report = drawn
    ended = chipviz(home, "cut", report.run_id, *options, "--out", tmp_path)
    assert ended.status == 0, ended.err
    (spec,) = asked
    assert spec.cut_layer == layer
    assert spec.rule == (options[1] if options[0] == "--rule" else "manual")
    assert "last" not in options or spec.pooling == "last"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rule", "within", "--tolerance", "5"], "tolerance is 5.0"),
        (["--rule", "within", "--tolerance", "-0.1"], "tolerance is -0.1"),
        (["--rule", "non-inferior", "--margin", "nan"], "margin is nan"),
        (["--rule", "budget", "--budget", "cheap"], "'cheap' cannot be read"),
        (["--rule", "budget", "--budget", "parameters=1K"], "No cut fits 1 thousand parameters"),
        (["--rule", "validate", "--margin", "0.1"], "--margin belongs to rule non-inferior"),
        (["--rule", "within", "--budget", "memory=1GB"], "--budget belongs to rule budget"),
        (["--layer", "3", "--tolerance", "0.1"], "--tolerance belongs to rule within"),
        (["--rule", "elbow", "--chip", "mlp"], "kind mlp"),
        (["--rule", "Oracle"], "no rule 'Oracle'"),
    ],
)
def test_a_number_that_no_rule_can_use_is_refused(drawn, asked, tmp_path, options, said):
    home, report = drawn
    ended = chipviz(home, "cut", report.run_id, *options, "--out", tmp_path / "x")
    assert said in ended.refusal
    assert not asked


def test_an_unknown_rule_is_answered_with_every_rule_there_is(drawn, tmp_path):
    home, report = drawn
    ended = chipviz(home, "cut", report.run_id, "--rule", "best", "--out", tmp_path)
    assert all(rule in ended.err for rule in RULES)
    assert {*RULES, "manual"} == set(get_args(Rule))


def test_show_prints_every_chip_and_rule_and_marks_what_is_not_an_honest_choice(home):
    store = Store(home)
    job = store.create_run(RunConfig(backbone="tiny", data="toy"), claim=True)
    chips = (ChipKey.published("linear"), ChipKey.published("mlp"), *CHIPS)
    report = report_of(job.run_id, chips=chips)
    store.folder(job.run_id).path.mkdir(parents=True)
    store.folder(job.run_id).write_report(report)
    assert store.finish(job.job_id, "done", found=summary(report))
    shown = chipviz(home, "show", job.run_id).out
    head, *rows = shown[shown.index("\n layer") + 1 :].splitlines()[:32]
    assert "preset published" in shown
    assert head.split("  ")[1:] == ["raw* linear", "raw* mlp", "last linear", "mean linear"]
    assert "* as published" in shown
    for layer, row in zip(range(-1, 30), rows, strict=True):
        values = [report.score_at(Cut(layer, key), "test").accuracy for key in chips]
        assert row.split()[1:] == [f"{100 * value:.1f}%" for value in values]
    for rule in RULES:
        chosen = report.selection[rule]
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(f"{rule}:"))
        assert f"layer {chosen.cut_layer} {chosen.key.vector.name} {chosen.chip}" in line
        assert line.endswith(chosen.why)
    assert shown.index("For comparison only, chosen on test") < shown.index("oracle:")
    assert shown.index("oracle:") > max(shown.index(f"{rule}:") for rule in RULES[:-1])


def test_show_marks_nothing_as_published_where_nothing_is(drawn):
    home, report = drawn
    shown = chipviz(home, "show", report.run_id).out
    assert "preset sound" in shown
    assert "as published" not in shown
    assert "*" not in shown


def test_tokens_asks_the_chip_that_was_named(drawn, monkeypatch):
    questions = []

    def answer(_self, question):
        questions.append(question)
        return token_reading(question.text, question.cut.layer)

    monkeypatch.setattr("chipviz.runs.model_process.Answerer.read_tokens", answer)
    home, report = drawn
    start = ("tokens", report.run_id, "--text", "a match")
    assert chipviz(home, *start, "--layer", "4", "--pooling", "last", "--json").status == 0
    assert chipviz(home, *start, "--chip", "linear", "--json").status == 0
    assert [question.cut for question in questions] == [
        at(4, "last"),
        report.selection["within"].cut,
    ]
    assert "kind mlp" in chipviz(home, *start, "--chip", "mlp").refusal


def test_the_options_of_a_run_are_the_settings_of_a_run(home):
    said = " ".join(chipviz(home, "train", "--help").out.replace("│", " ").split())
    for name in RunConfig.model_fields:
        assert f" {flag(name)} " in said
    assert "Default: 256." in said


def test_an_error_that_nobody_foresaw_is_a_sentence_and_a_log(home, monkeypatch):
    def fails(_self):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(Store, "runs", fails)
    ended = chipviz(home, "runs")
    assert ended.status == 1
    assert ended.refusal == "error: Unexpected ZeroDivisionError: by zero."
    assert "Traceback" not in ended.err
    assert "in fails" in (home / "errors.log").read_text()


def test_what_texts_and_names_hold_is_not_obeyed_by_a_terminal(capsys):
    hostile = "\x1b]0;title\x07 \x1b[31mred\x1b[0m \x9b2J \u202e back \r start \x7f"
    printing.show(f"{hostile}\nsecond line")
    printing.refuse(Refusal(hostile, hostile))
    printing.print_notices([Notice("texts-cut", hostile, 1)])
    said = capsys.readouterr()
    for lines in (said.out, said.err):
        assert lines.replace("\n", "").isprintable()
        assert "red" in lines
    assert said.out.endswith("\nsecond line\n")
