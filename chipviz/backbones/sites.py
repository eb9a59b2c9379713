"""Where the feed-forward part of a block is, found by running it, and what flows there.

Knows no architecture by name: the down projection is the last matrix of a block that narrows to its
width, the activation the last module without weights that is as wide as what it reads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone
from chipviz.backbones.structure import first_of
from chipviz.errors import BackboneError
from chipviz.keys import FfnSite, Site

FFN_SITES: tuple[FfnSite, ...] = get_args(FfnSite)
_PROBE = (4, 5, 6, 7, 8)
"""Tokens of the text that modules are found with."""


@dataclass(frozen=True)
class Sites:
    """The feed-forward sites that every block of a backbone has."""

    modules: dict[FfnSite, list[nn.Module]]
    """One module a layer: *ffn_in* is what it reads, the other sites what it gives."""
    widths: dict[FfnSite, int]
    """Numbers a token."""
    absent: dict[FfnSite, str]
    """Why the others are not there."""


_FOUND: WeakKeyDictionary[nn.Module, Sites] = WeakKeyDictionary()
"""Of each model that was looked at: the look costs a pass."""


def find_sites(backbone: Backbone) -> Sites:
    """The feed-forward sites of a backbone, found by running one short text.

    Every module that is taken gave a tensor of one row a token on that text. A site that a family
    computes without a module of its own (such as an activation that is a plain function) is absent.
    """
    if backbone.model in _FOUND:
        return _FOUND[backbone.model]
    places = [_places(made, block, backbone.hidden_size) for block, made in _run(backbone)]
    found = Sites({}, {}, {})
    for site in FFN_SITES:
        lacking = next((i for i, place in enumerate(places) if site not in place.modules), None)
        modules = [place.modules[site] for place in places if site in place.modules]
        widths = {place.widths[site] for place in places if site in place.widths}
        if lacking is not None:
            mixture = places[lacking].mixture
            why = "is a mixture of experts" if mixture else "computes it without a module"
            found.absent[site] = f"layer {lacking} {why}"
        elif len(widths) > 1 or len({id(module) for module in modules}) < len(modules):
            found.absent[site] = "its layers differ in width, or share a module"
        else:
            found.modules[site], found.widths[site] = modules, widths.pop()
    _FOUND[backbone.model] = found
    return found


def refuse_absent(name: str, sites: Sites, wanted: Iterable[Site]) -> None:
    """Refuse a site that a backbone lacks.

    Raises:
        BackboneError: Naming the site, why it is not there, and which are.
    """
    for site in wanted:
        if site in sites.absent:
            there = ", ".join(["block", *sites.modules])
            raise BackboneError(
                f"{name} has no site {site}: {sites.absent[site]}.", f"It has {there}.", "sites"
            )


@contextmanager
def watch_sites(
    found: Sites,
    wanted: Sequence[FfnSite],
    on_value: Callable[[FfnSite, int, Tensor], None],
) -> Iterator[None]:
    """Call `on_value(site, layer, value)` for every layer of every pass inside the block.

    A value is what flows there, shape (B, T, width), or (B T, width) where a family flattens.
    """
    handles = []

    def reading(site: FfnSite, layer: int) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: on_value(site, layer, args[0])

    def giving(site: FfnSite, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: on_value(site, layer, first_of(output))

    try:
        for site in wanted:
            for layer, module in enumerate(found.modules[site]):
                handles.append(
                    module.register_forward_pre_hook(reading(site, layer))
                    if site == "ffn_in"
                    else module.register_forward_hook(giving(site, layer))
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Made:
    """One call of a module inside a block."""

    module: nn.Module
    read: int | None
    """Width of what it read. None where that was no tensor."""
    gave: int | None
    changed: bool
    """Whether it gave something else than it read."""


def _run(backbone: Backbone) -> list[tuple[nn.Module, list[_Made]]]:
    """The calls of the modules of every block, in order, on one short text or one picture."""
    found: list[tuple[nn.Module, list[_Made]]] = [(block, []) for block in backbone.blocks]
    handles = []

    def noting(made: list[_Made]) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            output = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(output, Tensor) or given is None:
                return
            same = given.shape == output.shape and torch.equal(given, output)
            rows = len(_PROBE) if backbone.view is None else backbone.view.n_tokens
            widths = [
                tensor.shape[-1] if tensor.numel() == rows * tensor.shape[-1] else None
                for tensor in (given, output)
            ]
            made.append(_Made(module, widths[0], widths[1], not same))

        return note

    for block, made in found:
        for module in block.modules():
            if module is not block:
                handles.append(module.register_forward_hook(noting(made)))
    try:
        with torch.inference_mode():
            _probe(backbone)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _probe(backbone: Backbone) -> None:
    if backbone.view is not None:
        random = torch.Generator().manual_seed(0)
        backbone.look(torch.randn(1, *backbone.view.shape, generator=random))
        return
    size = int(backbone.config.get_text_config().vocab_size)
    ids = torch.tensor([[token % size for token in _PROBE]], device=backbone.device)
    backbone.forward(ids, torch.ones_like(ids))


@dataclass
class _Places:
    """The modules of one block."""

    modules: dict[FfnSite, nn.Module] = field(default_factory=dict)
    widths: dict[FfnSite, int] = field(default_factory=dict)
    mixture: bool = False
    """Whether the feed-forward part is a mixture of experts: only its output is one tensor."""


def _places(made: Sequence[_Made], block: nn.Module, width: int) -> _Places:
    experts = _holder_of_experts(block)
    if experts is not None:
        whole = any(m.module is experts and m.gave == width for m in made)
        one = {"ffn_out": experts} if whole else {}
        return _Places(cast(Any, one), dict.fromkeys(cast(Any, one), width), mixture=True)
    narrowing = [
        i for i, m in enumerate(made) if _is_matrix(m.module) and m.gave == width and m.read
    ]
    # Attention's last matrix gives the block's width as well. The feed-forward part's reads more,
    # and comes after it or beside it.
    inner = max((cast(int, made[i].read) for i in narrowing), default=0)
    down = max((i for i in narrowing if made[i].read == inner), default=None)
    if down is None:
        return _Places()
    module = made[down].module
    places = _Places({"ffn_in": module, "ffn_out": module}, {"ffn_in": inner, "ffn_out": width})
    for m in reversed(made[:down]):
        if m.gave == inner and m.changed and not list(m.module.parameters()):
            places.modules["gate"], places.widths["gate"] = m.module, inner
            break
    return places


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not list(module.children())


def _holder_of_experts(block: nn.Module) -> nn.Module | None:
    """The child of a block that holds its experts: weights stacked in one more dimension."""
    for child in block.children():
        for name, parameter in child.named_parameters():
            if parameter.dim() == 3 and "bias" not in name and "conv" not in name:
                return child
            if ".experts." in f".{name}":
                return child
    return None
