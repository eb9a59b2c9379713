"""Load and freeze a model, and watch what leaves each layer."""

import atexit
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)
from transformers.utils import logging as transformers_logging

from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.structure import (
    entering,
    find_blocks,
    find_norm_and_causality,
    first_of,
    padding_is_ignored,
    place_of,
    refuse_unknown_token,
    text_part,
)
from chipviz.backbones.surgery import load_operated
from chipviz.backbones.vetting import FOREIGN, SAFE
from chipviz.errors import BackboneError, Notice
from chipviz.files import write_atomic
from chipviz.keys import EMBEDDING_LAYER

transformers_logging.disable_progress_bar()  # standard error belongs to our own progress
transformers_logging.set_verbosity_error()  # what matters of its report is said by us


HOPELESS = 0.25
"""Speed of small bfloat16 products beside float32 below which large ones are not tried."""


@dataclass(frozen=True)
class View:
    """How a vision encoder reads a picture."""

    shape: tuple[int, int, int]
    """Channels, height and width of the pixels."""
    n_tokens: int
    """T: class token and registers, then the patches."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches."""
        return self.n_tokens - self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Backbone:
    """A frozen pretrained model without its LM head, and where its parts are."""

    folder: ModelFolder
    model: nn.Module
    blocks: nn.ModuleList
    final_norm: nn.Module | None
    """Applied after the last block. None where the family has none (most encoders)."""
    causal: bool = True
    """Whether a token reads only what stands before it (decoders), or the whole text (encoders)."""
    sep: int | None = None
    """The token that ends the first of two texts, if the prompt tells which is which."""
    padded: bool = True
    """Whether texts may be padded to one length. Otherwise a batch holds texts of one length."""
    view: View | None = None
    """How a vision encoder reads pictures. None of other models."""
    image_token: int | None = None
    """The token that a picture's places hold, of a decoder that is asked about pictures."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.folder.name

    @property
    def config(self) -> Any:
        """The configuration of the loaded part."""
        return self.model.config

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def class_token(self) -> bool | None:
        """Whether a vision encoder has a class token. None of a model of texts."""
        return None if self.view is None else self.view.n_prefix > 0

    @property
    def dtype(self) -> torch.dtype:
        """What the forward pass computes in."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model is, or its first part that is not put away to disk."""
        return place_of(self.model)

    def notices(self, n_texts: int) -> list[Notice]:
        """What must be said of how so many texts are read."""
        if self.padded:
            return []
        message = f"Padding reaches the texts in {self.name}: each batch has one length."
        return [Notice("read-without-padding", message, n_texts)]

    def refuse_unknown_token(self, largest: int) -> None:
        """Refuse texts whose largest token has no embedding.

        Raises:
            BackboneError: If this one has none.
        """
        refuse_unknown_token(largest, self.model, self.name)

    def apply_final_norm(self, hidden: Tensor) -> Tensor:
        """What a model cut at this point would output: the final norm of the hidden states."""
        if self.final_norm is None:
            return hidden
        home = next((p.device for p in self.final_norm.parameters()), hidden.device)
        # Where the model is spread over devices, the norm may be on another one than the block;
        # one that was put away to disk ("meta") moves its inputs itself.
        return self.final_norm(hidden if home.type == "meta" else hidden.to(home))

    def ask(self, inputs: dict[str, Tensor]) -> None:
        """Run all blocks on prompts with pictures, and drop the output."""
        placed = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        self.model(**placed, use_cache=False)

    def look(self, pixels: Tensor) -> None:
        """Run all blocks on pictures, shape (B, 3, H, W), and drop the output."""
        self.model(pixel_values=pixels.to(self.device, self.dtype))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Run all blocks and drop the output. What is wanted is taken by `watch_layers`."""
        which = segments(self.config, input_ids, self.sep)
        self.model(input_ids=input_ids, attention_mask=attention_mask, **which, use_cache=False)


def segments(config: Any, input_ids: Tensor, sep: int | None) -> dict[str, Tensor]:
    """Inputs that tell an encoder of BERT's kind the second of two texts from the first.

    As the tokenizer says it, found anew from the tokens, so that features, fingerprints and files
    hold tokens alone: a text cannot hold a control token, so the first `sep` ends the first text.

    Args:
        config: The model's. Most families have no such input.
        input_ids: Shape (B, T).
        sep: The token that ends the first text. None where the prompt does not tell.

    Returns:
        `token_type_ids`, shape (B, T), 0 up to the first `sep` and 1 after it. Empty for a model
        without such an input.
    """
    if sep is None or (getattr(config.get_text_config(), "type_vocab_size", None) or 0) < 2:
        return {}
    ends = (input_ids == sep).long()
    return {"token_type_ids": (ends.cumsum(dim=1) - ends).clamp(max=1)}


def load_backbone(
    folder: ModelFolder,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    blocks_path: str | None = None,
    sep: int | None = None,
) -> Backbone:
    """Load a model folder, frozen, without its LM head.

    Args:
        folder: The vetted folder.
        dtype: What to compute in; "auto" is what the files hold.
        device: None takes CUDA, then MPS, then the CPU.
        device_map: For a model too large for one device: "auto", or where each part goes, as
            accelerate reads it. What fits nowhere is read from disk for every pass.
        blocks_path: Where the blocks are (such as `transformer.h`), for a model whose structure
            does not tell.
        sep: The prompt's `segment_break`.

    Raises:
        BackboneError: If the folder cannot be loaded, or the model is no chain of blocks.
    """
    name = folder.name
    place = torch.device(device) if device is not None else best_device()
    spread: dict[str, Any] = {}
    if device_map is not None:
        away = tempfile.mkdtemp(prefix="chipviz-offload-")
        atexit.register(shutil.rmtree, away, ignore_errors=True)
        spread = {"device_map": device_map, "offload_folder": away}
    try:
        model, loading = load_operated(
            AutoModel, folder.path, folder.surgery, folder.files, dtype=dtype, **spread
        )
    except FOREIGN as error:
        raise unloadable(name, error) from None
    model = text_part(model).eval().requires_grad_(False)
    if device_map is None:
        model.to(place)
    blocks = find_blocks(model, name, blocks_path)
    refuse_missing(loading["missing_keys"], model, name)
    final_norm, causal = find_norm_and_causality(model, blocks, name)
    padded = padding_is_ignored(model)
    return Backbone(folder, model, blocks, final_norm, causal, sep, padded)


def unloadable(name: str, error: Exception) -> BackboneError:
    """The refusal of a model that its library cannot load."""
    return BackboneError(
        f"{name} cannot be loaded: {' '.join(str(error).split())[:200]}",
        "Give a folder or id of a transformers model with safetensors weights.",
    )


def refuse_missing(missing: Iterable[str], model: nn.Module, name: str) -> None:
    """Refuse a model whose files lack weights. Only a pooler's may be missing: no chip reads it.

    Raises:
        BackboneError: If they lack any other. It would be random numbers.
    """
    own = tuple(key for key in model.state_dict() if not key.startswith("pooler."))
    lost = sorted(key for key in missing if key.endswith(own))
    if lost:
        raise BackboneError(
            f"{name} lacks the weights of {len(lost)} parts, such as {lost[0]}.",
            "Its files do not belong together; download or save the model again.",
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
    if not isinstance(known, dict):
        known = {}
    if known.get(key) not in ("float32", "bfloat16"):
        known[key] = str(_measure_dtype(device)).removeprefix("torch.")
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(known, indent=1))
    return torch.bfloat16 if known[key] == "bfloat16" else torch.float32


def _measure_dtype(device: torch.device) -> torch.dtype:
    """The fast dtype of a device: bfloat16 where its products are clearly faster. Takes 0.1 s.

    Some CPUs take a hundred times longer in bfloat16. The small products of the first rounds tell
    that without waiting for large ones.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    if _speed_of_bfloat16(device, rows=64, width=256) < HOPELESS:
        return torch.float32
    faster = _speed_of_bfloat16(device, rows=512, width=1024) > 1 / 0.7
    return torch.bfloat16 if faster else torch.float32


def _speed_of_bfloat16(device: torch.device, rows: int, width: int) -> float:
    """How many times faster a product (rows, width) with (width, width) is than in float32."""
    dtypes = (torch.float32, torch.bfloat16)
    factors = [
        [torch.ones(n, width, dtype=dtype, device=device) for n in (rows, width)]
        for dtype in dtypes
    ]
    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(8):  # in turns, so that a slow moment of the machine meets both
        for dtype, (a, b) in zip(dtypes, factors, strict=True):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@contextmanager
def watch_layers(backbone: Backbone, on_hidden: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `on_hidden(layer, hidden)` for every layer of every forward pass inside the block.

    `hidden` is the output of the layer before the final norm, shape (B, T, D). Layer -1 is the
    embedding output. What it does not keep is freed at once.
    """

    def block_hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, _args: Any, output: Any) -> None:
            on_hidden(layer, first_of(output))

        return hook

    def embedding_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        on_hidden(EMBEDDING_LAYER, entering(args, kwargs))

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
    options: dict[str, Any] = {"gguf_file": "model.gguf", **SAFE}
    # Alone in a folder: nothing that lies beside the file takes part.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(gguf.absolute())
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                alone, dtype=torch.bfloat16, quantization_config=unpacked, **options
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(alone, **options)
        except FOREIGN as error:
            raise unloadable(gguf.name, error) from None
    # transformers refuses to save while the model still says it is quantised.
    with suppress(AttributeError):
        del model.config.quantization_config
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pad(
    ids: Sequence[Sequence[int] | NDArray[np.int32]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the right, both of shape (B, T), int64."""
    longest = max(len(row) for row in ids)
    tokens = torch.full((len(ids), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), longest), dtype=torch.int64)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return tokens.to(device), mask.to(device)
