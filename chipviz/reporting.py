"""What a run computed -> its report: scores beside what they cost, and what every rule says."""

from dataclasses import dataclass, field
from time import perf_counter

from chipviz.backbones.backbone import Backbone
from chipviz.bundle import save
from chipviz.chips import controls
from chipviz.chips.training import Trained
from chipviz.config import RunConfig
from chipviz.data.prompt import Prompt, as_read, cut_notices, n_truncated
from chipviz.data.task import Task
from chipviz.features.extract import Extracted
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Split
from chipviz.pruning import cost
from chipviz.results.report import (
    BackboneInfo,
    BundleKind,
    Controls,
    Example,
    RunReport,
    TaskInfo,
    Timing,
)
from chipviz.results.run_folder import RunFolder

KEPT_EXAMPLES: dict[Split, int] = {"test": 400, "validation": 64}
"""Maximum texts kept per split: test texts for the pages, validation texts for bundle checks."""


@dataclass
class Clock:
    """Seconds per step."""

    start: float = field(default_factory=perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str, *, less: float = 0.0) -> None:
        """Give the time since the last lap to a step, `less` what belongs to the next one."""
        self.laps[name] = self.total - sum(self.laps.values()) - less

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.start


@dataclass(frozen=True)
class Findings:
    """All that a run computed."""

    config: RunConfig
    task: Task
    backbone: Backbone
    prompt: Prompt
    extracted: Extracted
    trained: Trained


def assemble(found: Findings, run_id: str, clock: Clock) -> RunReport:
    """Measure costs and controls, and join them with the scores."""
    backbone, prompt, chips = found.backbone, found.prompt, found.trained.chips
    limit = prompt.max_length
    n_cut, n_texts = n_truncated(prompt, found.task), sum(map(len, found.task.splits.values()))
    tfidf = _tfidf(found, any_cut=n_cut > 0)
    typical = cost.typical_length(found.extracted.lengths["validation"])
    measurement = cost.measure(backbone, typical)
    bundles: dict[ChipKey, BundleKind] = {
        key: save.kind_of(backbone, prompt, key.vector, stack)
        for key, stack in chips.stacks.items()
    }
    report = RunReport(
        run_id=run_id,
        status="done",
        preset=found.config.preset,
        backbone=_backbone_info(backbone, found.config),
        task=_task_info(found.task, prompt, n_cut),
        timing=_timing(clock, found.extracted.n_tokens),
        scores=found.trained.scores,
        controls=_controls(found, "test", tfidf["test"]),
        controls_validation=_controls(found, "validation", tfidf["validation"]),
        selection={},
        dense=cost.dense_cost(backbone, limit, measurement),
        costs=cost.cut_costs(backbone, chips, bundles, limit, measurement),
        parts=cost.parts(backbone),
        measured=measurement.how,
        refit=bool(chips.refits),
        warnings=[
            *found.task.notices,
            *cut_notices(prompt.max_length, n_cut, n_texts),
            *backbone.notices(n_texts),
        ],
    )
    chosen = report.choices(found.trained.predictions.correct)
    return report.model_copy(update={"selection": chosen})


def keep_examples(task: Task, folder: RunFolder) -> None:
    """Keep the texts that pages show, and those that a bundle is verified on."""
    for split, most in KEPT_EXAMPLES.items():
        rows = task.splits[split].take(range(min(most, len(task.splits[split]))))
        pairs = rows.pairs or [None] * len(rows)
        examples = [
            Example(text=text, text_pair=pair, label=int(label))
            for text, pair, label in zip(rows.texts, pairs, rows.labels, strict=True)
        ]
        folder.write_examples(split, examples)


def _backbone_info(backbone: Backbone, config: RunConfig) -> BackboneInfo:
    return BackboneInfo(
        name=backbone.name,
        n_layers=backbone.n_layers,
        hidden_size=backbone.hidden_size,
        n_parameters=backbone.folder.n_published,
        dtype=str(backbone.dtype).removeprefix("torch."),
        device=str(backbone.device),
        revision=backbone.folder.revision,
        causal=backbone.causal,
        blocks=config.blocks,
        padded=backbone.padded,
        licence=backbone.folder.licence,
    )


def _task_info(task: Task, prompt: Prompt, n_cut: int) -> TaskInfo:
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    return TaskInfo(
        name=task.name,
        n_train=sizes["train"],
        n_validation=sizes["validation"],
        n_test=sizes["test"],
        n_classes=task.n_classes,
        label_names=list(task.label_names),
        template=prompt.template,
        max_length=prompt.max_length,
        max_chars=prompt.max_chars,
        n_truncated=n_cut,
        columns=task.columns.roles if task.columns else {},
        guessed=list(task.columns.guessed) if task.columns else [],
        made=list(task.made),
        revision=task.revision,
    )


def _timing(clock: Clock, n_tokens: int) -> Timing:
    extract_s = clock.laps["extract_s"]
    return Timing(
        **clock.laps,
        total_s=clock.total,
        n_tokens=n_tokens,
        tokens_per_s=n_tokens / extract_s if extract_s > 0 else 0.0,
    )


def _tfidf(found: Findings, *, any_cut: bool) -> dict[Split, tuple[float, float | None]]:
    """Accuracy of TF-IDF per split: on what the model reads, and on whole texts where these differ.

    A control that sees more than the model says nothing about the model.
    """
    splits = found.task.splits
    read = {split: as_read(found.prompt, rows) for split, rows in splits.items()}
    cut = controls.tfidf(read["train"], read["validation"], read["test"])
    whole: tuple[float | None, float | None] = (None, None)
    if any_cut:
        whole = controls.tfidf(splits["train"], splits["validation"], splits["test"])
    return {"validation": (cut[0], whole[0]), "test": (cut[1], whole[1])}


def _controls(found: Findings, split: Split, tfidf: tuple[float, float | None]) -> Controls:
    """Reference accuracies. The embedding control is on the pooling that validation prefers."""
    embedding = [s for s in found.trained.scores if s.layer == EMBEDDING_LAYER]
    best = max((s for s in embedding if s.split == "validation"), key=lambda s: s.accuracy)
    same = next(s for s in embedding if s.split == split and s.key.vector == best.key.vector)
    return Controls(
        majority=controls.majority(found.task.splits["train"], found.task.splits[split]),
        embedding=same.accuracy,
        tfidf=tfidf[0],
        tfidf_whole=tfidf[1],
    )
