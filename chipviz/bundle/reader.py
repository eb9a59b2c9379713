"""The chip of a bundle of our own kind, and how it reads the cut backbone beside it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file
from torch import Tensor

from chipviz.backbones.backbone import Backbone, segments, watch_layers
from chipviz.backbones.model_folder import open_folder
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import find_blocks, find_norm_and_causality, first_of
from chipviz.backbones.vision import asked, seeing
from chipviz.bundle.metadata import CHIP_FILE, Metadata
from chipviz.chips.chip import Chip
from chipviz.data.processor import AskingReader, PictureReader
from chipviz.features.forward import (
    Places,
    of_pictures,
    of_tokens,
    pool_layers,
    read_neurons,
    width_at,
)
from chipviz.keys import ALL_SITES, EMBEDDING_LAYER, Cut, Site, Vector


@dataclass(frozen=True)
class Reader:
    """A chip and the model that it reads."""

    metadata: Metadata
    model: Any
    chip: Chip
    sep: int | None
    """The token that ends the first of two texts, if the tokenizer tells which is which."""
    backbone: Backbone | None = None
    """The model and its parts, for a chip that reads neurons of several layers."""
    places: Places | None = None
    """Where that one takes them."""

    def scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Class scores of padded texts, shape (B, T) both: shape (B, C), float32."""
        pooling = self.metadata.cut.key.pooling
        if self.backbone is not None and self.places is not None:
            inputs = of_tokens(self.backbone, tokens, mask)
            values = read_neurons(self.backbone, inputs, pooling, self.places)
            return self.chip.to(values.device).logits(values)
        pooled = pool(self._states(tokens, mask), mask, pooling)
        return self.chip.to(pooled.device).logits(pooled)

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The hidden states that the chip pools, shape (B, T, D): *raw* ones before the norm."""
        seen: list[Any] = []
        last = find_blocks(self.model, path=self.metadata.blocks)[-1]
        handle = last.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            which = segments(self.model.config, tokens, self.sep)
            output = self.model(input_ids=tokens, attention_mask=mask, **which)
        finally:
            handle.remove()
        return (
            first_of(seen[0]) if self.metadata.cut.key.site == "raw" else output.last_hidden_state
        )


def read_chip(path: Path, model: Any, metadata: Metadata, sep: int | None) -> Reader:
    """The chip beside a cut backbone.

    Raises:
        ValueError: If it is none, or none for this backbone and these classes.
        BackboneError: If the backbone's parts cannot be found.
    """
    chip = _chip(path, model)
    if chip.neurons is None:
        return Reader(metadata, model, chip, sep)
    backbone = backbone_of(path, model, metadata, sep)
    _refuse_other_neurons(chip.neurons, backbone)
    return Reader(metadata, model, chip, sep, backbone, Places.of(chip.neurons))


def backbone_of(path: Path, model: Any, metadata: Metadata, sep: int | None) -> Backbone:
    """The cut backbone inside a bundle's model, and its parts.

    Args:
        path: The bundle's folder.
        model: A classifier, or the backbone alone.
        metadata: Of the bundle.
        sep: The token that ends the first of two texts, if the tokenizer tells which is which.

    Raises:
        BackboneError: If its parts cannot be found.
    """
    base = model.base_model
    blocks = find_blocks(base, path=metadata.blocks)
    norm, causal = find_norm_and_causality(base, blocks, path.name)
    folder = open_folder(path, path.name)
    return Backbone(folder, base, blocks, norm, causal, sep, metadata.padded)


class EnoughError(Exception):
    """Nothing that the blocks after this one say is wanted. Ends a pass."""


def read_several(
    backbone: Backbone, chips: Sequence[tuple[Cut, Chip]], tokens: Tensor, mask: Tensor
) -> list[Tensor]:
    """Class scores of several chips in one pass, which ends at the deepest of their layers.

    Args:
        backbone: As deep as that at the least.
        chips: Where each stands, and the chip. None reads neurons.
        tokens: Of padded texts, shape (B, T).
        mask: 1 where a token is real, shape (B, T).

    Returns:
        One tensor a chip, shape (B, C), float32.
    """
    deepest = max(cut.layer for cut, _ in chips)
    found: dict[int, Tensor] = {}

    def on_hidden(layer: int, hidden: Tensor) -> None:
        for i, (cut, chip) in enumerate(chips):
            if cut.layer == layer:
                raw = cut.chip.site == "raw"
                states = hidden if raw else backbone.apply_final_norm(hidden)
                pooled = pool(states, mask.to(states.device), cut.chip.pooling)
                found[i] = chip.to(pooled.device).logits(pooled)
        if layer == deepest:
            raise EnoughError

    with watch_layers(backbone, on_hidden), suppress(EnoughError):
        which = segments(backbone.config, tokens, backbone.sep)
        backbone.model(input_ids=tokens, attention_mask=mask, **which)
    return [found[i] for i in range(len(chips))]


@dataclass(frozen=True)
class PictureChip:
    """A chip and the vision encoder that it reads."""

    vector: Vector
    backbone: Backbone
    chip: Chip
    places: Places | None = None
    """Where a chip that reads neurons takes them."""

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Class scores of pictures, as their reader makes them: shape (B, C), float32."""
        inputs = of_pictures(self.backbone, batch)
        if self.places is not None:
            values = read_neurons(self.backbone, inputs, self.vector.pooling, self.places)
            return self.chip.to(values.device).logits(values)
        pooled = pool_layers(self.backbone, inputs, [self.vector])[0][-1]
        return self.chip.to(pooled.device).logits(pooled)


def read_picture_chip(
    path: Path, model: Any, metadata: Metadata, reader: PictureReader
) -> PictureChip:
    """The chip beside a cut vision encoder.

    Args:
        path: The bundle's folder.
        model: The encoder.
        metadata: Of the bundle.
        reader: Of its pictures.

    Raises:
        ValueError: If it is none, or none for this encoder and these classes.
        BackboneError: If the encoder's parts cannot be found.
    """
    folder = open_folder(path, path.name)
    backbone = (
        asked(folder, model, reader.image_token, metadata.blocks)
        if isinstance(reader, AskingReader)
        else seeing(folder, model, reader.shape, metadata.blocks)
    )
    vector = metadata.cut.key.vector
    chip = _chip(path, model, vector.n_states)
    if chip.neurons is None:
        return PictureChip(vector, backbone, chip)
    _refuse_other_neurons(chip.neurons, backbone)
    return PictureChip(vector, backbone, chip, Places.of(chip.neurons))


def _refuse_other_neurons(neurons: Tensor, backbone: Backbone) -> None:
    """Refuse neurons that the model beside them does not have.

    Raises:
        ValueError: If one is.
    """
    names = get_args(Site)
    widths: dict[Site, int] = {}
    for site, layer, column in neurons.tolist():
        known = 0 <= site < len(names) and names[site] != ALL_SITES
        if known and names[site] not in widths:
            widths[names[site]] = width_at(backbone, names[site])
        known = known and EMBEDDING_LAYER <= layer < backbone.n_layers
        if not known or not 0 <= column < widths[names[site]]:
            raise ValueError(f"{CHIP_FILE} reads a neuron that the model beside it does not have")


def _chip(path: Path, model: Any, n_states: int = 1) -> Chip:
    """The chip beside a cut backbone, which reads so many states together.

    Raises:
        ValueError: If it is none, or none for this backbone and these classes.
    """
    try:
        chip = Chip(**load_file(path / CHIP_FILE))
    except TypeError:
        raise ValueError(f"{CHIP_FILE} holds no chip") from None
    n_classes, width = len(model.config.id2label), model.config.get_text_config().hidden_size
    width *= n_states
    if chip.neurons is not None:
        width = len(chip.neurons)
    inner = width if chip.hidden_weight is None else len(chip.hidden_weight)
    shapes = {
        "weight": (n_classes, inner),
        "bias": (n_classes,),
        "hidden_weight": (inner, width),
        "hidden_bias": (inner,),
        "mean": (width,),
        "scale": (width,),
        "neurons": (width, 3),
    }
    tensors = chip.tensors()
    fits = all(tuple(value.shape) == shapes[name] for name, value in tensors.items())
    pairs = (("hidden_weight", "hidden_bias"), ("mean", "scale"))
    if not fits or any((one in tensors) != (other in tensors) for one, other in pairs):
        raise ValueError(f"{CHIP_FILE} does not fit the model beside it")
    return chip
