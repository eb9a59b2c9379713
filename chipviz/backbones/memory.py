"""What a backbone will need before any of its weights is loaded, from its configuration alone."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from chipviz.backbones.backbone import best_device, fast_dtype
from chipviz.backbones.batching import batch_tokens
from chipviz.backbones.model_folder import ModelFolder
from chipviz.config import RunConfig
from chipviz.errors import BackboneError
from chipviz.parallel import n_beside


@dataclass(frozen=True)
class Outlook:
    """Size of a backbone, and whether it fits. Bytes of activations are an estimate."""

    name: str
    n_layers: int
    hidden_size: int
    n_parameters: int
    """Parameters of the published model, LM head included."""
    n_loaded: int
    """Parameters of the part that is loaded, without the LM head."""
    file_bytes: int
    """Bytes of the weight files."""
    licence: str | None
    """As the model card says."""
    dtype: str
    """What would be computed in."""
    device: str
    weight_bytes: int
    """Bytes of the loaded part in that dtype."""
    activation_bytes: int
    """Bytes of the batches on their way through a block."""
    feature_bytes: int
    """Bytes of the pooled states of all texts on disk. Memory holds one layer at a time."""
    free_bytes: int
    """Bytes of memory that are free on the device now."""

    @property
    def memory_bytes(self) -> int:
        """What a run needs on the device at once."""
        return self.weight_bytes + self.activation_bytes + self.feature_bytes // (self.n_layers + 1)

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.memory_bytes <= self.free_bytes

    def refuse(self) -> None:
        """Say that it does not fit, and what would.

        Raises:
            BackboneError: If it does not.
        """
        if self.fits:
            return
        ways, fields = ["spread it over all devices, memory and disk"], ["device_map"]
        halved = self.memory_bytes - self.weight_bytes // 2
        if self.dtype == "float32" and halved <= self.free_bytes:
            ways.insert(0, "compute in bfloat16, which halves its weights and fits")
            fields.insert(0, "dtype")
        raise BackboneError(
            f"{self.name} needs about {_gb(self.memory_bytes)} in {self.dtype}, and "
            f"{self.device} has {_gb(self.free_bytes)} free.",
            f"Free some memory, take a smaller backbone, or {', or '.join(ways)}.",
            *fields,
        )


def look_ahead(
    folder: ModelFolder,
    config: RunConfig,
    *,
    home: Path,
    n_texts: int = 0,
    pictures: bool | None = None,
) -> Outlook:
    """What a run will need of memory and disk.

    Args:
        folder: The backbone.
        config: The run's settings. A run that names no pooling keeps two of them.
        home: Where the fast dtype is remembered.
        n_texts: Texts or pictures that will be read.
        pictures: Whether these are pictures. None asks the model.
    """
    pictures = not folder.reads if pictures is None else pictures
    device = best_device()
    dtype = chosen_dtype(config, device, home)
    part = folder.part(pictures=pictures)
    class_token = True if pictures and not folder.asks else None  # before anybody has looked
    n_layers, width = int(part.num_hidden_layers), int(part.hidden_size)
    inner = int(getattr(part, "intermediate_size", None) or 4 * width)
    vectors = config.resolved(causal=True, class_token=class_token).vectors
    numbers = sum(v.n_states * (inner if v.site in ("gate", "ffn_in") else width) for v in vectors)
    # In and out of a block, its norms, queries, keys, values, and three of the wide product.
    per_token = (8 * width + 3 * inner) * dtype.itemsize
    return Outlook(
        name=folder.name,
        n_layers=n_layers,
        hidden_size=width,
        n_parameters=folder.n_published,
        n_loaded=folder.n_loaded,
        file_bytes=folder.file_bytes,
        licence=folder.licence,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        weight_bytes=folder.n_loaded * dtype.itemsize,
        activation_bytes=per_token * batch_tokens(device) * n_beside(device),
        feature_bytes=4 * n_texts * (n_layers + 1) * numbers,
        free_bytes=free_memory(device),
    )


def chosen_dtype(config: RunConfig, device: torch.device, home: Path) -> torch.dtype:
    """What a run computes in: the user's choice, or the fast one of the device."""
    return getattr(torch, config.dtype) if config.dtype else fast_dtype(device, home)


def free_memory(device: torch.device) -> int:
    """Bytes a device could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def refuse_copies(folder: ModelFolder, copies: float, device: torch.device) -> None:
    """Refuse a model whose weights in float32, so many times, do not fit into memory.

    Raises:
        BackboneError: If they do not.
    """
    needed, free = int(4 * folder.n_published * copies), free_memory(device)
    if needed > free:
        raise BackboneError(
            f"{folder.name} needs about {_gb(needed)} for this, and {device} has {_gb(free)} free.",
            "Free some memory, take a smaller backbone, or heal otherwise.",
            "backbone",
        )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
