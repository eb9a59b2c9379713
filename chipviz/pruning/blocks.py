"""Whole blocks of a model taken out: which ones a pattern names, and the model without them."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from chipviz.backbones.language_model import LanguageModel, skipping
from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError, ConfigError

Pattern = Literal["top", "bottom", "middle", "alternate"]
"""Blocks that go whatever they do: the last ones, the first ones, those around the middle, or every
second one. Source: Just CHOP (arXiv:2305.14864)."""
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
_NOISE = 1e-4
"""Largest difference, relative to the states, between a model without blocks and the whole one
that lets them pass by."""


def by_pattern(pattern: Pattern, n_layers: int, n_removed: int) -> list[int]:
    """Blocks that a pattern takes out, in order.

    Args:
        pattern: Its name.
        n_layers: Blocks there are.
        n_removed: Blocks to take out.

    Raises:
        ConfigError: If *alternate* is to take more than every second one.
    """
    if pattern == "top":
        return list(range(n_layers - n_removed, n_layers))
    if pattern == "bottom":
        return list(range(n_removed))
    if pattern == "middle":
        first = (n_layers - n_removed) // 2
        return list(range(first, first + n_removed))
    if 2 * n_removed > n_layers:
        raise ConfigError(
            f"Method alternate takes out every second block at most, {n_layers // 2} here.",
            "Take out fewer, or take another method.",
            "layers",
        )
    # Evenly from the first block to the last: the middle one of each of so many equal parts.
    return [int((2 * i + 1) * n_layers / (2 * n_removed)) for i in range(n_removed)]


def kept_config(config: Any, n_layers: int, kept: Sequence[int]) -> Any:
    """The configuration of a model of some of its blocks.

    Every list with one entry a layer keeps the entries of these blocks, whatever its name: families
    keep attention kinds, rotary switches and more in such lists, and refuse to load when one has
    another length. Tables by the number of the layer likewise.

    Args:
        config: Of the whole model. It is not changed.
        n_layers: Blocks of the whole model.
        kept: Blocks that stay, in order.
    """
    text = config.get_text_config()
    if text is not config:  # a model that sees as well: the blocks are those of its text part
        values = config.to_dict()
        where = next(name for name in values if getattr(config, name, None) is text)
        values[where] = kept_config(text, n_layers, kept).to_dict()
        values.pop("architectures", None)
        return type(config).from_dict(values)
    values = {key: _kept(key, value, n_layers, kept) for key, value in config.to_dict().items()}
    values["num_hidden_layers"] = len(kept)
    # What follows architectures names outputs of single layers, of vision backbones: their default
    # is the last one.
    for dropped in (
        *("_name_or_path", "architectures", "auto_map"),
        *("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"),
    ):
        values.pop(dropped, None)
    return type(config).from_dict(values)


def _kept(key: str, value: Any, n_layers: int, kept: Sequence[int]) -> Any:
    if isinstance(value, list) and len(value) == n_layers:
        return [value[i] for i in kept]
    if not isinstance(value, dict) or not value or key == "id2label":
        return value
    if all(str(name).isdigit() for name in value):
        kind = type(next(iter(value)))
        by_number = {int(name): entry for name, entry in value.items()}
        return {kind(new): by_number[old] for new, old in enumerate(kept) if old in by_number}
    return value


def without(model: LanguageModel, removed: Collection[int]) -> LanguageModel:
    """A model without some of its blocks, as its family itself builds a shorter one.

    Embeddings, final norm and LM head stay. The weights are shared with the whole model.

    Raises:
        ConfigError: If no block would stay.
        BackboneError: If the family's own code computes otherwise than the whole model does when
            the hidden states pass these blocks by.
    """
    kept = [layer for layer in range(model.n_layers) if layer not in set(removed)]
    if not kept:
        raise ConfigError(
            f"{model.name} has {model.n_layers} blocks, and none would stay.",
            "Take out fewer.",
            "layers",
        )
    weights = renumbered(model.model, model.blocks, kept)
    try:
        config = kept_config(model.model.config, model.n_layers, kept)
        with no_init_weights():
            shorter: Any = type(model.model)(config)
        shorter = shorter.to(next(model.model.parameters()).dtype)
        shorter.load_state_dict(weights, assign=True)
        shorter.tie_weights()
    except FOREIGN as error:
        raise _other_model(model.name, str(error)) from None
    shorter = shorter.eval().requires_grad_(False).to(model.device)
    found = LanguageModel(model.folder, shorter, model.has_head)
    _refuse_other(model, found, sorted(set(range(model.n_layers)) - set(kept)))
    return found


def renumbered(model: nn.Module, blocks: nn.ModuleList, kept: Sequence[int]) -> dict[str, Tensor]:
    """Weights of a model of some of its blocks, under the names that they have there."""
    path = next(name for name, module in model.named_modules() if module is blocks)
    number = {old: new for new, old in enumerate(kept)}
    weights: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if not key.startswith(f"{path}."):
            weights[key] = value
            continue
        layer, _, rest = key[len(path) + 1 :].partition(".")
        if int(layer) in number:
            weights[f"{path}.{number[int(layer)]}.{rest}"] = value
    return weights


@torch.inference_mode()
def _refuse_other(whole: LanguageModel, shorter: LanguageModel, removed: Sequence[int]) -> None:
    size = int(whole.config.vocab_size)
    ids = torch.tensor([[size // 3, size // 2, size // 4, size // 5] * 3], device=whole.device)
    with skipping(whole, removed):
        expected = whole.logits(ids)
    found = shorter.logits(ids)
    if not (found - expected).norm() <= _NOISE * expected.norm():
        raise _other_model(whole.name, "the shorter model computes otherwise")


def _other_model(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"{name} cannot do without these blocks: {' '.join(why.split())[-120:]}.",
        "Its family builds a shorter model otherwise; take other blocks, or another backbone.",
        "method",
    )
