"""Chips: the fitted small classifiers on the layers, in memory and as safetensors.

A chip reads pooled hidden states and gives class logits. Knows neither models nor training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chipviz.errors import SourceError
from chipviz.files import replacing
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut

FORMAT = "1"


@dataclass(frozen=True)
class Chip:
    """One chip, or a stack of them with leading dimensions.

        linear  logits = W x (+ b)              MLP  logits = W relu(V x + c) + b

    Source: arXiv:2410.06541, section 3.1.
    """

    weight: Tensor
    """W: shape (..., C, D), of an MLP (..., C, H)."""
    bias: Tensor | None = None
    """b: shape (..., C)."""
    hidden_weight: Tensor | None = None
    """V: shape (..., H, D)."""
    hidden_bias: Tensor | None = None
    """c: shape (..., H)."""

    def logits(self, features: Tensor) -> Tensor:
        """Class scores of pooled features (..., N, D): shape (..., N, C)."""
        hidden = features
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
    repeats: dict[ChipKey, list[Chip]] = field(default_factory=dict)
    """The same chips fitted again on bootstrap samples, for the band. Not kept on disk."""

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
            SourceError: If the file belongs to another backbone or another format.
        """
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
