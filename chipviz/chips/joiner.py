"""The curves of a run that join neurons, and what a person looks at of them.

They rest on the sparse chips that the run already has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chipviz.chips import stc_published
from chipviz.chips.chip import Chip, Chips
from chipviz.chips.judge import balanced_weights
from chipviz.chips.rows import Rows
from chipviz.chips.stc import SITES, Aggregated, Aggregator, Neurons, importance, layer_weights
from chipviz.config import RunConfig
from chipviz.keys import ALL_SITES, EMBEDDING_LAYER, ChipKey, Site, Vector
from chipviz.progress import Meter
from chipviz.results.neurons import Aggregate, LayerShare, Neuron, SparsifyReport

STRONGEST = 3
"""Neurons of a layer whose values are kept."""
BINS = 24
TEXTS = 5
CHARS = 200


def look(rows: Rows, key: ChipKey, stack: Chip) -> tuple[list[Neuron], list[LayerShare]]:
    """The strongest neurons of every layer and how sparse its chip is, from validation texts.

    Args:
        rows: The texts.
        key: The curve of the sparse chips.
        stack: L + 1 of them, the embedding's first.
    """
    vector, examples = key.vector, rows.task.splits["validation"]
    found: list[Neuron] = []
    shares: list[LayerShare] = []
    labels, n_classes = rows.labels("validation"), rows.task.n_classes
    for layer in range(rows.features.n_layers):
        weight = stack.weight[layer + 1]
        carried, size = importance(weight), weight.abs().sum(dim=0)
        strongest = carried.topk(min(STRONGEST, len(carried))).indices
        tenth = size.topk(max(1, len(size) // 10)).values.sum() / size.sum().clamp_min(1e-30)
        used = int((carried > 0).sum())
        own = {"recipe": key.recipe, "site": key.site, "pooling": key.pooling, "layer": layer}
        share = LayerShare(**own, n_used=used, width=len(size), top_tenth=float(tenth))
        shares.append(share)
        values = rows.features.read("validation", vector, layer)[:, strongest]
        for i, column in enumerate(strongest.tolist()):
            if not carried[column] > 0:
                continue
            one = values[:, i].contiguous()
            low, high = float(one.min()), float(one.max())
            edges = torch.linspace(low, high if high > low else low + 1, BINS + 1)
            place = torch.bucketize(one, edges[1:-1])
            counts = torch.zeros(n_classes, BINS, dtype=torch.int64)
            counts.index_put_((labels, place), torch.ones_like(labels), accumulate=True)
            top = one.topk(min(TEXTS, len(one))).indices.tolist()
            found.append(
                Neuron(
                    **own,
                    column=column,
                    share=float(carried[column] / carried.sum()),
                    edges=edges.tolist(),
                    counts=counts.tolist(),
                    strongest=[examples.texts[row][:CHARS] for row in top],
                )
            )
    return found, shares


def vectors_of(key: ChipKey, sites: Sequence[Site]) -> list[Vector]:
    """The vectors whose sparse chips a curve rests on.

    Args:
        key: The curve.
        sites: Those that the run reads.
    """
    own: Sequence[Site] = sites if key.site == ALL_SITES else [key.site]
    return [Vector(site, key.pooling) for site in own]


@dataclass(frozen=True)
class Joiner:
    """Fits the curves of this recipe beside the sparse chips that a run already has."""

    rows: Rows
    config: RunConfig
    chips: Chips
    """Gets the classifiers."""
    meter: Meter
    tried: list[Aggregate] = field(default_factory=list)

    def join(self, key: ChipKey) -> Aggregated:
        """Fit the classifiers of every depth of one curve."""
        how = "published" if key.by_paper else "sound"
        probes: dict[Site, Chip] = {
            v.site: self.chips.stacks[ChipKey.sparse(v, how)]
            for v in vectors_of(key, self.config.sites)
        }
        if key.by_paper:
            return self._as_published(key, probes)
        labels, weights = self.rows.labels("train"), None
        if self.config.class_weight == "balanced":
            every = torch.ones_like(labels, dtype=torch.bool)
            weights = balanced_weights(labels, every, self.rows.task.n_classes)
        self.meter.advance(0, f"joining neurons, {key.vector.name}")
        neurons = Neurons.of(probes, self.config.importance)
        columns = None
        if self.config.layer_weights == "validation":
            columns = self._columns(probes, key, neurons)
        aggregator = Aggregator(self.rows, key, neurons, weights, columns)
        return aggregator.search(refit=self.config.refit)

    def _as_published(self, key: ChipKey, probes: Mapping[Site, Chip]) -> Aggregated:
        n_layers = self.rows.features.n_layers

        def on_depth(depth: int) -> None:
            where = f"{key.vector.name}, depth {depth + 1} of {n_layers}"
            self.meter.advance(0, f"joining neurons as published, {where}")

        return stc_published.join(self.rows, key, Neurons.of(probes), on_depth)

    def _columns(self, probes: Mapping[Site, Chip], key: ChipKey, neurons: Neurons) -> Tensor:
        """Weight of each neuron's layer, by what its sparse chip reaches on validation."""
        by_site: dict[int, Tensor] = {}
        for site, stack in probes.items():
            vector = Vector(site, key.pooling)
            layers = range(EMBEDDING_LAYER, self.rows.features.n_layers)
            reaches = [self.rows.accuracy(stack.at(i + 1), "validation", vector, i) for i in layers]
            by_site[SITES.index(site)] = layer_weights(torch.tensor(reaches))
        places = neurons.places.tolist()
        return torch.stack([by_site[site][layer + 1] for site, layer, _ in places])

    def keep(self, key: ChipKey, found: Aggregated) -> None:
        """Put the classifiers of a curve among the chips."""
        self.chips.stacks[key], self.chips.strengths[key] = found.chip, found.strengths
        if found.refit is not None:
            self.chips.refits[key] = found.refit
        self.meter.advance(self.rows.features.n_layers + 1, f"joining neurons, {key.vector.name}")
        self.tried.extend(found.tried)

    def told(self) -> list[SparsifyReport]:
        """What a person looks at: one report, none where nothing was joined."""
        if not self.tried:
            return []
        looks = [
            look(self.rows, key, stack)
            for key, stack in self.chips.stacks.items()
            if key.kind == "sparse" and not key.joins
        ]
        neurons = [neuron for found, _ in looks for neuron in found]
        shares = [share for _, found in looks for share in found]
        return [SparsifyReport(aggregates=self.tried, neurons=neurons, layers=shares)]
