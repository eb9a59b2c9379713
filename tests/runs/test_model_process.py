"""The process that answers pages: every question gets one line, whatever goes wrong."""

import pytest

from chipviz.errors import ConfigError, Refusal
from chipviz.keys import ChipKey, Cut
from chipviz.results.answers import Prediction
from chipviz.runs.model_process import Answerer, reply
from chipviz.runs.questions import QUESTION, Predict, ReadTokens, line_of

QUESTIONS = [
    Predict("/a", ["one\ntwo", "\u2028"], None),
    ReadTokens("20990101-000000-ffff", "x", "y", Cut(3, ChipKey.published("mlp"))),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.op)
def test_a_question_is_one_line_and_comes_back_as_it_was(question):
    line = line_of(question)
    assert "\n" not in line
    assert QUESTION.validate_json(line) == question


def test_an_answer_is_one_line(monkeypatch, home):
    answer = [Prediction("a\nb", 0.5, {"a\nb": 0.5, "c": 0.5})]
    monkeypatch.setattr(Answerer, "answer", lambda *_: answer)
    line = reply(Answerer(home), line_of(QUESTIONS[0]))
    assert line.startswith("answer [")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("No.", "Take 2.", "blocks"), Refusal("No.", "Take 2.", ("blocks",))),
        (
            ZeroDivisionError("by\nzero"),
            Refusal(
                "Unexpected ZeroDivisionError: by zero.",
                "inference.log in the home folder says where it happened.",
            ),
        ),
    ],
)
def test_whatever_goes_wrong_is_refused_in_words(monkeypatch, home, error, said, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(Answerer, "answer", fails)
    line = reply(Answerer(home), line_of(QUESTIONS[0]))
    from pydantic import TypeAdapter

    assert TypeAdapter(Refusal).validate_json(line.removeprefix("refused ")) == said
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)
