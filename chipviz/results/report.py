"""What a run says when it is done: the object behind `show --json` and behind every page.

Plain data, checked by pydantic, without torch: pages read it in milliseconds.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, Self, get_args

from pydantic import Field

from chipviz.config import Preset, Rule
from chipviz.data.task import TaskKind
from chipviz.errors import ConfigError, Notice
from chipviz.keys import ChipKey, ChipRecord, Cut, Record, Split, fields_of, in_order
from chipviz.results.metrics import Score
from chipviz.results.models import Lineage
from chipviz.results.selection import (
    DEFAULT_BUDGET,
    Correct,
    Quantity,
    Selection,
    parse_budget,
    select,
)

BundleKind = Literal["sequence", "token", "image", "chipviz"]
"""Which class holds a cut: a stock sequence classifier, a stock token classifier, or our own."""


CHIP_BYTES = 4
"""A bundle keeps its chip in float32: rounding it would move the probabilities."""


class BackboneInfo(Record):
    """The frozen model a run probed."""

    name: str
    n_layers: int
    hidden_size: int
    n_parameters: int
    """Parameters of the published model, LM head included (a tied head counts once)."""
    dtype: str
    """What the forward pass computed in."""
    device: str
    revision: str | None = None
    """The commit, of a backbone from the Hub."""
    causal: bool = True
    """Whether a token reads only what stands before it."""
    blocks: str | None = None
    """Where the blocks are, if the user had to say."""
    padded: bool = True
    """Whether texts of several lengths may share a batch, padded."""
    no_cut: dict[int, str] = Field(default_factory=dict)
    """Layers that the model cannot be cut after, and why. Their accuracy is known all the same."""
    licence: str | None = None
    """As its model card says."""
    lineage: Lineage | None = None
    """Where it comes from, of a model that was made here."""


class TaskInfo(Record):
    """The classification task, as it was run."""

    name: str
    kind: TaskKind = "text"
    """What is read."""
    n_train: int
    n_validation: int
    n_test: int
    n_classes: int
    label_names: list[str]
    template: str
    max_length: int
    """Tokens a prompt may have, template included."""
    max_chars: int
    """Where a longer text is cut, in characters: the form of the limit that travels with the
    tokenizer."""
    n_truncated: int
    """Rows with a text that was cut there."""
    columns: dict[str, str]
    """Role (text, text_pair, choices, label) -> column."""
    guessed: list[str]
    """Roles whose column nobody named."""
    made: list[Split]
    """Splits the source did not have, taken from its training rows."""
    revision: str | None = None
    """The commit, of a data set from the Hub."""
    test_fingerprint: str | None = None
    """Changes when the test texts, their order or their labels do."""

    @property
    def rows(self) -> str:
        """What its rows are called."""
        return "texts" if self.kind == "text" else "pictures"


class Timing(Record):
    """Where the time went, in seconds."""

    load_s: float
    extract_s: float
    fit_s: float
    ask_s: float = 0.0
    """Asking the backbone itself, see `Controls.zero_shot`."""
    total_s: float
    n_tokens: int
    """Tokens that went through the backbone in this process (0 when all features were there)."""
    tokens_per_s: float


class Controls(Record):
    """What a chip has to beat: accuracy of reference classifiers on one split."""

    majority: float
    embedding: float
    """Best chip on the embedding output, before any layer."""
    tfidf: float | None = None
    """TF-IDF words with logistic regression, on the texts as far as the model reads them. None of
    pictures."""
    tfidf_whole: float | None = None
    """The same on whole texts, where the length limit cuts any."""
    pixels: float | None = None
    """Small grey pictures with logistic regression. None of texts."""
    colours: float | None = None
    """Histograms of colours with logistic regression. None of texts."""
    zero_shot: float | None = None
    """What the backbone answers by itself: the label whose words it finds likeliest. None of
    encoders, and where labels are no words."""
    n_zero_shot: int = 0
    """Texts that it was asked, the first ones of the split."""

    @property
    def beside(self) -> dict[str, float]:
        """Reference classifiers that read the same rows without a model, by name."""
        named = {
            "TF-IDF": self.tfidf,
            "TF-IDF whole": self.tfidf_whole,
            "grey pixels": self.pixels,
            "colours": self.colours,
        }
        return {name: value for name, value in named.items() if value is not None}


class CutCost(Record):
    """What a model costs: the dense backbone, or a cut with its chip."""

    n_parameters: int
    weight_bytes: int
    """Bytes of all weights as stored in the bundle."""
    flops_per_token: int
    """Multiply-adds x 2 of the matrix products of one token at the run's length limit."""
    latency_s: float | None = None
    """Seconds of one forward pass, as `Measured` describes it. None where nothing was measured."""
    peak_bytes: int | None = None
    """Most bytes held at once in that pass: weights in the dtype computed in, and activations."""


class Parts(Record):
    """Parameters of the published model by part. They sum to its `n_parameters`.

    A part takes `dense.weight_bytes / dense.n_parameters` bytes a parameter.
    """

    embedding: int
    """Tables of tokens and positions."""
    blocks: list[int]
    """By layer."""
    final_norm: int
    lm_head: int
    """What the head adds. Nothing but a bias or a norm, or 0, where it is tied."""
    other: int
    """The rest, such as the norm of an embedding."""
    tied: bool
    """Whether the head has no table of its own but is the token table again, which counts once."""


class Measured(Record):
    """How latency and peak memory were measured."""

    batch: int
    n_tokens: int
    """Tokens of each text, without padding: the median prompt of the validation split."""
    repeats: int
    """Timed passes, after a warm-up. The latency is their median."""
    device: str
    dtype: str


class LayerCost(ChipRecord, CutCost):
    """The cost of the bundle cut at `layer` for one chip."""

    layer: int
    chip_parameters: int
    layer_ratio: float
    """(L - 1 - layer) / L: the share of layers removed, the paper's figure."""
    parameter_ratio: float
    """Parameters removed / parameters of the published model."""
    bundle: BundleKind
    """What this cut is built as."""

    @property
    def cut(self) -> Cut:
        """Where it is cut, and what reads there."""
        return Cut(self.layer, self.key)


class SelectionInfo(ChipRecord):
    """A rule's choice with what it reaches and saves."""

    cut_layer: int
    why: str
    validation_accuracy: float
    test_accuracy: float
    layer_ratio: float
    parameter_ratio: float

    @property
    def cut(self) -> Cut:
        """Where the rule cuts, and what reads there."""
        return Cut(self.cut_layer, self.key)


class RunReport(Record):
    """Everything a finished run found."""

    run_id: str
    status: str
    preset: Preset
    backbone: BackboneInfo
    task: TaskInfo
    timing: Timing
    scores: list[Score]
    controls: Controls
    """On the test split, like the scores that are reported."""
    controls_validation: Controls
    """On the validation split, for charts of validation curves."""
    selection: dict[Rule, SelectionInfo]
    dense: CutCost
    """The published model, for comparison."""
    costs: list[LayerCost]
    parts: Parts
    measured: Measured
    refit: bool = False
    """Whether linear chips were fitted once more on training and validation texts together, after
    every choice. Test scores are theirs, validation scores those of the training texts alone."""
    folds: int = 1
    """Folds of the validation scores. From 2 on these are about training and validation texts
    together, each judged by a chip that was fitted on the other folds."""
    warnings: list[Notice] = Field(default_factory=list)
    """What a reader must know although nothing stopped the run."""

    @cached_property
    def chips(self) -> list[ChipKey]:
        """The chips that a run has on every layer, as they are drawn and named."""
        return in_order(score.key for score in self.scores)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A changed copy, without what was looked up in this report."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("chips", "_scores_by_cut", "_costs_by_cut"):
            vars(copy).pop(name, None)
        return copy

    @property
    def judged(self) -> str:
        """What the validation scores are about, in words."""
        task = self.task
        if self.folds == 1:
            return f"{task.n_validation:,} validation {task.rows}"
        return f"{task.n_train + task.n_validation:,} labelled {task.rows} in {self.folds} folds"

    def score_at(self, cut: Cut, split: Split) -> Score:
        """The score of one chip (layer -1 is the embedding control)."""
        return self._scores_by_cut[cut, split]

    def cost_at(self, cut: Cut) -> LayerCost:
        """What a cut costs."""
        return self._costs_by_cut[cut]

    def stored_in(self, cut: Cut, n_bytes: int) -> Self:
        """The same report where a cut's backbone takes so many bytes a parameter."""
        cost = self.cost_at(cut)
        n_backbone = cost.n_parameters - cost.chip_parameters
        weight_bytes = n_backbone * n_bytes + cost.chip_parameters * CHIP_BYTES
        stored = cost.model_copy(update={"weight_bytes": weight_bytes})
        costs = [stored if one is cost else one for one in self.costs]
        return self.model_copy(update={"costs": costs})

    @cached_property
    def _scores_by_cut(self) -> dict[tuple[Cut, Split], Score]:
        return {(score.cut, score.split): score for score in self.scores}

    @cached_property
    def _costs_by_cut(self) -> dict[Cut, LayerCost]:
        return {cost.cut: cost for cost in self.costs}

    def select(
        self,
        rule: Rule,
        *,
        pooling: str | None = None,
        chip: str | None = None,
        recipe: str | None = None,
        site: str | None = None,
        budget: str | None = None,
        **options: Any,
    ) -> SelectionInfo:
        """Apply a selection rule.

        Sparse chips as published are looked at only where nothing else is named: each is the best
        of hundreds of tries on validation, and would win there by luck.

        Args:
            rule: Its name.
            pooling: Look only at chips on this pooling (`raw` is the published recipe's), or on
                this vector, such as `ffn_in-mean`. None looks at all.
            chip: Look only at chips of this kind, or `stc`. None looks at all.
            recipe: Look only at chips of this recipe. None looks at all.
            site: Look only at chips that read this site. None looks at all.
            budget: For rule *budget*: `parameters=50%`, `parameters=80M`, `memory=300MB` or
                `latency=20ms`. None is half of the published parameters.
            options: See `chipviz.results.selection.select`.

        Raises:
            ConfigError: As there, or if the run has no such chip, or the budget cannot be read or
                is one of latency and this run's was not measured.
        """
        named = [
            key
            for key in self.chips
            if pooling in (None, key.vector.name, key.pooling if key.site != "raw" else None)
            and chip in (None, key.word, key.kind)
            and recipe in (None, key.recipe)
            and site in (None, key.site)
        ]
        if not named:
            raise ConfigError(
                f"This run has no chip of pooling {pooling or 'any'} and kind {chip or 'any'}"
                f"{f', recipe {recipe}' if recipe else ''}{f', site {site}' if site else ''}.",
                "Name a pooling and a chip that the run has trained; `show RUN` lists them.",
            )
        named = [key for key in named if not key.lucky] or named
        if rule == "budget":
            limit = parse_budget(budget or DEFAULT_BUDGET, _amounts(self.dense))
            costs = {cost.cut: _amounts(cost)[limit.quantity] for cost in self.costs}
            options |= {"budget": limit, "costs": costs}
        options |= {"no_cut": self.backbone.no_cut}
        return self.describe(select(self.scores, rule, chips=named, **options))

    def choices(self, correct: Correct) -> dict[Rule, SelectionInfo]:
        """What every rule says, but *budget* where no cut is small enough for its default.

        Args:
            correct: Which validation texts each chip got right.
        """
        chosen: dict[Rule, SelectionInfo] = {}
        for rule in get_args(Rule):
            if rule != "manual":
                with suppress(ConfigError):
                    chosen[rule] = self.select(rule, correct=correct)
        return chosen

    def describe(self, chosen: Selection) -> SelectionInfo:
        """Join a selection with what it reaches on test and what it saves."""
        cost, test = self.cost_at(chosen.cut), self.score_at(chosen.cut, "test")
        return SelectionInfo(
            cut_layer=chosen.cut.layer,
            **fields_of(chosen.cut.chip),
            why=chosen.why,
            validation_accuracy=chosen.validation_accuracy,
            test_accuracy=test.accuracy,
            layer_ratio=cost.layer_ratio,
            parameter_ratio=cost.parameter_ratio,
        )


def _amounts(cost: CutCost) -> dict[Quantity, float | None]:
    """What a budget limits. A report without measured memory still knows its weights."""
    return {
        "parameters": cost.n_parameters,
        "memory": cost.weight_bytes if cost.peak_bytes is None else cost.peak_bytes,
        "latency": cost.latency_s,
    }


class BundleReport(ChipRecord):
    """What was built and how its verification went."""

    path: str
    kind: BundleKind
    cut_layer: int
    n_parameters: int
    weight_bytes: int
    folder_bytes: int
    n_verified: int
    """Validation texts whose prediction was compared in a fresh process."""
    max_difference: float
    """Largest probability difference found there."""
    files: dict[str, int]
    """File name -> bytes."""

    @property
    def cut(self) -> Cut:
        """Where it was cut, and what reads there."""
        return Cut(self.cut_layer, self.key)


class Example(Record):
    """A test text kept with the run, for the token view and the list of mistakes."""

    text: str
    text_pair: str | None = None
    label: int
