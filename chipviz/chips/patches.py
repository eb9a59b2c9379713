"""What the chip of every layer says at each patch of a picture.

A chip was trained on whole pictures: at one patch it is asked about that patch's state alone, or
about it beside the class token's where it reads both.
"""

import base64
import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from chipviz.backbones.backbone import Backbone, watch_layers
from chipviz.chips.chip import Chips
from chipviz.chips.tokens import read_depths, rounded, settled_layer
from chipviz.data.processor import PictureReader
from chipviz.errors import ConfigError
from chipviz.features.forward import Inputs, of_pictures
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut
from chipviz.results.answers import PatchReading


def read_patches(
    backbone: Backbone,
    reader: PictureReader,
    chips: Chips,
    source: str,
    *,
    cut: Cut,
    label_names: Sequence[str],
) -> PatchReading:
    """Ask every layer's chip about a picture and about each of its patches.

    Args:
        backbone: The run's own.
        reader: The run's own.
        chips: The run's own.
        source: A reference, or the path of a file.
        cut: Which chips to ask, and the layer whose probabilities are wanted in full.
        label_names: Names of the classes.

    Raises:
        SourceError: If the picture is not there.
        UnreadableError: If it cannot be read.
        ConfigError: If its tokens lie on no square.
    """
    picture = reader.open(source)
    inputs = of_pictures(backbone, reader.batch([picture]))
    grid = _grid(backbone, inputs)
    ask = _joined if cut.chip.joins or cut.chip.site not in ("block", "raw") else _of_layers
    at_patches, whole = ask(backbone, chips, cut.chip, inputs)  # (L, P, C), (L, C)
    confidence, label = at_patches.max(dim=-1)
    return PatchReading(
        grid=grid,
        layer=cut.layer,
        label_index=label.tolist(),
        confidence=rounded(confidence),
        by_layer=rounded(whole),
        settled_layer=settled_layer(whole.argmax(dim=-1)),
        label_names=list(label_names),
        seen=_as_png(reader.seen(picture)),
        width=picture.width,
        height=picture.height,
    )


def _as_png(picture: Image.Image) -> str:
    """A picture as a PNG file, base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@torch.inference_mode()
def _of_layers(
    backbone: Backbone, chips: Chips, key: ChipKey, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """What each layer's chip says at each patch, (L, P, C), and of the picture, (L, C)."""
    at_patches: list[Tensor] = []
    of_picture: list[Tensor] = []

    def on_hidden(layer: int, hidden: Tensor) -> None:
        if layer == EMBEDDING_LAYER:
            return
        chip = chips.at(Cut(layer, key)).to(hidden.device)
        states = (hidden if key.site == "raw" else backbone.apply_final_norm(hidden)).float()
        patches = _patches(inputs, states[0])
        if key.pooling == "first+mean":
            patches = torch.cat([states[0, :1].expand_as(patches), patches], dim=1)
        at_patches.append(chip.probabilities(patches).cpu())
        of_picture.append(chip.probabilities(inputs.pool(states, key.pooling))[0].cpu())

    with watch_layers(backbone, on_hidden):
        inputs.run()
    return torch.stack(at_patches), torch.stack(of_picture)


@torch.inference_mode()
def _joined(
    backbone: Backbone, chips: Chips, key: ChipKey, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """The same of chips that read neurons, of one layer or of all layers up to their own."""
    assert inputs.patches is not None
    host = Inputs(inputs.mask.cpu(), inputs.run, inputs.patches.cpu())
    at_patches, of_picture = [], []
    for chip, values in read_depths(backbone, chips, key, inputs.mask.shape, inputs.run):
        at_patches.append(chip.probabilities(_patches(host, values)))
        of_picture.append(chip.probabilities(host.pool(values[None], key.pooling))[0])
    return torch.stack(at_patches), torch.stack(of_picture)


def _patches(inputs: Inputs, values: Tensor) -> Tensor:
    """Rows of the patches, of one row for each token, (T, D)."""
    assert inputs.patches is not None
    return values[inputs.patches[0].bool().to(values.device)]


def _grid(backbone: Backbone, inputs: Inputs) -> tuple[int, int]:
    """Rows and columns of the patches.

    Raises:
        ConfigError: If a picture's tokens make no square.
    """
    if backbone.view is not None:
        return backbone.view.grid
    assert inputs.patches is not None
    n = int(inputs.patches[0].sum())
    side = math.isqrt(n)
    if side * side != n:
        raise ConfigError(
            f"{backbone.name} reads this picture as {n} tokens that lie on no square.",
            "Its processor cuts pictures into several; their patches cannot be drawn.",
        )
    return side, side
