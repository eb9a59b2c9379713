"""Early exits at work: a text leaves at the first chip that is sure, the others run on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone, segments
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import entering, first_of
from chipviz.bundle.metadata import EXITS_FILE, Metadata
from chipviz.bundle.reader import EnoughError, backbone_of
from chipviz.chips.chip import Chip
from chipviz.keys import Vector
from chipviz.results.exits import ExitPlan


@dataclass(frozen=True)
class Answers:
    """What early exits say of a batch."""

    probabilities: Tensor
    """At the temperature of each text's exit, shape (B, C)."""
    exits: Tensor
    """Which exit each text left at, shape (B,)."""


@dataclass
class _Batch:
    """A batch on its way through the blocks."""

    n: int
    n_heads: int
    """Of the model's attention."""
    mask: Tensor
    """Shape (B, T), of all texts."""
    rows: Tensor
    """Texts that are still inside, shape (b,)."""
    probabilities: Tensor
    exits: Tensor
    kept: Tensor | None = field(default=None)
    """Places of those that stayed among the ones of the block before, until the next block."""


@dataclass(frozen=True)
class Exits:
    """Chips at some layers of one backbone."""

    backbone: Backbone
    vector: Vector
    chips: Chip
    """A stack of E chips."""
    plan: ExitPlan

    @torch.inference_mode()
    def answer(self, tokens: Tensor, mask: Tensor) -> Answers:
        """Classify padded texts, shape (B, T) both."""
        if tokens.shape[0] == tokens.shape[1] > 1:
            # What belongs to texts is told by its first dimension, so that must not be T as well.
            if not self.backbone.padded:
                parts = [self.answer(tokens[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
                said = torch.cat([part.probabilities for part in parts])
                return Answers(said, torch.cat([part.exits for part in parts]))
            tokens, mask = (nn.functional.pad(x, (0, 1)) for x in (tokens, mask))
        n, device = tokens.shape[0], tokens.device
        n_classes = self.chips.weight.shape[-2]
        batch = _Batch(
            n,
            int(getattr(self.backbone.config, "num_attention_heads", 0) or 0),
            mask,
            torch.arange(n, device=device),
            torch.zeros(n, n_classes, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
        )
        with self._watching(batch):
            try:
                which = segments(self.backbone.config, tokens, self.backbone.sep)
                self.backbone.model(input_ids=tokens, attention_mask=mask, **which)
            except EnoughError:
                pass
        return Answers(batch.probabilities, batch.exits)

    @contextmanager
    def _watching(self, batch: _Batch) -> Iterator[None]:
        blocks, first = self.backbone.blocks, self.plan.layers[0]

        def leaving(exit_: int) -> Any:
            return lambda _block, _args, output: self._leave(batch, exit_, first_of(output))

        handles = [
            blocks[layer].register_forward_hook(leaving(i))
            for i, layer in enumerate(self.plan.layers)
        ]
        handles += [
            block.register_forward_pre_hook(
                lambda _block, args, kwargs: _only_those_inside(batch, args, kwargs),
                with_kwargs=True,
            )
            for block in list(blocks)[first + 1 :]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, batch: _Batch, exit_: int, hidden: Tensor) -> None:
        """Let those go of whom the chip of an exit is sure. `hidden` has shape (b, T, D)."""
        if self.vector.site != "raw":
            hidden = self.backbone.apply_final_norm(hidden)
        pooled = pool(hidden, batch.mask[batch.rows], self.vector.pooling)
        logits = self.chips.at(exit_).to(pooled.device).logits(pooled)
        logits = logits / self.plan.temperatures[exit_]
        leave = log_odds(logits) >= self.plan.threshold
        if exit_ == len(self.plan.layers) - 1:
            leave = torch.ones_like(leave)
        gone = batch.rows[leave]
        batch.probabilities[gone] = logits[leave].softmax(dim=1)
        batch.exits[gone] = exit_
        if leave.all():
            raise EnoughError
        if leave.any():
            batch.kept = (~leave).nonzero()[:, 0]
            batch.rows = batch.rows[batch.kept]


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest class, from class scores (B, C): shape (B,)."""
    top, at = logits.max(dim=1)
    rest = logits.scatter(1, at[:, None], float("-inf"))
    return top - rest.logsumexp(dim=1)


def _only_those_inside(batch: _Batch, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """What a block is given, without the texts that have left."""
    if len(batch.rows) == batch.n:
        return None
    hidden = entering(args, kwargs)
    if batch.kept is not None:
        hidden, batch.kept = hidden[batch.kept], None
    if args:
        return (hidden, *_picked(batch, args[1:])), _picked(batch, kwargs)
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return (), _picked(batch, others) | {"hidden_states": hidden}


def _picked(batch: _Batch, value: Any) -> Any:
    """The same of fewer texts: masks and positions have one row a text, or one for all."""
    if isinstance(value, Tensor) and value.dim() >= 2:
        if value.shape[0] == batch.n:
            return value[batch.rows]
        if value.dim() == 3 and value.shape[0] == batch.n * batch.n_heads:  # BLOOM's distances
            return value.unflatten(0, (batch.n, -1))[batch.rows].flatten(0, 1)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_picked(batch, one) for one in value)
    if type(value) is dict:
        return {name: _picked(batch, one) for name, one in value.items()}
    return value


def open_exits(path: Path, model: Any, metadata: Metadata, sep: int | None) -> Exits:
    """The early exits of a bundle of texts.

    Args:
        path: The bundle's folder.
        model: Its model, a classifier or the cut backbone.
        metadata: Of the bundle.
        sep: The token that ends the first of two texts, if the tokenizer tells which is which.

    Raises:
        ValueError: If it has none, or they do not fit the model beside them.
        BackboneError: If the model's parts cannot be found.
    """
    plan = metadata.exits
    if plan is None:
        raise ValueError("it was built without early exits")
    try:
        chips = Chip(**load_file(path / EXITS_FILE))
    except TypeError:
        raise ValueError(f"{EXITS_FILE} holds no chips") from None
    backbone = backbone_of(path, model, metadata, sep)
    reads = chips.weight if chips.hidden_weight is None else chips.hidden_weight
    n, n_classes = len(plan.layers), len(metadata.task.label_names)
    fits = chips.weight.dim() == 3 and chips.weight.shape[:2] == (n, n_classes)
    if not fits or reads.shape[-1] != backbone.hidden_size or plan.layers[-1] >= backbone.n_layers:
        raise ValueError(f"{EXITS_FILE} does not fit the model beside it")
    return Exits(backbone, metadata.cut.key.vector, chips, plan)
