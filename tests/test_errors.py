"""Every code of a warning is documented, and no other."""

import re

import pytest

from chipviz.errors import NOTICES, Notice
from chipviz.files import PROJECT


def test_the_documented_codes_are_those_there_are():
    text = (PROJECT / "docs" / "warnings.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text, re.M)) == NOTICES


def test_a_notice_of_no_known_code_is_a_fault():
    with pytest.raises(AssertionError, match="nonsense"):
        Notice("nonsense", "x", 1)
