"""Load and freeze a model, find its blocks and final norm, and watch what leaves each layer.

The blocks are found by structure, never by the name of an architecture.
"""

import atexit
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

from chipviz.errors import BackboneError
from chipviz.metrics import EMBEDDING_LAYER

transformers_logging.disable_progress_bar()  # standard error belongs to our own progress

SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""How every file is loaded here: nothing in a model folder may run, nothing is fetched."""


@dataclass(frozen=True)
class Backbone:
    """A frozen pretrained model without its LM head, and where its parts are."""

    name: str
    folder: Path
    model: nn.Module
    blocks: nn.ModuleList
    final_norm: nn.Module | None
    """Applied after the last block; None where the family has none (most encoders)."""
    config: Any
    stored_dtype: torch.dtype
    """What the files on disk hold."""
    n_published: int
    """Parameters of the published model, LM head included (a tied head counts once)."""
    fingerprint: str
    """Changes when the configuration or the weights do."""

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model is, or its first part that is not put away to disk."""
        return _place(self.model)

    def read(self, hidden: Tensor) -> Tensor:
        """What a model cut at this point would output: the final norm of the hidden states."""
        if self.final_norm is None:
            return hidden
        home = next(self.final_norm.parameters()).device
        # Where the model is spread over devices, the norm may be on another one than the block;
        # one that was put away to disk ("meta") moves its inputs itself.
        return self.final_norm(hidden if home.type == "meta" else hidden.to(home))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Run all blocks and drop the output; what is wanted is taken by `watch_layers`."""
        self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def load_backbone(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Backbone:
    """Load a model folder, frozen, without its LM head.

    Args:
        folder: As written by `save_pretrained`; weights in safetensors only.
        name: What the user calls it.
        dtype: What to compute in; "auto" is what the files hold.
        device: None takes CUDA, then MPS, then the CPU.
        device_map: For a model too large for one device: "auto", or where each part goes, as
            accelerate reads it; what fits nowhere is read from disk for every pass.

    Raises:
        BackboneError: If the folder cannot be loaded or has no list of blocks.
    """
    place = torch.device(device) if device is not None else best_device()
    spread: dict[str, Any] = {}
    if device_map is not None:
        away = tempfile.mkdtemp(prefix="chipviz-offload-")
        atexit.register(shutil.rmtree, away, ignore_errors=True)
        spread = {"device_map": device_map, "offload_folder": away}
    try:
        model: Any = AutoModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **spread, **SAFE
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"{name} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Give a folder or id of a transformers model with safetensors weights.",
        ) from None
    model.eval().requires_grad_(False)
    if device_map is None:
        model.to(place)
    blocks = find_blocks(model, name)
    return Backbone(
        name=name,
        folder=folder,
        model=model,
        blocks=blocks,
        final_norm=_find_final_norm(model, blocks),
        config=model.config,
        stored_dtype=_stored_dtype(folder),
        n_published=_count_published(folder, model),
        fingerprint=_fingerprint(folder),
    )


def best_device() -> torch.device:
    """CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_dtype(device: torch.device, home: Path) -> torch.dtype:
    """What to compute in on a device: measured once, then read from `home`.

    A resumed run must not choose otherwise because the machine is busier today.
    """
    memory = home / "fast_dtype.json"
    key = f"{device.type}, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    try:
        known = json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(key) not in ("float32", "bfloat16"):
        known[key] = str(_measure_dtype(device)).removeprefix("torch.")
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=1), "utf-8")
        temporary.replace(memory)
    return torch.bfloat16 if known[key] == "bfloat16" else torch.float32


def _measure_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this device multiplies it clearly faster than float32; in 0.1 s."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    dtypes = (torch.float32, torch.bfloat16)
    factors = [
        [torch.ones(rows, 1024, dtype=dtype, device=device) for rows in (512, 1024)]
        for dtype in dtypes
    ]
    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(8):  # in turns, so that a slow moment of the machine meets both
        for dtype, (a, b) in zip(dtypes, factors, strict=True):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    faster = seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
    return torch.bfloat16 if faster else torch.float32


def find_blocks(model: nn.Module, name: str = "the model") -> nn.ModuleList:
    """The list of transformer blocks: the heaviest module list with one entry a layer.

    Raises:
        BackboneError: If there is none.
    """
    config: Any = model.config
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise BackboneError(
            f"{name} has no list of {n_layers} blocks.",
            "chipviz needs a transformer whose layers stand in one module list.",
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


@contextmanager
def watch_layers(backbone: Backbone, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, hidden)` for every layer of every forward pass inside the block.

    `hidden` is the output of the layer before the final norm, shape (B, T, D); layer -1 is the
    embedding output. What `see` does not keep is freed at once.
    """

    def block_hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, _args: Any, output: Any) -> None:
            see(layer, _first(output))

        return hook

    def embedding_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        see(EMBEDDING_LAYER, args[0] if args else kwargs["hidden_states"])

    first = backbone.blocks[0]
    handles = [first.register_forward_pre_hook(embedding_hook, with_kwargs=True)]
    handles += [b.register_forward_hook(block_hook(i)) for i, b in enumerate(backbone.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a normal model folder: bfloat16 safetensors and a tokenizer."""
    unpacked = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=unpacked,
        **SAFE,
    )
    # transformers refuses to save while the model still says it is quantised.
    with suppress(AttributeError):
        del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **SAFE)
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _place(model: nn.Module) -> torch.device:
    places = (p.device for p in model.parameters())
    return next((device for device in places if device.type != "meta"), torch.device("cpu"))


def _first(output: Any) -> Tensor:
    """Blocks return a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def _find_final_norm(model: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """The module that turns the last block's output into the model's output, if there is one.

    Found by running two tokens and looking which module made the output.
    """
    made: list[tuple[nn.Module, Tensor]] = []
    inside = {id(m) for m in blocks.modules()}
    handles = [
        module.register_forward_hook(lambda m, _a, out: made.append((m, _first(out))))
        for module in model.modules()
        if module is not model
        and not isinstance(module, nn.ModuleList)
        and (id(module) not in inside or module is blocks[-1])
        and not any(child is blocks for child in module.modules())
    ]
    ids = torch.tensor([[1, 2]], device=_place(model))
    try:
        with torch.inference_mode():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    at = max(i for i, (module, _) in enumerate(made) if module is blocks[-1])
    if torch.equal(made[at][1], output):
        return None
    # By value: some families reshape after the norm, so the output is another tensor object.
    makers = [m for m, out in made[at + 1 :] if isinstance(out, Tensor) and _same(out, output)]
    return makers[0] if makers else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _count_published(folder: Path, model: nn.Module) -> int:
    """Parameters of the model as published, counted on the meta device without its weights."""
    config: Any = AutoConfig.from_pretrained(folder, **SAFE)
    with torch.device("meta"):
        try:
            published: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError:  # an encoder: its published form has no LM head to speak of
            return sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in published.parameters())


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the largest stored weight."""
    heaviest: tuple[int, str] = (0, "F32")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                part = weights.get_slice(name)
                heaviest = max(heaviest, (math.prod(part.get_shape()), part.get_dtype()))
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(heaviest[1], torch.float32)


def _fingerprint(folder: Path, samples: int = 64, width: int = 1 << 16) -> str:
    """Hash of the configuration and of samples spread over every weight file.

    Sampling keeps a model of 100 GB at a second; a fine-tune changes all of its matrices.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}{size}".encode())
        with file.open("rb") as handle:
            for i in range(samples):
                handle.seek(i * max(0, size - width) // max(1, samples - 1))
                digest.update(handle.read(width))
    return digest.hexdigest()


def pad(
    ids: Sequence[Sequence[int] | NDArray[np.int32]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the right; both (B, T), int64."""
    longest = max(len(row) for row in ids)
    tokens = torch.full((len(ids), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), longest), dtype=torch.int64)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return tokens.to(device), mask.to(device)
