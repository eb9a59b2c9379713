"""One pass over a batch: every layer pooled as it leaves its block, on the device."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.backbone import Backbone, pad, watch_layers
from chipviz.backbones.pooling import AT_ONE_TOKEN, pool
from chipviz.backbones.sites import FFN_SITES, Sites, find_sites, refuse_absent, watch_sites
from chipviz.keys import FfnSite, Pooling, Site, Vector

Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""


@contextmanager
def pooling_pass(
    backbone: Backbone, pad_id: int, vectors: Sequence[Vector]
) -> Iterator[Callable[[Sequence[Ids]], list[Tensor]]]:
    """A function that pools every layer as it leaves its block, on the device.

    It takes the token ids of one batch and returns one tensor per vector, shape (L + 1, B, width),
    float32, on the device. Row 0 of the layers is the embedding, which has no feed-forward part:
    there it is zero. Several threads may call it at the same time.

    Raises:
        BackboneError: If the backbone lacks a site.
    """
    wanted: set[Site] = {vector.site for vector in vectors}
    sites = find_sites(backbone) if wanted & set(FFN_SITES) else Sites({}, {}, {})
    refuse_absent(backbone.name, sites, wanted)
    normed_whole = any(v.site == "block" and v.pooling not in AT_ONE_TOKEN for v in vectors)
    own = threading.local()  # each thread's mask, and where its batch goes

    def on_hidden(layer: int, hidden: Tensor) -> None:
        mask = own.mask.to(hidden.device)
        normed = backbone.apply_final_norm(hidden) if normed_whole else hidden
        for vector, pooled in zip(vectors, own.pooled, strict=True):
            if vector.site in FFN_SITES:
                continue
            if vector.site == "raw":
                one = pool(hidden, mask, vector.pooling)
            elif vector.pooling in AT_ONE_TOKEN:
                # A norm works on each token alone, so it can come after the token is taken.
                one = pool(hidden, mask, vector.pooling).to(hidden.dtype)
                one = backbone.apply_final_norm(one).float()
            else:
                one = pool(normed, mask, vector.pooling)
            pooled[layer + 1] = one.to(pooled.device)

    def on_value(site: Site, layer: int, value: Tensor) -> None:
        mask = own.mask.to(value.device)
        value = value.reshape(*mask.shape, -1)  # some families put all tokens of a batch in a row
        for vector, pooled in zip(vectors, own.pooled, strict=True):
            if vector.site == site:
                pooled[layer + 1] = pool(value, mask, vector.pooling).to(pooled.device)

    @torch.inference_mode()
    def forward(ids: Sequence[Ids]) -> list[Tensor]:
        tokens, own.mask = pad(ids, pad_id, backbone.device)
        pooled = own.pooled = [
            torch.zeros(
                (backbone.n_layers + 1, len(ids), width_at(backbone, vector.site)),
                dtype=torch.float32,
                device=backbone.device,
            )
            for vector in vectors
        ]
        backbone.forward(tokens, own.mask)
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


def forward_pooled(
    backbone: Backbone, ids: Sequence[Ids], pad_id: int, vectors: Sequence[Vector]
) -> list[Tensor]:
    """One pass over one batch: see `pooling_pass`."""
    with pooling_pass(backbone, pad_id, vectors) as forward:
        return forward(ids)


@torch.inference_mode()
def forward_neurons(
    backbone: Backbone, ids: Sequence[Ids], pad_id: int, pooling: Pooling, neurons: Tensor
) -> Tensor:
    """The pooled values of some neurons, in one pass over one batch.

    Args:
        backbone: At least as deep as the deepest of them.
        ids: Token ids of each text.
        pad_id: What pads a batch.
        pooling: How each is pooled.
        neurons: See `chipviz.chips.chip.Chip.neurons`, shape (U, 3).

    Returns:
        Shape (B, U), float32, on the device.
    """
    tokens, mask = pad(ids, pad_id, backbone.device)

    def reduce(values: Tensor) -> Tensor:
        return pool(values, mask.to(values.device), pooling).to(backbone.device)

    with watch_neurons(backbone, neurons, mask.shape, reduce) as taken:
        backbone.forward(tokens, mask)
        return taken()


@contextmanager
def watch_neurons(
    backbone: Backbone,
    neurons: Tensor,
    shape: Sequence[int],
    reduce: Callable[[Tensor], Tensor],
) -> Iterator[Callable[[], Tensor]]:
    """What a pass inside the block leaves of some neurons. Nothing else is kept.

    Args:
        backbone: At least as deep as the deepest of them.
        neurons: See `chipviz.chips.chip.Chip.neurons`, shape (U, 3).
        shape: Texts and tokens of the pass.
        reduce: From the values of some of them, (B, T, u), to what is kept, (B', u).

    Yields:
        A function that gives all of it after the pass, shape (B', U).
    """
    names = get_args(Site)
    wanted: dict[tuple[Site, int], list[int]] = {}
    for i, (site, layer, _) in enumerate(neurons.tolist()):
        wanted.setdefault((names[site], layer), []).append(i)
    columns = {where: neurons[own, 2].long() for where, own in wanted.items()}
    found: dict[tuple[Site, int], Tensor] = {}

    def keep(site: Site, layer: int, value: Tensor) -> None:
        if (site, layer) in wanted:
            value = value.reshape(*shape, -1)
            picked = value[..., columns[site, layer].to(value.device)]
            found[site, layer] = reduce(picked).float()

    def on_hidden(layer: int, hidden: Tensor) -> None:
        keep("raw", layer, hidden)
        if ("block", layer) in wanted:
            keep("block", layer, backbone.apply_final_norm(hidden))

    def taken() -> Tensor:
        if not wanted:
            return reduce(torch.empty(*shape, 0, device=backbone.device))
        parts = torch.cat([found[where] for where in wanted], dim=1)
        order = torch.tensor([i for own in wanted.values() for i in own], device=parts.device)
        return parts[:, order.argsort()]

    read = {site for site, _ in wanted}
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
