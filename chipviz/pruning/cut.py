"""Backbone + cut layer -> the configuration and weights of the shortened backbone."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.surgery import Surgery, operate, write_surgery
from chipviz.backbones.vetting import FOREIGN
from chipviz.chips.chip import Chip
from chipviz.errors import BackboneError, ConfigError, Notice
from chipviz.keys import Cut
from chipviz.pruning.blocks import kept_config
from chipviz.results.report import BundleKind

_SETTINGS = (bool, int, float, str, type(None))
"""Attributes of a module that say how it computes."""
_OF_TRAINING = {"drop_prob"}
"""Those that say it of training alone: BEiT drops deeper layers more often."""


def cut_config(backbone: Backbone, cut_layer: int) -> Any:
    """The configuration of blocks 0 .. `cut_layer`.

    Raises:
        ConfigError: If there is no such layer.
    """
    n_layers = backbone.n_layers
    if not 0 <= cut_layer < n_layers:
        raise ConfigError(
            f"Layer {cut_layer} does not exist, layers are 0 to {n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    config = kept_config(backbone.config, n_layers, range(cut_layer + 1))
    config.use_cache = False
    return config


def last_kept(chip: Chip, layer: int, no_cut: Container[int]) -> int:
    """The last block that a chip needs: its layer's, or the deepest that its neurons are taken of.

    A block more is kept where the model cannot be cut after that one.

    Args:
        chip: One chip.
        layer: The layer whose chip it is.
        no_cut: Layers that the model cannot be cut after.
    """
    if chip.deepest is None:
        return layer
    last = max(0, chip.deepest)
    while last < layer and last in no_cut:
        last += 1
    return last


def as_stored(chip: Chip, cut: Cut, bundle: BundleKind) -> Chip:
    """A chip as its bundle keeps it.

    A sparse one of a stock kind has its scaler folded in. One of our own kind is the neurons that
    it reads.
    """
    if cut.chip.kind != "sparse":
        return chip
    return chip.folded() if bundle != "chipviz" else chip.of_neurons(cut.chip.site, cut.layer)


def cut_weights(backbone: Backbone, cut_layer: int) -> dict[str, Tensor]:
    """Weights of the base model up to block `cut_layer`, under their own names."""
    path = next(name for name, m in backbone.model.named_modules() if m is backbone.blocks)

    def is_kept(key: str) -> bool:
        if not key.startswith(f"{path}."):
            return True
        return int(key[len(path) + 1 :].split(".", 1)[0]) <= cut_layer

    return {key: value for key, value in backbone.model.state_dict().items() if is_kept(key)}


def cut_surgery(backbone: Backbone, cut_layer: int) -> Surgery | None:
    """What was changed in blocks 0 .. `cut_layer`, of a model whose parts are not its class's."""
    if backbone.folder.surgery is None:
        return None
    path = next(name for name, m in backbone.model.named_modules() if m is backbone.blocks)
    return backbone.folder.surgery.cut(path, cut_layer + 1)


def write_cut_surgery(backbone: Backbone, cut_layer: int, folder: Path) -> None:
    """Write it beside the weights, where there is any."""
    surgery = cut_surgery(backbone, cut_layer)
    if surgery is not None:
        write_surgery(folder, surgery)


def impossible_cuts(backbone: Backbone) -> dict[int, str]:
    """Layers after which the family's own code would build another model, and why.

    Some families count from the last layer, keep tables of all layers in one weight, or want an
    attention layer among those kept. Every cut is built without weights and compared with the whole
    model, built the same way. Takes a second for 30 layers.

    Raises:
        BackboneError: If no layer but the last can be cut after.
    """
    last = backbone.n_layers - 1
    whole = _built(backbone, last)
    found: dict[int, str] = {}
    for layer in range(last):
        try:
            found[layer] = next(_differences(backbone, _built(backbone, layer), whole, layer + 1))
        except StopIteration:
            continue
        except FOREIGN as error:
            found[layer] = " ".join(str(error).split())[-120:]
    if last and len(found) == last:
        raise BackboneError(
            f"{backbone.name} cannot be cut after any layer but its last: {found[last - 1]}.",
            "Its family builds a shorter model otherwise; give a backbone of another family.",
        )
    return found


def no_cut_notices(no_cut: dict[int, str], name: str) -> list[Notice]:
    """What must be said of the layers that a model cannot be cut after."""
    if not no_cut:
        return []
    message = f"{name} cannot be cut after {len(no_cut)} of its layers: no rule chooses them."
    shown = tuple(f"layer {layer}: {why}" for layer, why in list(no_cut.items())[:3])
    return [Notice("layers-without-cut", message, len(no_cut), shown)]


def _built(backbone: Backbone, layer: int) -> nn.Module:
    """The cut model as its family builds it, without weights."""
    with torch.device("meta"):
        model: Any = type(backbone.model)(cut_config(backbone, layer))
        if (surgery := cut_surgery(backbone, layer)) is not None:
            operate(model, surgery)
    if layer == 0:
        model.initialize_weights()  # as loading does: RWKV divides by its layers less one
    return model


def _differences(backbone: Backbone, cut: nn.Module, whole: nn.Module, kept: int) -> Iterator[str]:
    """Where a cut model has other weights or settings than the same part of the whole one."""
    wanted = {name: value.shape for name, value in cut_weights(backbone, kept - 1).items()}
    built = {name: value.shape for name, value in cut.state_dict().items()}
    for name in sorted(wanted.keys() | built.keys()):
        if wanted.get(name) != built.get(name):
            yield f"{name} would have another shape"
    parts = dict(whole.named_modules())
    counts = (kept, backbone.n_layers)  # a number of layers is another one by right
    for where, part in cut.named_modules():
        ours, theirs = vars(part), vars(parts.get(where, part))
        for name in (ours.keys() & theirs.keys()) - _OF_TRAINING:
            one, other = ours[name], theirs[name]
            if isinstance(one, _SETTINGS) and one != other and (one, other) != counts:
                yield f"{where}.{name} would be {one}, not {other}".removeprefix(".")
