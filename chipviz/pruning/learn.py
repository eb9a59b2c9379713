"""What a model learns: a task or any text by LoRA, or any text by pretraining that goes on."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from chipviz.backbones import answers
from chipviz.backbones.backbone import fast_dtype
from chipviz.backbones.language_model import LanguageModel, load_language_model
from chipviz.backbones.vetting import SAFE
from chipviz.data.from_table import load_task
from chipviz.data.prompt import Prompt, bake, load_tokenizer
from chipviz.data.task import Task
from chipviz.pruning import pretrain, tune
from chipviz.pruning.job import Job, Made
from chipviz.pruning.training import Fitted, Plan
from chipviz.results.models import Fit

PUBLISHED_LR = {"paper": (1e-5, 0.01), "code": (5e-5, 0.0)}
"""Learning rate and weight decay: the paper's table, and what its public code really used."""


def tuned(job: Job) -> Made:
    """The backbone of a job after LoRA on its task, merged. An encoder learns through a head.

    Raises:
        ChipvizError: If the data cannot be had, or the family takes no adapter.
    """
    job.say(f"loading {job.folder.name}")
    tokenizer = load_tokenizer(job.folder.path, job.folder.n_positions)
    model = load_language_model(job.folder, device=job.device, needs_loss=False)
    n_layers = model.n_layers
    if model.has_head:
        return Made(fit_lora(job, model.model, tokenizer), n_layers, [])
    task = _task(job)
    config: Any = job.folder.config
    config.num_labels = task.n_classes
    torch.manual_seed(job.spec.seed)  # of the new head
    classifier = AutoModelForSequenceClassification.from_pretrained(
        job.folder.path, config=config, dtype=torch.float32, use_safetensors=True, **SAFE
    ).to(job.device)
    tuned = fit_lora(job, classifier, tokenizer, task)
    return Made(tuned.base_model, n_layers, [])


def _task(job: Job) -> Task:
    assert job.spec.task is not None
    return load_task(job.spec.task, job.home, job.progress)


def fit_lora(job: Job, model: Any, tokenizer: Any, task: Task | None = None) -> Any:
    """Fit an adapter on the task and merge it. With a task given, `model` is its classifier."""
    spec, config = job.spec, job.spec.task
    assert config is not None
    classifies = task is not None
    task = task or _task(job)
    prompt = _prompt(tokenizer, task, config.max_length, classifies)
    words = answers.label_words(task.label_names, prompt.template)
    said = [] if classifies else answers.answer_tokens(tokenizer, words)
    texts = {
        split: tune.with_answers(prompt.encode(rows.texts, rows.pairs), rows.labels.tolist(), said)
        for split, rows in task.splits.items()
        if split != "test"
    }
    fit, published = spec.fit, spec.fit.preset == "published"
    lr, decay = _rates(fit, 2e-4)
    epochs = 1 if published else fit.epochs

    def plan(per_epoch: int) -> Plan:
        return Plan(
            n_steps=epochs * per_epoch,
            lr=lr,
            weight_decay=decay,
            validate_every=max(1, per_epoch // tune.PARTS),
            patience=0 if published else 4,
            seed=spec.seed,
            bfloat16=fast_dtype(job.device, job.home) == torch.bfloat16,
        )

    heads = ("classifier", "score")
    merged, fitted = tune.fit_lora(
        model,
        tune.Lora(targets=None) if published else tune.Lora(),
        texts["train"],
        texts["validation"],
        plan=plan,
        loss_of=tune.class_loss if classifies else tune.answer_loss,
        batch=fit.batch,
        head=next((h for h in heads if hasattr(model, h)), None) if classifies else None,
        checkpoint=job.scratch / "checkpoint.safetensors",
        progress=job.progress,
        on_mark=job.on_mark,
    )
    job.found |= {"template": prompt.template} | _ended(fitted)
    return merged


def fit_lora_on_text(job: Job, model: LanguageModel, rows: Tensor, held: Tensor) -> LanguageModel:
    """A model after an adapter has learned text, and is merged.

    Args:
        job: Says for how many tokens, and how.
        model: Without some of its parts. It is used up.
        rows: Text to learn, shape (N, T).
        held: Text to stop on, shape (M, T).
    """
    fit, published = job.spec.fit, job.spec.fit.preset == "published"
    steps = pretrain.n_steps(fit.tokens, fit.batch, rows.shape[1])
    lr, decay = _rates(fit, 2e-4)
    plan = Plan(
        n_steps=steps,
        lr=lr,
        weight_decay=decay,
        validate_every=max(1, steps // 10),
        patience=0 if published else 4,
        seed=job.spec.seed,
        bfloat16=fast_dtype(job.device, job.home) == torch.bfloat16,
    )
    # every token but the first is an answer
    texts = [[tune.Text(row, 1, 0) for row in some.tolist()] for some in (rows, held)]
    merged, fitted = tune.fit_lora(
        model.model,
        tune.Lora(targets=None) if published else tune.Lora(),
        *texts,
        plan=lambda _: plan,
        loss_of=tune.answer_loss,
        batch=fit.batch,
        checkpoint=job.scratch / "checkpoint.safetensors",
        progress=job.progress,
        on_mark=job.on_mark,
    )
    job.found |= _ended(fitted)
    return replace(model, model=merged)


def _ended(fitted: Fitted) -> dict[str, Any]:
    return {"n_steps": fitted.n_steps, "loss": fitted.loss, "validation_loss": fitted.best}


def _prompt(tokenizer: Any, task: Task, max_length: int, classifies: bool) -> Prompt:
    if classifies:
        return bake(tokenizer, task.template, max_length, task.splits["train"])
    return answers.asking_prompt(tokenizer, task, max_length)


def fit_all(job: Job, model: LanguageModel, rows: Tensor, held: Tensor) -> LanguageModel:
    """A model after pretraining has gone on.

    Args:
        job: Says for how many tokens, and how.
        model: Without some of its blocks. It is changed.
        rows: Text to learn, shape (N, T).
        held: Text to measure on, shape (M, T).
    """
    fit = job.spec.fit
    steps = pretrain.n_steps(fit.tokens, fit.batch, rows.shape[1])
    lr, decay = _rates(fit, 1e-4 if fit.optimizer == "adamw" else 2e-5)
    plan = Plan(
        n_steps=steps,
        lr=lr,
        optimizer=fit.optimizer,
        weight_decay=decay,
        floor=0.1,
        validate_every=max(1, steps // 10),
        seed=job.spec.seed,
        bfloat16=fast_dtype(job.device, job.home) == torch.bfloat16,
    )
    fitted = pretrain.pretrain(
        model,
        rows,
        held,
        plan,
        fit.batch,
        checkpoint=job.scratch / "checkpoint.safetensors",
        progress=job.progress,
        on_mark=job.on_mark,
        team=job.team,
    )
    job.found |= {"n_tokens": fitted.n_tokens, "loss": fitted.loss}
    return model


def _rates(fit: Fit, usual: float) -> tuple[float, float]:
    """Learning rate and weight decay."""
    if isinstance(fit.lr, str):
        return PUBLISHED_LR[fit.lr]
    if fit.lr is not None:
        return fit.lr, 0.0
    return PUBLISHED_LR["code"] if fit.preset == "published" else (usual, 0.01)
