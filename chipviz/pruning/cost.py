"""What a model costs, dense and cut: parameters, bytes, FLOPs, measured latency and peak memory."""

import time
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from chipviz.backbones.backbone import Backbone, watch_layers
from chipviz.chips.chip import Chip, Chips
from chipviz.features.forward import Inputs, inputs_of, look_at
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, fields_of
from chipviz.pruning.cut import as_stored, last_kept
from chipviz.results.report import CHIP_BYTES, BundleKind, CutCost, LayerCost, Measured, Parts

TYPICAL_ROWS = 1_000
"""Maximum prompts whose median length is the typical one."""
REPEATS = (3, 9)
REPEATS_S = 1.0
"""Minimum and maximum timed passes, and the seconds after which no further one begins."""


@dataclass(frozen=True)
class Measurement:
    """What the forward passes of one backbone took, dense and cut at every layer."""

    latency_s: list[float]
    """Seconds per cut, without its chip (one product of a vector with C rows), shape (L,)."""
    peak_bytes: list[int]
    """Bytes per cut, without its chip, shape (L,)."""
    dense_latency_s: float
    dense_peak_bytes: int
    how: Measured


# --- what is counted ----------------------------------------------------------------------------


def parts(backbone: Backbone) -> Parts:
    """The published model's parameters by part.

    What the published model has beyond the backbone is its LM head. A pooler belongs to the encoder
    alone: a published model with an LM head is built without it.
    """
    embedding = _count_embedding(backbone)
    blocks = [_count(block) for block in backbone.blocks]
    norm = _count(backbone.final_norm) if backbone.final_norm is not None else 0
    whole = _count(backbone.model)
    pooler = getattr(backbone.model, "pooler", None)
    if isinstance(pooler, nn.Module) and backbone.folder.n_published != whole:
        whole -= _count(pooler)
    head = backbone.folder.n_published - whole
    return Parts(
        embedding=embedding,
        blocks=blocks,
        final_norm=norm,
        lm_head=head,
        other=whole - embedding - sum(blocks) - norm,
        tied=head < _head_size(backbone),  # a head of its own is a whole table
    )


def dense_cost(backbone: Backbone, max_length: int, measurement: Measurement) -> CutCost:
    """The published model, its LM head included; of an encoder's head no products are counted.

    Args:
        backbone: The frozen model.
        max_length: Tokens a prompt may have. Attention grows with it.
        measurement: Latency and memory of this backbone.
    """
    config = backbone.config.get_text_config()
    blocks = sum(_block_flops(block, config, max_length) for block in backbone.blocks)
    return CutCost(
        n_parameters=backbone.folder.n_published,
        weight_bytes=backbone.folder.n_published * backbone.folder.stored_dtype.itemsize,
        # Who classifies with an encoder never runs its head for masked words.
        flops_per_token=blocks + 2 * _head_size(backbone) * backbone.causal,
        latency_s=measurement.dense_latency_s,
        peak_bytes=measurement.dense_peak_bytes,
    )


def cut_costs(
    backbone: Backbone,
    chips: Chips,
    bundles: Mapping[ChipKey, BundleKind],
    max_length: int,
    measurement: Measurement,
    no_cut: Container[int] = (),
) -> list[LayerCost]:
    """What every cut costs with every chip.

    Args:
        backbone: The frozen model.
        chips: Every chip that it may be cut for.
        bundles: What the cuts of each curve are built as.
        max_length: Tokens a prompt may have.
        measurement: Latency and memory of this backbone.
        no_cut: Layers that it cannot be cut after.
    """
    return [
        layer_cost(
            backbone,
            Cut(layer, key),
            chips.at(Cut(layer, key)),
            bundle=bundles[key],
            max_length=max_length,
            measurement=measurement,
            no_cut=no_cut,
        )
        for key in chips.stacks
        for layer in range(backbone.n_layers)
    ]


def layer_cost(
    backbone: Backbone,
    cut: Cut,
    chip: Chip,
    *,
    bundle: BundleKind,
    max_length: int,
    measurement: Measurement,
    no_cut: Container[int] = (),
) -> LayerCost:
    """What a bundle costs, its chip included.

    Args:
        backbone: The frozen model.
        cut: Where it is cut.
        chip: The chip of one layer.
        bundle: What it is kept as. The classes of *token* and *image* have a bias (of zeros) beside
            the chip.
        max_length: Tokens a prompt may have.
        measurement: Latency and memory of this backbone.
        no_cut: Layers that it cannot be cut after.
    """
    chip = as_stored(chip, cut, bundle)
    last = last_kept(chip, cut.layer, no_cut)
    n_layers, kept = backbone.n_layers, last + 1
    stored_bytes = backbone.folder.stored_dtype.itemsize
    whole = _count(backbone.model)
    removed = sum(_count(block) for block in backbone.blocks[kept:])
    if bundle == "image" and isinstance(
        pooler := getattr(backbone.model, "pooler", None), nn.Module
    ):
        removed += _count(pooler)  # which the stock class for pictures is built without
    extra = len(chip.weight) if bundle in ("token", "image") and chip.bias is None else 0
    chip_parameters = chip.n_parameters + extra
    n_parameters = whole - removed + chip_parameters
    config = backbone.config.get_text_config()
    blocks = sum(_block_flops(block, config, max_length) for block in backbone.blocks[:kept])
    return LayerCost(
        layer=cut.layer,
        **fields_of(cut.chip),
        chip_parameters=chip_parameters,
        n_parameters=n_parameters,
        weight_bytes=(whole - removed) * stored_bytes + chip_parameters * CHIP_BYTES,
        flops_per_token=blocks + 2 * chip.n_parameters,
        layer_ratio=(n_layers - kept) / n_layers,
        parameter_ratio=(backbone.folder.n_published - n_parameters) / backbone.folder.n_published,
        bundle=bundle,
        latency_s=measurement.latency_s[last],
        peak_bytes=measurement.peak_bytes[last] + chip_parameters * CHIP_BYTES,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_embedding(backbone: Backbone) -> int:
    """Every table outside the blocks."""
    inside = {id(module) for module in backbone.blocks.modules()}
    tables = [
        module
        for module in backbone.model.modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    ]
    return sum(_count(table) for table in tables)


def _head_size(backbone: Backbone) -> int:
    if backbone.view is not None:
        return 0  # what it was trained with is no part of a vision encoder
    return backbone.config.get_text_config().vocab_size * backbone.hidden_size


def _block_flops(block: nn.Module, config: Any, max_length: int) -> int:
    """Two for each matrix weight, and the two products of attention over `max_length` tokens.

    Of a mixture of experts, stacked in one weight each, a token passes through a few.
    """
    weights = [p for name, p in block.named_parameters() if not name.endswith("bias")]
    asked = getattr(config, "num_experts_per_tok", 1)
    matrices = sum(p.numel() for p in weights if p.dim() == 2)
    matrices += sum(p.numel() * asked // len(p) for p in weights if p.dim() == 3)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * matrices + 4 * max_length * width


# --- what is measured ---------------------------------------------------------------------------


def typical_length(lengths: Sequence[int]) -> int:
    """Tokens of the median prompt, over the first `TYPICAL_ROWS` prompts."""
    return max(1, round(median(lengths[:TYPICAL_ROWS])))


def measure(
    backbone: Backbone, n_tokens: int, *, batch: int = 1, example: Inputs | None = None
) -> Measurement:
    """Measure the dense model and every cut of it together.

    One pass through all blocks gives a time stamp at the output of each, so it times every cut at
    once. A cut also pays what the model does after its last block (the final norm). The dense model
    is the published one as it classifies or begins to generate: all blocks, and its LM head on the
    last position of each text. The backbone has no head here, so a product of the same size, with
    the token table, stands for it.

    Peak memory is what the weights of the parts kept take, in the dtype computed in, and the most
    that tensors made on the way held at once. Scratch memory inside a kernel is not seen.

    Args:
        backbone: In the dtype and on the device that the run uses.
        n_tokens: Tokens of each text.
        batch: Texts.
        example: What is read in place of random texts: one picture inside its prompt.
    """
    inputs = example or _example(backbone, batch, n_tokens)
    with torch.no_grad():
        activations = _activation_bytes(backbone, inputs)  # the warm-up as well
        passes: list[list[float]] = []
        start = time.perf_counter()
        while len(passes) < REPEATS[0] or (
            len(passes) < REPEATS[1] and time.perf_counter() - start < REPEATS_S
        ):
            passes.append(_time_pass(backbone, inputs))
    # A median of each column; the last is the dense model.
    seconds = [median(column) for column in zip(*passes, strict=True)]
    weights = _weight_bytes(backbone)
    peaks = [kept + made for kept, made in zip(weights, activations, strict=True)]
    how = Measured(
        batch=batch,
        n_tokens=n_tokens,
        repeats=len(passes),
        device=str(backbone.device),
        dtype=str(backbone.dtype).removeprefix("torch."),
    )
    return Measurement(seconds[:-1], peaks[:-1], seconds[-1], peaks[-1], how)


def _example(backbone: Backbone, batch: int, n_tokens: int) -> Inputs:
    """Random texts of so many tokens, or random pictures."""
    random = torch.Generator().manual_seed(0)
    if backbone.view is not None:
        pixels = torch.randn(batch, *backbone.view.shape, generator=random)
        return look_at(backbone, pixels.to(backbone.device))
    size = backbone.config.get_text_config().vocab_size
    return inputs_of(backbone, torch.randint(size, (batch, n_tokens), generator=random).tolist(), 0)


def _time_pass(backbone: Backbone, inputs: Inputs) -> list[float]:
    """Seconds of every cut of one pass, and of the dense model: shape (L + 1,)."""
    stamps: list[float] = []

    def stamp(layer: int, hidden: Tensor) -> None:
        if layer != EMBEDDING_LAYER:
            stamps.append(_now(hidden.device))

    start = _now(backbone.device)
    with watch_layers(backbone, stamp):
        inputs.run()
    end = _now(backbone.device)
    _head(backbone, len(inputs.mask))
    head = _now(backbone.device) - end
    after = end - stamps[-1]
    return [at - start + after for at in stamps] + [end - start + head]


def _now(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _head(backbone: Backbone, batch: int) -> None:
    """A product of the LM head's size on one position of each text."""
    if backbone.view is not None:
        return
    model: Any = backbone.model
    table: Tensor = model.get_input_embeddings().weight
    _ = table.new_ones(batch, table.shape[1]) @ table.T


def _weight_bytes(backbone: Backbone) -> list[int]:
    """What the parts kept hold in memory, for every cut and, head included, the dense model."""
    blocks = [_held(block) for block in backbone.blocks]
    around = _held(backbone.model) - sum(blocks)
    cuts = [around + sum(blocks[: layer + 1]) for layer in range(len(blocks))]
    return [*cuts, cuts[-1] + parts(backbone).lm_head * backbone.dtype.itemsize]


def _held(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _activation_bytes(backbone: Backbone, inputs: Inputs) -> list[int]:
    """Most bytes of live tensors up to the end of each block, and of the dense model."""
    peaks: list[int] = []
    held = _LiveBytes(_tensors(backbone.model))

    def note(layer: int, _: Tensor) -> None:
        if layer != EMBEDDING_LAYER:
            peaks.append(held.peak)

    with watch_layers(backbone, note), held:
        inputs.run()
        _head(backbone, len(inputs.mask))
    return [*peaks, held.peak]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on and not yet freed, on any device.

    Needs `no_grad`, not `inference_mode`, under which composite operations hide their temporaries.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # Views of these are not new memory. A pointer names a storage for as long as it lives.
        self._pointers = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self._pointers:
            return
        self._pointers.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, pointer, size)

    def _free(self, pointer: int, size: int) -> None:
        self._pointers.discard(pointer)
        self.live -= size
