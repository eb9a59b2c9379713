"""SliceGPT (arXiv:2401.15024): a narrower residual stream, turned so that least is lost.

A model with RMS norms computes the same when its residual stream is rotated. Before each unit it is
rotated to the principal axes of its states, and the least of them are cut off, in every matrix that
reads or writes it. Between two units the axes differ, so the residual around a unit is turned by a
small matrix of its own. Ours takes all axes from the whole model's states; the published code takes
each from the model as it is sliced so far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from chipviz.backbones.language_model import LanguageModel, batches
from chipviz.backbones.surgery import Part, Surgery, operate
from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError, ConfigError
from chipviz.pruning.units import Place, Unit, find_units

STEP = 8
"""Widths are multiples of it, as published."""
DAMPING = 0.01
"""Share of the mean variance that is added to every axis, as published."""
_NOISE = 1e-3


@dataclass(frozen=True)
class Stream:
    """The modules of one block that read or write the residual stream, by their names."""

    attention: Place
    mlp: Place
    readers: tuple[tuple[str, ...], tuple[str, ...]]
    """Matrices that read it, of the attention and of the feed-forward part."""
    writers: tuple[str, str]


def find_streams(model: LanguageModel) -> list[Stream]:
    """What reads and writes the residual stream in every block.

    Raises:
        BackboneError: If the model is not made of RMS norms and separate matrices.
    """
    places, width = find_units(model), int(model.config.hidden_size)
    found: list[Stream] = []
    for layer in range(model.n_layers):
        units = [places[Unit(layer, kind)] for kind in ("attention", "mlp")]
        readers, writers = [], []
        for place in units:
            inside = [
                (f"{place.module}.{name}", m)
                for name, m in model.base.get_submodule(place.module).named_modules()
                if isinstance(m, nn.Linear)
            ]
            writers += [name for name, _ in inside[-1:]]
            readers.append(tuple(name for name, m in inside[:-1] if m.in_features == width))
            good = place.norm is not None and len(inside) == len(readers[-1]) + 1
            if not good or inside[-1][1].out_features != width:
                raise _not_covered(model.name, "its units are no chains of matrices behind a norm")
        attention, mlp = units
        both = (readers[0], readers[1]), (writers[0], writers[1])
        found.append(Stream(attention, mlp, *both))
    return found


def _not_covered(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"SliceGPT does not cover {name}: {why}.",
        "Take another method, or a model of Llama's, Qwen's or Mistral's kind.",
        "method",
    )


def width_for(model: LanguageModel, n_parameters: int) -> int:
    """The width of the stream that leaves so many parameters fewer, as nearly as steps allow.

    Raises:
        ConfigError: If no width does.
    """
    width, n_layers = int(model.config.hidden_size), model.n_layers
    tables = 2 * int(model.config.vocab_size)  # the head is no longer the token table
    in_blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    wanted = model.n_parameters - n_parameters

    def left(d: int) -> int:
        return tables * d + in_blocks * d // width + 2 * n_layers * d * d + d

    widths = range(STEP, width + 1, STEP)
    best = min(widths, key=lambda d: abs(left(d) - wanted))
    if abs(left(best) - wanted) > 0.1 * model.n_parameters:
        raise ConfigError(
            f"No narrower stream of {model.name} leaves so few parameters.",
            "Take out fewer.",
            "ratio",
        )
    return best


@torch.inference_mode()
def sliced(model: LanguageModel, rows: Tensor, width: int) -> tuple[LanguageModel, Surgery]:
    """A model with a narrower residual stream.

    Args:
        model: The whole model. Its norms are folded into the matrices behind them, in place.
        rows: Calibration text, shape (N, T).
        width: Dimensions of the stream that stay.

    Returns:
        The model, and what stock code has to be told.

    Raises:
        BackboneError: If the family is not covered.
    """
    streams = find_streams(model)
    _fold_norms(model, streams)
    axes = _principal_axes(model, rows, streams, width)
    config = type(model.model.config).from_dict(model.model.config.to_dict())
    heads = int(config.num_attention_heads)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    whole = int(config.hidden_size)
    config.hidden_size, config.tie_word_embeddings = width, False
    weights, surgery = _weights(model, streams, axes, (whole / width) ** 0.5)
    try:
        with no_init_weights():
            narrow: Any = type(model.model)(config)
        narrow = narrow.to(next(model.model.parameters()).dtype)
        operate(narrow.base_model, surgery)
        narrow.load_state_dict(weights, assign=True)
    except FOREIGN as error:
        raise _not_covered(model.name, " ".join(str(error).split())[-100:]) from None
    narrow = narrow.eval().requires_grad_(False).to(model.device)
    return LanguageModel(model.folder, narrow), surgery


def _fold_norms(model: LanguageModel, streams: list[Stream]) -> None:
    """Put the weight of every norm into the matrices that read it.

    Raises:
        BackboneError: If the model computes otherwise afterwards: its norms are no RMS norms.
    """
    ids = torch.arange(3, 15, device=model.device)[None] % int(model.config.vocab_size)
    before = model.logits(ids)
    for stream in streams:
        units = (stream.attention, stream.mlp)
        for place, readers in zip(units, stream.readers, strict=True):
            assert place.norm is not None
            norm: Any = model.base.get_submodule(place.norm)
            _absorb(norm, [model.base.get_submodule(name) for name in readers])
    head = model.model.get_output_embeddings()
    table = model.model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    _absorb(model.base.get_submodule(_final_norm(model)), [head])
    after = model.logits(ids)
    if not (after - before).norm() <= _NOISE * before.norm():
        raise _not_covered(model.name, "its norms are no plain RMS norms")


def _absorb(norm: Any, readers: list[Any]) -> None:
    if getattr(norm, "bias", None) is not None or getattr(norm, "weight", None) is None:
        raise _not_covered("this model", "its norms are no plain RMS norms")
    for reader in readers:
        reader.weight.data = reader.weight.data * norm.weight.data
    norm.weight.data = torch.ones_like(norm.weight.data)


def _final_norm(model: LanguageModel) -> str:
    """The norm after the last block: the last child of the base model that has one weight alone."""
    inside = {id(m) for m in model.blocks.modules()}
    norms = [
        name
        for name, m in model.base.named_modules()
        if id(m) not in inside and [p.dim() for p in m.parameters()] == [1]
    ]
    if not norms:
        raise _not_covered(model.name, "it has no final norm")
    return norms[-1]


def _principal_axes(
    model: LanguageModel, rows: Tensor, streams: list[Stream], width: int
) -> list[Tensor]:
    """The first axes of the states before every unit and after the last, (D, width) each."""
    names = [place.norm for s in streams for place in (s.attention, s.mlp)]
    names.append(_final_norm(model))
    d = int(model.config.hidden_size)
    sums = [torch.zeros(d, d, dtype=torch.float64) for _ in names]

    def seeing(i: int) -> Callable[[nn.Module, Any], None]:
        def see(_: nn.Module, args: Any) -> None:
            x = args[0].reshape(-1, d).double().cpu()
            # As the norm shows them to what reads: no token weighs more than another.
            x = x / x.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
            sums[i] += x.T @ x

        return see

    modules = [model.base.get_submodule(str(name)) for name in names]
    handles = [m.register_forward_pre_hook(seeing(i)) for i, m in enumerate(modules)]
    for some in batches(rows):
        model.run(some.to(model.device))
    for handle in handles:
        handle.remove()
    found: list[Tensor] = []
    for total in sums:
        damped = total + DAMPING * total.diagonal().mean() * torch.eye(d, dtype=torch.float64)
        found.append(torch.linalg.eigh(damped).eigenvectors.flip(1)[:, :width])
    return found


def _weights(
    model: LanguageModel, streams: list[Stream], axes: list[Tensor], gain: float
) -> tuple[dict[str, Tensor], Surgery]:
    """Weights of the narrow model under their names, and its shortcuts.

    A norm over fewer dimensions divides by another mean: `gain` makes up for it.
    """
    own = next(model.model.parameters()).dtype
    base = {f"{id(p)}": name for name, p in model.model.named_parameters()}
    found = {name: p.data for name, p in model.model.named_parameters()}
    parts: dict[str, Part] = {}
    width = axes[0].shape[1]

    def put(module: str, change: Callable[[Tensor], Tensor], which: str = "weight") -> None:
        parameter = getattr(model.base.get_submodule(module), which, None)
        if parameter is not None:
            name = base[f"{id(parameter)}"]
            found[name] = change(found[name].double().cpu()).to(own)

    prefix = f"{model.model.base_model_prefix}."
    for layer, stream in enumerate(streams):
        for i, place in enumerate((stream.attention, stream.mlp)):
            into, out = axes[2 * layer + i], axes[2 * layer + i + 1]
            for name in stream.readers[i]:
                put(name, lambda w, a=into: w @ a)
            put(stream.writers[i], lambda w, a=out: a.T @ w)
            put(stream.writers[i], lambda b, a=out: b @ a, "bias")
            assert place.norm is not None
            put(place.norm, lambda w: w[:width] * gain)
            found[f"{prefix}{place.module}.shortcut"] = (into.T @ out).to(own)
            parts[place.module] = Part(kind="shortcut", inner=width, reads=place.norm)
    put(_final_norm(model), lambda w: w[:width] * gain)
    table, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    for part, a in ((table, axes[0]), (head, axes[-1])):
        name = base[f"{id(part.weight)}"]
        found[name] = (found[name].double().cpu() @ a).to(own)
    return found, Surgery(method="slicegpt", modules=parts)
