"""The model card of a bundle, and the lines that run it."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from chipviz.bundle import curve, targets
from chipviz.bundle.metadata import read_metadata
from chipviz.bundle.remarks import remarks
from chipviz.config import CutSpec
from chipviz.keys import RAW, Site, Vector
from chipviz.results.report import (
    BackboneInfo,
    BundleKind,
    CutCost,
    LayerCost,
    RunReport,
    Score,
    TaskInfo,
)

_USE: dict[BundleKind, str] = {
    "sequence": """\
from transformers import pipeline
classify = pipeline("text-classification", "PATH")
print(classify(GIVEN))""",
    "token": """\
from transformers import AutoModelForTokenClassification, AutoTokenizer
model, read = AutoModelForTokenClassification.from_pretrained("PATH"), AutoTokenizer.from_pretrained("PATH")
scores = model(**read(GIVEN, return_tensors="pt")).logits.mean(dim=1)[0].softmax(dim=0).tolist()
print(max(zip(scores, model.config.id2label.values())))""",
    "image": """\
from transformers import pipeline
classify = pipeline("image-classification", "PATH")
print(classify(GIVEN))""",
    "chipviz": """\
from pathlib import Path
from chipviz import bundle
print(bundle.load(Path("PATH")).predict(GIVEN)[0])""",
}
_GIVEN: dict[BundleKind, tuple[str, str]] = {
    "sequence": ('"TEXT"', '{"text": "TEXT", "text_pair": "SECOND TEXT"}'),
    "token": ('"TEXT"', '"TEXT", "SECOND TEXT"'),
    "image": ('"picture.jpg"', ""),
    "chipviz": ('["TEXT"]', '["TEXT"], ["SECOND TEXT"]'),
}
"""How one text is handed over, and how two are."""
_MAKE = """\
from PIL import Image
def picture(name):
    if name == "red":
        return Image.new("RGB", (64, 48), (200, 30, 30))
    if name in ("ramp", "rings"):
        maker = Image.linear_gradient if name == "ramp" else Image.radial_gradient
        return maker("L").convert("RGB")
    return Image.open(name).convert("RGB")
"""
"""A picture of `chipviz.bundle.vision.MADE`, or of a file."""

_READ = """\
import json, sys, torch
folder, rows = sys.argv[1], json.load(sys.stdin)
texts, pairs = [row[0] for row in rows], [row[1] for row in rows]
"""

PROGRAMS: dict[BundleKind, str] = {
    "sequence": _READ
    + """\
from transformers import pipeline
classify = pipeline("text-classification", folder, top_k=None, trust_remote_code=False)
inputs = [{"text": t, "text_pair": p} if p is not None else t for t, p in zip(texts, pairs)]
names = classify.model.config.id2label
scores = [{s["label"]: s["score"] for s in found} for found in classify(inputs)]
print(json.dumps([[found[names[c]] for c in sorted(names)] for found in scores]))
""",
    "token": _READ
    + """\
from transformers import AutoModelForTokenClassification, AutoTokenizer
model = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=False).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
found = []
with torch.inference_mode():
    for text, pair in rows:
        logits = model(**tokenizer(text, pair, return_tensors="pt")).logits
        found.append(logits.float().mean(dim=1)[0].softmax(dim=0).tolist())
print(json.dumps(found))
""",
    "image": _READ
    + _MAKE
    + """\
from transformers import pipeline
classify = pipeline("image-classification", folder, trust_remote_code=False)
names = classify.model.config.id2label
found = [classify(picture(name), top_k=len(names)) for name in texts]
scores = [{s["label"]: s["score"] for s in said} for said in found]
print(json.dumps([[said[names[c]] for c in sorted(names)] for said in scores]))
""",
    "chipviz": _READ
    + """\
from pathlib import Path
from chipviz import bundle
classifier = bundle.load(Path(folder))
found = []
for text, pair in rows:
    (said,) = classifier.predict([text], [pair] if pair is not None else None)
    found.append(list(said.probabilities.values()))
print(json.dumps(found))
""",
}
"""Programs for a fresh process: texts as JSON on standard input, probabilities on standard output."""

_STATES: dict[Vector, str] = {
    Vector("block", "last"): "the last token's hidden state",
    Vector("block", "first"): "the first token's hidden state",
    Vector("block", "mean"): "the mean of the hidden states",
    Vector("block", "max"): "the largest value of each hidden dimension",
    Vector("block", "first+mean"): "the class token's hidden state and the mean of the patches'",
    RAW: "the last token's raw hidden state (trained as published)",
}
_POOLED = {"last": "at the last token", "first": "at the first token"}
_POOLED |= {"mean": "averaged over the text", "max": "at their largest in the text"}
_FROM: dict[Site, str] = {
    "block": "block outputs",
    "raw": "block outputs before the final norm",
    "gate": "activations of the feed-forward part",
    "ffn_in": "inputs of the down projection",
    "ffn_out": "outputs of the feed-forward part",
    "all": "several sites",
}
_KINDS = {
    "linear": "linear chip",
    "mlp": "MLP chip",
    "sparse": "linear chip with an L1 penalty",
    "sparse-published": "linear chip with an L1 penalty, trained as published",
    "stc": "linear classifier",
    "stc-published": "linear classifier, trained as published",
}
_CHIP_TUNING = "Chip-Tuning, arXiv:2410.06541"
_STC = "Sparsify-then-Classify, arXiv:2311.15983"
_METHOD = {"stc": _STC, "stc-published": _STC}


def _reads(cut: CutSpec) -> str:
    """What the chip reads, in words."""
    key = cut.key
    if key.joins:
        where = f"layers 0 to {cut.cut_layer} ({_FROM[key.site]}), {_POOLED[key.pooling]}"
        return f"the neurons that matter of {where}"
    states = _STATES.get(key.vector)
    return states or f"layer {cut.cut_layer}'s {_FROM[key.site]}, {_POOLED[key.pooling]}"


def _kept(report: RunReport, cost: LayerCost) -> int:
    """Layers that a bundle keeps: no more than its chip reads."""
    return round(report.backbone.n_layers * (1 - cost.layer_ratio))


def use(kind: BundleKind, task: TaskInfo) -> str:
    """Lines to copy: PATH is the bundle's folder. One prompt at a time needs no mask.

    Args:
        kind: What the bundle is.
        task: What it reads.
    """
    if task.kind == "image" and kind == "chipviz":
        return _USE[kind].replace("GIVEN", '["picture.jpg"]')
    return _USE[kind].replace("GIVEN", _GIVEN[kind]["{text_pair}" in task.template])


def write_card(
    cut: CutSpec,
    report: RunReport,
    kind: BundleKind,
    n_verified: int,
    difference: float,
    folder: Path,
) -> None:
    """Write README.md and its curve into a bundle, whose metadata is there."""
    text = model_card(cut, report, kind, n_verified, difference)
    metadata = read_metadata(folder)
    text += remarks(metadata) + "\n" + targets.card_section(metadata)
    (folder / "README.md").write_text(text, "utf-8")
    (folder / curve.FILE).write_bytes(curve.draw_curve(report, cut))


def model_card(
    cut: CutSpec, report: RunReport, kind: BundleKind, n_verified: int, difference: float
) -> str:
    """The README.md of a bundle, with the front matter that model hubs read."""
    backbone, task, lineage = report.backbone, report.task, report.backbone.lineage
    cost, dense = report.cost_at(cut.cut), report.dense
    score = report.score_at(cut.cut, "test")
    stock = kind != "chipviz"
    pictures = task.kind == "image"
    data = ModelCardData(
        model_name=f"{task.name}, cut from {backbone.name}",
        eval_results=_eval_results(task, score),
        library_name="transformers" if stock else "chipviz",
        pipeline_tag="image-classification" if pictures else "text-classification",
        base_model=(lineage.root.name if lineage else backbone.name).partition("@")[0],
        license=backbone.licence,
        datasets=[task.name],
        metrics=["accuracy", "f1"],
        tags=["chipviz", "chip-tuning", "arxiv:2410.06541", "layer-pruning"],
    )
    rounded = (
        '; pass `dtype="bfloat16"` for\nhalf the memory and slightly rounded scores'
        if stock
        else ""
    )
    labels = ", ".join(_code(name) for name in task.label_names[:50])
    return f"""---
{data.to_yaml()}
---

# {_plain(task.name)}, cut from {_plain(backbone.name)}

{"An image" if pictures else "A text"} classifier made of the first {_kept(report, cost)} of {backbone.n_layers} layers of
`{_plain(backbone.name)}` and one {_KINDS[cut.key.word]} on {_reads(cut)}.{_made_from(backbone)}

| | dense | this bundle |
| --- | ---: | ---: |
| parameters | {dense.n_parameters:,} | {cost.n_parameters:,} |
| weights | {dense.weight_bytes / 1e6:,.1f} MB | {cost.weight_bytes / 1e6:,.1f} MB |
| FLOPs per token | {dense.flops_per_token / 1e6:,.0f} M | {cost.flops_per_token / 1e6:,.0f} M |{_measured(report, cost)}

Layer ratio {100 * cost.layer_ratio:.1f} % removed, parameter ratio {100 * cost.parameter_ratio:.1f} % removed.

Test accuracy {100 * score.accuracy:.1f} % (95 % interval {100 * score.accuracy_low:.1f} to
{100 * score.accuracy_high:.1f}, n = {score.n}), macro-F1 {100 * score.macro_f1:.1f} %. The cut layer was
chosen {_chosen(cut, report)}, the chip fitted on {_fitted_on(cut, report)}.

![Test accuracy of this kind of chip on every layer](curve.png)

## Use

{"No chipviz and no remote code" if stock else "With chipviz, no remote code"}:

```python
{use(kind, task)}
```

{_GIVE_PICTURES if pictures else _give_texts(task)}
Weights are stored as published and computed in float32{rounded}.

Labels: {labels}.

## Verification

A fresh process with {"plain `transformers`" if stock else "chipviz"} gave the probabilities of the run's own chip on {n_verified}
validation {task.rows}; the largest difference was {difference:.1e}.

Method: {_METHOD.get(cut.key.word, _CHIP_TUNING)}. The licence of the backbone applies to this bundle.
"""


def _eval_results(task: TaskInfo, score: Score) -> list[EvalResult]:
    """Test scores as model hubs list them."""
    what = "image-classification" if task.kind == "image" else "text-classification"
    values = {"accuracy": score.accuracy, "f1": score.macro_f1}
    return [
        EvalResult(
            task_type=what,
            dataset_type=_plain(task.name),
            dataset_name=_plain(task.name),
            dataset_split="test",
            metric_type=kind,
            metric_value=round(value, 4),
        )
        for kind, value in values.items()
    ]


_GIVE_PICTURES = (
    "Give pictures as they are: what the model makes of them is part of the processor. Turn them\n"
    "upright as their EXIF tag says, and put white behind transparent ones."
)


def _give_texts(task: TaskInfo) -> str:
    return (
        f"{_fields(task)}Give raw texts: the prompt template and the length limit (texts are cut "
        f"after {task.max_chars}\ncharacters, about {task.max_length} tokens with the template) are "
        "part of the tokenizer. Pad on the right."
    )


def _made_from(backbone: BackboneInfo) -> str:
    """Where a backbone comes from that was made here."""
    made = backbone.lineage
    if made is None:
        return ""
    return (
        f" That backbone was made from `{_plain(made.parent)}` by {made.method}, in the end from "
        f"`{_plain(made.root.name)}` of {made.root.n_layers} layers and {made.root.n_parameters:,} "
        "parameters."
    )


def _fields(task: TaskInfo) -> str:
    """What the two texts are, where two are read."""
    if "{text_pair}" not in task.template:
        return ""
    first, second, options = (
        f"`{_plain(task.columns[role])}`" if role in task.columns else None
        for role in ("text", "text_pair", "choices")
    )
    if options is None:
        told = f": {first} and {second} of the data" if first and second else ""
        return f"Two texts are read{told}. "
    question = f"{second} with the options of {options} below it" if second else options
    example = "The question\nA. one\nB. two" if second else "A. one\nB. two"
    return (
        f"Two texts are read: {first} of the data, and {question}, one a line and lettered:\n"
        f"`{json.dumps(example)}`.\n"
    )


def _measured(report: RunReport, cost: LayerCost) -> str:
    """Rows of the table for what was measured."""
    how, dense = report.measured, report.dense

    def row(of: CutCost) -> tuple[str, str]:
        return f"{1e3 * (of.latency_s or 0):,.1f} ms", f"{(of.peak_bytes or 0) / 1e6:,.1f} MB"

    (slow, large), (fast, small) = row(dense), row(cost)
    pass_ = f"{how.batch} x {how.n_tokens} tokens, {how.dtype}, {how.device}"
    return f"\n| latency ({pass_}) | {slow} | {fast} |\n| peak memory | {large} | {small} |"


def _fitted_on(cut: CutSpec, report: RunReport) -> str:
    task = report.task
    what = task.rows
    if report.refit and cut.recipe == "sound" and cut.chip == "linear":
        n = task.n_train + task.n_validation
        return f"{n} {what}, training and validation ones together"
    return f"{task.n_train} training {what}"


def _chosen(cut: CutSpec, report: RunReport) -> str:
    if cut.rule == "oracle":  # never let it pass for an honest choice
        return f"by rule *oracle* on the test {report.task.rows} themselves, so its accuracy is too good"
    return f"by rule *{cut.rule}* on {report.judged}"


def _code(text: str) -> str:
    """A name as code: within it nothing is Markdown or HTML, and no backtick of its own ends it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _plain(text: str) -> str:
    """Names come from users: keep them from acting as Markdown or front matter."""
    return "".join(c for c in text if c.isalnum() or c in " ._-/")[:120]
