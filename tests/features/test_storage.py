"""Features on disk: rows lie where numpy finds them, and a disk that fills is an error."""

import numpy as np
import pytest

from chipviz.backbones.batching import Chunk
from chipviz.errors import is_disk_full
from chipviz.features.storage import Features, Writer
from chipviz.keys import Vector

LAST, MEAN = map(Vector.named, ("last", "mean"))
CHUNK = Chunk("train", 2, 8)


@pytest.fixture
def features(tmp_path):
    sizes = {"train": 9, "validation": 1, "test": 1}
    return Features(tmp_path / "features", (LAST, MEAN), 3, {"block": 512}, sizes)


def states(n_rows):
    return np.random.default_rng(0).standard_normal((2, 4, n_rows, 512)).astype(np.float32)


def test_rows_are_where_numpy_finds_them_and_no_others_are_touched(features):
    writer, values = Writer(features, {}), states(3)
    writer.write(CHUNK, [4, 0, 1], values, [MEAN])
    expected = np.zeros((4, 9, 512), dtype=np.float32)
    expected[:, [6, 2, 3]] = values[1]
    assert np.array_equal(np.load(features.path("train", MEAN)), expected)
    assert not np.load(features.path("train", LAST)).any()


def test_a_chunk_is_missing_until_all_of_it_is_written(features):
    writer = Writer(features, {})
    writer.write(CHUNK, range(6), states(6), [LAST, MEAN])
    assert Writer(features, {}).missing(CHUNK) == [LAST, MEAN]
    writer.finish(CHUNK, [LAST])
    assert Writer(features, {}).missing(CHUNK) == [MEAN]
    assert Writer(features, {"another": "model"}).missing(CHUNK) == [LAST, MEAN]


def test_a_row_that_is_written_in_part_is_a_full_disk(features, full_disk):
    writer, values = Writer(features, {}), states(6)
    inside = 128 + 4 * 512 * 3 + 100  # of the row after the chunk's first
    with full_disk(inside), pytest.raises(OSError, match="No space left") as caught:
        writer.write(CHUNK, range(6), values, [LAST])
    assert is_disk_full(caught.value)
