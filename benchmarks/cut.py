"""Latency of models that are really cut, against their share of the dense one."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from benchmarks.bench import Bench
from benchmarks.features import SAME
from benchmarks.measure import Row, figure_row, seconds
from chipviz.backbones.backbone import Backbone, watch_layers
from chipviz.pruning.cut import cut_config, cut_weights

BATCH, LENGTH = 4, 128
GOAL = 1.1


def against_dense(bench: Bench) -> list[Row]:
    """Cuts at a quarter, half and three quarters of the depth, in turns with the dense model."""
    backbone = bench.open(max_train=8, max_validation=2, max_test=2).backbone
    n_layers = backbone.n_layers
    layers = sorted({n_layers // 4 - 1, n_layers // 2 - 1, 3 * n_layers // 4 - 1})
    random = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH)
    ids = torch.randint(backbone.config.vocab_size, shape, generator=random)
    models = {layer: really_cut(backbone, layer) for layer in layers}
    gap = max(_gap(backbone, models[layer], layer, ids) for layer in layers)
    times = _times({n_layers - 1: backbone.model} | models, ids, bench.pick(15, 5))
    dense = times.pop(n_layers - 1)
    ratios = [times[layer] / (dense * (layer + 1) / n_layers) for layer in layers]
    worst = max(range(len(layers)), key=lambda i: abs(ratios[i] - 1))
    said = ", ".join(f"{r:.3f} at {layer}" for r, layer in zip(ratios, layers, strict=True))
    note = (
        f"{said}; batches of {BATCH} x {LENGTH} tokens; dense is {n_layers} blocks without LM "
        f"head; embedding and final norm, which every cut keeps, are not taken off; "
        f"outputs differ by {gap:.0e}"
    )
    return [
        figure_row(
            "latency of the cut model against dense x (l + 1) / L",
            ratios,
            GOAL,
            right=gap <= SAME,
            better="near 1",
            ours=1000 * times[layers[worst]],
            peer=1000 * dense * (layers[worst] + 1) / n_layers,
            measured_in="ms",
            note=note,
        )
    ]


def really_cut(backbone: Backbone, layer: int) -> Any:
    """A model of its own with blocks 0 .. `layer`, as a bundle holds it."""
    model = AutoModel.from_config(
        cut_config(backbone, layer), dtype=backbone.dtype, trust_remote_code=False
    )
    model.load_state_dict(cut_weights(backbone, layer))
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _gap(backbone: Backbone, model: Any, layer: int, ids: Tensor) -> float:
    """Largest difference, relative, between the cut model's output and the dense model's layer."""
    seen = {}

    def see(at: int, hidden: Tensor) -> None:
        if at == layer:
            seen[at] = backbone.apply_final_norm(hidden)

    mask = torch.ones_like(ids)
    with watch_layers(backbone, see):
        backbone.forward(ids, mask)
    cut = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return float((cut - seen[layer].float()).abs().max() / cut.abs().max())


@torch.inference_mode()
def _times(models: dict[int, Any], ids: Tensor, repeats: int) -> dict[int, float]:
    """Median seconds of each model, in turns, after one round that does not count."""
    mask = torch.ones_like(ids)
    times: dict[int, list[float]] = {layer: [] for layer in models}
    for i in range(repeats + 1):
        for layer, model in models.items():
            took = seconds(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))  # noqa: B023 - called at once
            if i:
                times[layer].append(took)
    return {layer: sorted(each)[len(each) // 2] for layer, each in times.items()}
