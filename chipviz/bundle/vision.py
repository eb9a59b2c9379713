"""Bundles of pictures: the stock class that holds a chip exactly, if the family has one, and ours.

Which states a stock class reads is found by asking it: a small one of the family, random weights.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone, View
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import find_blocks, find_norm_and_causality, first_of
from chipviz.chips.chip import Chip
from chipviz.data.processor import PictureReader
from chipviz.keys import IMAGE_POOLINGS, Pooling
from chipviz.pruning.cut import cut_config, cut_weights

MADE = ("red", "ramp", "rings")
"""Names of pictures that anyone can make, see `make_picture`: a bundle's own test."""
SAME = 1e-4
"""Largest difference of logits that are the same."""


@contextmanager
def as_files(reader: PictureReader, references: Sequence[str]) -> Iterator[list[Path]]:
    """Pictures as plain RGB files, for a program that knows nothing of what was made of them."""
    with tempfile.TemporaryDirectory(prefix="chipviz-pictures-") as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(references))]
        for file, reference in zip(files, references, strict=True):
            reader.open(reference).save(file, compress_level=1)
        yield files


def make_picture(name: str) -> Image.Image:
    """One of the pictures named in `MADE`. `chipviz.bundle.card` has the same lines."""
    if name == "red":
        return Image.new("RGB", (64, 48), (200, 30, 30))
    maker = Image.linear_gradient if name == "ramp" else Image.radial_gradient
    return maker("L").convert("RGB")


def stock_class(config: Any) -> Any:
    """The family's stock classifier of pictures, or None."""
    known: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    return known[0] if isinstance(known, tuple) else known  # DeiT has one with a teacher as well


def stock_model(config: Any) -> Any:
    """A stock classifier without its weights, or None where the family has no such class."""
    family = stock_class(config)
    if family is None:
        return None
    with torch.device("meta"):
        return family(config)


def holds(backbone: Backbone, pooling: Pooling, chip: Chip) -> bool:
    """Whether the family's stock class reads these states and has room for this chip."""
    if backbone.folder.surgery is not None or stock_pooling(backbone) != pooling:
        return False
    last = backbone.n_layers - 1
    model = stock_model(cut_config(backbone, last))
    return set(model.state_dict()) == set(stock_weights(model, backbone, last, chip))


def stock_weights(model: Any, backbone: Backbone, cut_layer: int, chip: Chip) -> dict[str, Tensor]:
    """A stock classifier's weights under the names it would have for them."""
    wanted = model.state_dict().keys()
    prefix = model.base_model_prefix
    weights = {f"{prefix}.{name}": v for name, v in cut_weights(backbone, cut_layer).items()}
    weights = {name: v for name, v in weights.items() if name in wanted or ".pooler." not in name}
    head = _head_name(model)
    weights[f"{head}.weight"] = chip.weight
    none = torch.zeros(len(chip.weight))
    weights[f"{head}.bias"] = chip.bias if chip.bias is not None else none
    return weights


def stock_pooling(backbone: Backbone) -> Pooling | None:
    """What the family's stock class reads.

    None where there is no such class, or it does more than a linear layer on pooled states.
    """
    family = stock_class(backbone.config)
    if family is None or backbone.view is None:
        return None
    config = cut_config(backbone, 0)
    return _asked(family, type(config), config.to_json_string(use_diff=False), backbone.view)


@lru_cache(maxsize=8)
def _asked(family: Any, kind: Any, settings: str, view: View) -> Pooling | None:
    """The same, found on one block of random weights. Every chip of a run asks anew."""
    config = kind.from_dict(json.loads(settings))
    config.id2label = {0: "a", 1: "b", 2: "c"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        pixels = torch.randn(2, *view.shape)
    name = _head_name(model)
    if not name:
        return None
    head, base = model.get_submodule(name), model.base_model
    blocks = find_blocks(base)
    norm, _ = find_norm_and_causality(base, blocks, kind.__name__, pixels)
    seen: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(first_of(out)))
    try:
        with torch.inference_mode():
            said = model(pixel_values=pixels).logits
            states = seen[0] if norm is None else norm(seen[0])
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
            patches = mask.clone()
            patches[:, : view.n_prefix] = 0
            for pooling in IMAGE_POOLINGS:
                pooled = pool(states, mask, pooling, patches)
                fits = pooled.shape[1] == head.in_features
                if fits and torch.allclose(head(pooled), said, atol=SAME):
                    return pooling
    finally:
        handle.remove()
    return None


def _head_name(model: Any) -> str:
    """The one linear layer outside the encoder. Empty where there is none or several."""
    inside = {id(module) for module in model.base_model.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    return names[0] if len(names) == 1 else ""
