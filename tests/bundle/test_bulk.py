"""Whole tables: every row answered in order beside all its columns, whatever the size and stops."""

import csv
import json
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chipviz.bundle import bulk
from chipviz.bundle.bulk import Written
from chipviz.data import streaming
from chipviz.data.streaming import stream_rows
from chipviz.data.tables import read_table
from chipviz.errors import ChipvizError, SourceError
from chipviz.progress import silent
from chipviz.results.answers import Prediction
from chipviz.runs import model_process
from chipviz.runs.questions import ClassifyTable
from tests.cli.test_cli import bundle, chipviz, trained  # noqa: F401
from tests.families import planted_rows

ROWS = [
    {"id": i, "text": text, "label": str(label), "note": '=A1, "said"\nso' if i % 7 == 0 else None}
    for i, (text, label) in enumerate(planted_rows(230))
]


def written(folder, kind):
    path, frame = folder / f"table.{kind}", pd.DataFrame(ROWS)
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ";")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_chunks_are_the_whole_table(tmp_path, kind, size):
    path = written(tmp_path, kind)
    whole = read_table(str(path), tmp_path, keep=False).frames["all"]
    chunks = list(stream_rows(path, size))
    assert [chunk.attrs["first"] for chunk in chunks] == list(range(0, len(whole), size))
    found = pd.concat(chunks, ignore_index=True)
    assert list(found.columns) == list(whole.columns)
    for name in whole.columns:
        one, other = found[name].tolist(), whole[name].tolist()
        assert [None if pd.isna(v) else v for v in one] == [
            None if pd.isna(v) else v for v in other
        ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text,label\na,b\nc,d,e\n", "line 3 has 3 cells"),
        ("a.csv", 'text,label\n"a,b\nc",d\n', "one cell in quotes, or rows"),
        ("a.csv", 'text,label\n"a,b\n', "line"),
        ("a.csv", "text,label\na\0,b\n", "NUL"),
        ("a.csv", b"text,label\n\xff,b\n", "utf-8"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is no JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is not well-formed"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1"),
        ("a.parquet", b"PAR1 and so on", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=said):
        list(stream_rows(path, 10))


def test_memory_does_not_grow_with_the_table(tmp_path):
    def peak(n):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as file:
            for i in range(n):
                file.write(json.dumps({"text": f"{i} " + "word " * 100}) + "\n")
        wanted = bulk.Wanted(tmp_path / f"out-{n}.jsonl", False, "s")
        tracemalloc.start()
        bulk.predict_table(stream_rows(path, 200), parity, wanted, silent)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(8_000) < 1.5 * peak(1_000)


def parity(rows):
    """A model of which everybody knows what it says: whether a text has an even length."""
    shares = [(0.75, 0.25) if len(text) % 2 else (0.25, 0.75) for text in rows["text"]]
    return [{"": Prediction.of({0: "odd", 1: "even"}, share)} for share in shares]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_all_columns_are_kept_beside_the_answer(tmp_path, kind, ending):
    path, out = written(tmp_path, kind), tmp_path / f"out.{ending}"
    wanted = bulk.Wanted(out, True, "s")
    assert bulk.predict_table(stream_rows(path, 50), parity, wanted, silent) == Written(
        230, 0, True
    )
    if ending == "jsonl":
        found = lines(out)
        shares = [row["probabilities"]["even"] for row in found]
    elif ending == "parquet":
        found = pq.read_table(out).to_pylist()
        shares = [row["p(even)"] for row in found]
    else:
        with out.open(newline="") as file:
            found = list(csv.DictReader(file))
        shares = [float(row["p(even)"]) for row in found]
    for row, given, share in zip(found, ROWS, shares, strict=True):
        for name, cell in given.items():
            kept = "" if row[name] is None else str(row[name])
            assert kept == ("" if cell is None else str(cell))
        even = len(given["text"]) % 2 == 0
        assert row["predicted_label"] == ("even" if even else "odd")
        assert share == (0.75 if even else 0.25)
    assert {f.name for f in tmp_path.iterdir()} == {path.name, out.name}, "nothing half-written"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_stopped_call_goes_on_to_the_same_bytes(tmp_path, ending):
    path = written(tmp_path, "csv")
    whole, broken = (bulk.Wanted(tmp_path / f"{n}.{ending}", True, "s") for n in ("whole", "out"))
    bulk.predict_table(stream_rows(path, 50), parity, whole, silent)
    asked = []

    def stops(rows):
        asked.append(len(rows))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return parity(rows)

    with pytest.raises(KeyboardInterrupt):
        bulk.predict_table(stream_rows(path, 50), stops, broken, silent)
    assert not broken.out.exists()
    with broken.part.open("ab") as file:
        file.write(b'{"half a li')  # what a kill in the middle of a write leaves
    asked.clear()

    def counts(rows):
        asked.append(len(rows))
        return parity(rows)

    # In chunks of another size, too.
    assert bulk.predict_table(stream_rows(path, 64), counts, broken, silent) == Written(
        230, 150, True
    )
    assert sum(asked) == 80
    if ending == "parquet":  # chunks are its row groups
        assert pq.read_table(broken.out).equals(pq.read_table(whole.out))
    else:
        assert broken.out.read_bytes() == whole.out.read_bytes()
    assert {f.name for f in tmp_path.iterdir()} == {path.name, broken.out.name, whole.out.name}


def test_parquet_keeps_the_types_of_parquet(tmp_path):
    path, out = tmp_path / "a.parquet", tmp_path / "out.parquet"
    given = pa.table(
        {
            "text": [f"{i} words" for i in range(120)],
            "count": pa.array([None if i % 3 else i for i in range(120)], pa.int32()),
            "when": pa.array([i * 10**9 for i in range(120)], pa.timestamp("ns")),
            "late": pa.array([None] * 60 + list(range(60)), pa.int64()),
            "tags": [[str(i)] for i in range(120)],
        }
    )
    pq.write_table(given, path)
    bulk.predict_table(stream_rows(path, 50), parity, bulk.Wanted(out, False, "s"), silent)
    found = pq.read_table(out)
    assert found.select(given.column_names).to_pylist() == given.to_pylist()
    assert found.schema.field("when").type == pa.timestamp("ns")
    assert pa.types.is_integer(found.schema.field("count").type)
    assert found.column_names[-2:] == ["label", "score"]


def test_cells_of_several_types_are_no_parquet(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out.parquet"
    rows = [{"text": "a", "note": 3}, {"text": "bb", "note": "three"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in (1, 2):
        with pytest.raises(ChipvizError, match="cells of several types"):
            bulk.predict_table(
                stream_rows(path, size), parity, bulk.Wanted(out, False, str(size)), silent
            )
        assert not out.exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_table_may_be_classified_a_part_at_a_time(tmp_path, ending):
    path = written(tmp_path, "csv")
    whole, parted = (bulk.Wanted(tmp_path / f"{n}.{ending}", False, "s") for n in ("whole", "out"))
    bulk.predict_table(stream_rows(path, 50), parity, whole, silent)
    seen = []
    while not seen or not seen[-1].finished:
        assert not parted.out.exists()
        seen.append(bulk.predict_table(stream_rows(path, 50), parity, parted, silent, most=100))
    assert [one.n_rows for one in seen] == [100, 200, 230]
    if ending == "parquet":
        assert pq.read_table(parted.out).equals(pq.read_table(whole.out))
    else:
        assert parted.out.read_bytes() == whole.out.read_bytes()


def test_another_table_or_bundle_is_no_continuation(tmp_path):
    path = written(tmp_path, "jsonl")
    out = tmp_path / "out.jsonl"

    def stops(rows):
        if rows.attrs["first"]:
            raise KeyboardInterrupt
        return parity(rows)

    with pytest.raises(KeyboardInterrupt):
        bulk.predict_table(stream_rows(path, 50), stops, bulk.Wanted(out, False, "a"), silent)
    again = bulk.predict_table(stream_rows(path, 50), parity, bulk.Wanted(out, False, "b"), silent)
    assert again == Written(230, 0, True)


def test_a_call_that_wants_more_of_each_row_begins_anew(tmp_path):
    path, out = written(tmp_path, "csv"), tmp_path / "out.jsonl"

    def stops(rows):
        if rows.attrs["first"]:
            raise KeyboardInterrupt
        return parity(rows)

    with pytest.raises(KeyboardInterrupt):
        bulk.predict_table(stream_rows(path, 50), stops, bulk.Wanted(out, False, "s"), silent)
    done = bulk.predict_table(stream_rows(path, 50), parity, bulk.Wanted(out, True, "s"), silent)
    assert done == Written(230, 0, True)
    assert all("probabilities" in row for row in lines(out))


def test_columns_that_come_later_are_kept_or_refused(tmp_path):
    """Lines of JSON may name what the first ones do not."""
    path = tmp_path / "some.jsonl"
    rows = [{"text": f"text {i}", "a": i} | ({"b": i} if i >= 60 else {}) for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = bulk.Wanted(tmp_path / "out.jsonl", False, "s")
    bulk.predict_table(stream_rows(path, 30), parity, out, silent)
    for found, given in zip(lines(out.out), rows, strict=True):
        assert {name: found[name] for name in given} == given
    table = bulk.Wanted(tmp_path / "out.csv", False, "s")
    with pytest.raises(ChipvizError, match="column 'b' that the first rows lack"):
        bulk.predict_table(stream_rows(path, 30), parity, table, silent)
    rows = [{"text": "x"} | ({"label": "mine"} if i >= 60 else {}) for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = bulk.Wanted(tmp_path / "again.jsonl", False, "s")
    with pytest.raises(ChipvizError, match="column 'label' that the first rows lack"):
        bulk.predict_table(stream_rows(path, 30), parity, again, silent)


def test_columns_that_are_missing_later_stay_in_their_place(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"a": 1, "text": "x", "b": 2} if i < 30 else {"text": "x", "a": 3} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = bulk.Wanted(tmp_path / "out.csv", False, "s")
    bulk.predict_table(stream_rows(path, 30), parity, wanted, silent)
    with wanted.out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [float(row["a"]) for row in found] == [1] * 30 + [3] * 30
    assert [row["b"] for row in found[30:]] == [""] * 30
    assert {row["label"] for row in found} == {"odd"}


def test_the_command_reads_a_large_file_in_parts(trained, bundle, tmp_path, monkeypatch):  # noqa: F811
    home, _ = trained
    folder, _ = bundle
    path = written(tmp_path, "parquet")
    small = tmp_path / "small.jsonl"
    done = chipviz(home, "predict", folder, "--file", path, "--out", small)
    assert done.status == 0, done.err
    said = chipviz(home, "predict", folder, "--file", path, "--out", small, "--json").json
    assert said == {"path": str(small), "rows": len(ROWS), "rows_before": 0}
    monkeypatch.setattr(streaming, "LARGE", 100)
    monkeypatch.setattr(bulk, "CHUNK", 40)
    refused = chipviz(home, "predict", folder, "--file", path)
    assert "Give --out" in refused.err
    large = tmp_path / "large.jsonl"
    done = chipviz(home, "predict", folder, "--file", path, "--out", large, "--probabilities")
    assert done.status == 0, done.err
    assert len(lines(large)) == len(ROWS)
    for one, other, row in zip(lines(small), lines(large), ROWS, strict=True):
        assert one["id"] == other["id"] == row["id"]
        assert one["predicted_label"] == other["predicted_label"]
        assert np.isclose(max(other["probabilities"].values()), other["score"])


def test_a_bad_row_is_named_as_the_file_counts_it(trained, bundle, tmp_path, monkeypatch):  # noqa: F811
    home, _ = trained
    folder, _ = bundle
    rows = [dict(row) for row in ROWS]
    rows[123]["text"] = " "
    path = tmp_path / "gap.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(bulk, "CHUNK", 50)
    for large in (1 << 30, 100):
        monkeypatch.setattr(streaming, "LARGE", large)
        done = chipviz(home, "predict", folder, "--file", path, "--out", tmp_path / "out.jsonl")
        assert done.status == 1
        assert "Row 124 has no value in column 'text'" in done.err


def test_bytes_have_no_place_in_a_text_file(tmp_path):
    path = tmp_path / "b.parquet"
    pd.DataFrame({"text": ["a"], "blob": [b"\xff"]}).to_parquet(path)
    wanted = bulk.Wanted(tmp_path / "out.jsonl", False, "s")
    with pytest.raises(ChipvizError, match="holds bytes"):
        bulk.predict_table(stream_rows(path, 5), parity, wanted, silent)


def test_the_page_gets_the_answers_of_the_command_a_part_at_a_time(
    trained,  # noqa: F811
    bundle,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    home, _ = trained
    folder, _ = bundle
    path, out = written(tmp_path, "parquet"), tmp_path / "by-command.parquet"
    done = chipviz(home, "predict", folder, "--file", path, "--out", out, "--probabilities")
    assert done.status == 0, done.err
    monkeypatch.setattr(model_process, "TABLE_ROWS", 100)
    answerer = model_process.Answerer(home)
    question = ClassifyTable(str(folder), str(path), probabilities=True)
    parts = [answerer.answer(question) for _ in range(3)]
    assert [(part.n_rows, part.finished) for part in parts] == [
        (100, False),
        (200, False),
        (230, True),
    ]
    found, truth = pq.read_table(parts[-1].out), pq.read_table(out)
    assert found.column_names == truth.column_names
    assert found["predicted_label"] == truth["predicted_label"]
    assert np.allclose(found["score"], truth["score"], atol=1e-6)
    assert answerer.answer(question).finished  # asked again: it is there
    other = answerer.answer(ClassifyTable(str(folder), str(path), probabilities=False))
    assert other.out != parts[-1].out
    path.with_suffix(".csv").write_text("words,label\na,b\n")
    with pytest.raises(ChipvizError, match="no column 'text'"):
        answerer.answer(ClassifyTable(str(folder), str(path.with_suffix(".csv")), False))
