"""Rows with the columns of a run -> the texts that its bundle reads."""

import pandas as pd

from chipviz.config import Preset
from chipviz.data.columns import list_columns
from chipviz.data.from_table import read_fields
from chipviz.data.task import Columns
from chipviz.errors import TaskError
from chipviz.results.report import TaskInfo


def fields_of(
    rows: pd.DataFrame, task: TaskInfo, preset: Preset
) -> tuple[list[str], list[str] | None]:
    """First and second texts, as the prompt of a task takes them.

    Args:
        rows: A table with the columns of the run; others are not looked at.
        task: The run's task. Its columns say what each text is.
        preset: The run's preset.

    Raises:
        TaskError: If a column or a value is missing, or a value is no text.
    """
    columns = columns_of(task)
    wanted = [name for role, name in columns.roles.items() if role != "label"]
    if lacking := [name for name in wanted if name not in rows.columns]:
        raise TaskError(
            f"The table has no column {lacking[0]!r}; columns are {list_columns(rows.columns)}.",
            "Name its columns as those of the data that the chip was trained on.",
        )
    return read_fields(rows, "all", columns, preset)[:2]


def columns_of(task: TaskInfo) -> Columns:
    """The columns of a run."""
    named = task.columns
    return Columns(named["label"], named["text"], named.get("text_pair"), named.get("choices"))
