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

from chipviz.pruning.cut import cut_config, cut_weights
from tests.families import make_tokenizer

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


def cut_model(backbone: Any, layer: int) -> Any:
    """A model of its own with blocks 0 .. `layer`, as its family builds it."""
    model = type(backbone.model)(cut_config(backbone, layer))
    model.load_state_dict(cut_weights(backbone, layer))
    return model.eval()


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


def asked_model(name: str, folder: Path) -> Any:
    """Save a tiny decoder that is asked about pictures, with its processor, and return it."""
    from transformers import AutoModelForImageTextToText

    tokenizer = make_tokenizer("bytes")
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    marks += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    marks += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    config, processor = ASKED[name](tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


_TEXT: dict[str, Any] = {**WORDS, "num_hidden_layers": 4, "vocab_size": 440}


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    tokenizer.image_token = "<image>"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL),
        text_config=LlamaConfig(**_TEXT, num_key_value_heads=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURN,
    )
    return config, processor


def _paligemma(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**SMALL, projection_dim=32),
        text_config=GemmaConfig(**{**_TEXT, "vocab_size": 1600}, num_key_value_heads=2, head_dim=8),
        image_token_index=processor.image_token_id,
        projection_dim=32,
    )
    return config, processor


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=TURN
    )
    config = Idefics3Config(
        vision_config={**SMALL},
        text_config=LlamaConfig(**_TEXT, num_key_value_heads=2, pad_token_id=2).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3Processor, Gemma3TextConfig, SiglipVisionConfig
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    # Kept with the tokenizer, as the published ones keep them.
    named = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokenizer._set_model_specific_special_tokens({f"{k}_token": v for k, v in named.items()})
    processor = Gemma3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=TURN.replace("<image>", "<start_of_image>"),
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SMALL, vision_use_head=False),
        text_config=Gemma3TextConfig(**_TEXT, num_key_value_heads=2, head_dim=8, sliding_window=16),
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        mm_tokens_per_image=16,
    )
    return config, processor


@dataclass(frozen=True)
class _Parts:
    """A processor on disk as it is published. Its class wants torchvision, for videos."""

    images: Any
    tokenizer: Any
    turn: str
    name: str

    def save_pretrained(self, folder: Path) -> None:
        self.images.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.turn, "utf-8")
        file = folder / "preprocessor_config.json"
        said = json.loads(file.read_text("utf-8"))
        said |= {"processor_class": self.name, "image_processor_type": "Qwen2VLImageProcessor"}
        file.write_text(json.dumps(said), "utf-8")


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    )
    turn = TURN.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = _Parts(images, tokenizer, turn, "Qwen2VLProcessor")
    ids = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
    }
    text = {**_TEXT, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return config, processor


TURN = (
    "{% for message in messages %}User: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
ASKED = {
    "llava": _llava,
    "paligemma": _paligemma,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
}
