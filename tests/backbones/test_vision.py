"""Vision encoders: found by structure, read as transformers reads them, cut, saved and verified."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from chipviz.backbones.model_folder import open_folder
from chipviz.backbones.structure import find_blocks
from chipviz.backbones.vision import load_vision_backbone, refuse_blind, refuse_wordless
from chipviz.bundle import save
from chipviz.bundle.classifier import load
from chipviz.bundle.kinds import Cutting, kind_of
from chipviz.bundle.verify import in_fresh_process
from chipviz.bundle.vision import MADE, stock_pooling
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.pictures import Pictures
from chipviz.data.processor import load_processor
from chipviz.errors import BackboneError, SourceError
from chipviz.features.forward import forward_pooled, look_at, pool_layers
from chipviz.keys import IMAGE_POOLINGS, Vector
from chipviz.pruning.cut import impossible_cuts
from tests.backbones.test_families import small_report
from tests.families import NAMED as TEXT
from tests.seeing import ALL, COLOURS, NAMED, PROCESSOR, SIDE, as_bytes, cut_model, picture

PICTURES = [picture(COLOURS[name], i, (30 + i, 26)) for i in range(4) for name in COLOURS]


@pytest.fixture(scope="module", params=ALL, ids=lambda one: one.name)
def found(request, tmp_path_factory):
    """A family, its model as transformers loads it, what chipviz makes of it, and its reader."""
    return opened(request.param, tmp_path_factory.mktemp(request.param.name))


def opened(one, folder):
    one.build(folder)
    store = Pictures(folder.parent / "pictures")
    reader = load_processor(folder, store)
    backbone = load_vision_backbone(
        open_folder(folder, one.name), reader.shape, dtype=torch.float32, device="cpu"
    )
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if one.name in ("clip", "siglip"):
        plain = plain.vision_model
    assert backbone.view is not None
    reader = type(reader)(reader.processor, store, backbone.view.n_tokens)
    return one, plain, backbone, reader


def references(reader):
    return [reader.pictures.add(as_bytes(image))[0] for image in PICTURES]


def test_the_parts_are_found_by_structure(found):
    one, _, backbone, _ = found
    assert backbone.n_layers == 4
    assert backbone.hidden_size == 32
    assert (backbone.final_norm is not None) == one.normed
    assert not backbone.causal
    assert backbone.view.n_prefix == one.n_prefix
    assert backbone.view.grid == (4, 4)
    assert backbone.class_token == (one.n_prefix > 0)
    assert stock_pooling(backbone) == one.stock
    assert backbone.folder.n_published == sum(p.numel() for p in backbone.model.parameters())


def test_features_are_the_states_that_transformers_gives(found):
    one, plain, backbone, reader = found
    stock = AutoImageProcessor.from_pretrained(backbone.folder.path, backend="pil")
    pixels = stock(PICTURES, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states = plain(pixel_values=pixels, output_hidden_states=True).hidden_states
    poolings = IMAGE_POOLINGS if one.n_prefix else ("mean", "max")
    vectors = [Vector("block", pooling) for pooling in poolings]
    ours = forward_pooled(backbone, reader.encode(references(reader)), 0, vectors)
    assert len(states) == 5
    for layer, state in enumerate(states[1:]):
        # some families norm the last of their hidden states
        last = (
            layer == 3 and one.normed and not torch.equal(backbone.apply_final_norm(state), state)
        )
        normed = plain(pixel_values=pixels).last_hidden_state if last else None
        state = backbone.apply_final_norm(state) if normed is None else normed
        patches = state[:, one.n_prefix :]
        truth = {
            "first": state[:, 0],
            "mean": patches.mean(dim=1),
            "max": patches.amax(dim=1),
            "first+mean": torch.cat([state[:, 0], patches.mean(dim=1)], dim=1),
        }
        for pooling, values in zip(poolings, ours, strict=True):
            torch.testing.assert_close(values[layer + 1], truth[pooling], atol=1e-5, rtol=1e-5)


def test_batch_mates_do_not_matter(found):
    _, _, backbone, reader = found
    rows, vectors = reader.encode(references(reader)), [Vector("block", "mean")]
    together = forward_pooled(backbone, rows, 0, vectors)[0]
    for i in (0, 5, 11):
        alone = forward_pooled(backbone, rows[i : i + 1], 0, vectors)[0]
        torch.testing.assert_close(alone[:, 0], together[:, i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_cut_model_says_what_the_whole_one_says_there(found, layer):
    _, _, backbone, reader = found
    assert impossible_cuts(backbone) == {}
    model = cut_model(backbone, layer)
    pixels = torch.stack([reader.pixels(image) for image in PICTURES])
    vectors = [Vector("raw", "last")]
    whole = pool_layers(backbone, look_at(backbone, pixels), vectors)[0][layer + 1]
    taken = []
    blocks = model.get_submodule(
        next(n for n, m in backbone.model.named_modules() if m is backbone.blocks)
    )
    blocks[-1].register_forward_hook(
        lambda _m, _a, out: taken.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.inference_mode():
        model(pixel_values=pixels)
    torch.testing.assert_close(taken[0][:, -1], whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", IMAGE_POOLINGS)
def test_a_bundle_says_what_the_chip_says(found, pooling, tmp_path, monkeypatch):
    one, _, backbone, reader = found
    if not one.n_prefix and pooling.startswith("first"):
        return
    about, chip, cut = bundled(found, pooling, tmp_path, monkeypatch)
    assert about.max_difference < 1e-5
    assert about.kind == ("image" if pooling == one.stock else "chipviz")
    assert kind_of(backbone, reader, cut.key.vector, chip) == about.kind


def bundled(found, pooling, tmp_path, monkeypatch=None):
    _, _, backbone, reader = found
    width = 64 if pooling == "first+mean" else 32
    draw = torch.Generator().manual_seed(3)
    chip = Chip(torch.randn(3, width, generator=draw), torch.randn(3, generator=draw))
    cut = CutSpec(cut_layer=1, pooling=pooling)
    report = small_report(pooling)
    report = report.model_copy(
        update={"task": report.task.model_copy(update={"kind": "image", "template": ""})}
    )
    rows = reader.encode(references(reader))
    states = forward_pooled(backbone, rows, 0, [cut.key.vector])[0][2]
    files = []
    for i, image in enumerate(PICTURES):
        files.append((str(tmp_path / f"{i}.png"), None))
        image.save(files[-1][0])
    if monkeypatch is not None:
        monkeypatch.setattr(save, "in_fresh_process", said_here)
    about = save.save(
        Cutting(backbone, reader, chip, cut, report),
        tmp_path / "out",
        files,
        chip.probabilities(states),
    )
    return about, chip, cut


def said_here(folder, _kind, check):
    return [list(p.probabilities.values()) for p in load(folder).predict([c[0] for c in check])]


def test_stock_pipelines_give_the_same_labels_on_64_pictures(tmp_path):
    """In a fresh process without chipviz, and in this one with a plain loop."""
    found = opened(NAMED["vit"], tmp_path / "vit")
    about, _, _ = bundled(found, "first", tmp_path)
    assert about.kind == "image"
    assert about.n_verified == len(PICTURES)
    check = []
    for i in range(64):
        file = tmp_path / f"more{i}.png"
        picture(COLOURS[list(COLOURS)[i % 3]], 100 + i).save(file)
        check.append((str(file), None))
    said = np.array(in_fresh_process(tmp_path / "out", "image", check))
    ours = np.array(said_here(tmp_path / "out", "image", check))
    assert np.array_equal(said.argmax(axis=1), ours.argmax(axis=1))
    assert np.abs(said - ours).max() < 1e-5
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert len(find_blocks(model.base_model)) == model.config.num_hidden_layers == 2


def test_a_bundle_of_pictures_verifies_itself_and_refuses_other_tests(tmp_path, monkeypatch):
    from chipviz.bundle.verify import verify, write_sums
    from chipviz.errors import BundleError

    found = opened(NAMED["dinov2"], tmp_path / "dinov2")
    bundled(found, "first+mean", tmp_path, monkeypatch)
    out = tmp_path / "out"
    assert verify(out)["n_texts"] == len(MADE)
    said = json.loads((out / "chip.json").read_text())
    said["self_test"][0]["text"] = "/etc/hostname"  # a stranger's bundle opens no file of ours
    (out / "chip.json").write_text(json.dumps(said))
    write_sums(out)
    with pytest.raises(BundleError, match="no test of the bundle"):
        verify(out)


def test_an_odd_processor_is_refused(tmp_path):
    folder = tmp_path / "vit"
    NAMED["vit"].build(folder)
    file = folder / "preprocessor_config.json"
    for said, why in (
        ({**PROCESSOR, "auto_map": {"AutoImageProcessor": "x.Y"}}, "code of its own"),
        ({**PROCESSOR, "size": {"shortest_edge": SIDE}}, "two shapes"),
        ([], "cannot be used"),
    ):
        file.write_text(json.dumps(said))
        with pytest.raises(SourceError, match=why):
            load_processor(folder, Pictures(tmp_path))
    file.unlink()
    with pytest.raises(SourceError, match="has no preprocessor_config"):
        load_processor(folder, Pictures(tmp_path))


def test_texts_and_pictures_are_told_apart_before_anything_is_loaded(tmp_path):
    text = open_folder(TEXT["llama"].build(tmp_path / "llama"), "words")
    NAMED["vit"].build(tmp_path / "vit")
    NAMED["clip"].build(tmp_path / "clip")
    eyes, both = (open_folder(tmp_path / name, name) for name in ("vit", "clip"))
    with pytest.raises(BackboneError, match="words reads texts, and the data has pictures"):
        refuse_blind(text)
    with pytest.raises(BackboneError, match="vit reads pictures, and the data has texts"):
        refuse_wordless(eyes)
    for folder in (eyes, both):
        refuse_blind(folder)
    for folder in (text, both):
        refuse_wordless(folder)


def test_what_the_crop_leaves_is_found_by_looking(tmp_path):
    folder = tmp_path / "vit"
    NAMED["vit"].build(folder)
    crop = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    said = {**PROCESSOR, "image_processor_type": "BitImageProcessor", **crop}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**said, "size": {"shortest_edge": 32}})
    )
    reader = load_processor(folder, Pictures(tmp_path))
    left, top, right, bottom = reader.crop(128, 64)  # becomes 64 x 32, of which 16 x 16 stay
    assert (left, right) == pytest.approx((0.375, 0.625), abs=0.03)
    assert (top, bottom) == pytest.approx((0.25, 0.75), abs=0.03)
    NAMED["vit"].build(folder)
    assert load_processor(folder, Pictures(tmp_path)).crop(90, 40) == (0, 0, 1, 1)


def test_a_configuration_of_other_weights_is_refused(tmp_path):
    NAMED["vit"].build(tmp_path / "vit")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "vit", other)
    said = json.loads((other / "config.json").read_text()) | {"patch_size": 64}
    (other / "config.json").write_text(json.dumps(said))
    with pytest.raises(BackboneError):
        load_vision_backbone(open_folder(other, "other"), (3, SIDE, SIDE), device="cpu")
