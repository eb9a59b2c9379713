"""What the command line prints: runs, curves and choices, JSON, progress and refusals."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from chipviz.cli.options import flag
from chipviz.config import Rule
from chipviz.data.task import notice_in_words, say_columns
from chipviz.errors import Notice, Refusal
from chipviz.files import write_atomic
from chipviz.keys import Cut
from chipviz.progress import Progress, ProgressFn
from chipviz.results.report import Controls, RunReport, SelectionInfo
from chipviz.runs.store import Job, Store


def show(text: str, file: TextIO | None = None) -> None:
    """Print lines for a person. Texts and names in them are of others: nothing is obeyed.

    Args:
        text: Lines, parted by newlines.
        file: Where they go. None is standard output.
    """
    print("\n".join(map(_harmless, text.split("\n"))), file=file or sys.stdout)


def _harmless(line: str) -> str:
    """A line without what a terminal would obey: colours, titles, the cursor, reading backwards."""
    return "".join(c if c.isprintable() else " " for c in line)


def run_line(job: Job) -> dict[str, Any]:
    """What `runs --json` prints of each run."""
    return {
        "run_id": job.run_id,
        "name": job.name,
        "status": job.status,
        "created": job.created,
        "label": job.label,
        "message": job.message,
    }


def run_object(store: Store, job: Job) -> dict[str, Any]:
    """What `train --json` and `show --json` print."""
    base: dict[str, Any] = run_line(job) | {"config": job.config.model_dump(mode="json")}
    if job.state == "done":
        base |= store.report(job.run_id).model_dump(mode="json")
    base["status"] = job.status
    base["history"] = [point.to_dict() for point in store.points(job.run_id)]
    built = (bundle.bundle for bundle in store.bundles(job.run_id))
    base["bundles"] = [bundle.model_dump(mode="json") for bundle in built if bundle]
    return base


def print_run(store: Store, job: Job) -> None:
    """A run as a person reads it: curves, controls and what each rule says, if it is done."""
    show(f"{job.run_id}  {job.name}  {job.status}  {job.message}")
    if job.state != "done":
        return
    report = store.report(job.run_id)
    show(say_columns(report.task.columns, report.task.guessed))
    for notice in report.warnings:
        show(notice_in_words(notice))
    show(f"\nTest accuracy by layer, preset {report.preset}")
    _print_curves(report)
    show(
        f"\nControls: majority {100 * report.controls.majority:.1f}%, "
        f"embedding {100 * report.controls.embedding:.1f}%, "
        f"{_beside(report.controls)}{_itself(report.controls)}\n\n"
        f"Rules, on {report.judged}"
    )
    choices = dict(report.selection)
    oracle = choices.pop("oracle", None)
    for rule, chosen in choices.items():
        _print_choice(report, rule, chosen)
    if oracle:
        show("\nFor comparison only, chosen on test")
        _print_choice(report, "oracle", oracle)


def _beside(controls: Controls) -> str:
    return ", ".join(f"{name} {100 * value:.1f}%" for name, value in controls.beside.items())


def _itself(controls: Controls) -> str:
    said = controls.zero_shot
    if said is None:
        return ""
    return f", the model itself {100 * said:.1f}% on {controls.n_zero_shot:,} texts"


def _print_curves(report: RunReport) -> None:
    """A table of accuracies: one column per chip, one row per layer, the embedding first."""
    chips = list(dict.fromkeys(score.key for score in report.scores))
    published = [key for key in chips if key.by_paper]
    heads = [f"{key.vector.name}{'*' * (key in published)} {key.word}" for key in chips]
    show(" layer  " + "  ".join(f"{head:>7}" for head in heads))
    for layer in range(-1, report.backbone.n_layers):
        row = (report.score_at(Cut(layer, key), "test").accuracy for key in chips)
        cells = (
            f"{100 * value:.1f}%".rjust(max(7, len(head)))
            for value, head in zip(row, heads, strict=True)
        )
        show(f" {'embed' if layer < 0 else f'{layer:>5}'}  " + "  ".join(cells))
    if published:
        show(" * as published: a paper's own recipe, on states before the final norm")
    if any(key.lucky for key in published):
        show(
            "   Rules pass over its sparse and joined chips unless these are named: each is the "
            "best of hundreds of tries on validation."
        )


def _print_choice(report: RunReport, rule: Rule, chosen: SelectionInfo) -> None:
    test = report.score_at(chosen.cut, "test")
    show(
        f"{rule:>12}: layer {chosen.cut_layer} {chosen.key.vector.name} {chosen.key.word}, "
        f"test {100 * test.accuracy:.1f}% "
        f"({100 * test.accuracy_low:.1f} to {100 * test.accuracy_high:.1f}), "
        f"{'' if test.auroc is None else f'AUROC {test.auroc:.3f}, '}"
        f"layer ratio {100 * chosen.layer_ratio:.1f}%, "
        f"parameter ratio {100 * chosen.parameter_ratio:.1f}%: {chosen.why}"
    )


def print_notices(notices: Sequence[Notice]) -> None:
    """What must be known although nothing stops, on standard error."""
    for notice in notices:
        show(notice_in_words(notice), file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """One object, one line."""
    print(json.dumps(value, ensure_ascii=False))


def printer() -> ProgressFn:
    """Progress on standard error: one moving line on a terminal, a line a second otherwise."""
    last = {"time": 0.0, "label": ""}
    terminal = sys.stderr.isatty()

    def report(progress: Progress) -> None:
        now = time.monotonic()
        if now - last["time"] < (0.1 if terminal else 2.0) and progress.label == last["label"]:
            return
        last.update(time=now, label=progress.label)
        share = f" {100 * progress.done / progress.total:3.0f} %" if progress.total else ""
        left = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        line = f"{progress.stage}: {progress.label}{share}{left}"
        if terminal:
            print(f"\r\033[K{_harmless(line[:110])}", end="", file=sys.stderr, flush=True)
        else:
            print(_harmless(line), file=sys.stderr, flush=True)

    return report


def refuse(refusal: Refusal) -> int:
    """Two lines, whatever a path or a value in them holds. Settings are named as options."""
    end_progress()
    options = " and ".join(flag(field) for field in refusal.fields)
    hint = f"{refusal.hint} See {options}." if options else refusal.hint
    for name, text in (("error", refusal.message), ("hint", hint)):
        show(f"{name}: {' '.join(text.splitlines())}", file=sys.stderr)
    return 1


def end_progress() -> None:
    """Clear the moving line, so that what follows begins at the left."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def predictions(
    lines: Sequence[dict[str, Any]], shown: Sequence[str], out: Path | None, as_json: bool
) -> None:
    """Print what a bundle says of each row, or write it as JSON lines.

    Args:
        lines: Label and score of each row.
        shown: The same in words.
        out: Where JSON lines go, if anywhere.
        as_json: Whether JSON is printed.
    """
    if out:
        write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if as_json:
        print_json({"predictions": list(lines)})
    elif not out:
        for line in shown:
            show(line)
