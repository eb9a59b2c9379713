"""Every code of a warning is documented, and no other."""

import re

import pytest

from chipviz.errors import NOTICES, Notice, unexpected
from chipviz.files import PROJECT


def test_the_documented_codes_are_those_there_are():
    text = (PROJECT / "docs" / "warnings.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text, re.M)) == NOTICES


def test_a_notice_of_no_known_code_is_a_fault():
    with pytest.raises(AssertionError, match="nonsense"):
        Notice("nonsense", "x", 1)


def test_an_error_that_repeats_is_logged_once(tmp_path):
    def fail(words):
        try:
            raise ZeroDivisionError(words)
        except ZeroDivisionError as error:
            return unexpected(error, tmp_path)

    assert [fail("the first").message for _ in range(50)] == [fail("the first").message] * 50
    once = (tmp_path / "errors.log").read_text()
    assert once.count("ZeroDivisionError: the first") == 1
    fail("another")
    assert (tmp_path / "errors.log").read_text().count("Traceback") == 2
