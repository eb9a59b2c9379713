"""Bundles of several tasks on one backbone -> one folder, compared with each of them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from chipviz.bundle import joined, tasks, verify
from chipviz.bundle.folders import copy_reader
from chipviz.bundle.kinds import MAX_SHARD, mend_config
from chipviz.bundle.metadata import CHIP_FILE, METADATA, refuse_in_the_way
from chipviz.bundle.parts import Part, base_of, fields, parts_of, slug
from chipviz.errors import BundleError, ConfigError
from chipviz.files import bytes_below, publish
from chipviz.progress import Progress, ProgressFn, silent


def join(
    bundles: Sequence[Path],
    out: Path,
    *,
    home: Path,
    progress: ProgressFn,
    names: Sequence[str] = (),
) -> tasks.JoinReport:
    """Write bundles of one backbone as one folder, cut at the deepest of them.

    Args:
        bundles: Folders of bundles of texts, or of what was joined before.
        out: The folder. Must not exist, or be one of this kind.
        home: The folder that may hold their runs.
        progress: Told each step.
        names: Of the tasks, in order. None takes those of their data.

    Raises:
        ChipvizError: If they do not go together, or the whole says something else than one of them.
    """
    refuse_in_the_way(out, tasks.FILE, "folder of several tasks")
    parts: list[Part] = []
    for bundle in bundles:
        progress(Progress("building", f"asking {bundle.name}"))
        parts += parts_of(bundle, home)
    parts = _named(parts, names)
    _refuse_strangers(parts)
    progress(Progress("building", f"joining {len(parts)} tasks"))
    with publish(out) as folder:
        _write(parts, folder)
        progress(Progress("verifying", "asking the whole what each was asked"))
        whole = joined.load_joined(folder)
        difference = max(_compare(whole, part) for part in parts)
        report = _report(parts, whole, difference, out, folder)
        (folder / "README.md").write_text(_card(report, parts), "utf-8")
        told = {name: value for name, value in asdict(report).items() if name not in tasks.OF_PLACE}
        _write_list(parts, folder, report=told)
        verify.write_sums(folder)
        n_bytes = bytes_below(folder)
    return replace(report, n_bytes=n_bytes)


def join_beside(bundles: Sequence[Path], home: Path) -> tasks.JoinReport:
    """Join bundles into a folder beside the first.

    Args:
        bundles: See `join`.
        home: See `join`.

    Raises:
        ChipvizError: As `join` does.
    """
    return join(bundles, tasks.place_of(bundles[0]), home=home, progress=silent)


def _named(parts: list[Part], names: Sequence[str]) -> list[Part]:
    """The same under names of their own.

    Raises:
        ConfigError: If names do not fit.
    """
    if not 1 < len(parts) <= tasks.MAX_TASKS:
        raise ConfigError(
            f"There are {len(parts)} tasks to join.", f"Give 2 to {tasks.MAX_TASKS} bundles."
        )
    if names and (len(names) != len(parts) or any(slug(n) != n for n in names)):
        raise ConfigError(
            f"There are {len(parts)} tasks and {len(names)} names for them.",
            "Give each a name of letters, digits, dots and dashes, or none.",
        )
    taken: list[str] = []
    for i, part in enumerate(parts):
        name, n = names[i] if names else part.name, 2
        while name.lower() in taken:
            if names:
                raise ConfigError(f"Two tasks are called {name}.", "Give each its own name.")
            name, n = f"{part.name}-{n}", n + 1
        taken.append(name.lower())
        parts[i] = replace(part, name=name)
    return parts


def _refuse_strangers(parts: Sequence[Part]) -> None:
    """Refuse bundles of several backbones.

    Raises:
        BundleError: If there are.
    """
    first, *others = parts
    for other in others:
        one, two = (part.metadata.everything["backbone"] for part in (first, other))
        if one.get("fingerprint") != two.get("fingerprint"):
            raise BundleError(
                f"{other.name} was cut from {str(two.get('name'))[:80]}, {first.name} from "
                f"{str(one.get('name'))[:80]}: another model.",
                "Join bundles of one backbone.",
            )
        if first.metadata.cut.dtype != other.metadata.cut.dtype:
            raise BundleError(
                f"{other.name} and {first.name} keep their weights in different number formats.",
                "Build them with the same --dtype.",
            )


def _write(parts: Sequence[Part], folder: Path) -> None:
    deepest = max(parts, key=lambda part: part.n_layers)
    base, weights = base_of(deepest.weights)
    base.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    mend_config(folder, base)
    for part in parts:
        own = folder / tasks.TASKS / part.name
        own.mkdir(parents=True)
        copy_reader(part.files, own)
        for name in (METADATA, "config.json"):  # the class of its tokenizer is found by the latter
            shutil.copyfile(part.files / name, own / name)
        tensors = {name: value.contiguous() for name, value in part.tensors.items()}
        save_file(tensors, own / CHIP_FILE)
    _write_list(parts, folder)  # the whole is loaded by it


def _write_list(parts: Sequence[Part], folder: Path, **more: object) -> None:
    """Write the names of the tasks, and what is known of the whole."""
    said = {"format": tasks.FORMAT, "tasks": [part.name for part in parts]} | more
    (folder / tasks.FILE).write_text(json.dumps(said, indent=2), "utf-8")


def _compare(whole: joined.Joined, part: Part) -> float:
    """Largest difference of a probability between the whole and a task's own bundle.

    Raises:
        BundleError: If it is too large.
    """
    alone = whole.of(part.name)
    found = [row[part.name] for row in alone.predict(*fields(part.metadata, part.rows))]
    one, other = (
        torch.tensor([list(p.probabilities.values()) for p in said]) for said in (found, part.said)
    )
    difference = float((one - other).abs().max())
    if not difference <= verify.TOLERANCE:
        raise BundleError(
            f"The whole disagrees with the bundle of {part.name} by {difference:.3g}.",
            "This is a fault of chipviz or of the model's family; nothing was kept.",
        )
    return difference


def _report(
    parts: Sequence[Part], whole: joined.Joined, difference: float, out: Path, folder: Path
) -> tasks.JoinReport:
    lines = []
    for part in parts:
        scores = part.metadata.everything["scores"]
        test = next(score["accuracy"] for score in scores if score["split"] == "test")
        n_parameters = int(part.metadata.everything["cost"]["n_parameters"])
        lines.append(tasks.TaskLine(part.name, part.metadata.cut.cut_layer, test, n_parameters))
    chips = sum(task.chip.n_parameters for task in whole.tasks)
    return tasks.JoinReport(
        path=str(out),
        tasks=lines,
        cut_layer=whole.backbone.n_layers - 1,
        n_parameters=sum(p.numel() for p in whole.backbone.model.parameters()) + chips,
        n_bytes=bytes_below(folder),
        n_passes=whole.n_passes,
        n_checked=sum(len(part.rows) for part in parts),
        max_difference=difference,
    )


def _card(report: tasks.JoinReport, parts: Sequence[Part]) -> str:
    """What lies here, what each task costs alone, and how it is asked."""
    rows = "\n".join(
        f"| {task.name} | {task.cut_layer} | {100 * task.test_accuracy:.1f} % | "
        f"{task.n_parameters:,} |"
        for task in report.tasks
    )
    alone = sum(task.n_parameters for task in report.tasks)
    passes = (
        "All of them read the same prompt: one pass answers them all."
        if report.n_passes == 1
        else f"Their prompts differ: the weights are shared, the passes are not ({report.n_passes} "
        "a text)."
    )
    backbone = str(parts[0].metadata.everything["backbone"].get("name"))[:120]
    return f"""# {len(parts)} tasks on one cut backbone

Made by chipviz of bundles cut from `{backbone}`, which share layers 0 to {report.cut_layer}.
{passes}

| task | layer | test accuracy | parameters alone |
| --- | ---: | ---: | ---: |
{rows}
| together | {report.cut_layer} | | {report.n_parameters:,} instead of {alone:,} |

```bash
python -m chipviz predict PATH --text "TEXT" --json
```

```python
from pathlib import Path
from chipviz.bundle.joined import load_joined
print(load_joined(Path("PATH")).predict(["TEXT"])[0])
```

Checked: {report.n_checked} rows get from the whole what their own bundle says, the largest
difference of a probability is {report.max_difference:.1e}. The licence of the backbone applies.
"""
