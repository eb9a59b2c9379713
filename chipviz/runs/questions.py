"""What pages ask the process that keeps models loaded. Each question names the type of its answer.

A question is one line of JSON. Its answer is one line too: `answer` and JSON, or `refused` and the
JSON of a `Refusal`. Whatever a library prints beside begins otherwise.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from chipviz.bundle.targets import Target
from chipviz.config import RunConfig
from chipviz.keys import Cut

ANSWER = "answer "
REFUSED = "refused "


@dataclass(frozen=True)
class LookAtColumns:
    """Which columns a table has: a `preview.ColumnsPreview`."""

    data: str
    label: str | None
    op: Literal["columns"] = "columns"


@dataclass(frozen=True)
class LookAtBackbone:
    """What a backbone is and takes: a `preview.BackbonePreview`."""

    backbone: str
    dtype: str | None
    op: Literal["backbone"] = "backbone"


@dataclass(frozen=True)
class LookAhead:
    """What a run would read: a `preview.Preview`."""

    config: RunConfig
    op: Literal["preview"] = "preview"


@dataclass(frozen=True)
class ReadTokens:
    """What a run's chips say at each token of a text: a `TokenReading`."""

    run_id: str
    text: str
    text_pair: str | None
    cut: Cut
    single: bool = False
    """Ask a chip on the mean or the maximum about each token alone."""
    op: Literal["tokens"] = "tokens"


@dataclass(frozen=True)
class ReadPatches:
    """What a run's chips say at each patch of a picture: a `PatchReading`."""

    run_id: str
    source: str
    """A reference of a picture, or the path of a file."""
    cut: Cut
    op: Literal["patches"] = "patches"


@dataclass(frozen=True)
class Predict:
    """What a bundle says of some texts, or pictures by their paths: a list of `Prediction`."""

    path: str
    texts: list[str]
    text_pairs: list[str] | None
    adaptive: bool = False
    """Whether texts may leave at the bundle's early exits."""
    op: Literal["predict"] = "predict"


@dataclass(frozen=True)
class ClassifyTable:
    """Classify the next rows of a table and write them beside its columns: a `TablePart`."""

    path: str
    """The bundle."""
    file: str
    """CSV, TSV, lines of JSON or Parquet."""
    probabilities: bool
    """Whether every class gets its own column."""
    adaptive: bool = False
    op: Literal["table"] = "table"


@dataclass(frozen=True)
class TablePart:
    """How far a table is classified."""

    out: str
    """Where it is, once finished."""
    n_rows: int
    finished: bool


@dataclass(frozen=True)
class Export:
    """Write a bundle for another place, beside it: an `Exported`."""

    path: str
    target: Target
    int8: bool
    op: Literal["export"] = "export"


@dataclass(frozen=True)
class Join:
    """Put bundles of one backbone into one folder, beside the first: a `JoinReport`."""

    paths: list[str]
    op: Literal["join"] = "join"


Question = (
    LookAtColumns
    | LookAtBackbone
    | LookAhead
    | ReadTokens
    | ReadPatches
    | Predict
    | ClassifyTable
    | Export
    | Join
)
QUESTION = TypeAdapter[Question](Annotated[Question, Field(discriminator="op")])


def line_of(question: Question) -> str:
    """The question as it is sent: one line of JSON, the same for the same question."""
    return QUESTION.dump_json(question).decode()
