"""The process that answers pages: what a run would read, tokens of a text, predictions of a bundle.

Reads one JSON object a line on standard input, answers with one a line on standard output, and ends
when its input closes. Keeps the last run and the last bundle loaded. What loads models is imported
by the questions that need it: a page that only asks for columns waits for nothing else.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from chipviz import preview
from chipviz.config import RunConfig
from chipviz.errors import ChipvizError
from chipviz.keys import ChipKey, Cut
from chipviz.runs.store import Store


class Answerer:
    """Answers requests about the runs of one home folder."""

    def __init__(self, home: Path) -> None:
        self._store = Store(home)
        self._run = lru_cache(maxsize=1)(self._open_run)
        self._bundle = lru_cache(maxsize=1)(_open_bundle)
        self._answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "columns": lambda asked: asdict(
                preview.look_at_columns(asked["data"], asked["label"], home=home)
            ),
            "outlook": lambda asked: asdict(
                preview.look_at_source(asked["backbone"], asked["dtype"], home=home)
            ),
            "preview": lambda asked: preview.inspect(
                RunConfig.checked(**asked["config"]), home=home
            ).to_dict(),
            "tokens": self._tokens,
            "predict": self._predict,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; what the user can mend comes back as `error` and `hint`."""
        try:
            return self._answers[request["op"]](request)
        except ChipvizError as error:
            return {"error": error.message, "hint": error.hint}

    def _tokens(self, request: dict[str, Any]) -> dict[str, Any]:
        from chipviz.chips import tokens

        backbone, prompt, chips, names = self._run(request["run_id"])
        read = tokens.read_tokens(
            backbone,
            prompt,
            chips,
            request["text"],
            cut=Cut(request["layer"], ChipKey.parse(request["chip"])),
            text_pair=request.get("text_pair"),
        )
        return {**read, "label_names": names}

    def _predict(self, request: dict[str, Any]) -> dict[str, Any]:
        classifier = self._bundle(Path(request["path"]))
        found = classifier.predict(request["texts"], request.get("text_pairs"))
        return {"predictions": [p.__dict__ for p in found]}

    def _open_run(self, run_id: str) -> tuple[Any, Any, Any, list[str]]:
        from chipviz.backbones.opening import reopen
        from chipviz.chips.chip import Chips

        report, folder = self._store.report(run_id), self._store.folder(run_id)
        config = self._store.get(run_id).config
        backbone, prompt = reopen(config, report, home=self._store.home, folder=folder)
        chips = Chips.load(folder.chips, backbone.folder.fingerprint)
        return backbone, prompt, chips, report.task.label_names


def _open_bundle(path: Path) -> Any:
    from chipviz.bundle import save

    return save.load(path)


def main() -> None:
    """Answer until standard input closes."""
    parser = argparse.ArgumentParser(prog="python -m chipviz.runs.model_process")
    parser.add_argument("--home", type=Path, required=True)
    answerer = Answerer(parser.parse_args().home)
    for line in sys.stdin:
        answer = answerer.answer(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
