"""A model folder, vetted and measured once: what all else needs to know of it before loading."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

from chipviz.backbones.hub import revision_of
from chipviz.backbones.structure import text_part
from chipviz.backbones.surgery import SURGERY, Surgery, operate, read_surgery
from chipviz.backbones.vetting import FOREIGN, SAFE, licence_of, vet
from chipviz.errors import BackboneError
from chipviz.results.models import Lineage, read_record


@dataclass(frozen=True)
class ModelFolder:
    """A vetted folder of a saved model. Made by `open_folder`, never examined again."""

    path: Path
    name: str
    """What the user calls it."""
    files: tuple[Path, ...]
    """Weight files."""
    config: Any
    """The model's configuration, as transformers reads it."""
    fingerprint: str
    """Changes when the configuration or the weights do."""
    stored_dtype: torch.dtype
    """Dtype of the largest stored weight."""
    n_published: int
    """Parameters of the published model, LM head included (a tied head counts once)."""
    n_loaded: int
    """Parameters of the part that is loaded, without an LM head."""
    n_positions: int | None
    """Maximum tokens per text where positions stand in a table, which has no row beyond. None where
    they are computed."""
    licence: str | None
    """Licence that the model card names."""
    revision: str | None
    """The commit, if the folder is one of the Hub's."""
    lineage: Lineage | None = None
    """Where it comes from, of a model that was made here."""
    surgery: Surgery | None = None
    """Parts that are not those of its class."""

    @property
    def sees(self) -> bool:
        """Whether it reads pictures, itself or with a tower beside its text part."""
        return any(hasattr(self.config, field) for field in ("vision_config", "patch_size"))

    @property
    def reads(self) -> bool:
        """Whether it reads texts."""
        return hasattr(self.config.get_text_config(), "vocab_size")

    @property
    def asks(self) -> bool:
        """Whether it is a decoder that reads pictures inside prompts."""
        return type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    def part(self, *, pictures: bool) -> Any:
        """The configuration of the part whose blocks are read, for pictures or texts."""
        if pictures and not self.asks:
            return getattr(self.config, "vision_config", None) or self.config
        return self.config.get_text_config()

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)


_POSITION_TABLES = {"position_embeddings", "position_embedding", "embed_positions", "wpe"}
"""Attributes that hold tables of positions, as the families call them."""


def n_positions(model: nn.Module) -> int | None:
    """Rows of the smallest table of positions that texts can use; None without such a table.

    Some tables begin with rows that no token has: RoBERTa's up to its pad token, OPT's first two.
    """
    rows = [
        table.num_embeddings - getattr(table, "offset", (table.padding_idx or -1) + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
    ]
    return min(rows, default=None)


def open_folder(path: Path, name: str) -> ModelFolder:
    """Look at a model folder. No weight is loaded.

    Args:
        path: The folder, as written by `save_pretrained`.
        name: What the user calls it.

    Raises:
        BackboneError: If the folder holds what no model folder should, or no known architecture.
    """
    weights = vet(path)
    files = weights.files
    try:
        config: Any = AutoConfig.from_pretrained(path, **SAFE)
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, trust_remote_code=False)
        surgery = read_surgery(path)
        if surgery is not None:
            operate(model, surgery)
        weights.refuse_larger(name, _count(model))
        n_published = _count_published(config, model, surgery)
        stored = _stored_dtype(files)
    except FOREIGN as error:
        raise BackboneError(
            f"{name} is of no architecture known here: {' '.join(str(error).split())[:160]}",
            "Give a model that transformers knows by itself; code in a model folder is never run.",
        ) from None
    record = read_record(path)
    return ModelFolder(
        path=path,
        name=name,
        files=files,
        config=config,
        fingerprint=_fingerprint(path, files),
        stored_dtype=stored,
        n_published=n_published,
        n_positions=n_positions(model),
        n_loaded=_count(model),
        licence=licence_of(path),
        revision=revision_of(path),
        lineage=record.lineage if record else None,
        surgery=surgery,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _count_published(config: Any, model: nn.Module, surgery: Surgery | None) -> int:
    """Parameters of the model as published, counted on the meta device without its weights."""
    with torch.device("meta"):
        try:
            published: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:  # an encoder: its published form has no LM head to speak of
            return _count(text_part(model))
        if surgery is not None:
            operate(published.base_model, surgery)
    return _count(published)


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The dtype of the largest stored weight."""
    heaviest: tuple[int, str] = (0, "F32")
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                part = weights.get_slice(name)
                heaviest = max(heaviest, (math.prod(part.get_shape()), part.get_dtype()))
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(heaviest[1], torch.float32)


def _fingerprint(
    folder: Path, files: Sequence[Path], samples: int = 64, width: int = 1 << 16
) -> str:
    """Hash of the configuration and of samples spread over every weight file.

    Sampling keeps a model of 100 GB at a second. A fine-tune changes all of its matrices.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (folder / SURGERY).exists():
        digest.update((folder / SURGERY).read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}{size}".encode())
        with file.open("rb") as handle:
            for i in range(samples):
                handle.seek(i * max(0, size - width) // max(1, samples - 1))
                digest.update(handle.read(width))
    return digest.hexdigest()
