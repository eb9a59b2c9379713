"""Tiny vision encoders, their processors, and pictures that a classifier can tell apart."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, CLIPConfig, SiglipConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIDE, PATCH = 32, 8
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": PATCH,
}
WORDS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@dataclass(frozen=True)
class Seeing:
    """How to build a tiny vision encoder of one family, and what is known of it."""

    name: str
    n_prefix: int
    normed: bool
    """Whether a norm stands after the last block."""
    stock: str | None = None
    """The pooling that the family's stock classifier reads."""

    def config(self) -> Any:
        """Of a model that reads pictures, in `clip` and `siglip` beside texts."""
        if self.name == "clip":
            return CLIPConfig(vision_config=SMALL, text_config=WORDS, projection_dim=16)
        if self.name == "siglip":
            return SiglipConfig(vision_config=SMALL, text_config=WORDS)
        return CONFIG_MAPPING[self.name](**SMALL)

    def build(self, folder: Path) -> Any:
        """Save a random model with its processor, and return it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModel.from_config(self.config()).eval()
            for name, parameter in model.named_parameters():
                noise = 0.3 if "norm" in name else 0.1
                parameter.data.add_(noise * torch.randn_like(parameter))
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), "utf-8")
        return model


ALL = (
    Seeing("vit", 1, True, "first"),
    Seeing("deit", 2, True, "first"),
    Seeing("beit", 1, False),
    Seeing("dinov2", 1, True, "first+mean"),
    Seeing("dinov2_with_registers", 5, True, "first+mean"),
    Seeing("dinov3_vit", 1, True),
    Seeing("clip_vision_model", 1, False),
    Seeing("siglip_vision_model", 0, True),
    Seeing("clip", 1, False),
    Seeing("siglip", 0, True),
)
NAMED = {one.name: one for one in ALL}


def picture(
    colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 28)
) -> Image.Image:
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).normal(0, 40, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def class_folders(root: Path, n: int = 20, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A folder of class folders with so many pictures each."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            data = as_bytes(picture(COLOURS[name], seed=1000 * len(name) + i))
            (root / name / f"{i:03}.png").write_bytes(data)
    return root
