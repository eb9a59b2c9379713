"""Which words are paths, and what a source is called."""

from chipviz import sources
from chipviz.sources import absolute

NAMES = [
    "nosuchmodel",
    "owner/nosuchmodel",
    "./nosuch",
    "/nosuch/folder",
    "~nosuchuser/model",
    "../../../etc/nosuch",
    "\\\\host\\share",
    "file:///etc/passwd",
    "a\0b",
    "-flag",
    "x" * 300,
    "/" + "x" * 300,
    "a b",
    " ",
    "/dev/zero",
]
"""Names of nothing that is on this machine; the Hub is out of reach."""


def test_a_path_is_valid_from_any_folder_and_a_name_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbc-news").mkdir()
    (tmp_path / "mine").mkdir()
    assert absolute("mine", ["bbc-news"]) == str(tmp_path / "mine")
    assert absolute("bbc-news", ["bbc-news"]) == "bbc-news"
    for name in NAMES[:-1]:
        assert absolute(name, []) == name


def test_a_folder_backbone_is_called_by_its_last_part_and_others_by_their_name():
    assert sources.public_name("/home/somebody/secret/my-llama") == "my-llama"
    assert sources.public_name("smollm2-135m") == "smollm2-135m"
    assert sources.public_name("owner/name") == "owner/name"
