"""A model whose parts are not those of its class: what was changed, and the one loader of it.

Written beside the weights as `surgery.json`: which modules of the stock class give way to which.
Reads JSON and tensors, and runs nothing of a folder.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from chipviz.backbones.vetting import SAFE, read_json
from chipviz.errors import BackboneError

SURGERY = "surgery.json"
MOST = 100_000
"""Maximum modules that a file may change."""


class Part(BaseModel):
    """What stands in place of a module of the stock class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nothing", "identity", "linear", "shortcut"]
    """*nothing* gives zeros, so that a residual passes by; *identity* what it is given. With a
    *shortcut* the module stays, and the residual around it is turned by a matrix."""
    outputs: Annotated[int, Field(ge=0, le=8)] = 0
    """Of *nothing*: length of the tuple that it gives, 0 for a tensor alone."""
    inner: Annotated[int, Field(ge=0)] = 0
    """Of *linear* and *shortcut*: numbers that it reads."""
    outer: Annotated[int, Field(ge=0)] = 0
    """Of *linear*: numbers that it gives."""
    bias: bool = False
    reads: str = ""
    """Of *shortcut*: the norm whose input is the residual."""


class Surgery(BaseModel):
    """Every module that was changed, by its name in the model without a head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    method: str
    modules: Annotated[dict[str, Part], Field(max_length=MOST)]

    def cut(self, path: str, n_kept: int) -> "Surgery":
        """The same of a model of its first blocks.

        Args:
            path: Name of the list of blocks.
            n_kept: Blocks that stay.
        """

        def stays(name: str) -> bool:
            if not name.startswith(f"{path}."):
                return True
            return int(name[len(path) + 1 :].partition(".")[0]) < n_kept

        kept = {name: part for name, part in self.modules.items() if stays(name)}
        return self.model_copy(update={"modules": kept})


class Nothing(nn.Module):
    """In place of attention or a feed-forward part: the residual passes by unchanged."""

    def __init__(self, outputs: int) -> None:
        """Give a tensor, or with `outputs` a tuple of that length that begins with it."""
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of the hidden states."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros_like(hidden)
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


class Shortcut:
    """Turns the residual around a unit: x + unit(x) becomes x Q + unit(x).

    The block adds x itself, so what the unit gives gets x Q - x on top. The norm before the unit is
    where x is seen.
    """

    def __init__(self, norm: nn.Module, unit: nn.Module, width: int, like: Tensor) -> None:
        """Watch both modules. The matrix is a parameter `shortcut` of the unit, not set yet."""
        turn = torch.empty(width, width, dtype=like.dtype, device=like.device)
        unit.register_parameter("shortcut", nn.Parameter(turn, requires_grad=False))
        self.seen: Tensor | None = None
        norm.register_forward_pre_hook(self.see)
        unit.register_forward_hook(self.add)

    def see(self, _: nn.Module, args: Any) -> None:
        """Keep the residual."""
        self.seen = args[0]

    def add(self, unit: nn.Module, _: Any, output: Any) -> Any:
        """Turn it."""
        x, self.seen = self.seen, None
        assert x is not None, "the norm runs before its unit"
        turned = x @ unit.get_parameter("shortcut") - x
        if isinstance(output, Tensor):
            return output + turned
        return (output[0] + turned, *output[1:])


def read_surgery(folder: Path) -> Surgery | None:
    """What was changed in a model folder. None of an ordinary one.

    Raises:
        BackboneError: If the file is malformed.
    """
    if not (folder / SURGERY).exists():
        return None
    found = read_json(folder / SURGERY)
    try:
        return Surgery.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise BackboneError(
            f"{folder.name}/{SURGERY} is malformed: {where}: {first['msg'][:80]}.",
            "Download the model again, or make it again.",
        ) from None


def write_surgery(folder: Path, surgery: Surgery) -> None:
    """Write what was changed, beside the weights."""
    (folder / SURGERY).write_text(surgery.model_dump_json(indent=1), "utf-8")


def operate(base: nn.Module, surgery: Surgery) -> list[str]:
    """Change the modules of a model in place.

    Args:
        base: The part without a head.
        surgery: What to change.

    Returns:
        Names of the modules that have weights of another shape now.

    Raises:
        BackboneError: If there is no such module.
    """
    resized: list[str] = []
    for name, part in surgery.modules.items():
        parent_name, _, own = name.rpartition(".")
        parent, old = _module(base, parent_name), _module(base, name)
        like = next(old.parameters(), next(base.parameters()))
        if part.kind == "shortcut":
            Shortcut(_module(base, part.reads), old, part.inner, like)
            resized.append(name)
            continue
        if part.kind == "linear":
            options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
            new: nn.Module = nn.Linear(part.inner, part.outer, bias=part.bias, **options)
            resized.append(name)
        else:
            new = nn.Identity() if part.kind == "identity" else Nothing(part.outputs)
        setattr(parent, own, new.requires_grad_(False))
    return resized


def _module(base: nn.Module, name: str) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError:
        raise BackboneError(
            f"{SURGERY} names {name[:80]!r}, which this model has not.",
            "Its files do not belong together; make the model again.",
        ) from None


def load_operated(
    kind: Any, folder: Path, surgery: Surgery | None, files: Iterable[Path], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model folder, whatever was changed in it.

    Args:
        kind: The class of transformers, such as AutoModel.
        folder: The model folder.
        surgery: What was changed, as `read_surgery` found it.
        files: The weight files.
        options: For `from_pretrained`.

    Returns:
        The model, and what transformers says of its loading.
    """
    options |= {"use_safetensors": True, "output_loading_info": True, **SAFE}
    if surgery is None:
        return kind.from_pretrained(folder, **options)
    model, loading = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    base = model.base_model
    fresh = {
        f"{name}.{own}": parameter
        for name in operate(base, surgery)
        for own, parameter in base.get_submodule(name).named_parameters(recurse=False)
    }
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                short = key.removeprefix(prefix).removeprefix(f"{model.base_model_prefix}.")
                if short in fresh:
                    fresh.pop(short).data.copy_(stored.get_tensor(key))
    if fresh:
        raise BackboneError(
            f"{folder.name} lacks the weights of {next(iter(fresh))[:80]}.",
            "Its files do not belong together; make the model again.",
        )
    there = set(model.state_dict())
    for name in ("missing_keys", "unexpected_keys"):
        # What is no stock weight was unexpected, and what is gone was missing.
        known = name == "missing_keys"
        loading[name] = [key for key in loading[name] if (key in there) == known]
    loading["mismatched_keys"] = []
    return model, loading
