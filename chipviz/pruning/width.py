"""Narrower blocks: whole heads and feed-forward channels that matter least to the loss go.

Source: LLM-Pruner (arXiv:2305.11627), first-order importance, in one step, ranked in each layer.
A head goes with its rows in queries, keys and values and its columns in the output matrix; where
queries share keys, with all that share. A channel goes with its row in the matrices that widen and
its column in the one that narrows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chipviz.backbones.language_model import LanguageModel, token_losses
from chipviz.backbones.surgery import Part, Surgery, operate
from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError, ConfigError
from chipviz.pruning.units import Unit, find_units

ROWS, ROW_LENGTH = 10, 64
"""Calibration texts and their tokens, as published."""
UNTOUCHED_FIRST, UNTOUCHED_LAST = 4 / 32, 2 / 32
"""Share of the layers at both ends that keep their width, as published for 32."""


@dataclass(frozen=True)
class Wide:
    """The matrices of a block that share heads or channels, by their names without the head."""

    queries: str
    keys: str
    values: str
    output: str
    widening: tuple[str, ...]
    narrowing: str

    @property
    def all(self) -> tuple[str, ...]:
        """Every one of them."""
        attention = (self.queries, self.keys, self.values, self.output)
        return (*attention, *self.widening, self.narrowing)


def find_wide(model: LanguageModel) -> list[Wide]:
    """The matrices of every block.

    Raises:
        BackboneError: If a block has no separate matrices of queries, keys, values and output.
    """
    places = find_units(model)
    found: list[Wide] = []
    for layer in range(model.n_layers):
        attention, mlp = (places[Unit(layer, kind)].module for kind in ("attention", "mlp"))
        names = dict.fromkeys("qkvo", "")
        for name, module in _linears(model, attention):
            letter = name.rpartition(".")[2][:1]
            if isinstance(module, nn.Linear) and letter in names:
                names[letter] = name
        width = int(model.config.hidden_size)
        inside = _linears(model, mlp)
        narrowing = [n for n, m in inside if m.out_features == width and m.in_features != width]
        widening = [n for n, m in inside if m.in_features == width and m.out_features != width]
        if not all(names.values()) or len(narrowing) != 1 or not widening:
            raise BackboneError(
                f"{model.name} has no separate matrices of queries, keys, values and output: its "
                "heads cannot be taken out one by one.",
                "Take a method that takes out whole blocks or units.",
                "method",
            )
        queries, keys, values, output = (names[letter] for letter in "qkvo")
        found.append(Wide(queries, keys, values, output, tuple(widening), narrowing[0]))
    return found


def _linears(model: LanguageModel, unit: str) -> list[tuple[str, nn.Linear]]:
    return [
        (f"{unit}.{name}", module)
        for name, module in model.base.get_submodule(unit).named_modules()
        if isinstance(module, nn.Linear)
    ]


def importances(model: LanguageModel, found: Sequence[Wide], rows: Tensor) -> dict[str, Tensor]:
    """|w g| of every weight of a block's matrices, g the gradient of the loss of all tokens.

    Args:
        model: The whole model. Its weights are not changed.
        found: Its matrices.
        rows: Calibration text, shape (N, T).

    Returns:
        By name, each of its weight's shape.
    """
    matrices = {name: model.base.get_submodule(name) for wide in found for name in wide.all}
    weights: dict[str, Any] = {name: module.weight for name, module in matrices.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for row in rows.to(model.device):
            loss = token_losses(model.logits(row[None]), row[None]).mean() / len(rows)
            loss.backward()
        return {name: (w.detach() * w.grad).abs() for name, w in weights.items()}
    finally:
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(False)


def narrowed(model: LanguageModel, rows: Tensor, n_parameters: int) -> Surgery:
    """Take the least important heads and channels out of a model, in place.

    Args:
        model: The whole model.
        rows: Calibration text, shape (N, T).
        n_parameters: Parameters to take out, as nearly as whole heads and channels allow.

    Returns:
        What was changed.

    Raises:
        ConfigError: If the layers between the untouched ones have not so many.
        BackboneError: If the family is not made so.
    """
    found = find_wide(model)
    scores = importances(model, found, rows)
    first = round(UNTOUCHED_FIRST * model.n_layers)
    last = model.n_layers - round(UNTOUCHED_LAST * model.n_layers)
    touched = found[first:last]
    n_heads, n_channels = _how_many(model, touched, n_parameters)
    modules: dict[str, Part] = {}
    kept: dict[str, Tensor] = {}
    for wide in touched:
        width = _head_width(model)
        n_groups = _out(model, wide.keys) // width
        own = _out(model, wide.queries) // n_groups  # rows of the queries that share keys
        heads = (
            _rows(scores[wide.queries], n_groups)
            + _rows(scores[wide.keys], n_groups)
            + _rows(scores[wide.values], n_groups)
            + _rows(scores[wide.output].T, n_groups)
        )
        channels = scores[wide.narrowing].sum(dim=0)
        for name in wide.widening:
            channels = channels + scores[name].sum(dim=1)
        groups, stay = _best(heads, n_groups - n_heads), _best(channels, len(channels) - n_channels)
        queries, keys = _expand(groups, own), _expand(groups, width)
        for name, index in ((wide.queries, queries), (wide.keys, keys), (wide.values, keys)):
            _keep(model, name, index, modules, kept)
        for name in wide.widening:
            _keep(model, name, stay, modules, kept)
        for name, index in ((wide.output, queries), (wide.narrowing, stay)):
            _keep(model, name, index, modules, kept, columns=True)
            _empty_columns(model, name, index)
    surgery = Surgery(method="llm-pruner", modules=modules)
    _replace(model, surgery, kept)
    return surgery


def _empty_columns(model: LanguageModel, name: str, stay: Tensor) -> None:
    """Set the columns of a matrix to zero that will go: the model computes as if they were gone."""
    weight = model.base.get_parameter(f"{name}.weight").data
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[stay] = False
    weight[:, gone] = 0


@torch.inference_mode()
def _replace(model: LanguageModel, surgery: Surgery, kept: dict[str, Tensor]) -> None:
    """Change the modules, and refuse a family that computes otherwise then.

    Args:
        model: Whose columns that will go are zero already.
        surgery: What to change.
        kept: New weights by name.
    """
    ids = torch.arange(3, 15, device=model.device)[None] % int(model.config.vocab_size)
    expected = model.logits(ids)
    try:
        operate(model.base, surgery)
        for name, value in kept.items():
            owner, _, own_name = name.rpartition(".")
            getattr(model.base.get_submodule(owner), own_name).data.copy_(value)
        alike = torch.allclose(model.logits(ids), expected, rtol=1e-3, atol=1e-3)
    except FOREIGN:  # such as a norm over all queries, which has a weight for each
        alike = False
    if not alike:
        raise BackboneError(
            f"{model.name} computes otherwise when some of its heads are gone.",
            "Take a method that takes out whole blocks or units.",
            "method",
        )


def _how_many(model: LanguageModel, touched: Sequence[Wide], n_parameters: int) -> tuple[int, int]:
    """Groups of heads and channels to take out of every touched layer."""
    if not touched:
        raise ConfigError(
            f"{model.name} has too few layers: its first and last ones keep their width.",
            "Take a method that takes out whole blocks.",
            "method",
        )
    wide, width = touched[0], _head_width(model)
    n_groups, n_channels = _out(model, wide.keys) // width, _out(model, wide.widening[0])
    linear = model.base.get_submodule
    per_group = sum(
        sum(p.numel() for p in linear(name).parameters()) // n_groups
        for name in (wide.queries, wide.keys, wide.values, wide.output)
    )
    per_channel = sum(
        sum(p.numel() for p in linear(name).parameters()) // n_channels
        for name in (*wide.widening, wide.narrowing)
    )
    wanted = n_parameters / len(touched)
    share = wanted / (per_group * n_groups + per_channel * n_channels)
    heads = min(n_groups - 1, round(share * n_groups))
    channels = round((wanted - heads * per_group) / per_channel)
    if channels >= n_channels:
        raise ConfigError(
            f"The layers of {model.name} that may become narrower have not so many parameters.",
            "Take out fewer.",
            "ratio",
        )
    return heads, max(0, channels)


def _head_width(model: LanguageModel) -> int:
    config = model.config
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _out(model: LanguageModel, name: str) -> int:
    return len(model.base.get_parameter(f"{name}.weight"))


def _rows(scores: Tensor, n_groups: int) -> Tensor:
    """Importance of so many groups of consecutive rows, shape (n_groups,)."""
    return scores.sum(dim=1).view(n_groups, -1).sum(dim=1)


def _best(scores: Tensor, n: int) -> Tensor:
    """The n most important, in order of place."""
    return scores.argsort(descending=True, stable=True)[:n].sort().values


def _expand(groups: Tensor, rows: int) -> Tensor:
    """Rows of groups of consecutive ones."""
    return (groups[:, None] * rows + torch.arange(rows, device=groups.device)).flatten()


def _keep(
    model: LanguageModel,
    name: str,
    index: Tensor,
    modules: dict[str, Part],
    kept: dict[str, Tensor],
    *,
    columns: bool = False,
) -> None:
    """Note the rows of a matrix that stay, or its columns, and what stands there instead."""
    module: Any = model.base.get_submodule(name)
    weight, bias = module.weight.data, module.bias
    kept[f"{name}.weight"] = (weight[:, index] if columns else weight[index]).clone()
    if bias is not None:
        kept[f"{name}.bias"] = (bias.data if columns else bias.data[index]).clone()
    outer, inner = kept[f"{name}.weight"].shape
    modules[name] = Part(kind="linear", inner=inner, outer=outer, bias=bias is not None)
