"""Chips: the fitted small classifiers on the layers, in memory and as safetensors.

A chip reads pooled hidden states and gives class logits. Knows neither models nor training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chipviz.errors import SourceError
from chipviz.files import replacing
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Site
from chipviz.results.neurons import SparsifyReport

FORMAT = "1"


@dataclass(frozen=True)
class Chip:
    """One chip, or a stack of them with leading dimensions.

        linear  logits = W x (+ b)              MLP  logits = W relu(V x + c) + b
        sparse  logits = W ((x - m) / s) + b, most of W zero

    Source: arXiv:2410.06541, section 3.1; sparse ones arXiv:2311.15983.
    """

    weight: Tensor
    """W: shape (..., C, D), of an MLP (..., C, H)."""
    bias: Tensor | None = None
    """b: shape (..., C)."""
    hidden_weight: Tensor | None = None
    """V: shape (..., H, D)."""
    hidden_bias: Tensor | None = None
    """c: shape (..., H)."""
    mean: Tensor | None = None
    """m: shape (..., D)."""
    scale: Tensor | None = None
    """s: shape (..., D)."""
    neurons: Tensor | None = None
    """Where each of the D numbers is taken: site (its place in `keys.Site`), layer and column,
    shape (..., D, 3), int32. None where a chip reads one vector of one layer."""

    def logits(self, features: Tensor) -> Tensor:
        """Class scores of pooled features (..., N, D): shape (..., N, C)."""
        hidden = features
        if self.mean is not None and self.scale is not None:
            hidden = (features - self.mean[..., None, :]) / self.scale[..., None, :]
        if self.hidden_weight is not None and self.hidden_bias is not None:
            hidden = (features @ self.hidden_weight.mT + self.hidden_bias[..., None, :]).relu()
        logits = hidden @ self.weight.mT
        return logits if self.bias is None else logits + self.bias[..., None, :]

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities of pooled features (..., N, D): shape (..., N, C)."""
        return self.logits(features).softmax(dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in own.items() if value is not None}

    def at(self, index: int | Tensor) -> "Chip":
        """One chip of a stack, or some."""
        return Chip(**{name: value[index] for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> "Chip":
        """The same chip on another device."""
        return Chip(**{name: value.to(device) for name, value in self.tensors().items()})

    @property
    def n_parameters(self) -> int:
        """Numbers it is made of."""
        return sum(value.numel() for value in self.tensors().values())

    @property
    def deepest(self) -> int | None:
        """The last layer that neurons are taken of, -1 for none. None for a vector of one layer."""
        if self.neurons is None:
            return None
        return int(self.neurons[:, 1].max()) if len(self.neurons) else EMBEDDING_LAYER

    def kept(self) -> "Chip":
        """One sparse chip without the columns whose weights are all zero."""
        used = (self.weight != 0).any(dim=0)
        own = self.tensors()
        for name in own.keys() & {"mean", "scale", "neurons"}:
            own[name] = own[name][used]
        return Chip(**(own | {"weight": self.weight[:, used]}))

    def of_neurons(self, site: Site, layer: int) -> "Chip":
        """One sparse chip of one layer's vector, as one that reads the neurons it needs."""
        if self.neurons is not None:
            return self.kept()
        columns = torch.arange(self.weight.shape[1], dtype=torch.int32)
        number = get_args(Site).index(site)
        place = torch.tensor([number, layer], dtype=torch.int32).expand(len(columns), 2)
        neurons = torch.cat([place, columns[:, None]], dim=1)
        return Chip(**(self.tensors() | {"neurons": neurons})).kept()

    def folded(self) -> "Chip":
        """The same linear chip on plain features: the scaler is part of weights and bias."""
        if self.mean is None or self.scale is None or self.bias is None:
            return self
        weight = self.weight / self.scale[..., None, :]
        return Chip(weight, self.bias - (weight @ self.mean[..., None])[..., 0])

    @classmethod
    def cat(cls, stacks: "Sequence[Chip]") -> "Chip":
        """One stack of several, along the first dimension."""
        names = stacks[0].tensors()
        return cls(**{name: torch.cat([s.tensors()[name] for s in stacks]) for name in names})


@dataclass(frozen=True)
class Chips:
    """The fitted chips of all layers."""

    stacks: dict[ChipKey, Chip]
    """L + 1 chips per curve, float32. The first reads the embedding output."""
    strengths: dict[ChipKey, list[float]] = field(default_factory=dict)
    """Penalty that validation chose for linear chips, per layer, embedding first."""
    refits: dict[ChipKey, Chip] = field(default_factory=dict)
    """The same chips fitted on training and validation texts together, where a recipe does that.
    They take the place of the others on disk."""
    held_out: dict[ChipKey, Tensor] = field(default_factory=dict)
    """With folds: probabilities of the training and validation texts, each by a chip that had not
    seen it, shape (L + 1, N, C). Not kept on disk."""
    repeats: dict[ChipKey, list[Chip]] = field(default_factory=dict)
    """The same chips fitted again on bootstrap samples, for the band. Not kept on disk."""
    sparsified: list[SparsifyReport] = field(default_factory=list)
    """What Sparsify-then-Classify found, if it was asked for: one. Kept in a file of its own."""

    def at(self, cut: Cut, *, train_only: bool = False) -> Chip:
        """The chip of one layer. Layer -1 reads the embedding output.

        Args:
            cut: Which one.
            train_only: Take the chip that has not seen the validation texts.

        Raises:
            IndexError: If there is no such layer.
        """
        stack = self.stacks[cut.chip]
        if not train_only:
            stack = self.refits.get(cut.chip, stack)
        if not EMBEDDING_LAYER <= cut.layer < len(stack.weight) - 1:
            raise IndexError(f"layer {cut.layer} is outside of -1 to {len(stack.weight) - 2}")
        return stack.at(cut.layer + 1)

    def stack_at(self, key: ChipKey, layers: Sequence[int]) -> Chip:
        """The chips of some layers, as they are shipped."""
        stack = self.refits.get(key, self.stacks[key])
        return stack.at(torch.tensor(layers) + 1)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: The final name.
            fingerprint: Fingerprint of the backbone that the chips belong to.
        """
        tensors = {}
        for key, stack in (self.stacks | self.refits).items():
            for name, value in stack.tensors().items():
                tensors[f"{key.name}.{name}"] = value.contiguous()
        for key, values in self.strengths.items():
            tensors[f"{key.name}.strength"] = torch.tensor(values, dtype=torch.float64)
        with replacing(path) as part:
            # One key: safetensors writes several in any order, and equal chips are to be equal
            # bytes.
            save_file(tensors, part, {"chipviz": f"{FORMAT} {fingerprint}"})

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Chips":
        """Read what `save` wrote.

        Raises:
            SourceError: If the file belongs to another backbone or format, or was damaged.
        """
        try:
            return cls._read(path, fingerprint)
        except (OSError, ValueError, TypeError, SafetensorError):
            raise SourceError(
                f"{path.name} of run {path.parent.name} is gone or damaged.",
                "Its folder was changed; delete the run and train again.",
            ) from None

    @classmethod
    def _read(cls, path: Path, fingerprint: str) -> "Chips":
        stacks: dict[ChipKey, dict[str, Tensor]] = {}
        strengths: dict[ChipKey, list[float]] = {}
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("chipviz") != f"{FORMAT} {fingerprint}":
                raise SourceError(
                    f"{path.name} was trained on another backbone than the one at hand.",
                    "The backbone's folder changed since the run; train again.",
                )
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                chip, _, what = name.rpartition(".")
                key = ChipKey.parse(chip)
                if what == "strength":
                    strengths[key] = file.get_tensor(name).tolist()
                else:
                    stacks.setdefault(key, {})[what] = file.get_tensor(name)
        return cls({key: Chip(**tensors) for key, tensors in stacks.items()}, strengths)
