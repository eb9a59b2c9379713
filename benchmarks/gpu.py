"""`python -m benchmarks.gpu`: a model of Llama-2-7B's shape on a GPU. Prints one JSON object.

Weights are random and made on the device: nothing is fetched, and the time of a forward pass does
not depend on their values. Texts are random tokens of one length.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig

from benchmarks.measure import matrix_rate
from chipviz.backbones.backbone import Backbone
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.structure import find_blocks
from chipviz.chips.linear import STRENGTHS, fit_linear
from chipviz.chips.training import TOGETHER_BYTES
from chipviz.errors import BackboneError, ChipvizError
from chipviz.features.forward import forward_pooled
from chipviz.keys import Vector

N_CLASSES = 4
PLANTED = 8
"""Tokens that give one class away, as the last token of a text."""
NOISE = 0.1
"""Share of labels drawn anew, so that the classes cannot be told apart altogether."""


@dataclass(frozen=True)
class Shape:
    """What is run."""

    config: LlamaConfig
    device: torch.device
    dtype: torch.dtype
    n_texts: int
    length: int


def full(n_texts: int, length: int) -> Shape:
    """Llama-2-7B on the GPU.

    Raises:
        BackboneError: If this machine has no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BackboneError(
            "This machine has no CUDA device.",
            "Run it where there is a GPU, or look at the same code on a toy shape with --tiny.",
        )
    # The defaults of LlamaConfig are Llama-2-7B's, but for the length.
    config = LlamaConfig(max_position_embeddings=4096, use_cache=False)
    return Shape(config, torch.device("cuda"), torch.bfloat16, n_texts, length)


def tiny() -> Shape:
    """The same code on a CPU in seconds. Its figures mean nothing."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    return Shape(config, torch.device("cpu"), torch.float32, 512, 16)


LAST = Vector.named("last")


def random_backbone(shape: Shape) -> Backbone:
    """A frozen model of the shape, its weights made on the device."""
    torch.manual_seed(0)
    with torch.device(shape.device):
        model: Any = AutoModel.from_config(shape.config, dtype=shape.dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    n_loaded = sum(p.numel() for p in model.parameters())
    return Backbone(
        ModelFolder(
            path=Path(),
            name="random",
            files=(),
            config=shape.config,
            fingerprint="",
            stored_dtype=shape.dtype,
            n_published=n_loaded + shape.config.vocab_size * shape.config.hidden_size,
            n_loaded=n_loaded,
            n_positions=None,
            licence=None,
            revision=None,
        ),
        model,
        find_blocks(model),
        model.norm,
    )


def random_texts(shape: Shape) -> tuple[Tensor, Tensor]:
    """Token ids (N, T), and labels (N,) that the last token gives away but for some noise."""
    random = torch.Generator().manual_seed(0)
    size = (shape.n_texts, shape.length)
    ids = torch.randint(shape.config.vocab_size, size, generator=random)
    labels = torch.randint(N_CLASSES, size[:1], generator=random)
    planted = torch.randint(PLANTED, size[:1], generator=random)
    ids[:, -1] = PLANTED * labels + planted
    noisy = torch.rand(size[:1], generator=random) < NOISE
    drawn = torch.randint(N_CLASSES, size[:1], generator=random)
    return ids, torch.where(noisy, drawn, labels)


def read_all(backbone: Backbone, ids: Tensor) -> tuple[Tensor, float]:
    """Last-token states of every text, streamed to host memory: (L + 1, N, D), and seconds."""
    n_texts, length = ids.shape
    host = torch.empty(backbone.n_layers + 1, n_texts, backbone.hidden_size)
    plan = batches([length] * n_texts, batch_tokens(backbone.device))
    numbers = ids.numpy()
    forward_pooled(backbone, [numbers[i] for i in plan[0]], 0, [LAST])  # warm
    _wait(backbone.device)
    start = time.perf_counter()
    for rows in plan:
        pooled = forward_pooled(backbone, [numbers[i] for i in rows], 0, [LAST])
        host[:, rows] = pooled[0].cpu()
    return host, time.perf_counter() - start


def fit_all(host: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """Chips of all layers and strengths, layers side by side as a run fits them: and seconds.

    Returns:
        Weights (L + 1, G, C, D) on the host.
    """
    one_layer = 4 * host.shape[1] * (host.shape[2] + 1)
    together = max(1, TOGETHER_BYTES.get(device.type, 0) // one_layer)

    def read(layers: slice, start: int, stop: int) -> Tensor:
        return host[layers, start:stop].to(device)

    _wait(device)
    start, weights = time.perf_counter(), []
    for first in range(0, len(host), together):
        layers = slice(first, min(first + together, len(host)))
        weights.append(fit_linear(partial(read, layers), labels, N_CLASSES).cpu())
    return torch.cat(weights), time.perf_counter() - start


def measure(shape: Shape) -> dict[str, Any]:
    """Every figure of the GPU, with what it belongs to."""
    backbone = random_backbone(shape)
    matrices = [p for p in backbone.blocks[0].parameters() if p.dim() == 2]
    rates = [matrix_rate(matrices, batch_tokens(shape.device))]
    ids, labels = random_texts(shape)
    host, read_s = read_all(backbone, ids)
    rates.append(matrix_rate(matrices, batch_tokens(shape.device)))
    n_weights = backbone.n_layers * sum(p.numel() for p in matrices)
    n_tokens = ids.numel()
    peak = torch.cuda.max_memory_allocated() if shape.device.type == "cuda" else None
    weights, fit_s = fit_all(host, labels, shape.device)
    logits = host @ weights[:, len(STRENGTHS) // 2].mT  # (L + 1, N, C)
    return {
        "device": _name(shape.device),
        "torch": torch.__version__,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "n_parameters": backbone.folder.n_published,
        "n_layers": backbone.n_layers,
        "n_texts": shape.n_texts,
        "length": shape.length,
        "tokens_per_s": n_tokens / read_s,
        "minutes_all_layers": read_s / 60,
        "matrix_tflops": max(rates) / 1e12,
        "share_of_matrix_rate": 2 * n_weights * n_tokens / read_s / max(rates),
        "peak_device_bytes": peak,
        "fit_s": fit_s,
        "fit": f"{len(host)} layers x {len(STRENGTHS)} strengths, {N_CLASSES} classes",
        "fit_train_accuracy": (logits.argmax(-1) == labels).double().mean(1).tolist(),
        "note": "FLOPs are 2 a block weight and token; the paper names about 2 hours on an A100",
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Returns:
        0, or 1 where there is no GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of each text")
    parser.add_argument("--tiny", action="store_true", help="a toy shape on the CPU")
    options = parser.parse_args(arguments)
    try:
        shape = tiny() if options.tiny else full(options.texts, options.length)
    except ChipvizError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 1
    sys.stdout.write(json.dumps(measure(shape), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
