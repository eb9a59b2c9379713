"""What Sparsify-then-Classify found, for a person to look at: `stc.json` of a run."""

from pydantic import BaseModel, ConfigDict

from chipviz.keys import STC, ChipKey, Pooling, Site


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Aggregate(_Record):
    """One aggregated classifier that was looked at, judged on validation."""

    site: Site
    pooling: Pooling
    layer: int
    """Depth: it reads neurons of the layers up to this one."""
    eta: float
    n_selected: int
    """Neurons that it may read."""
    n_used: int
    """Neurons with a weight."""
    accuracy: float
    log_loss: float
    chosen: bool
    """Whether it is its depth's classifier, and not one that was tried on the way to eta."""


class Neuron(_Record):
    """One of the strongest neurons of a layer."""

    site: Site
    pooling: Pooling
    layer: int
    column: int
    share: float
    """Of the layer's importance."""
    edges: list[float]
    """Ends of the bins of its values on the validation texts."""
    counts: list[list[int]]
    """Texts of each class in each bin."""
    strongest: list[str]
    """Beginnings of the validation texts with its largest values."""


class LayerShare(_Record):
    """How sparse a layer's chip is."""

    site: Site
    pooling: Pooling
    layer: int
    n_used: int
    """Neurons with a weight."""
    width: int
    top_tenth: float
    """Share of |weight| that the strongest tenth of the neurons holds."""


class SparsifyReport(_Record):
    """All of it."""

    aggregates: list[Aggregate]
    neurons: list[Neuron]
    layers: list[LayerShare]

    def n_read(self, key: ChipKey, layer: int) -> int:
        """Neurons with a weight of the chip of one layer, before it was fitted on all texts."""
        rows = self.layers if key.recipe != STC else [a for a in self.aggregates if a.chosen]
        place = (key.site, key.pooling, layer)
        return next(r.n_used for r in rows if (r.site, r.pooling, r.layer) == place)
