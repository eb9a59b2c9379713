"""Attention and feed-forward units of a model: where they are, and the model without some of them.

Source: BlockPruner (arXiv:2406.10594), which takes out single units, each time the one whose
absence costs the calibration text least.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chipviz.backbones.language_model import LanguageModel, mean_loss
from chipviz.backbones.surgery import Nothing, Part, Surgery
from chipviz.errors import BackboneError
from chipviz.progress import ProgressFn, silent
from chipviz.pruning.ranking import greedy

UnitKind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Unit:
    """One residual unit of a block."""

    layer: int
    kind: UnitKind

    def __str__(self) -> str:
        """As a record names it."""
        return f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class Place:
    """Where a unit is in the model without its head."""

    module: str
    outputs: int
    """Length of the tuple that it gives, 0 for a tensor alone."""
    norm: str | None
    """The norm that it alone reads from, and that goes with it."""


def find_units(model: LanguageModel) -> dict[Unit, Place]:
    """The two residual units of every block, found by running one short text.

    A unit is a child of the block that holds matrices; the first to run is the attention.

    Raises:
        BackboneError: If a block has not two of them, or is not its input and what they give.
    """
    names = {module: name for name, module in model.base.named_modules()}
    found: dict[Unit, Place] = {}
    for layer, block in enumerate(model.blocks):
        made = _run(model, block)
        units = [module for module, *_ in made if _has_matrix(module)]
        if len(units) != 2:
            raise _no_units(model.name, f"block {layer} has {len(units)} of them")
        for kind, unit in zip(("attention", "mlp"), units, strict=True):
            given, output = next((a, b) for module, a, b in made if module is unit)
            outputs = 0 if isinstance(output, Tensor) else len(output)
            readers = [m for m, a, _ in made if a is not None and a is given and _has_matrix(m)]
            norms = [m for m, _, out in made if out is given and not _has_matrix(m)]
            norm = names[norms[-1]] if norms and len(readers) == 1 else None
            found[Unit(layer, kind)] = Place(names[unit], outputs, norm)
    _refuse_other(model, found)
    return found


def _run(model: LanguageModel, block: nn.Module) -> list[tuple[nn.Module, Any, Any]]:
    """Children of a block as they run: each with what it is given and what it gives."""
    made: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        made.append((module, args[0] if args else kwargs.get("hidden_states"), output))

    handles = [c.register_forward_hook(note, with_kwargs=True) for c in block.children()]
    with torch.inference_mode():
        model.run(_probe(model))
    for handle in handles:
        handle.remove()
    return made


def _probe(model: LanguageModel) -> Tensor:
    size = int(model.config.vocab_size)
    return torch.tensor([[size // 3, size // 2, size // 4, size // 5]], device=model.device)


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _refuse_other(model: LanguageModel, places: dict[Unit, Place]) -> None:
    """Refuse a model whose block without both units is not its input."""
    seen: list[Tensor] = []
    block = model.blocks[0]
    handle = block.register_forward_hook(
        lambda _m, args, kwargs, out: seen.extend(
            [
                args[0] if args else kwargs["hidden_states"],
                out if isinstance(out, Tensor) else out[0],
            ]
        ),
        with_kwargs=True,
    )
    both = [Unit(0, "attention"), Unit(0, "mlp")]
    with torch.inference_mode(), without_units(model, both, places):
        model.run(_probe(model))
    handle.remove()
    if not torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-4):
        raise _no_units(model.name, "its blocks add more than their units")


def _no_units(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"{name} is not made of attention and feed-forward units alone: {why}.",
        "Take a method that takes out whole blocks.",
        "method",
    )


@contextmanager
def without_units(
    model: LanguageModel, units: Sequence[Unit], places: dict[Unit, Place]
) -> Iterator[None]:
    """Let the residual pass some units by, inside the block."""
    changed = [(model.base.get_submodule(places[u].module), places[u].outputs) for u in units]
    for module, outputs in changed:
        vars(module)["forward"] = Nothing(outputs).forward
    try:
        yield
    finally:
        for module, _ in changed:
            del vars(module)["forward"]


def choose_units(
    model: LanguageModel,
    rows: Tensor,
    n_parameters: int,
    progress: ProgressFn = silent,
) -> list[Unit]:
    """Units that the calibration text misses least, until so many parameters are gone.

    Args:
        model: The whole model.
        rows: Calibration text, shape (N, T).
        n_parameters: Parameters to take out. The last unit may exceed them.
        progress: Told every trial.

    Returns:
        The units in the order in which they go.
    """
    places = find_units(model)
    sizes = {unit: _size(model, place) for unit, place in places.items()}

    def loss_without(units: Sequence[Unit]) -> float:
        with without_units(model, units, places):
            return mean_loss(model, rows)

    def enough(gone: Sequence[Unit]) -> bool:
        return sum(sizes[unit] for unit in gone) >= n_parameters

    return greedy(list(places), len(places), loss_without, progress, enough=enough)


def _size(model: LanguageModel, place: Place) -> int:
    """Parameters that go with a unit."""
    names = [place.module, *([place.norm] if place.norm else [])]
    return sum(p.numel() for name in names for p in model.base.get_submodule(name).parameters())


def surgery_without(model: LanguageModel, units: Sequence[Unit]) -> Surgery:
    """What has to be changed in a model so that it has not these units."""
    places, modules = find_units(model), dict[str, Part]()
    for unit in units:
        place = places[unit]
        modules[place.module] = Part(kind="nothing", outputs=place.outputs)
        if place.norm is not None:
            modules[place.norm] = Part(kind="identity")
    return Surgery(method="blockpruner", modules=modules)
