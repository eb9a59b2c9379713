"""One pass over a batch: every layer pooled as it leaves its block, on the device."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chipviz.backbones.backbone import Backbone, pad, watch_layers
from chipviz.backbones.pooling import AT_ONE_TOKEN, pool
from chipviz.keys import Vector

Ids = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""


@contextmanager
def pooling_pass(
    backbone: Backbone, pad_id: int, vectors: Sequence[Vector]
) -> Iterator[Callable[[Sequence[Ids]], list[Tensor]]]:
    """A function that pools every layer as it leaves its block, on the device.

    It takes the token ids of one batch and returns one tensor per vector, shape (L + 1, B, width),
    float32, on the device. Row 0 of the layers is the embedding. Several threads may call it at the
    same time.
    """
    normed_whole = any(v.site == "block" and v.pooling not in AT_ONE_TOKEN for v in vectors)
    own = threading.local()  # each thread's mask, and where its batch goes

    def on_hidden(layer: int, hidden: Tensor) -> None:
        mask = own.mask.to(hidden.device)
        normed = backbone.apply_final_norm(hidden) if normed_whole else hidden
        for vector, pooled in zip(vectors, own.pooled, strict=True):
            if vector.site == "raw":
                one = pool(hidden, mask, vector.pooling)
            elif vector.pooling in AT_ONE_TOKEN:
                # A norm works on each token alone, so it can come after the token is taken.
                one = pool(hidden, mask, vector.pooling).to(hidden.dtype)
                one = backbone.apply_final_norm(one).float()
            else:
                one = pool(normed, mask, vector.pooling)
            pooled[layer + 1] = one.to(pooled.device)

    @torch.inference_mode()
    def forward(ids: Sequence[Ids]) -> list[Tensor]:
        tokens, own.mask = pad(ids, pad_id, backbone.device)
        shape = (backbone.n_layers + 1, len(ids), backbone.hidden_size)
        pooled = own.pooled = [
            torch.empty(shape, dtype=torch.float32, device=backbone.device) for _ in vectors
        ]
        backbone.forward(tokens, own.mask)
        return pooled

    with watch_layers(backbone, on_hidden):
        yield forward


def forward_pooled(
    backbone: Backbone, ids: Sequence[Ids], pad_id: int, vectors: Sequence[Vector]
) -> list[Tensor]:
    """One pass over one batch: see `pooling_pass`."""
    with pooling_pass(backbone, pad_id, vectors) as forward:
        return forward(ids)


def reentrant(backbone: Backbone) -> bool:
    """Whether several passes may run at once: not where a pass changes the model.

    Parts that were put away come and go, and some rotary embeddings stretch with the text.
    """
    stretching = (str(getattr(m, "rope_type", "")) for m in backbone.model.modules())
    changing = any("dynamic" in kind or "longrope" in kind for kind in stretching)
    return not changing and not hasattr(backbone.model, "hf_device_map")
