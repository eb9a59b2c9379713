"""Questions are asked as published or as we mend it, and what is cut is never the question."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, pipeline

from chipviz import experiment
from chipviz.bundle.classifier import load
from chipviz.config import CutSpec, RunConfig
from chipviz.data.columns import options_of
from chipviz.data.from_table import make_task
from chipviz.data.multiple_choice import answer_indices, holds_options
from chipviz.data.prompt import bake, load_tokenizer, n_truncated
from chipviz.data.tables import Table
from chipviz.errors import TaskError
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder

N = 60
NAMES = ["A", "B", "C", "D"]


def reading(n=N, passage="Passage {i}: it went on.", options=4):
    """RACE and C3 in shape: every third question has two options only."""
    rows = range(n)
    counts = [options if i % 3 else 2 for i in rows]
    return pd.DataFrame(
        {
            "passage": [passage.format(i=i) for i in rows],
            "question": [f"Did it end, {i}?" for i in rows],
            "choices": [[f"option {i}-{k}" for k in range(counts[i])] for i in rows],
            "label": [i % counts[i] for i in rows],
            "id": [f"q{i}" for i in rows],
        }
    )


def exam(n=N, subject="anatomy"):
    frame = reading(n).drop(columns=["passage", "id"])
    return frame.assign(subject=subject)


def yes_or_no(n=N):
    return reading(n)[["question", "passage"]].assign(
        label=[("no", "yes")[i % 2] for i in range(n)]
    )


def task_of(frames, *, names=None, **settings):
    frames = frames if isinstance(frames, dict) else {"all": frames}
    config = RunConfig.checked(backbone="tiny", data="toy", **settings)
    return make_task(Table("toy", frames, names or {}), config)


def prompts_of(task, tokenizer, max_length=512):
    """Every prompt of a task in words, by split."""
    prompt = bake(tokenizer, task.template, max_length, task.splits["train"])
    return {
        split: [prompt.tokenizer.decode(ids) for ids in prompt.encode(rows.texts, rows.pairs)]
        for split, rows in task.splits.items()
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer(tiny_tokenizer_folder)


def lines_of(row):
    return "\n".join(f"{'ABCD'[k]}. {option}" for k, option in enumerate(row["choices"]))


PUBLISHED = {
    "boolq": lambda r: f"{r['passage']}\n\nQuestion: {r['question']}\nAnswer: ",
    "race": lambda r: (
        f"Article: {r['passage']}\n\nQuestion: {r['question']}\n{lines_of(r)}\nAnswer: "
    ),
    "mmlu": lambda r: (
        "The following are multiple choice questions (with answers) about "
        f"{r['subject']}.\n\n{r['question']}\n{lines_of(r)}\nAnswer:"
    ),
    "mmlu without subject": lambda r: (
        "The following are multiple choice questions (with answers)."
        f"\n\n{r['question']}\n{lines_of(r)}\nAnswer:"
    ),
}
FRAMES = {
    "boolq": yes_or_no,
    "race": reading,
    "mmlu": exam,
    "mmlu without subject": lambda: exam(subject=None),
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("preset", ["published", "sound"])
def test_a_question_is_asked_in_the_papers_words(tokenizer, kind, preset):
    """As published to the letter; ours without the last space and without the subject."""
    frame = FRAMES[kind]()
    found = prompts_of(task_of(frame, preset=preset), tokenizer)
    expected = [PUBLISHED[kind](row) for row in frame.to_dict("records")]
    if preset == "sound":
        expected = [text.rstrip(" ").replace(" about anatomy", "") for text in expected]
    assert sorted(text for texts in found.values() for text in texts) == sorted(expected)


def test_training_and_test_prompts_of_an_exam_have_one_form(tokenizer):
    """Training rows of MMLU have no subject, test rows do: ours must not tell them apart by it."""
    frames = {"train": exam(subject=None), "validation": exam(9, ""), "test": exam(9, "law")}
    found = prompts_of(task_of(frames), tokenizer)
    firsts = {text.split("\n")[0] for texts in found.values() for text in texts}
    assert firsts == {"The following are multiple choice questions (with answers)."}


def test_the_class_is_the_index_of_the_answer_and_is_called_by_its_letter():
    frame = reading()
    task = task_of(frame)
    truth = {row["passage"]: row["label"] for row in frame.to_dict("records")}
    assert task.label_names == tuple(NAMES)
    for rows in task.splits.values():
        assert [truth[text] for text in rows.texts] == rows.labels.tolist()


def test_a_prompt_the_user_gives_is_taken_instead(tokenizer):
    task = task_of(reading(), template="{text_pair}\nRead: {text}\nSo:")
    (prompt, *_) = prompts_of(task, tokenizer)["train"]
    assert prompt.startswith("Did it end")
    assert prompt.endswith("it went on.\nSo:")


def test_naming_the_text_asks_no_question():
    task = task_of(reading().assign(label=["x", "y"] * (N // 2)), text="passage")
    assert (task.template, task.splits["train"].pairs) == (None, None)


def test_questions_and_options_are_taken_by_any_name_that_the_user_gives():
    odd = reading().rename(columns={"passage": "p", "question": "q", "choices": "o", "label": "k"})
    same = task_of(reading())
    named = task_of(odd, text="p", text_pair="q", choices="o", label="k")
    assert named.fingerprint == same.fingerprint
    assert named.template == same.template
    assert named.columns.guessed == ()
    assert same.columns.guessed == ("text", "text_pair", "choices", "label")


# --- options and answers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        ([1, 2.5], ["1", "2.5"]),
        ('["a", "b"]', ["a", "b"]),
        ({"text": ["a", "b"], "label": ["A", "B"]}, ["a", "b"]),
        ('{"text": ["a", "b"]}', ["a", "b"]),
        ("a", None),
        ("[a", None),
        ("[" * 100_000, None),
        ([], None),
        (["a", None], None),
        (["a", ["b"]], None),
        (7, None),
        (None, None),
    ],
)
def test_options_are_read_from_every_form_that_is_about(cell, expected):
    assert options_of(cell) == expected


THREE = [["2", "3", "4"], ["a", "b", "c"], ["x", "y"]]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([2, 0, 1], [2, 0, 1]),
        (["2", "0", "1"], [2, 0, 1]),  # all are indices, though an option reads "2" too
        ([2.0, 0.0, 1.0], [2, 0, 1]),
        (["C", "a", "B"], [2, 0, 1]),
        (["4", "a", "y"], [2, 0, 1]),
        ([2, 0, 2], [2, 0, None]),
        (["C", "A", "C"], [2, 0, None]),
        (["4", "a", "z"], [2, 0, None]),
        ([True, False, True], [None, None, None]),
        ([-1, 10**30, None], [None, None, None]),
    ],
)
def test_an_answer_is_an_index_a_letter_or_words_the_same_way_in_a_whole_column(answers, expected):
    assert answer_indices(answers, THREE) == expected


def test_answers_that_could_be_numbers_or_words_are_numbers():
    assert answer_indices(["2", "1"], [["2", "1", "0"]] * 2) == [2, 1]


def test_answers_in_every_form_make_the_same_task():
    frame = reading()
    rows = frame.to_dict("records")
    same = task_of(frame, names={"label": NAMES}).fingerprint
    letters = frame.assign(answer=[NAMES[i] for i in frame["label"]]).drop(columns="label")
    words = frame.assign(label=[row["choices"][row["label"]] for row in rows])
    strings = frame.assign(
        choices=[json.dumps(row["choices"]) for row in rows], label=frame["label"].astype(str)
    )
    arc = frame.assign(
        choices=[{"text": r["choices"], "label": NAMES[: len(r["choices"])]} for r in rows]
    )
    for form in (letters, words, strings, arc):
        assert task_of(form).fingerprint == same


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("choices", ["one"], r"Row 4, column 'choices', has 1 options, expected 2 to 26"),
        ("choices", "none", r"Row 4, column 'choices', has no list of options"),
        ("choices", [str(i) for i in range(27)], "has 27 options"),
        ("label", 4, r"Row 4 has '4' in column 'label', which is none of its 2 options"),
        ("label", -1, r"Row 4 has '-1' in column 'label'"),
        ("question", None, r"Row 4 has no value in column 'question'"),
    ],
)
def test_options_and_answers_that_do_not_fit_are_refused_by_row_and_column(column, value, said):
    frame = reading().astype(object)
    frame.at[3, column] = value
    with pytest.raises(TaskError, match=said):
        task_of(frame)


# --- what is cut --------------------------------------------------------------------------------

PIECES = ["it went on", "A. x\nB. y", "\n", "Question:", "é", "\u2028", "a " * 50]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def reading_prompt(tokenizer):
    task = task_of(reading(passage="it went on and on " * 40 + "{i}"))
    prompt = bake(tokenizer, task.template, 80, task.splits["train"])
    assert n_truncated(prompt, task) == N
    return prompt


@pytest.fixture(scope="module")
def exam_prompt(tokenizer):
    task = task_of(exam())
    prompt = bake(tokenizer, task.template, 120, task.splits["train"])
    assert n_truncated(prompt, task) == 0
    return prompt


@given(passage=WORDS.map(" ".join), question=WORDS.map("".join))
def test_the_limit_cuts_the_passage_and_never_the_question_or_an_option(
    reading_prompt, passage, question
):
    pair = f"{question}\nA. {'yes ' * 200}\nB. no"
    for text in (passage, passage + " and on" * 200):
        (ids,) = reading_prompt.encode([text], [pair])
        end = f"\n\nQuestion: {pair}\nAnswer:"
        said = reading_prompt.tokenizer.decode(ids)
        assert said.endswith(end)
        if not holds_options(text):  # a passage in the form of options passes for a question
            assert said == f"Article: {text[: reading_prompt.max_chars]}{end}"


def test_options_that_leave_no_room_stay_whole_and_a_little_of_the_passage_with_them(tokenizer):
    task = task_of(reading(passage="it went on and on " * 40 + "{i}"))
    for limit in (20, 40):
        prompt = bake(tokenizer, task.template, limit, task.splits["train"])
        assert 1 <= prompt.max_chars <= limit
        rows = task.splits["test"]
        for ids, pair in zip(prompt.encode(rows.texts, rows.pairs), rows.pairs, strict=True):
            said = prompt.tokenizer.decode(ids)
            assert said.startswith("Article: i")
            assert said.endswith(f"\n\nQuestion: {pair}\nAnswer:")


@given(question=WORDS.map(" ".join))
def test_a_question_without_a_passage_is_never_cut(exam_prompt, question):
    long = question + " and on" * 300
    said = exam_prompt.tokenizer.decode(exam_prompt.encode([long], ["A. yes\nB. no"])[0])
    assert said.endswith(f"\n\n{long}\nA. yes\nB. no\nAnswer:")


def test_where_the_model_itself_ends_the_beginning_of_such_a_question_goes(
    exam_prompt, monkeypatch
):
    monkeypatch.setattr(exam_prompt.tokenizer, "model_max_length", 80)
    (ids,) = exam_prompt.encode(["on and " * 300 + "so?"], ["A. yes\nB. no"])
    assert len(ids) <= 80
    assert exam_prompt.tokenizer.decode(ids).endswith("and so?\nA. yes\nB. no\nAnswer:")


@pytest.mark.parametrize("limit", [40, 80])
def test_a_question_of_yes_or_no_stays_whole_wherever_it_fits_alone(tokenizer, limit):
    frame = yes_or_no().assign(
        passage="it went on " * 100, question=[f"did it {i} " + "or not " * 3 for i in range(N)]
    )
    task = task_of(frame)
    for texts in prompts_of(task, tokenizer, limit).values():
        assert all(text.endswith("or not or not or not \nAnswer:") for text in texts)


def test_a_second_text_longer_than_the_models_end_is_no_error(tokenizer):
    task = task_of(yes_or_no())
    prompt = bake(tokenizer, task.template, 60, task.splits["train"])
    prompt.tokenizer.model_max_length = 48
    (ids,) = prompt.encode(["it went on"], ["did it " * 300])
    assert len(ids) <= 48


@pytest.mark.parametrize(
    "frame",
    [reading(passage="went on " * 90 + "{i}"), exam(), yes_or_no()],
    ids=["race", "mmlu", "boolq"],
)
def test_a_stock_pipeline_on_raw_fields_gives_the_chips_answer(
    frame, tiny_backbone_folder, tmp_path
):
    """Long passages among them: what the limit cuts must be the same in plain transformers."""
    frame.to_json(tmp_path / "toy.jsonl", orient="records", lines=True)
    config = RunConfig.checked(
        backbone=str(tiny_backbone_folder),
        data=str(tmp_path / "toy.jsonl"),
        max_length=120,
        poolings=("last",),
    )
    home, folder, out = tmp_path / "home", RunFolder(tmp_path / "run"), tmp_path / "out"
    folder.path.mkdir()
    report = experiment.run(
        config, home=home, run_id="one", folder=folder, progress=silent, on_points=lambda _: None
    )
    assert report.task.columns["label"] == "label"
    cut = CutSpec(cut_layer=1, pooling="last")
    built = experiment.build(folder, cut, home=home, out=out, progress=silent)
    assert built.max_difference < 1e-5
    rows = make_task(Table("toy", {"all": frame}, {}), config).splits["test"]
    ours = load(out).predict(rows.texts, rows.pairs)
    pairs = [{"text": t, "text_pair": p} for t, p in zip(rows.texts, rows.pairs, strict=True)]
    stock = pipeline("text-classification", str(out))(pairs)
    assert [s["label"] for s in stock] == [p.label for p in ours]
    assert max(abs(s["score"] - p.score) for s, p in zip(stock, ours, strict=True)) < 1e-5
    plain = AutoTokenizer.from_pretrained(out)
    assert plain.truncation_side == ("left" if "passage" not in frame else "right")
    assert plain(rows.texts, rows.pairs)["input_ids"] == bake(
        load_tokenizer(tiny_backbone_folder),
        report.task.template,
        120,
        make_task(Table("toy", {"all": frame}, {}), config).splits["train"],
    ).encode(rows.texts, rows.pairs)
