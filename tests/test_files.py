"""A small file has its name whole or not at all."""

import pytest

from chipviz.files import write_atomic


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "exit.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new, then a lone surrogate: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
