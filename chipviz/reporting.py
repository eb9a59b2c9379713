"""What a run computed -> its report: scores beside what they cost, and what every rule says."""

from dataclasses import dataclass, field
from time import perf_counter

from chipviz.backbones.backbone import Backbone
from chipviz.bundle.kinds import kind_of
from chipviz.chips import controls
from chipviz.chips.scoring import Trained
from chipviz.config import RunConfig
from chipviz.data.processor import Reader, limit_notices
from chipviz.data.task import Task
from chipviz.features.extract import Extracted, example_of
from chipviz.keys import ChipKey
from chipviz.pruning import cost
from chipviz.pruning.cut import no_cut_notices
from chipviz.results.report import (
    BackboneInfo,
    BundleKind,
    Controls,
    RunReport,
    TaskInfo,
    Timing,
)


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
    prompt: Reader
    no_cut: dict[int, str]
    """Layers that the backbone cannot be cut after, and why."""
    extracted: Extracted
    trained: Trained


def assemble(found: Findings, run_id: str, clock: Clock) -> RunReport:
    """Measure costs and controls, and join them with the scores."""
    backbone, prompt, chips = found.backbone, found.prompt, found.trained.chips
    limit = prompt.max_length
    n_cut, of_limit = limit_notices(prompt, found.task)
    n_texts = sum(map(len, found.task.splits.values()))
    scores = found.trained.scores
    beside = controls.measure(found.task, prompt, scores, any_cut=n_cut > 0)
    typical = cost.typical_length(found.extracted.lengths["validation"])
    measurement = cost.measure(backbone, typical, example=example_of(backbone, prompt))
    bundles: dict[ChipKey, BundleKind] = {
        key: kind_of(backbone, prompt, key.vector, stack) for key, stack in chips.stacks.items()
    }
    report = RunReport(
        run_id=run_id,
        status="done",
        preset=found.config.preset,
        backbone=_backbone_info(found),
        task=_task_info(found.task, prompt, n_cut),
        timing=_timing(clock, found.extracted.n_tokens),
        scores=found.trained.scores,
        controls=_with_asked(found, beside["test"]),
        controls_validation=beside["validation"],
        selection={},
        dense=cost.dense_cost(backbone, limit, measurement),
        costs=cost.cut_costs(backbone, chips, bundles, limit, measurement, no_cut=found.no_cut),
        parts=cost.parts(backbone),
        measured=measurement.how,
        refit=bool(chips.refits) or found.task.folds > 1,
        folds=found.task.folds,
        warnings=[
            *found.task.notices,
            *of_limit,
            *backbone.notices(n_texts),
            *no_cut_notices(found.no_cut, backbone.name),
        ],
    )
    chosen = report.choices(found.trained.predictions.correct)
    return report.model_copy(update={"selection": chosen})


def _with_asked(found: Findings, controls: Controls) -> Controls:
    """The controls on test, with what the backbone itself answers."""
    asked = found.trained.predictions.asked
    if asked is None:
        return controls
    labels = found.task.splits["test"].labels[: len(asked)]
    right = float((asked == labels).mean())
    return controls.model_copy(update={"zero_shot": right, "n_zero_shot": len(asked)})


def _backbone_info(found: Findings) -> BackboneInfo:
    backbone = found.backbone
    return BackboneInfo(
        name=backbone.name,
        n_layers=backbone.n_layers,
        hidden_size=backbone.hidden_size,
        n_parameters=backbone.folder.n_published,
        dtype=str(backbone.dtype).removeprefix("torch."),
        device=str(backbone.device),
        revision=backbone.folder.revision,
        causal=backbone.causal,
        blocks=found.config.blocks,
        padded=backbone.padded,
        no_cut=found.no_cut,
        licence=backbone.folder.licence,
        lineage=backbone.folder.lineage,
    )


def _task_info(task: Task, prompt: Reader, n_cut: int) -> TaskInfo:
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    return TaskInfo(
        name=task.name,
        kind=task.kind,
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
        test_fingerprint=task.test_fingerprint,
    )


def _timing(clock: Clock, n_tokens: int) -> Timing:
    extract_s = clock.laps["extract_s"]
    return Timing(
        **clock.laps,
        total_s=clock.total,
        n_tokens=n_tokens,
        tokens_per_s=n_tokens / extract_s if extract_s > 0 else 0.0,
    )
