"""What a page asks before a run starts: a table's columns, a backbone's outlook, a preview.

Answers are plain JSON. Heavy libraries are imported where they are needed, so that columns are
known in a second.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from chipviz.config import RunConfig
from chipviz.errors import BackboneError, TaskError


def columns(data: str, label: str | None, home: Path) -> dict[str, Any]:
    """The columns of a table, and what each would be taken for.

    Args:
        data: As `RunConfig.data`.
        label: The label column, where the user named it.
        home: The folder that holds `data/`.

    Returns:
        `columns`, all names; `roles`, the guess by role; or no roles and `missing`, why there is no
        guess.

    Raises:
        ChipvizError: If the table cannot be had or read.
    """
    from chipviz.columns import find_columns
    from chipviz.tables import read_table

    frames = read_table(data, home).frames
    frame = frames["all" if "all" in frames else "train"]
    answer: dict[str, Any] = {"columns": list(frame.columns), "roles": {}, "missing": ""}
    try:
        found = find_columns(frame, RunConfig(backbone="any", data=data, label=label))
    except TaskError as error:
        return answer | {"missing": error.message}
    return answer | {"roles": found.roles}


def outlook(backbone: str, dtype: str | None, home: Path) -> dict[str, Any]:
    """Size of a backbone, its licence, the memory it needs and what is free; loads no weight.

    Args:
        backbone: As `RunConfig.backbone`.
        dtype: What to compute in; None takes the fast one of the device.
        home: The folder that holds `backbones/`.

    Returns:
        The fields of `Outlook`, `memory_bytes`, and `refused` with its `hint`: why it does not fit,
        or None.

    Raises:
        ChipvizError: If the backbone cannot be had, or is none.
    """
    from chipviz import outlook as outlooks
    from chipviz.adapters import find_model
    from chipviz.backbone import best_device
    from chipviz.sources import public_name

    folder = find_model(backbone, home)
    device = best_device()
    config = RunConfig.checked(backbone=backbone, data="any", dtype=dtype)
    chosen = outlooks.chosen_dtype(config, device, home)
    found = outlooks.outlook(folder, public_name(backbone), dtype=chosen, device=device)
    refused, hint = None, ""
    try:
        found.refuse()
    except BackboneError as error:
        refused, hint = error.message, error.hint
    sums = {"memory_bytes": found.memory_bytes, "refused": refused, "hint": hint}
    return asdict(found) | sums


def preview(config: RunConfig, home: Path) -> dict[str, Any]:
    """What a run with these settings would read; see `chipviz.preview.Preview`.

    Raises:
        ChipvizError: As the run would.
    """
    from chipviz.preview import inspect

    return inspect(config, home=home).to_dict()
