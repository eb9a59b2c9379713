"""Outlook: what is said before loading is what loading finds; what cannot fit is refused."""

from dataclasses import replace

import pytest
import torch

from chipviz import experiment
from chipviz.backbones import memory as outlook_module
from chipviz.backbones import opening
from chipviz.backbones.memory import look_ahead
from chipviz.backbones.model_folder import open_folder
from chipviz.config import RunConfig
from chipviz.errors import BackboneError
from chipviz.progress import silent
from chipviz.pruning import cost
from chipviz.results.run_folder import RunFolder
from tests.families import ALL, NAMED, load_backbone

SITES = ("block", "gate", "ffn_in", "ffn_out")
FLOAT = RunConfig(backbone="x", data="y", dtype="float32")


def outlook(path, name, n_texts=0):
    """What is said of a model folder before it is loaded in float32."""
    return look_ahead(open_folder(path, name), FLOAT, home=path, n_texts=n_texts)


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_the_outlook_of_a_family_is_what_loading_it_finds(family, tmp_path):
    folder = family.build(tmp_path)
    found = outlook(folder, "x", n_texts=5)
    backbone = load_backbone(folder, "x", dtype=torch.float32, device="cpu")
    assert (found.n_layers, found.hidden_size) == (backbone.n_layers, backbone.hidden_size)
    assert found.n_parameters == backbone.folder.n_published
    assert found.n_loaded == sum(p.numel() for p in backbone.model.parameters())
    assert found.weight_bytes == 4 * found.n_loaded
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert found.feature_bytes == 4 * 10 * 5 * 32
    assert found.fits


def test_nothing_is_loaded_to_look_ahead(tmp_path, monkeypatch):
    folder = NAMED["llama"].build(tmp_path)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda _: None)
    made = []
    real = torch.nn.Parameter.__new__

    def note(cls, data=None, requires_grad=True):
        made.append(data.device.type)
        return real(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", note)
    outlook(folder, "x")
    assert set(made) == {"meta"}


def test_activations_are_of_the_size_that_a_pass_really_makes(tmp_path, monkeypatch):
    folder = NAMED["llama"].build(tmp_path, intermediate_size=128)
    tokens = 128
    monkeypatch.setattr(outlook_module, "batch_tokens", lambda _: tokens)
    found = outlook(folder, "x")
    backbone = load_backbone(folder, "x", dtype=torch.float32, device="cpu")
    measured = cost.measure(backbone, tokens)
    made = measured.peak_bytes[-1] - 4 * found.n_loaded
    assert 0.5 * made < found.activation_bytes < 3 * made


def test_what_cannot_fit_is_refused_with_what_could(tmp_path, monkeypatch):
    folder = NAMED["llama"].build(tmp_path)
    found = outlook(folder, "big")
    found.refuse()
    with pytest.raises(BackboneError, match=r"big needs about .* GB in float32, and cpu has") as no:
        replace(found, free_bytes=1000).refuse()
    assert no.value.fields == ("device_map",)
    with pytest.raises(BackboneError, match="big needs about") as no:
        replace(found, free_bytes=found.memory_bytes - 1000).refuse()
    assert "bfloat16, which halves its weights" in no.value.hint
    assert no.value.fields == ("dtype", "device_map")
    with pytest.raises(BackboneError, match="in bfloat16") as no:
        replace(found, dtype="bfloat16", free_bytes=found.memory_bytes - 1000).refuse()
    assert no.value.fields == ("device_map",)
    monkeypatch.setattr(outlook_module, "free_memory", lambda _: 1000)
    assert not outlook(folder, "big").fits


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_a_run_is_refused_before_loading_unless_it_may_spread(
    device_map, tiny_backbone_folder, toy_csv, home, tmp_path, monkeypatch
):
    monkeypatch.setattr(outlook_module, "free_memory", lambda _: 1000)
    loaded = []
    load = opening.load_backbone
    monkeypatch.setattr(
        opening, "load_backbone", lambda *a, **k: loaded.append(k["device_map"]) or load(*a, **k)
    )
    config = RunConfig.checked(
        backbone=str(tiny_backbone_folder),
        data=str(toy_csv),
        device_map=device_map,
        dtype="float32",
        max_train=20,
        max_validation=10,
        max_test=10,
    )
    (tmp_path / "run").mkdir()

    def start():
        return experiment.run(
            config,
            home=home,
            run_id="x",
            folder=RunFolder(tmp_path / "run"),
            progress=silent,
            on_points=lambda _: None,
        )

    if device_map is None:
        with pytest.raises(BackboneError, match="free"):
            start()
    else:
        assert start().backbone.dtype == "float32"
    assert loaded == ([] if device_map is None else ["auto"])


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_type": "nosuch"}, "of no architecture known here"), ({"hidden_size": "x"}, "known")],
)
def test_an_unknown_architecture_is_refused(change, said, tmp_path):
    import json

    folder = NAMED["llama"].build(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BackboneError, match=said):
        outlook(folder, "x")


def test_the_states_of_feed_forward_sites_are_as_wide_as_they_are(tiny_backbone_folder, home):
    folder = open_folder(tiny_backbone_folder, "tiny")
    plain, joined = (
        look_ahead(
            folder,
            RunConfig.checked(backbone="x", data="y", poolings=("mean",), stc=stc, sites=SITES),
            home=home,
            n_texts=10,
        ).feature_bytes
        for stc in (False, True)
    )
    # 4 layers and the embedding, 32 wide; the feed-forward part is 64 wide inside.
    assert plain == 4 * 10 * 5 * 32
    assert joined == 4 * 10 * 5 * (32 + 64 + 64 + 32)
