"""Bad input: what a stranger gives is refused in a sentence before it costs memory or time.

The letter and number in a test's name are those of the list that these tests go through.
"""

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chipviz.config import RunConfig
from chipviz.data.from_table import load_task
from chipviz.data.tables import read_table
from chipviz.errors import SourceError, TaskError
from chipviz.progress import silent
from tests.withstand.servers import recording_proxy, serving, status_of, web_socket

ROWS = 2_000


def repeated(kind):
    """One long text in each of many rows: a file holds it once."""
    text = "x" * 200_000
    texts = {
        "plain": [text] * ROWS,
        "in lists": [[text, "y"]] * ROWS,
        "in objects": [{"question": text, "more": [text]}] * ROWS,
    }[kind]
    return pa.table({"text": texts, "label": ["a", "b"] * (ROWS // 2)})


@pytest.mark.parametrize("kind", ["plain", "in lists", "in objects"])
def test_b6_a_small_parquet_file_of_hundreds_of_megabytes_is_refused(tmp_path, kind):
    path = tmp_path / "small.parquet"
    pq.write_table(repeated(kind), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(SourceError, match=r"bytes of it unpack to [48]\d\d,\d{3},\d{3}"):
        read_table(str(path), tmp_path)


def test_b6_a_parquet_file_of_a_billion_empty_rows_is_refused(tmp_path):
    path = tmp_path / "empty.parquet"
    with pq.ParquetWriter(path, pa.schema({"text": pa.null(), "label": pa.null()})) as writer:
        for _ in range(10):
            rows = pa.nulls(10_000_000)
            writer.write_table(pa.table({"text": rows, "label": rows}))
    with pytest.raises(SourceError, match="unpack to"):
        read_table(str(path), tmp_path)


def test_b6_a_table_that_takes_more_memory_than_is_free_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "large.parquet"
    texts = [f"{i} " * 100 for i in range(10_000)]
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 5_000}), path)
    assert len(read_table(str(path), tmp_path).frames["all"]) == 10_000

    class Memory:
        available = 10 << 20

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(SourceError, match=r"more memory than the 0\.0 GiB that are free"):
        read_table(str(path), tmp_path)


def declaring(path, names):
    features = {"label": {"_type": "ClassLabel", "names": names}}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = pa.table({"text": [f"text {i}" for i in range(40)], "label": [0, 1] * 20})
    pq.write_table(rows.replace_schema_metadata(said), path)
    return RunConfig.checked(backbone="x", data=str(path))


def test_b6_declared_class_names_are_few_and_each_another(tmp_path):
    good = load_task(declaring(tmp_path / "good.parquet", ["no", "yes"]), tmp_path, silent)
    assert good.label_names == ("no", "yes")
    with pytest.raises(TaskError, match=r"Two declared classes .*'no'"):
        load_task(declaring(tmp_path / "twice.parquet", ["no", "no"]), tmp_path, silent)
    many = [str(i) for i in range(100_000)]
    with pytest.raises(TaskError, match="100,000 declared classes"):
        load_task(declaring(tmp_path / "many.parquet", many), tmp_path, silent)


# --- other web pages ----------------------------------------------------------------------------


def test_b10_no_other_page_opens_a_web_socket_or_makes_the_server_call_out(tmp_path):
    with (
        recording_proxy() as (proxy, asked),
        serving(
            tmp_path, http_proxy=proxy, https_proxy=proxy, HTTP_PROXY=proxy, HTTPS_PROXY=proxy
        ) as (port, _),
    ):
        foreign = [
            "http://evil.example",
            "https://evil.example",
            f"http://127.0.0.1:{port + 1}",
            f"http://localhost:{port + 1}",
            "http://127.0.0.1",
            "null",
            "file://",
            f"http://127.0.0.1:{port}.evil.example",
        ]
        for origin in (None, f"http://127.0.0.1:{port}"):
            assert "101" in web_socket(port, origin), origin
        for origin in foreign:
            assert "403" in web_socket(port, origin), origin
        assert "403" in web_socket(port, None, host="evil.example")
        start = time.monotonic()
        for _ in range(5):
            web_socket(port, "http://evil.example")
        assert status_of(f"http://127.0.0.1:{port}/") == 200
        assert time.monotonic() - start < 5  # it called nobody, and waited for nobody
        upload = f"http://127.0.0.1:{port}/_stcore/upload_file/x/y"
        assert status_of(upload, "PUT", Origin="http://evil.example") == 403
        assert status_of(f"http://127.0.0.1:{port}/", Host="evil.example") == 403
    assert asked == []
