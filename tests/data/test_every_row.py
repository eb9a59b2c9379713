"""Whatever a table holds: rows in are rows used and rows named in warnings."""

import csv
import io

from hypothesis import given, settings
from hypothesis import strategies as st

from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.tables import read_table
from chipviz.errors import ChipvizError

LEFT_OUT = ("repeated-texts", "class-without-training", "split-without-labels", "hidden-labels")

words = st.sampled_from(
    ["a", "A", "b ", " b", "c", '"', 'd"', "e,f", "g\nh", "caf\u00e9", "cafe\u0301"]
)
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)
NAMES = ["x", "y", "1", "1.0", "0", "01", "True", "true", "x ", "X", "-1", "x|y", "0.5"]


@st.composite
def tables(draw):
    """Rows of few labels, so that most tables are a task."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=4, unique=True))
    row = st.tuples(texts, st.sampled_from(names))
    return draw(st.lists(row, min_size=8, max_size=40))


@settings(max_examples=3_000)
@given(
    rows=tables(), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), tabs=st.booleans()
)
def test_rows_in_are_rows_used_and_rows_named(tmp_path_factory, rows, quoting, tabs):
    out = io.StringIO()
    mark = "\t" if tabs else ","
    csv.writer(out, delimiter=mark, quoting=quoting).writerows([("text", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / f"every-row.{'tsv' if tabs else 'csv'}"
    path.write_bytes(out.getvalue().encode())
    try:
        table = read_table(str(path), path.parent, keep=False)
        task = make_task(table, RunConfig(backbone="x", data="y"))
    except ChipvizError:
        return
    used = sum(len(split) for split in task.splits.values())
    named = sum(notice.n for notice in task.notices if notice.code in LEFT_OUT)
    assert used + named == len(table.frames["all"])
    read = {notice.code for notice in task.notices}
    assert len(table.frames["all"]) == len(rows) or "quotes-are-text" in read
