"""The process that answers pages: what a run would read, tokens of a text, predictions of a bundle.

Reads questions on standard input and answers on standard output, see `questions`. Ends when its
input closes. Keeps the last run and the last bundle loaded. What loads models is imported by the
questions that need it: a page that only asks for columns waits for nothing else.
"""

import argparse
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from chipviz import bundle, preview
from chipviz.data.task import refuse_kind
from chipviz.errors import ChipvizError, Refusal, panics_as_errors
from chipviz.results.answers import PatchReading, Prediction, TokenReading
from chipviz.runs.questions import (
    ANSWER,
    QUESTION,
    REFUSED,
    ClassifyTable,
    Export,
    Join,
    LookAhead,
    LookAtBackbone,
    LookAtColumns,
    Predict,
    Question,
    ReadPatches,
    ReadTokens,
    TablePart,
)
from chipviz.runs.store import Store

TABLE_ROWS = 256
"""Rows of a table that one question classifies: others may ask in between."""


class Answerer:
    """Answers questions about the runs of one home folder."""

    def __init__(self, home: Path) -> None:
        self._home, self._store = home, Store(home)
        self._run = lru_cache(maxsize=1)(self._open_run)
        self._bundle = lru_cache(maxsize=1)(_open_bundle)

    def answer(self, question: Question) -> Any:
        """The answer, of the type that the question names.

        Raises:
            ChipvizError: Whatever the user can mend.
        """
        match question:
            case LookAtColumns(data, label):
                return preview.look_at_columns(data, label, home=self._home)
            case LookAtBackbone(backbone, dtype):
                return preview.look_at_source(backbone, dtype, home=self._home)
            case LookAhead(config):
                return preview.inspect(config, home=self._home)
            case ReadTokens():
                return self.read_tokens(question)
            case ReadPatches():
                return self.read_patches(question)
            case Predict(path, texts, text_pairs, adaptive):
                opened = self._bundle(Path(path), adaptive)
                predictions: list[Prediction] = opened.predict(texts, text_pairs)
                return predictions
            case ClassifyTable():
                return self.classify_table(question)
            case Export(path, target, int8):
                return bundle.export_beside(Path(path), target, self._home, int8=int8)
            case Join(paths):
                return bundle.join_beside([Path(path) for path in paths], self._home)

    def classify_table(self, question: ClassifyTable) -> TablePart:
        """The next rows of a table, beside its columns. Written beside the table."""
        from chipviz.bundle import bulk

        path, file = Path(question.path), Path(question.file)
        opened = self._bundle(path, question.adaptive)
        mark = f"{bulk.source_mark(file, path)} {question.adaptive} {question.probabilities}"
        wanted = bulk.Wanted(bulk.beside(file, mark), question.probabilities, mark)
        done = bulk.predict_beside(file, opened, wanted, most=TABLE_ROWS)
        return TablePart(str(wanted.out), done.n_rows, done.finished)

    def read_tokens(self, question: ReadTokens) -> TokenReading:
        """What a run's chips say at each token of a text."""
        from chipviz.chips import tokens

        refuse_kind(self._store.report(question.run_id).task.kind, "text")
        backbone, prompt, chips, label_names = self._run(question.run_id)
        return tokens.read_tokens(
            backbone,
            prompt,
            chips,
            question.text,
            cut=question.cut,
            label_names=label_names,
            text_pair=question.text_pair,
            single=question.single,
        )

    def read_patches(self, question: ReadPatches) -> PatchReading:
        """What a run's chips say at each patch of a picture."""
        from chipviz.chips import patches

        refuse_kind(self._store.report(question.run_id).task.kind, "image")
        backbone, reader, chips, label_names = self._run(question.run_id)
        return patches.read_patches(
            backbone, reader, chips, question.source, cut=question.cut, label_names=label_names
        )

    def _open_run(self, run_id: str) -> tuple[Any, Any, Any, list[str]]:
        from chipviz.backbones.opening import reopen
        from chipviz.chips.chip import Chips

        report, folder = self._store.report(run_id), self._store.folder(run_id)
        config = self._store.get(run_id).config
        backbone, prompt = reopen(config, report, home=self._home, folder=folder)
        chips = Chips.load(folder.whole(folder.chips), backbone.folder.fingerprint)
        return backbone, prompt, chips, report.task.label_names


def _open_bundle(path: Path, adaptive: bool) -> Any:
    return bundle.load(path, adaptive=adaptive)


def reply(answerer: Answerer, line: str) -> str:
    """The line that answers a question. What the user can mend is refused in words."""
    try:
        with panics_as_errors():
            answer = answerer.answer(QUESTION.validate_json(line))
    except ChipvizError as error:
        return REFUSED + TypeAdapter(Refusal).dump_json(error.refusal).decode()
    except Exception as error:  # noqa: BLE001 - the page gets a sentence, the log the rest
        traceback.print_exception(error)
        said = " ".join(f"Unexpected {type(error).__name__}: {error}".split())[:300]
        refusal = Refusal(f"{said}.", "inference.log in the home folder says where it happened.")
        return REFUSED + TypeAdapter(Refusal).dump_json(refusal).decode()
    kind = list[Prediction] if isinstance(answer, list) else type(answer)
    return ANSWER + TypeAdapter(kind).dump_json(answer).decode()


def main() -> None:
    """Answer until standard input closes."""
    parser = argparse.ArgumentParser(prog="python -m chipviz.runs.model_process")
    parser.add_argument("--home", type=Path, required=True)
    answerer = Answerer(parser.parse_args().home)
    for line in sys.stdin:
        sys.stdout.write(reply(answerer, line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
