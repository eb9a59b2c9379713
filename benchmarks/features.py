"""Hidden states of every layer: against the plain transformers loop, nnsight and TransformerLens.

The peers' code stands here, each in the way its own documentation recommends.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.bench import Bench, Work
from benchmarks.measure import Row, alternate, difference, figure_row, matrix_rate, missing_row
from chipviz.backbones.backbone import pad
from chipviz.backbones.batching import batch_tokens
from chipviz.backbones.vetting import SAFE
from chipviz.features.extract import ORDER
from chipviz.features.storage import Features
from chipviz.keys import RAW, Vector

BATCH = 16
LAST, MEAN = Vector.named("last"), Vector.named("mean")
VECTORS = (LAST, MEAN)
SAME = 1e-4
"""Relative difference up to which two float32 computations of one state are the same."""
N_CHECKED = 32
"""Texts a split on which both sides are compared in float32 before any timing."""

Reader = Callable[[Any, Work], Tensor]
"""A peer's way: its model and the texts -> raw last-token states (L, N, D)."""


def against_plain_loop(bench: Bench) -> list[Row]:
    """Features of all layers, last and mean: against the plain loop, and against the machine."""
    n = bench.pick(4000, 300)
    gap = _check_plain_loop(bench)
    work = bench.open(max_train=n, max_validation=50, max_test=50)
    model = load_causal(bench, work.backbone.dtype)
    weights = [p for p in work.backbone.blocks[0].parameters() if p.dim() == 2]
    rows, rates = batch_tokens(work.backbone.device), []
    ratio = alternate(
        lambda: work.compute(VECTORS),
        lambda: plain_loop(model, work),
        3,
        between=lambda: rates.append(matrix_rate(weights, rows)),
    )
    matrices = sum(p.numel() for p in work.backbone.blocks.parameters() if p.dim() == 2)
    n_tokens = sum(map(len, work.ids()))
    flops = 2 * matrices * n_tokens
    shares = [flops / s / max(rates) for s in ratio.ours]
    note = (
        f"{len(work.texts()):,} texts, {n_tokens:,} tokens; ours writes to disk, the loop keeps "
        f"its states in memory; largest relative difference in float32 {gap:.0e}"
    )
    rate_note = (
        "2 FLOPs a block weight and real token; attention, norms, padding, tokenising and writing "
        f"count as nothing done; machine: best of {len(rates)} x 5 passes of the model's own "
        f"products of {rows} rows"
    )
    return [
        ratio.row(
            "features of all layers against the plain loop", 2.5, right=gap <= SAME, note=note
        ),
        figure_row(
            "the same, share of the machine's matrix rate",
            shares,
            0.75,
            right=gap <= SAME,
            ours=max(flops / s for s in ratio.ours) / 1e9,
            peer=max(rates) / 1e9,
            measured_in="GFLOP/s",
            note=rate_note,
        ),
    ]


def against_nnsight(bench: Bench) -> list[Row]:
    """Raw last-token states of every layer, against nnsight's trace."""
    return [_against(bench, "nnsight", open_nnsight, read_nnsight)]


def against_transformer_lens(bench: Bench) -> list[Row]:
    """Raw last-token states of every layer, against TransformerLens's cache."""
    return [_against(bench, "transformer_lens", open_transformer_lens, read_transformer_lens)]


def _against(bench: Bench, package: str, opened: Callable[[Bench, Work], Any], read: Reader) -> Row:
    name = f"last-token states of all layers against {package}"
    try:
        version = metadata.version(package)  # not every package has a __version__
    except ImportError as error:
        return missing_row(name, None, f"not installed, see benchmarks/requirements.txt: {error}")
    gap = check_reader(bench, opened, read)
    n = bench.pick(256, 64)
    work = bench.open(max_train=n, max_validation=16, max_test=16)
    model = opened(bench, work)
    ratio = alternate(lambda: work.compute((RAW,)), lambda: read(model, work), bench.pick(5, 3))
    note = (
        f"{package} {version}, {len(work.texts())} texts in batches of {BATCH} in data order; "
        f"largest relative difference in float32 {gap:.0e}"
    )
    if gap > SAME:
        note = f"NOT THE SAME STATES: {note}"
    return ratio.row(name, None, note=note)


def load_causal(bench: Bench, dtype: torch.dtype) -> Any:
    """The backbone as transformers loads it for everybody, LM head included."""
    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder().path, dtype=dtype, **SAFE)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def plain_loop(model: Any, work: Work) -> dict[Vector, Tensor]:
    """What one writes without chipviz: batches in data order, padded to the longest.

    Returns:
        Final-normed states (L, N, D) by vector, float32.
    """
    last, mean = [], []
    texts = work.texts()
    for start in range(0, len(texts), BATCH):
        batch = work.prompt.tokenizer(
            texts[start : start + BATCH], padding=True, return_tensors="pt"
        )
        mask = batch["attention_mask"]
        states = model(
            input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True
        ).hidden_states
        # The last entry is final-normed already, the others are not.
        normed = [*(model.model.norm(h) for h in states[1:-1]), states[-1]]
        at, rows = mask.sum(dim=1) - 1, torch.arange(len(mask))
        weights = mask[..., None].float()
        last.append(torch.stack([h[rows, at].float() for h in normed]))
        mean.append(
            torch.stack([(h.float() * weights).sum(1) / weights.sum(1) for h in normed])
        )  # (L, B, D)
    return {LAST: torch.cat(last, dim=1), MEAN: torch.cat(mean, dim=1)}


def _check_plain_loop(bench: Bench) -> float:
    work = checked_work(bench)
    theirs = plain_loop(load_causal(bench, torch.float32), work)
    with work.extracted(VECTORS) as found:
        return max(difference(states(found.features, v), theirs[v]) for v in VECTORS)


def check_reader(bench: Bench, opened: Callable[[Bench, Work], Any], read: Reader) -> float:
    """Largest relative difference between a peer's states and ours, in float32."""
    work = checked_work(bench)
    theirs = read(opened(bench, work), work)
    with work.extracted((RAW,)) as found:
        return difference(states(found.features, RAW), theirs)


def checked_work(bench: Bench) -> Work:
    """A few texts in float32."""
    n = N_CHECKED
    return bench.open(dtype=torch.float32, max_train=n, max_validation=n, max_test=n)


def states(features: Features, vector: Vector) -> Tensor:
    """What `extract` stored of all texts, without the embedding: (L, N, D)."""
    return torch.stack(
        [
            torch.cat([features.read(split, vector, layer) for split in ORDER])
            for layer in range(features.n_layers)
        ]
    )


def padded(work: Work) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches in data order: token ids, mask, and where each text's last token stands."""
    ids = work.ids()
    for start in range(0, len(ids), BATCH):
        tokens, mask = pad(
            ids[start : start + BATCH], work.prompt.tokenizer.pad_token_id, torch.device("cpu")
        )
        yield tokens, mask, mask.sum(dim=1) - 1


def open_nnsight(bench: Bench, work: Work) -> Any:
    """Wrap a model of its own."""
    nnsight: Any = importlib.import_module("nnsight")
    model = load_causal(bench, work.backbone.dtype)
    return nnsight.TransformersModel(model, tokenizer=work.prompt.tokenizer)


@torch.inference_mode()
def read_nnsight(model: Any, work: Work) -> Tensor:
    """One trace a batch: save each block's output at the last token, stop before the LM head.

    Source: nnsight 0.8 README and its page on early stopping.
    """
    nnsight: Any = importlib.import_module("nnsight")
    found = []
    for tokens, mask, at in padded(work):
        rows = torch.arange(len(at))
        with model.trace({"input_ids": tokens, "attention_mask": mask}) as tracer:
            saved = nnsight.save([])
            for block in model.model.layers:
                saved.append(block.output[rows, at])
            tracer.stop()
        found.append(_stacked(saved))
    return torch.cat(found, dim=1)


def open_transformer_lens(bench: Bench, work: Work) -> Any:
    """A bridge around a model of its own (the bridge changes the model it is given)."""
    bridges: Any = importlib.import_module("transformer_lens.model_bridge")
    return bridges.TransformerBridge.boot_transformers(
        str(bench.folder().path),
        hf_model=load_causal(bench, work.backbone.dtype),
        tokenizer=work.prompt.tokenizer,
        dtype=work.backbone.dtype,
        device="cpu",
    )


@torch.inference_mode()
def read_transformer_lens(bridge: Any, work: Work) -> Tensor:
    """`run_with_cache` on the residual stream after each block, one call a batch.

    Source: TransformerLens 4 README and `run_with_cache`.
    """
    names = [f"blocks.{i}.hook_resid_post" for i in range(work.backbone.n_layers)]
    found = []
    for tokens, mask, at in padded(work):
        rows = torch.arange(len(at))
        _, cache = bridge.run_with_cache(
            tokens, names_filter=names, attention_mask=mask, return_type=None
        )
        found.append(_stacked([cache[name][rows, at] for name in names]))
    return torch.cat(found, dim=1)


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([state.float() for state in layers])  # (L, B, D)
