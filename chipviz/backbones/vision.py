"""Load and freeze a model that reads pictures: a vision encoder, or a decoder that is asked.

An encoder is a model of its own, or the tower of one that reads texts too. Parts are found by
structure and by running it, as those of text models are.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from chipviz.backbones.backbone import Backbone, View, best_device, refuse_missing, unloadable
from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.structure import find_blocks, find_norm_and_causality, text_part
from chipviz.backbones.surgery import load_operated
from chipviz.backbones.vetting import FOREIGN
from chipviz.config import RunConfig
from chipviz.data.pictures import Pictures, size_of
from chipviz.data.processor import (
    QUESTION,
    AskingReader,
    PictureReader,
    load_asking,
    load_processor,
)
from chipviz.data.task import Examples, PictureLook
from chipviz.errors import BackboneError, ConfigError


def open_vision(
    folder: ModelFolder,
    config: RunConfig,
    home: Path,
    dtype: torch.dtype | Literal["auto"],
    *,
    processor: Path | None = None,
    device: str | None = None,
) -> tuple[Backbone, PictureReader]:
    """A model that reads pictures, alone or inside prompts, and its processor.

    Args:
        folder: The vetted folder.
        config: The run's settings.
        home: The folder that holds `data/pictures/`.
        dtype: What to compute in; "auto" is what the files hold.
        processor: The folder of a processor that a run kept. None takes the model's own.
        device: None takes the best.

    Raises:
        ChipvizError: If the model reads no pictures, its processor cannot be used, or a setting is
            of texts alone.
    """
    refuse_blind(folder)
    if config.device_map is not None:
        raise ConfigError(
            "A vision encoder is not spread over devices.", "Leave device_map out.", "device_map"
        )
    if config.max_length != RunConfig.model_fields["max_length"].default:
        raise ConfigError(
            "Pictures have no length limit: each becomes as many tokens as its processor makes.",
            "Leave the limit out.",
            "max_length",
        )
    pictures = Pictures(home / "data" / "pictures")
    if folder.asks and not names_tower(folder, config.blocks):
        asking = load_asking(processor or folder.path, pictures, config.template or QUESTION)
        backbone = load_asked_backbone(
            folder, asking, dtype=dtype, device=device, blocks_path=config.blocks
        )
        return backbone, asking
    if config.template is not None:
        raise ConfigError(
            "A vision encoder reads pictures without a template.",
            "Leave the template out.",
            "template",
        )
    reader = load_processor(processor or folder.path, pictures)
    backbone = load_vision_backbone(
        folder, reader.shape, dtype=dtype, device=device, blocks_path=config.blocks
    )
    assert backbone.view is not None
    return backbone, replace(reader, n_tokens=backbone.view.n_tokens)


def load_vision_backbone(
    folder: ModelFolder,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    blocks_path: str | None = None,
) -> Backbone:
    """Load the vision encoder of a model folder, frozen.

    Args:
        folder: The vetted folder.
        shape: Channels, height and width of the pixels that its processor makes.
        dtype: What to compute in; "auto" is what the files hold.
        device: None takes CUDA, then MPS, then the CPU.
        blocks_path: Where the blocks are, for a model whose structure does not tell.

    Raises:
        BackboneError: If the folder cannot be loaded, or is no chain of blocks.
    """
    name = folder.name
    place = torch.device(device) if device is not None else best_device()
    try:
        model, loading = load_operated(
            AutoModel, folder.path, folder.surgery, folder.files, dtype=dtype
        )
    except FOREIGN as error:
        raise unloadable(name, error) from None
    tower = vision_part(model, name).eval().requires_grad_(False).to(place)
    refuse_missing(loading["missing_keys"], tower, name)
    # The tower is the model here: what stands around it is neither kept nor saved.
    own = sum(p.numel() for p in tower.parameters())
    return seeing(replace(folder, n_published=own), tower, shape, blocks_path)


def load_asked_backbone(
    folder: ModelFolder,
    reader: AskingReader,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    blocks_path: str | None = None,
) -> Backbone:
    """Load a decoder that is asked about pictures, frozen, without its LM head.

    The layers are the language model's blocks. What stands before them, the vision tower included,
    stays whatever is cut.

    Raises:
        BackboneError: If the folder cannot be loaded, or its text part is no chain of blocks.
    """
    place = torch.device(device) if device is not None else best_device()
    try:
        model, loading = load_operated(
            AutoModel, folder.path, folder.surgery, folder.files, dtype=dtype
        )
        with torch.device("meta"):
            published: Any = AutoModelForImageTextToText.from_config(
                folder.config, trust_remote_code=False
            )
    except FOREIGN as error:
        raise unloadable(folder.name, error) from None
    model.eval().requires_grad_(False).to(place)
    refuse_missing(loading["missing_keys"], model, folder.name)
    n_published = sum(p.numel() for p in published.parameters())
    counted = replace(folder, n_published=n_published, n_loaded=n_published)
    return asked(counted, model, reader.image_token, blocks_path)


def asked(folder: ModelFolder, model: Any, image_token: int, blocks_path: str | None) -> Backbone:
    """A loaded decoder that is asked about pictures, and where its parts are.

    Raises:
        BackboneError: If its text part is no chain of blocks.
    """
    text = text_part(model)
    blocks = find_blocks(text, folder.name, blocks_path)
    norm, _ = find_norm_and_causality(text, blocks, folder.name)
    # PaliGemma reads its prompt both ways. What it goes on from is the last token all the same.
    return Backbone(folder, model, blocks, norm, causal=True, image_token=image_token)


def seeing(
    folder: ModelFolder, tower: Any, shape: tuple[int, int, int], blocks_path: str | None
) -> Backbone:
    """A loaded vision encoder, and where its parts are.

    Args:
        folder: Where it comes from.
        tower: The encoder.
        shape: Channels, height and width of the pixels that its processor makes.
        blocks_path: Where the blocks are, for a model whose structure does not tell.

    Raises:
        BackboneError: If it is no chain of blocks that all see the same patches.
    """
    first = next(tower.parameters())
    pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(first)
    blocks = find_blocks(tower, folder.name, blocks_path)
    final_norm, _ = find_norm_and_causality(tower, blocks, folder.name, pixels)
    view = _view(tower, blocks, pixels[:1], folder.name)
    return Backbone(folder, tower, blocks, final_norm, causal=False, view=view)


def refuse_blind(folder: ModelFolder) -> None:
    """Refuse a model that reads no pictures, before it is loaded.

    Raises:
        BackboneError: If it does not.
    """
    if not folder.sees:
        raise BackboneError(
            f"{folder.name} reads texts, and the data has pictures.",
            "Take a vision backbone, such as dinov2-small, or data with texts.",
            "backbone",
            "data",
        )


def refuse_wordless(folder: ModelFolder) -> None:
    """Refuse a vision model where texts are to be read, before it is loaded.

    Raises:
        BackboneError: If it reads no texts.
    """
    if folder.sees and not folder.reads:
        raise BackboneError(
            f"{folder.name} reads pictures, and the data has texts.",
            "Take a text backbone, such as smollm2-135m, or data with pictures.",
            "backbone",
            "data",
        )


def look_at_pictures(
    rows: Examples,
    label_names: Sequence[str],
    folder: ModelFolder,
    home: Path,
    most: int,
    blocks_path: str | None = None,
) -> tuple[PictureLook, ...]:
    """Pictures to show before a run, one of each class first.

    Args:
        rows: Training pictures.
        label_names: Names of the classes.
        folder: The model that will read them.
        home: The folder that holds `data/pictures/`.
        most: Maximum pictures.
        blocks_path: Where the run's layers are.

    Raises:
        ChipvizError: If the model reads no pictures, or its processor cannot be used.
    """
    refuse_blind(folder)
    pictures = Pictures(home / "data" / "pictures")
    reader = (
        load_asking(folder.path, pictures, QUESTION)
        if folder.asks and not names_tower(folder, blocks_path)
        else load_processor(folder.path, pictures)
    )
    labels = rows.labels.tolist()
    first = sorted({label: row for row, label in reversed(list(enumerate(labels)))}.values())
    others = [row for row in range(len(labels)) if row not in set(first)]
    shown = rows.take([*first, *others][:most])
    return tuple(
        PictureLook(one, label_names[int(label)], width, height, reader.crop(width, height))
        for one, label in zip(shown.texts, shown.labels.tolist(), strict=True)
        for width, height in [size_of(one)]
    )


def names_tower(folder: ModelFolder, path: str | None) -> bool:
    """Whether a path leads to layers of the vision tower, so that it is read by itself.

    Args:
        folder: Of a model that reads pictures.
        path: Where the layers are, as the model or the published one around it names it.
    """
    if path is None:
        return False
    with torch.device("meta"):
        model: Any = AutoModel.from_config(folder.config, trust_remote_code=False)
    with suppress(AttributeError, BackboneError):
        module = model.get_submodule(path.removeprefix(f"{model.base_model_prefix}."))
        return any(module is one for one in vision_part(model, folder.name).modules())
    return False


def vision_part(model: Any, name: str) -> Any:
    """The part that reads pictures.

    Raises:
        BackboneError: If there is none that stands by itself.
    """
    wanted = getattr(model.config, "vision_config", None)
    if wanted is None:
        return model
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
    tower = next((m for m in parts if type(m.config) is type(wanted)), None)
    if tower is None:
        raise BackboneError(
            f"The vision tower of {name} cannot be found.", "Save it as a model of its own."
        )
    return tower


def _view(tower: Any, blocks: nn.ModuleList, pixels: Tensor, name: str) -> View:
    """How many tokens a picture becomes, and how its patches lie: patches stand at the end."""
    lengths: list[int] = []
    handle = blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: lengths.append(
            (args[0] if args else kwargs["hidden_states"]).shape[1]
        ),
        with_kwargs=True,
    )
    try:
        with torch.inference_mode():
            tower(pixel_values=pixels)
    finally:
        handle.remove()
    side: Any = tower.config.patch_size
    down, across = side if isinstance(side, (tuple, list)) else (side, side)
    _, height, width = pixels.shape[1:]
    grid = (height // down, width // across)
    view = View((pixels.shape[1], height, width), lengths[0], grid)
    if view.n_prefix < 0:
        raise BackboneError(
            f"{name} does not keep one token for each patch of {down} x {across} pixels.",
            "chipviz reads encoders whose layers all see the same patches, such as ViT and DINOv2.",
        )
    return view
