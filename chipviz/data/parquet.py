"""Parquet files: measured before they are unpacked. A few bytes of one may hold gigabytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

_compute: Any = pyarrow.compute  # whose functions are made when it is imported

RATIO = 200
"""Maximum bytes of texts per byte of their file. Tables of people have up to twenty."""
FREE = 256 << 20
"""Bytes that any file may unpack to."""
IN_PANDAS = 4
"""Bytes of memory that a byte of text may take as a cell of a table."""


def read_parquet(path: Path) -> pd.DataFrame:
    """All columns, those too that were the index of a saved frame.

    Raises:
        ValueError: If it unpacks to far more than it is, or than there is memory.
        pyarrow.ArrowException: If it is malformed.
    """
    meta = pq.read_metadata(path)
    _refuse_larger(path, _claimed_bytes(meta))
    _refuse_larger(path, sum(_measured(path, meta)))
    return pq.read_table(path).to_pandas(ignore_metadata=True)


def _claimed_bytes(meta: pq.FileMetaData) -> int:
    """Bytes of the encoded columns and of a number for each cell, by the words of the file."""
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    cells = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    return sum(group.total_byte_size for group in groups) + 4 * max(cells, 0)


def _measured(path: Path, meta: pq.FileMetaData) -> Iterator[int]:
    """Bytes of each batch once it is unpacked. Read with each text once, as it lies in the file."""
    columns = [meta.schema.column(i) for i in range(meta.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(batch_size=65_536):
            yield sum(map(_unpacked, batch.columns))


def _unpacked(array: pa.Array) -> int:
    """Bytes of an array once every cell has a text of its own."""
    if isinstance(array, pa.DictionaryArray):
        lengths = _compute.binary_length(array.dictionary.cast(pa.large_binary()))
        return 4 * len(array) + (_compute.sum(_compute.take(lengths, array.indices)).as_py() or 0)
    if isinstance(array, pa.StructArray):
        return sum(map(_unpacked, array.flatten()))
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray | pa.MapArray):
        return 4 * len(array) + _unpacked(array.flatten())
    return array.nbytes


def _refuse_larger(path: Path, n_bytes: int) -> None:
    """Refuse what unpacks to more than such a file of people holds, or than there is memory."""
    most = max(FREE, RATIO * path.stat().st_size)
    if n_bytes > most:
        raise ValueError(f"{path.stat().st_size:,} bytes of it unpack to {n_bytes:,}")
    free = psutil.virtual_memory().available
    if IN_PANDAS * n_bytes > free:
        raise ValueError(
            f"its {n_bytes / 2**30:,.1f} GiB of cells take more memory than the "
            f"{free / 2**30:,.1f} GiB that are free"
        )


def declared_labels(path: Path) -> dict[str, list[str]]:
    """Class names by column, where `datasets` wrote them into the file.

    Raises:
        ValueError: If they are malformed.
    """
    metadata = pq.read_schema(path).metadata or {}
    if b"huggingface" not in metadata:
        return {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        json.dumps(features, ensure_ascii=False).encode()  # half of a surrogate pair is no name
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("its declared class names are malformed") from None
