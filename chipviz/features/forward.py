"""One pass over a batch: every layer pooled as it leaves its block, on the device."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.backbone import Backbone, pad, watch_layers
from chipviz.backbones.pooling import AT_ONE_TOKEN, pool
from chipviz.backbones.sites import FFN_SITES, Sites, find_sites, refuse_absent, watch_sites
from chipviz.data.processor import Picture
from chipviz.keys import FfnSite, Pooling, Site, Vector

Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""


@dataclass(frozen=True)
class Inputs:
    """A batch as a backbone takes it."""

    mask: Tensor
    """1 where a token is real. Shape (B, T)."""
    run: Callable[[], None]
    """Sends the batch through all blocks."""
    patches: Tensor | None = None
    """1 where a token is a patch of a picture, shape (B, T). None of texts."""

    def pool(self, hidden: Tensor, pooling: Pooling) -> Tensor:
        """One layer's states (B, T, D) pooled: see `chipviz.backbones.pooling.pool`."""
        patches = None if self.patches is None else self.patches.to(hidden.device)
        return pool(hidden, self.mask.to(hidden.device), pooling, patches)


def inputs_of(backbone: Backbone, rows: Sequence[Ids | Picture], pad_id: int) -> Inputs:
    """A batch of texts or pictures, on the device.

    Args:
        backbone: What will read it.
        rows: Token ids of each text, or pictures where it reads pictures.
        pad_id: What pads texts.
    """
    pictures = [row for row in rows if isinstance(row, Picture)]
    if pictures:
        batch = pictures[0].reader.batch([picture.opened() for picture in pictures])
        return of_pictures(backbone, batch)
    ids = [row for row in rows if not isinstance(row, Picture)]
    return of_tokens(backbone, *pad(ids, pad_id, backbone.device))


def of_tokens(backbone: Backbone, tokens: Tensor, mask: Tensor) -> Inputs:
    """A batch of padded texts, shape (B, T) both."""
    return Inputs(mask, lambda: backbone.forward(tokens, mask))


def of_pictures(backbone: Backbone, batch: dict[str, Tensor]) -> Inputs:
    """A batch of pictures, as their reader makes it: alone, or inside prompts."""
    if backbone.image_token is None:
        return look_at(backbone, batch["pixel_values"])
    mask = batch["attention_mask"].to(backbone.device)
    patches = (batch["input_ids"] == backbone.image_token).long().to(backbone.device)
    return Inputs(mask, lambda: backbone.ask(batch), patches)


def look_at(backbone: Backbone, pixels: Tensor) -> Inputs:
    """A batch of pictures, shape (B, 3, H, W)."""
    assert backbone.view is not None
    n_tokens = backbone.view.n_tokens
    mask = torch.ones(pixels.shape[0], n_tokens, dtype=torch.int64, device=backbone.device)
    patches = mask.clone()
    patches[:, : backbone.view.n_prefix] = 0
    return Inputs(mask, lambda: backbone.look(pixels), patches)


@contextmanager
def pooling_pass(
    backbone: Backbone, pad_id: int, vectors: Sequence[Vector]
) -> Iterator[Callable[[Sequence[Ids | Picture] | Inputs], list[Tensor]]]:
    """A function that pools every layer as it leaves its block, on the device.

    It takes one batch, token ids or pictures, and returns one tensor per vector, on the device:
    shape (L + 1, B, width), float32. Row 0 of the layers is the embedding, which has no
    feed-forward part: there it is zero. Several threads may call it at the same time.

    Raises:
        BackboneError: If the backbone lacks a site.
    """
    wanted: set[Site] = {vector.site for vector in vectors}
    sites = find_sites(backbone) if wanted & set(FFN_SITES) else Sites({}, {}, {})
    refuse_absent(backbone.name, sites, wanted)
    normed_whole = any(v.site == "block" and v.pooling not in AT_ONE_TOKEN for v in vectors)
    own = threading.local()  # each thread's batch, and where its states go

    def on_hidden(layer: int, hidden: Tensor) -> None:
        inputs: Inputs = own.inputs
        normed = backbone.apply_final_norm(hidden) if normed_whole else hidden
        for vector, pooled in zip(vectors, own.pooled, strict=True):
            if vector.site in FFN_SITES:
                continue
            if vector.site == "raw":
                one = inputs.pool(hidden, vector.pooling)
            elif vector.pooling in AT_ONE_TOKEN:
                # A norm works on each token alone, so it can come after the token is taken.
                one = inputs.pool(hidden, vector.pooling).to(hidden.dtype)
                one = backbone.apply_final_norm(one).float()
            else:
                one = inputs.pool(normed, vector.pooling)
            pooled[layer + 1] = one.to(pooled.device)

    def on_value(site: Site, layer: int, value: Tensor) -> None:
        inputs: Inputs = own.inputs
        value = value.reshape(*inputs.mask.shape, -1)  # some put all tokens of a batch in a row
        for vector, pooled in zip(vectors, own.pooled, strict=True):
            if vector.site == site:
                pooled[layer + 1] = inputs.pool(value, vector.pooling).to(pooled.device)

    @torch.inference_mode()
    def forward(rows: Sequence[Ids | Picture] | Inputs) -> list[Tensor]:
        inputs = rows if isinstance(rows, Inputs) else inputs_of(backbone, rows, pad_id)
        own.inputs = inputs
        pooled = own.pooled = [
            torch.zeros(
                (
                    backbone.n_layers + 1,
                    inputs.mask.shape[0],
                    vector.n_states * width_at(backbone, vector.site),
                ),
                dtype=torch.float32,
                device=backbone.device,
            )
            for vector in vectors
        ]
        inputs.run()
        return pooled

    ffn: list[FfnSite] = [site for site in FFN_SITES if site in wanted]
    with watch_layers(backbone, on_hidden), watch_sites(sites, ffn, on_value):
        yield forward


def width_at(backbone: Backbone, site: Site) -> int:
    """Numbers a token at a site.

    Raises:
        BackboneError: If the backbone lacks it.
    """
    if site in ("block", "raw", "all"):
        return backbone.hidden_size
    sites = find_sites(backbone)
    refuse_absent(backbone.name, sites, [site])
    return sites.widths[site]


def pool_layers(backbone: Backbone, inputs: Inputs, vectors: Sequence[Vector]) -> list[Tensor]:
    """One pass over one batch that is on the device already: see `pooling_pass`."""
    with pooling_pass(backbone, 0, vectors) as forward:
        return forward(inputs)


def forward_pooled(
    backbone: Backbone,
    ids: Sequence[Ids | Picture],
    pad_id: int,
    vectors: Sequence[Vector],
) -> list[Tensor]:
    """One pass over one batch: see `pooling_pass`."""
    with pooling_pass(backbone, pad_id, vectors) as forward:
        return forward(ids)


def forward_neurons(
    backbone: Backbone,
    ids: Sequence[Ids | Picture],
    pad_id: int,
    pooling: Pooling,
    neurons: Tensor,
) -> Tensor:
    """The pooled values of some neurons, in one pass over one batch.

    Args:
        backbone: At least as deep as the deepest of them.
        ids: Token ids of each text, or pictures.
        pad_id: What pads a batch of texts.
        pooling: How each is pooled.
        neurons: See `chipviz.chips.chip.Chip.neurons`, shape (U, 3).

    Returns:
        Shape (B, U), float32, on the device.
    """
    return read_neurons(backbone, inputs_of(backbone, ids, pad_id), pooling, neurons)


@torch.inference_mode()
def read_neurons(
    backbone: Backbone, inputs: Inputs, pooling: Pooling, neurons: "Tensor | Places"
) -> Tensor:
    """The same of a batch that is on the device already."""

    def reduce(values: Tensor) -> Tensor:
        return inputs.pool(values, pooling).to(backbone.device)

    with watch_neurons(backbone, neurons, inputs.mask.shape, reduce) as taken:
        inputs.run()
        return taken()


@dataclass(frozen=True)
class Places:
    """Where neurons are taken, site by site and layer by layer."""

    order: dict[tuple[Site, int], list[int]]
    """Places of each among all of them."""
    columns: dict[tuple[Site, int], list[int]]

    @classmethod
    def of(cls, neurons: Tensor) -> "Places":
        """From `chipviz.chips.chip.Chip.neurons`, shape (U, 3)."""
        names = get_args(Site)
        order: dict[tuple[Site, int], list[int]] = {}
        columns: dict[tuple[Site, int], list[int]] = {}
        for i, (site, layer, column) in enumerate(neurons.tolist()):
            order.setdefault((names[site], layer), []).append(i)
            columns.setdefault((names[site], layer), []).append(column)
        return cls(order, columns)


@contextmanager
def watch_neurons(
    backbone: Backbone,
    neurons: Tensor | Places,
    shape: Sequence[int],
    reduce: Callable[[Tensor], Tensor],
) -> Iterator[Callable[[], Tensor]]:
    """What a pass inside the block leaves of some neurons. Nothing else is kept.

    Args:
        backbone: At least as deep as the deepest of them.
        neurons: See `chipviz.chips.chip.Chip.neurons`, shape (U, 3), or read from it already.
        shape: Texts and tokens of the pass.
        reduce: From the values of some of them, (B, T, u), to what is kept, (B', u).

    Yields:
        A function that gives all of it after the pass, shape (B', U).
    """
    wanted = neurons if isinstance(neurons, Places) else Places.of(neurons)
    found: dict[tuple[Site, int], Tensor] = {}

    def keep(site: Site, layer: int, value: Tensor) -> None:
        if (site, layer) in wanted.columns:
            value = value.reshape(*shape, -1)
            picked = value[..., torch.tensor(wanted.columns[site, layer], device=value.device)]
            found[site, layer] = reduce(picked).float()

    def on_hidden(layer: int, hidden: Tensor) -> None:
        keep("raw", layer, hidden)
        if ("block", layer) in wanted.columns:
            keep("block", layer, backbone.apply_final_norm(hidden))

    def taken() -> Tensor:
        if not wanted.order:
            return reduce(torch.empty(*shape, 0, device=backbone.device))
        parts = torch.cat([found[where] for where in wanted.order], dim=1)
        order = [i for own in wanted.order.values() for i in own]
        back = sorted(range(len(order)), key=order.__getitem__)
        return parts[:, torch.tensor(back, device=parts.device)]

    read = {site for site, _ in wanted.order}
    ffn: list[FfnSite] = [site for site in FFN_SITES if site in read]
    sites = find_sites(backbone) if ffn else Sites({}, {}, {})
    refuse_absent(backbone.name, sites, ffn)
    with watch_layers(backbone, on_hidden), watch_sites(sites, ffn, keep):
        yield taken


def reentrant(backbone: Backbone) -> bool:
    """Whether several passes may run at once: not where a pass changes the model.

    Parts that were put away come and go, and some rotary embeddings stretch with the text.
    """
    stretching = (str(getattr(m, "rope_type", "")) for m in backbone.model.modules())
    changing = any("dynamic" in kind or "longrope" in kind for kind in stretching)
    return not changing and not hasattr(backbone.model, "hf_device_map")
