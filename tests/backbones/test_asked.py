"""Decoders that are asked about pictures: LLaVA's shape, PaliGemma's and Idefics3's (SmolVLM's)."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from chipviz import experiment
from chipviz.backbones.model_folder import open_folder
from chipviz.backbones.opening import reopen
from chipviz.backbones.vision import load_asked_backbone
from chipviz.bundle.classifier import load
from chipviz.chips.chip import Chips
from chipviz.chips.patches import read_patches
from chipviz.config import CutSpec
from chipviz.data.pictures import Pictures
from chipviz.data.processor import QUESTION, load_asking, load_processor
from chipviz.errors import BackboneError, SourceError
from chipviz.features.forward import forward_pooled
from chipviz.keys import ChipKey, Cut, Vector
from chipviz.progress import silent
from chipviz.pruning.cut import impossible_cuts
from tests.here import verified_here
from tests.seeing import (
    ASKED,
    COLOURS,
    as_bytes,
    asked_model,
    class_folders,
    cut_model,
    picture,
)
from tests.test_seeing import trained

# PaliGemma's processor turns tensors into arrays the way that NumPy 2 does not like
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PICTURES = [picture(COLOURS[name], i, (34 + 2 * i, 30)) for i in range(2) for name in COLOURS]


@pytest.fixture(scope="module", params=ASKED)
def found(request, tmp_path_factory):
    """A family's folder, its published model, what chipviz makes of it, and its reader."""
    folder = tmp_path_factory.mktemp(request.param)
    model = asked_model(request.param, folder)
    reader = load_asking(folder, Pictures(folder.parent / "pictures"), QUESTION)
    backbone = load_asked_backbone(
        open_folder(folder, request.param), reader, dtype=torch.float32, device="cpu"
    )
    return request.param, model, backbone, reader


def test_the_language_models_blocks_are_the_layers_and_all_is_counted(found):
    _, model, backbone, _ = found
    assert backbone.n_layers == 4
    assert backbone.hidden_size == 32
    assert backbone.final_norm is not None
    assert backbone.causal
    assert backbone.folder.n_published == sum(p.numel() for p in model.parameters())
    assert any("vis" in name for name, _ in backbone.model.named_parameters())


def plain_inputs(name, folder):
    """What a model is given of one picture and a prompt, by transformers alone."""
    if name != "qwen2_vl":
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        return lambda image, prompt: processor(images=[[image]], text=[prompt], return_tensors="pt")
    # Its processor wants torchvision, for videos: the prompt is written out by hand.
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def by_hand(image, prompt):
        found = images(images=[image], return_tensors="pt")
        n_places = int(found["image_grid_thw"].prod()) // 4
        ids = tokenizer(
            prompt.replace("<|image_pad|>", n_places * "<|image_pad|>"), return_tensors="pt"
        )
        places = ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {**found, **ids, "mm_token_type_ids": places.int()}

    return by_hand


def test_features_are_the_states_that_transformers_gives(found):
    name, _, backbone, reader = found
    inputs_of = plain_inputs(name, backbone.folder.path)
    plain = AutoModel.from_pretrained(backbone.folder.path, dtype=torch.float32).eval()
    vectors = [Vector("block", "last"), Vector("block", "mean")]
    rows = reader.encode([reader.pictures.add(as_bytes(image))[0] for image in PICTURES])
    together = forward_pooled(backbone, rows, 0, vectors)
    assert QUESTION in reader.prompt
    for i, image in enumerate(PICTURES):
        inputs = inputs_of(image, reader.prompt)
        with torch.inference_mode():
            out = plain(**inputs, output_hidden_states=True, use_cache=False)
        places = inputs["input_ids"][0] == reader.image_token
        assert int(places.sum()) == {"idefics3": 4, "qwen2_vl": 4}.get(name, 16)
        for layer in range(3):
            state = backbone.apply_final_norm(out.hidden_states[layer + 1])[0]
            torch.testing.assert_close(together[0][layer + 1, i], state[-1], atol=2e-5, rtol=1e-4)
            mean = state[places].mean(dim=0)
            torch.testing.assert_close(together[1][layer + 1, i], mean, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            together[0][4, i], out.last_hidden_state[0, -1], atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_cut_model_says_what_the_whole_one_says_there(found, layer):
    _, _, backbone, reader = found
    assert impossible_cuts(backbone) == {}
    model = cut_model(backbone, layer)
    batch = reader.batch(PICTURES)
    rows = reader.encode([reader.pictures.add(as_bytes(image))[0] for image in PICTURES])
    whole = forward_pooled(backbone, rows, 0, [Vector("block", "last")])[0][layer + 1]
    with torch.inference_mode():
        said = model(**batch, use_cache=False).last_hidden_state
    ends = batch["attention_mask"].sum(dim=1) - 1
    torch.testing.assert_close(said[range(len(ends)), ends], whole, atol=1e-5, rtol=1e-5)


def test_from_class_folders_to_a_verified_bundle(found, tmp_path):
    name, _, backbone, _ = found
    data = class_folders(tmp_path / "colours", 12)
    run = trained(
        tmp_path / "home", backbone.folder.path, data, template="Which colour?", dtype="float32"
    )
    report = run.report
    assert report.task.template == "Which colour?"
    assert sorted({key.pooling for key in report.chips}) == ["last", "mean"]
    cut = Cut(1, next(key for key in report.chips if key.pooling == "mean"))
    built = experiment.build(
        run.folder, CutSpec.at(cut), home=run.home, out=tmp_path / "bundle", progress=silent
    )
    assert built.kind == "chipviz"
    assert built.max_difference < 1e-3
    assert built.n_parameters < report.backbone.n_parameters
    files = []
    for colour in COLOURS:
        files.append(tmp_path / f"{colour}.png")
        picture(COLOURS[colour], 500).save(files[-1])
    said = load(tmp_path / "bundle").predict(files)
    chips = Chips.load(run.folder.chips, backbone.folder.fingerprint)
    reader = load_asking(backbone.folder.path, Pictures(tmp_path), "Which colour?")
    states = forward_pooled(backbone, reader.encode(list(map(str, files))), 0, [cut.chip.vector])
    truth = chips.at(cut).probabilities(states[0][2])
    names = report.task.label_names
    for row, one in zip(truth, said, strict=True):
        assert one.label == names[int(row.argmax())]
        assert one.score == pytest.approx(float(row.max()), abs=1e-3)
    if name not in ("idefics3", "qwen2_vl"):
        shown = read_patches(backbone, reader, chips, str(files[0]), cut=cut, label_names=names)
        assert shown.grid == (4, 4)
        assert np.allclose(shown.by_layer[1], truth[0], atol=1e-3)


def test_named_blocks_are_taken_and_others_refused(found):
    _, _, backbone, reader = found
    for path in ("language_model.layers", "text_model.layers", "layers"):
        again = load_asked_backbone(
            backbone.folder, reader, dtype=torch.float32, device="cpu", blocks_path=path
        )
        assert len(again.blocks) == 4
    with pytest.raises(BackboneError, match="no list of 4 blocks at 'nowhere'"):
        load_asked_backbone(backbone.folder, reader, device="cpu", blocks_path="nowhere")


def test_a_processor_with_code_or_without_a_place_for_a_picture_is_refused(tmp_path):
    folder = tmp_path / "llava"
    asked_model("llava", folder)
    said = (folder / "processor_config.json").read_text()
    (folder / "processor_config.json").write_text(
        said[:-2] + ', "auto_map": {"AutoProcessor": "x.Y"}}'
    )
    with pytest.raises(SourceError, match="code of its own"):
        load_asking(folder, Pictures(tmp_path), QUESTION)
    nested = json.loads(said)
    nested["image_processor"]["auto_map"] = {"AutoImageProcessor": "x.Y"}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    for opening in (
        lambda: load_asking(folder, Pictures(tmp_path), QUESTION),
        lambda: load_processor(folder, Pictures(tmp_path)),
    ):
        with pytest.raises(SourceError, match="code of its own"):
            opening()
    (folder / "processor_config.json").unlink()
    with pytest.raises(SourceError, match="cannot be used"):
        load_asking(folder, Pictures(tmp_path), QUESTION)


@pytest.mark.parametrize(
    "path", ["vision_tower.encoder.layers", "model.vision_tower.encoder.layers"]
)
def test_the_tower_of_such_a_model_is_read_by_itself_where_its_layers_are_named(tmp_path, path):
    folder = tmp_path / "llava"
    model = asked_model("llava", folder)
    data = class_folders(tmp_path / "colours", 20)
    run = trained(tmp_path / "home", folder, data, blocks=path, dtype="float32", poolings=["first"])
    tower = model.model.vision_tower
    assert run.report.backbone.n_layers == 4
    assert run.report.backbone.n_parameters == sum(p.numel() for p in tower.parameters())
    backbone, reader = reopen(run.config, run.report, home=run.home, folder=run.folder)
    assert not any("language" in name for name, _ in backbone.model.named_parameters())
    pixels = torch.stack([reader.pixels(image) for image in PICTURES])
    with torch.inference_mode():
        truth = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    rows = reader.encode([reader.pictures.add(as_bytes(image))[0] for image in PICTURES])
    found = forward_pooled(backbone, rows, 0, [Vector("raw", "first")])[0]
    for layer in range(4):
        torch.testing.assert_close(found[layer + 1], truth[layer + 1][:, 0], atol=2e-5, rtol=1e-4)
    cut = Cut(2, ChipKey.sound("first"))
    with verified_here():
        built = experiment.build(
            run.folder, CutSpec.at(cut), home=run.home, out=tmp_path / "bundle", progress=silent
        )
    assert built.max_difference < 1e-4
    assert built.n_parameters < sum(p.numel() for p in tower.parameters())


def test_a_tower_without_one_size_of_pictures_is_refused(tmp_path):
    asked_model("idefics3", tmp_path / "idefics3")
    data = class_folders(tmp_path / "colours", 5)
    with pytest.raises(SourceError, match="cannot be used"):
        trained(
            tmp_path / "home", tmp_path / "idefics3", data, blocks="vision_model.encoder.layers"
        )
