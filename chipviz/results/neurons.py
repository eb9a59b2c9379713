"""What Sparsify-then-Classify found, for a person to look at: `stc.json` of a run."""

from chipviz.keys import STC, ChipKey, Pooling, Recipe, Record, Site


class _OfLayer(Record):
    """What was found at one place."""

    recipe: Recipe
    site: Site
    pooling: Pooling
    layer: int

    @property
    def place(self) -> tuple[Recipe, Site, Pooling, int]:
        """How its chip is trained, what that reads, and of which layer."""
        return self.recipe, self.site, self.pooling, self.layer


class Aggregate(_OfLayer):
    """One aggregated classifier that was looked at, judged on validation.

    It reads neurons of the layers up to its own.
    """

    recipe: Recipe = STC
    eta: float
    n_selected: int
    """Neurons that it may read."""
    n_used: int
    """Neurons with a weight."""
    accuracy: float
    log_loss: float
    chosen: bool
    """Whether it is its depth's classifier, and not one that was tried on the way to eta."""


class Neuron(_OfLayer):
    """One of the strongest neurons of a layer."""

    recipe: Recipe = "sound"
    column: int
    share: float
    """Of the layer's importance."""
    edges: list[float]
    """Ends of the bins of its values on the validation texts."""
    counts: list[list[int]]
    """Texts of each class in each bin."""
    strongest: list[str]
    """Beginnings of the validation texts with its largest values."""


class LayerShare(_OfLayer):
    """How sparse a layer's chip is."""

    recipe: Recipe = "sound"
    n_used: int
    """Neurons with a weight."""
    width: int
    top_tenth: float
    """Share of |weight| that the strongest tenth of the neurons holds."""


class SparsifyReport(Record):
    """All of it."""

    aggregates: list[Aggregate]
    neurons: list[Neuron]
    layers: list[LayerShare]

    def n_read(self, key: ChipKey, layer: int) -> int:
        """Neurons with a weight of the chip of one layer, before it was fitted on all texts."""
        rows = [a for a in self.aggregates if a.chosen] if key.joins else self.layers
        place = (key.recipe, key.site, key.pooling, layer)
        return next(row.n_used for row in rows if row.place == place)
