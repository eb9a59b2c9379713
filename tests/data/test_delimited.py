"""Quotation marks: whatever a text holds, no row vanishes into another."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipviz.data.delimited import read_delimited
from chipviz.errors import SourceError


def read(folder, content, *, tabs=False):
    path = folder / f"a.{'tsv' if tabs else 'csv'}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_delimited(path, tabs=tabs)


def codes(notices):
    return [notice.code for notice in notices]


ROWS = [("one, two", "a"), ("three", "b"), ('she said "no"', "a"), ("two\nlines", "b")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_what_a_csv_writer_writes_is_read_back(tmp_path, quoting, mark):
    """Python's writer is the truth."""
    out = io.StringIO()
    csv.writer(out, delimiter=mark, quoting=quoting).writerows([("text", "label"), *ROWS])
    frame, notices = read(tmp_path, out.getvalue())
    assert list(frame.itertuples(index=False, name=None)) == ROWS
    assert not notices


texts = st.text(st.sampled_from('ab ,;"\n|'), min_size=1, max_size=12).filter(str.strip)


@given(rows=st.lists(st.tuples(texts, st.sampled_from("xy")), min_size=1, max_size=8))
def test_any_table_of_pandas_is_read_back_or_named_or_refused(tmp_path_factory, rows):
    """Never silently other rows than were written."""
    folder = tmp_path_factory.mktemp("any")
    written = pd.DataFrame(rows, columns=["text", "label"])
    try:
        frame, notices = read(folder, written.to_csv(index=False))
    except (SourceError, ValueError):
        return
    same = frame["text"].tolist() == written["text"].tolist()
    assert same or {"quotes-are-text", "blank-after-delimiter"} & set(codes(notices))


def quotation(n_rows, mark, n_inside=3):
    """Rows of which one begins with a quotation mark and a later one ends with one."""
    lines = [f"sentence {i}{mark}{'ab'[i % 2]}" for i in range(n_rows)]
    lines[4] = f'"sentence 4{mark}a'
    last = 4 + n_inside
    lines[last] = f'sentence {last}"{mark}b'
    return "\n".join([f"text{mark}label", *lines]) + "\n"


def test_a_quotation_over_several_rows_of_a_tsv_file_leaves_every_row(tmp_path):
    frame, notices = read(tmp_path, quotation(30, "\t"), tabs=True)
    assert len(frame) == 30
    assert codes(notices) == ["quotes-are-text"]
    assert notices[0].examples == ("line 6",)


def test_a_quotation_over_several_rows_of_a_csv_file_is_refused_by_its_lines(tmp_path):
    with pytest.raises(SourceError, match=r"Lines 6 to 9 of a\.csv are one cell in quotes"):
        read(tmp_path, quotation(30, ","))


def test_where_other_cells_need_their_quotes_a_cell_of_lines_is_read_and_named(tmp_path):
    content = quotation(30, ",") + '"one, two",a\n'
    frame, notices = read(tmp_path, content)
    assert len(frame) == 28
    assert codes(notices) == ["cell-spans-lines"]
    assert notices[0].examples == ("lines 6 to 9",)


def test_a_mark_that_opens_no_cell_is_text_and_named(tmp_path):
    frame, notices = read(tmp_path, 'text,label\n"what,a\nyes,b\n')
    assert frame["text"].tolist() == ['"what', "yes"]
    assert codes(notices) == ["quotes-are-text"]


@pytest.mark.parametrize("cells", ["{}, {}", '"{}", "{}"'])
def test_blanks_after_every_comma_are_no_part_of_cells(tmp_path, cells):
    lines = [cells.format(f"text {i}", "ab"[i % 2]) for i in range(10)]
    frame, notices = read(tmp_path, "\n".join(["text, label", *lines]))
    assert set(frame["label"]) == {"a", "b"}
    assert frame["text"].tolist() == [f"text {i}" for i in range(10)]
    assert codes(notices) == ["blank-after-delimiter"]


def test_a_hint_for_windows_letters_gives_these_letters(tmp_path):
    """Byte 0x92 is a typographic apostrophe there, and a control code in Latin-1."""
    with pytest.raises(SourceError, match="line 2 holds the byte 0x92") as refused:
        read(tmp_path, b"text,label\nit\x92s,a\n")
    encoding = refused.value.hint.split("-f ")[1].split()[0]
    assert b"it\x92s".decode(encoding) == "it\u2019s"
    with pytest.raises(SourceError, match="0xe9") as refused:
        read(tmp_path, b"text,label\ncaf\xe9,a\n")
    assert "-f latin1" in refused.value.hint
