"""Data nobody would want: every file becomes a task or is refused in one sentence and a hint."""

import csv
import io
import json
import os
import struct
from collections import Counter

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.labels import MAX_CLASSES
from chipviz.data.tables import read_table
from chipviz.data.task import Task
from chipviz.errors import ChipvizError, SourceError
from tests.data.test_tables import parquet_bytes, write


def outcome(path, **settings) -> Task | ChipvizError:
    """What becomes of a file; any other exception is a fault."""
    try:
        config = RunConfig.checked(backbone="tiny", data=str(path), **settings)
        return make_task(read_table(str(path), path), config)
    except ChipvizError as error:
        refused = error
    assert refused.hint
    assert "\n" not in refused.message
    assert len(refused.message) < 500
    return refused


def csv_of(rows, header="text,label", end="\n"):
    return end.join([header, *rows]) + end


GOOD = [f"text {i},{'ab'[i % 2]}" for i in range(40)]
GOOD_CSV = csv_of(GOOD)
JSON_ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
NESTED = [*JSON_ROWS[:3], {"text": {"body": "x"}, "label": "a"}]
ACCENTS = GOOD_CSV.replace("text 7", "café 7")

LOADED = {
    "crlf.csv": csv_of(GOOD, end="\r\n"),
    "cr.csv": csv_of(GOOD, end="\r"),
    "bom.csv": "\ufeff" + ACCENTS,
    "utf16.csv": ACCENTS.encode("utf-16"),
    "utf16-be.csv": b"\xfe\xff" + ACCENTS.encode("utf-16-be"),
    "utf16.jsonl": "\n".join(map(json.dumps, JSON_ROWS)).encode("utf-16"),
    "semicolon.csv": GOOD_CSV.replace(",", ";"),
    "semicolon-with-commas.csv": csv_of(
        [f"Yes, text {i};{'ab'[i % 2]}" for i in range(40)], "text;label"
    ),
    "tabs.csv": GOOD_CSV.replace(",", "\t"),
    "blank-lines.csv": GOOD_CSV.replace("\n", "\n\n"),
    "no-last-end.csv": GOOD_CSV.rstrip("\n"),
    "spaces.csv": GOOD_CSV.replace("text,label", " text , label "),
    "quotes.tsv": csv_of([f'"so" said {i}\t{"ab"[i % 2]}' for i in range(40)], "text\tlabel"),
    "open-quote.tsv": csv_of([f'"so said {i}\t{"ab"[i % 2]}' for i in range(40)], "text\tlabel"),
    "list.json": json.dumps(JSON_ROWS, indent=1),
    "lines.json": "\n".join(map(json.dumps, JSON_ROWS)),
    "list.jsonl": json.dumps(JSON_ROWS),
    "two-classes-of-many-rows.csv": csv_of([*GOOD, "text 41,c"]),
    "booleans.jsonl": "\n".join(
        json.dumps({"text": f"t {i}", "label": i % 2 == 0}) for i in range(40)
    ),
    "fractions.jsonl": "\n".join(
        json.dumps({"text": f"t {i}", "label": i % 2 / 2}) for i in range(40)
    ),
}

REFUSED = {
    "empty.csv": ("", "empty.csv holds no rows"),
    "spaces.csv": ("  \n\n", "holds no rows"),
    "empty.json": ("[]", "holds no rows"),
    "empty-objects.jsonl": ("{}\n{}", "holds no rows"),
    "header.csv": ("text,label\n", "header.csv holds no rows"),
    "one-class.csv": (csv_of([f"text {i},same" for i in range(40)]), "one class only, 'same'"),
    "one-row-a-class.csv": (
        csv_of([f"text {i},class {i}" for i in range(40)]),
        "'label' has 40 different values in 40 rows",
    ),
    "many-classes.csv": (
        csv_of([f"text {i},class {i // 2}" for i in range(10_000)]),
        "'label' has 5,000 different values",
    ),
    "missing-labels.csv": (
        csv_of([*GOOD[:5], "text 5,", *GOOD[6:20], "x, "]),
        r"Row 6 has no value in column 'label' \(2 rows lack one\)",
    ),
    "null.jsonl": (
        "\n".join(
            json.dumps(r | ({"label": None} if i == 4 else {})) for i, r in enumerate(JSON_ROWS)
        ),
        r"Row 5 has no value in column 'label' \(1 rows",
    ),
    "nan.jsonl": (
        "\n".join(
            json.dumps(r | ({"label": float("nan")} if i == 4 else {}))
            for i, r in enumerate(JSON_ROWS)
        ),
        "Row 5 has no value in column 'label'",
    ),
    "no-key.json": (
        json.dumps([*JSON_ROWS, {"label": "a"}]),
        "Row 41 has no value in column 'text'",
    ),
    "duplicate-columns.csv": (
        csv_of([f"x,{row}" for row in GOOD], "text,text,label"),
        "has 2 columns named 'text'",
    ),
    "duplicate-keys.jsonl": (
        '{"text": "a", "label": "x"}\n{"text": "a", "label": "x", "text": "b"}',
        "line 2 names 'text' twice",
    ),
    "latin-1.csv": (ACCENTS.encode("latin-1"), "is not UTF-8: line 9 holds the byte 0xe9"),
    "latin-1.jsonl": (
        '{"text": "caf\xe9"}'.encode("latin-1"),
        "is not UTF-8: line 1 holds the byte 0xe9",
    ),
    "torn-utf16.csv": (ACCENTS.encode("utf-16")[:-1], "is not UTF-16"),
    "utf16-without-mark.csv": (ACCENTS.encode("utf-16-le")[:200], "is not UTF-8|NUL"),
    "nul.csv": (csv_of([*GOOD[:5], "text\0 5,a"]), "line 7 holds a NUL character"),
    "nul.jsonl": ('{"text": "a\0"}', "line 1 holds a NUL character"),
    "long-row.csv": (csv_of([*GOOD[:3], "a,b,c"]), "line 5 has 3 cells, expected 2"),
    "short-row.csv": (csv_of([*GOOD[:3], "a"]), "line 5 has 1 cells, expected 2"),
    "parquet.csv": (parquet_bytes(), "is no .csv file but begins like a .parquet file"),
    "parquet.jsonl": (parquet_bytes(), "is no .jsonl file but begins like a .parquet file"),
    "zipped.csv": (b"PK\x03\x04" + b"\0" * 40, "begins like a .zip or .xlsx file"),
    "zipped.jsonl": (b"\x1f\x8b" + b"\0" * 40, "begins like a .gz file"),
    "csv.parquet": (GOOD_CSV, "csv.parquet cannot be read"),
    "csv.jsonl": (GOOD_CSV, "line 1 is not well-formed JSON"),
    "jsonl.csv": ("\n".join(map(json.dumps, JSON_ROWS)), "No label column was found"),
    "truncated.parquet": (parquet_bytes()[:-20], "truncated.parquet cannot be read"),
    "half.parquet": (parquet_bytes()[: len(parquet_bytes()) // 2], "half.parquet cannot be read"),
    "torn.json": (json.dumps(JSON_ROWS, indent=1)[:200], "line 20 is not well-formed JSON"),
    "torn.jsonl": ('{"text": "a"}\n{"text": ', "line 2 is not well-formed JSON"),
    "number.json": ("[1, 2]", "item 1 is no JSON object"),
    "string.json": ('"text"', "line 1 is no JSON object"),
    "deep.jsonl": ("[" * 100_000, "line 1 is not well-formed JSON"),
    "deep-object.jsonl": ('{"a":' * 100_000, "line 1 is not well-formed JSON"),
    "nested.json": (json.dumps(NESTED), "Row 4 has a dict in column 'text'"),
    "nested-label.json": (
        json.dumps([*JSON_ROWS, {"text": "x", "label": ["a", "b"]}]),
        "Row 41 has a list in column 'label'",
    ),
    "surrogate.jsonl": (
        "\n".join(map(json.dumps, [*JSON_ROWS, {"text": "half \ud800", "label": "a"}])),
        "Row 41 has half of a surrogate pair in column 'text'",
    ),
    "surrogate-column.jsonl": (
        "\n".join(json.dumps({"label": i % 2, "\ud800": f"text {i}"}) for i in range(40)),
        "surrogate-column.jsonl cannot be read: 'utf-8' codec can't encode",
    ),
    "huge-number.jsonl": (
        '{"text": "a", "label": ' + "9" * 10_000 + "}",
        "line 1 is not well-formed",
    ),
    "one-column.csv": ("label\na\nb\n", "No text column was found; columns are 'label'"),
}


@pytest.mark.parametrize("name", LOADED)
def test_an_unusual_but_sound_file_loads(tmp_path, name):
    found = outcome(write_to(tmp_path, name, LOADED[name]))
    assert isinstance(found, Task), found
    assert 40 <= sum(len(rows) for rows in found.splits.values()) <= 41
    if "utf16" in name or "bom" in name:
        texts = [text for rows in found.splits.values() for text in rows.texts]
        assert ("café 7" in texts) == (not name.endswith("jsonl"))


@pytest.mark.parametrize("name", REFUSED)
def test_b6_a_bad_file_is_refused_by_row_and_column_or_line(tmp_path, name):
    content, said = REFUSED[name]
    found = outcome(write_to(tmp_path, name, content))
    assert isinstance(found, ChipvizError), "it loaded"
    with pytest.raises(ChipvizError, match=said):
        raise found
    assert [path.name for path in tmp_path.iterdir()] == [name]


def write_to(folder, name, content):
    write(folder, name, content)
    return folder / name


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_cell_of_fifty_megabytes_is_refused_by_row_and_column(tmp_path, kind):
    path = tmp_path / f"huge.{kind}"
    frame = pd.DataFrame(JSON_ROWS)
    frame.loc[6, "text"] = "x" * 50_000_000
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    with pytest.raises(
        ChipvizError, match=r"Row 7 has 50,000,000 characters in column 'text'|at most"
    ):
        raise outcome(path)


def test_a_long_cell_of_a_column_that_is_not_read_does_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(csv_of([f"{row},{'x' * 400_000}" for row in GOOD], "text,label,notes"))
    assert isinstance(outcome(path), Task)


def test_duplicate_columns_of_parquet_are_refused_by_name(tmp_path):
    table = pa.table([["a"], ["b"], ["c"]], names=["text", "label", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ChipvizError, match="has 2 columns named 'text'"):
        raise outcome(tmp_path / "a.parquet")


@pytest.mark.parametrize("values", [[b"\xff\xfe"] * 40, [struct.pack("<d", 1.0)] * 40])
def test_bytes_are_no_text(tmp_path, values):
    frame = pd.DataFrame(JSON_ROWS).assign(text=values)
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ChipvizError, match="Row 1 has a bytes in column 'text'"):
        raise outcome(tmp_path / "a.parquet", text="text")


def test_a_thousand_classes_load_and_one_more_does_not(tmp_path):
    def rows(n):
        return csv_of([f"text {i},class {i % n}" for i in range(10 * n)])

    assert isinstance(outcome(write_to(tmp_path, "a.csv", rows(MAX_CLASSES))), Task)
    assert isinstance(outcome(write_to(tmp_path, "b.csv", rows(MAX_CLASSES + 1))), ChipvizError)


# --- drawn files --------------------------------------------------------------------------------

NAMES = ["text", "label", "Label", "topic", "", "text ", "question", "passage", "choices", "answer"]
CELLS = st.sampled_from(
    [
        *["", " ", "a", "b", "0", "1", "-1", "1.5", "nan", "NA", "null", "true", "A", "B"],
        *['"', '""', "a,b", "a;b", "a\tb", "line\nbreak", "\r", "\0", "\ufeff", "é", "\u2028"],
        *["[1]", '["a","b"]', '["a"', "{}", "=cmd()", "1e999", "9" * 400, "x" * 3000, "<b>"],
    ]
) | st.text(max_size=6)
USUAL = st.sampled_from(["a goal", "a bank", "an atom", "0", "1", "sport", "money"])
ENCODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1", "utf-16-le"])
seen = {"csv": Counter(), "jsonl": Counter()}


@st.composite
def csv_files(draw):
    """Mostly small tables, some of whose cells, lines or bytes are as bad as can be."""
    width = draw(st.integers(1, 4))
    header = draw(st.permutations(NAMES))[:width]
    if draw(st.booleans()):
        header = ["text", "label", *header][: max(2, width)]
    cells = draw(st.sampled_from([USUAL, USUAL, USUAL, CELLS]))
    rows = draw(st.lists(st.lists(cells, min_size=len(header), max_size=len(header)), max_size=12))
    n = draw(st.sampled_from([0, 30, 30]))
    rows += [[f"text {i}", "ab"[i % 2], *["x"] * 9][: len(header)] for i in range(n)]
    if rows and draw(st.integers(0, 4)) == 0:
        rows[draw(st.integers(0, len(rows) - 1))].append("more")
    mark, end = draw(st.sampled_from(",,,;\t|")), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    if draw(st.integers(0, 3)):
        file = io.StringIO()
        csv.writer(file, delimiter=mark, lineterminator=end).writerows([header, *rows])
        text = file.getvalue()
    else:
        text = end.join(mark.join(row) for row in [header, *rows])
    return harmed(draw, text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELLS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def json_files(draw):
    values = draw(st.sampled_from([USUAL, USUAL, USUAL, JSON_VALUES]))
    keys = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    if draw(st.booleans()):
        keys = [*dict.fromkeys(["text", "label", *keys])]
    row = st.fixed_dictionaries(dict.fromkeys(keys, values))
    rows = draw(st.lists(row, max_size=8))
    n = draw(st.sampled_from([0, 30, 30]))
    rows += [dict.fromkeys(keys, "x") | {"text": f"text {i}", "label": i % 2} for i in range(n)]
    if draw(st.integers(0, 5)) == 0:
        rows.append(draw(JSON_VALUES))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    listed = draw(st.integers(0, 3)) == 0
    return harmed(draw, f"[{','.join(lines)}]" if listed else "\n".join(lines))


def harmed(draw, text):
    """The bytes of a file, now and then with some of them lost, doubled or replaced."""
    content = text.encode(draw(ENCODINGS), "replace")
    if content and draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(content) - 1))
        content = (
            content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 2)) :]
        )
    return content


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@settings(max_examples=1_200)
@given(content=csv_files())
def test_b6_a_drawn_csv_file_is_a_task_or_a_sentence(drawn, content):
    seen["csv"][type(outcome(write_to(drawn, "a.csv", content))) is Task] += 1


@settings(max_examples=1_200)
@given(content=json_files())
def test_b6_a_drawn_json_file_is_a_task_or_a_sentence(drawn, content):
    seen["jsonl"][type(outcome(write_to(drawn, "a.jsonl", content))) is Task] += 1


def test_enough_files_of_both_kinds_were_drawn_and_of_both_fates():
    for kind in seen.values():
        if not kind:
            pytest.skip("nothing was drawn in this session")
        assert kind.total() >= 1_000
        assert min(kind[True], kind[False]) >= 100, kind


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_split_that_is_no_regular_file_is_refused_unread(tmp_path, kind):
    path = tmp_path / "train.csv"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=r"train\.csv is no regular file"):
        read_table(str(tmp_path), tmp_path / "home")
