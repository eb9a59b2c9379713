"""ReplaceMe (arXiv:2505.02819): a linear map in place of a run of blocks, folded into the model.

The map is fitted in closed form, and becomes part of the down projection of the last block before
the run. So the healed model is an ordinary one.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.language_model import LanguageModel, batches
from chipviz.backbones.sites import find_sites
from chipviz.backbones.structure import first_of
from chipviz.errors import BackboneError, ConfigError

OUTLIER = 10.0
"""Norm of a state, over the median, from which its token counts as if it had no more. The first
token of a text has a hundred times the norm of the others in many decoders. A square sum would be
about it alone; a map that never saw it would tear it apart, and attention with it."""
_AS_IT_IS = 1e-3
"""Largest difference, relative to a change of the feed-forward part, to the change of its block."""


@torch.inference_mode()
def fit_map(model: LanguageModel, rows: Tensor, run: Sequence[int]) -> Tensor:
    """The map T that brings the model without a run of blocks nearest to the whole one.

    With a the residual stream and m the contribution of the feed-forward part, both of the last
    block before the run, and x what the run's last block gives, T minimises |x - (a + m T)|^2 over
    all tokens, those of outlying norm weighed down. Sums are float64.

    Args:
        model: The whole model.
        rows: Calibration text, shape (N, T).
        run: Blocks that go, one after the other.

    Returns:
        Shape (D, D), float64.

    Raises:
        ConfigError: If the blocks are no run, none stands before it, or the text is too short.
        BackboneError: If the model adds its feed-forward part otherwise than as it is.
    """
    refuse_run(run)
    before, last = run[0] - 1, run[-1]
    part = _down_projection(model, before)
    width = int(model.config.hidden_size)
    if rows.numel() < 2 * width:
        raise ConfigError(
            f"The calibration text has {rows.numel():,} tokens, and a map of {width} dimensions "
            f"needs {2 * width:,}.",
            "Give more text.",
            "calibrate",
        )
    seen: dict[str, Tensor] = {}
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    handles = [
        part.register_forward_hook(_keep(seen, "m")),
        model.blocks[before].register_forward_hook(_keep(seen, "sum")),
        model.blocks[last].register_forward_hook(_keep(seen, "x")),
    ]
    try:
        for some in batches(rows):
            model.run(some.to(model.device))
            m, whole, x = (seen[name].double().cpu() for name in ("m", "sum", "x"))
            weight = _weights(m, whole, x)[:, None]
            gram += m.T @ (weight * m)
            cross += m.T @ (weight * (x - (whole - m)))
    finally:
        for handle in handles:
            handle.remove()
    # Some dimensions may hardly move on this text: the smallest solution leaves them alone.
    return torch.linalg.lstsq(gram, cross, driver="gelsd").solution


def _weights(*states: Tensor) -> Tensor:
    """Weight of each token: 1, or as if its largest norm were `OUTLIER` medians, shape (N,)."""
    norms = torch.stack([state.norm(dim=1) for state in states])
    outlying = (norms / norms.median(dim=1, keepdim=True).values).amax(dim=0) / OUTLIER
    return outlying.clamp_min(1.0) ** -2


def refuse_run(blocks: Sequence[int]) -> None:
    """Refuse blocks that no map can stand for.

    Raises:
        ConfigError: If they do not follow each other, or no block stands before them.
    """
    if list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
        raise ConfigError(
            "ReplaceMe heals one run of blocks, and these do not follow each other.",
            "Take method angular, middle or top, or another way to heal.",
            "heal",
        )
    if blocks[0] == 0:
        raise ConfigError(
            "ReplaceMe changes the block before the run, and none stands before these.",
            "Take method angular, middle or top, or another way to heal.",
            "heal",
        )


def fold(model: LanguageModel, layer: int, found: Tensor) -> None:
    """Multiply a map into the down projection of a block.

    Args:
        model: Whose block is changed, with or without the run that the map stands for.
        layer: The block before the run.
        found: The map T, shape (D, D): the contribution m becomes m T.
    """
    part: Any = _down_projection(model, layer)
    weight = part.weight.data.double()
    rows_give = isinstance(part, nn.Linear)  # transformers' Conv1D keeps (in, out)
    changed = found.T @ weight.cpu() if rows_give else weight.cpu() @ found
    part.weight.data = changed.to(part.weight)
    if getattr(part, "bias", None) is not None:
        part.bias.data = (part.bias.data.double().cpu() @ found).to(part.bias)


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keeping(_: nn.Module, _args: Any, output: Any) -> None:
        value = first_of(output)
        seen[name] = value.reshape(-1, value.shape[-1])

    return keeping


def _down_projection(model: LanguageModel, layer: int) -> nn.Module:
    """The matrix whose output a block adds as it is.

    Raises:
        BackboneError: If there is none: a mixture of experts, or a norm stands after it.
    """
    sites = find_sites(Backbone(model.folder, model.base, model.blocks, None))
    part = sites.modules.get("ffn_out", [None] * model.n_layers)[layer]
    if "ffn_in" not in sites.modules or part is None or not _adds(model, layer, part):
        raise BackboneError(
            f"{model.name} does not add the output of a down projection as it is, so no map can be "
            "folded into one.",
            "Take another way to heal.",
            "heal",
        )
    return cast(nn.Module, part)


@torch.inference_mode()
def _adds(model: LanguageModel, layer: int, part: nn.Module) -> bool:
    """Whether a change of a part's output changes its block's output by as much."""
    given: list[Tensor] = []
    ids = torch.arange(4, 12, device=model.device)[None] % int(model.config.vocab_size)
    change = torch.randn(
        8, int(model.config.hidden_size), generator=torch.Generator().manual_seed(0)
    )

    def note(_: nn.Module, _args: Any, output: Any) -> None:
        given.append(first_of(output).float().cpu().reshape(8, -1))

    def add(_: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + change.to(output).reshape(output.shape)

    watch = model.blocks[layer].register_forward_hook(note)
    try:
        model.run(ids)
        adding = part.register_forward_hook(add)
        model.run(ids)
        adding.remove()
    finally:
        watch.remove()
    return bool((given[1] - given[0] - change).norm() <= _AS_IT_IS * change.norm())
