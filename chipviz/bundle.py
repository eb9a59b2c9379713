"""A pruned classifier as a folder that plain `transformers` loads: save, verify, load, predict.

Only safetensors and JSON, a tokenizer, a card and checksums; nothing in it is ever run.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from chipviz import __version__, cards
from chipviz.backbone import SAFE, Backbone, pad
from chipviz.config import CutSpec
from chipviz.errors import BundleError
from chipviz.features import batches
from chipviz.pruning import cut_config, cut_weights
from chipviz.report import BundleReport, RunReport
from chipviz.sources import publish
from chipviz.task import Prompt

Kind = Literal["sequence", "token"]
FORMAT = 1
TOLERANCE = 1e-3
"""Largest probability difference between a bundle and its run's own chip, both in float32."""
MAX_SHARD = "5GB"
SELF_TEST = (
    "The match ended two to one after extra time.",
    "Shares rose as the central bank kept its rate.",
    "I would not watch this film again.",
)
"""Texts whose probabilities stand in every bundle, so that `verify` needs nothing else."""

FILES = {".safetensors", ".json", ".md", ".txt", ".model"}
"""What a bundle may hold, beside SHA256SUMS."""


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one text."""

    label: str
    score: float
    """Probability of `label`."""
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """A loaded bundle."""

    kind: Kind
    model: Any
    tokenizer: Any

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts: template and length limit are part of the tokenizer."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), list(pairs) if pairs is not None else None)["input_ids"]
        names = self.model.config.id2label
        found: list[Prediction | None] = [None] * len(ids)
        for rows in batches([len(sequence) for sequence in ids]):
            probabilities = self._probabilities([ids[i] for i in rows])
            for i, row in zip(rows, probabilities.tolist(), strict=True):
                best = max(range(len(row)), key=row.__getitem__)
                by_name = {names[c]: p for c, p in enumerate(row)}
                found[i] = Prediction(names[best], row[best], by_name)
        return [p for p in found if p is not None]

    def _probabilities(self, ids: Sequence[Sequence[int]]) -> Tensor:
        tokens, mask = pad(ids, self.tokenizer.pad_token_id, self.model.device)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        if self.kind == "token":  # the mean of the token logits is the chip's logit
            logits = (logits * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return logits.softmax(dim=-1)


def kind_of(cut: CutSpec) -> Kind:
    """Which stock class can hold a chip: see DESIGN of the bundle in the README."""
    return "sequence" if cut.pooling == "last" else "token"


def save(
    backbone: Backbone,
    prompt: Prompt,
    weight: Tensor,
    cut: CutSpec,
    report: RunReport,
    out: Path,
    check: Sequence[tuple[str, str | None]],
    expected: Tensor,
) -> BundleReport:
    """Write a bundle, verify it in a fresh process, and only then give it its name.

    Args:
        backbone: In the dtype its weights are stored in.
        prompt: The run's own.
        weight: The chip, shape (C, D).
        cut: What to keep.
        report: The run the chip comes from.
        out: The bundle's folder; must not exist, or be an older bundle.
        check: Validation texts (and second texts).
        expected: Probabilities of the run's own chip for them, in float32, shape (N, C).

    Raises:
        BundleError: If the family has no fitting class, `out` is in the way, or the verification
            finds a difference; nothing is left at `out` then.
    """
    _refuse_in_the_way(out)
    with publish(out) as folder:
        kind = _write_model(backbone, prompt, weight, cut, report, folder)
        found = _in_fresh_process(folder, kind, [*check, *_bare(SELF_TEST)])
        difference = _compare(check, found[: len(check)], expected)
        chip = _about(cut, report, kind, len(check), difference)
        chip["self_test"] = [
            {"text": text, "probabilities": row}
            for text, row in zip(SELF_TEST, found[len(check) :], strict=True)
        ]
        (folder / "chip.json").write_text(json.dumps(chip, indent=2, ensure_ascii=False), "utf-8")
        card = cards.model_card(cut, report, kind, len(check), difference)
        (folder / "README.md").write_text(card, "utf-8")
        _write_sums(folder)
        cost = report.cost_at(cut.cut_layer, cut.pooling)
        files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    return BundleReport(
        path=str(out),
        kind=kind,
        cut_layer=cut.cut_layer,
        pooling=cut.pooling,
        chip=cut.chip,
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        folder_bytes=sum(files.values()),
        n_verified=len(check),
        max_difference=difference,
        files=files,
    )


def load(path: Path) -> Classifier:
    """Load a bundle.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    about = read_about(path)
    task = (
        transformers.AutoModelForSequenceClassification
        if about["kind"] == "sequence"
        else transformers.AutoModelForTokenClassification
    )
    try:
        model: Any = task.from_pretrained(path, use_safetensors=True, **SAFE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **SAFE)
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"{path.name} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Run `python -m chipviz verify` on it, and build it again if a file was altered.",
        ) from None
    return Classifier(about["kind"], model.eval(), tokenizer)


def verify(path: Path) -> dict[str, Any]:
    """Check a bundle: every checksum, nothing foreign inside, and its own test in a fresh process.

    Returns:
        Files checked, texts compared and the largest probability difference.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    about = read_about(path)
    sums = _read_sums(path)
    for file in sorted(path.iterdir()):
        if file.name != "SHA256SUMS" and sums.get(file.name) != _sha256(file):
            raise BundleError(
                f"{file.name} is not what its checksum says.", "Build or download the bundle again."
            )
    if absent := sorted(set(sums) - {f.name for f in path.iterdir()}):
        raise BundleError(f"{absent[0]} is missing.", "Build or download the bundle again.")
    tests = about["self_test"]
    expected = torch.tensor([list(t["probabilities"]) for t in tests])
    texts = _bare([test["text"] for test in tests])
    difference = _compare(texts, _in_fresh_process(path, about["kind"], texts), expected)
    return {
        "path": str(path),
        "kind": about["kind"],
        "n_files": len(sums),
        "n_texts": len(tests),
        "max_difference": difference,
    }


def read_about(path: Path) -> dict[str, Any]:
    """The `chip.json` of a bundle.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    if not (path / "chip.json").is_file():
        raise BundleError(
            f"{path} is no bundle: it has no chip.json.", "Give a folder written by `chipviz cut`."
        )
    for file in path.iterdir():
        if file.name != "SHA256SUMS" and (file.suffix not in FILES or not file.is_file()):
            raise BundleError(
                f"{path.name} holds {file.name}, which no bundle has.",
                "Remove it, or do not trust it.",
            )
    try:
        about = json.loads((path / "chip.json").read_text("utf-8"))
        config = json.loads((path / "config.json").read_text("utf-8"))
        known = about["format"] == FORMAT and about["kind"] in ("sequence", "token")
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(
            f"{path.name} has an unreadable chip.json or config.json.", "Build the bundle again."
        ) from None
    if not known or "auto_map" in config:
        raise BundleError(
            f"{path.name} has a format this version of chipviz does not read.",
            "Update chipviz, or build the bundle again.",
        )
    return about


def _write_model(
    backbone: Backbone,
    prompt: Prompt,
    weight: Tensor,
    cut: CutSpec,
    report: RunReport,
    folder: Path,
) -> Kind:
    kind = kind_of(cut)
    config = cut_config(backbone, cut.cut_layer)
    config.id2label = dict(enumerate(report.task.label_names))
    config.label2id = {name: i for i, name in enumerate(report.task.label_names)}
    config.problem_type = "single_label_classification"
    config.get_text_config().pad_token_id = prompt.tokenizer.pad_token_id
    mapping = (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if kind == "sequence"
        else transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    )
    family: Any = mapping.get(type(config), None)
    if family is None or backbone.final_norm is None:
        raise BundleError(
            f"transformers has no class that can hold a {cut.pooling} chip on {config.model_type}.",
            "Choose another pooling, or another backbone.",
        )
    with torch.device("meta"):
        model: Any = family(config)
    weights = {
        f"{model.base_model_prefix}.{k}": v for k, v in cut_weights(backbone, cut.cut_layer).items()
    }
    weights["score.weight"] = weight.to(torch.float32)
    if kind == "token":  # the class insists on a bias
        weights["score.bias"] = torch.zeros(len(weight))
    missing = set(model.state_dict()) ^ set(weights)
    if missing:
        raise BundleError(
            f"{family.__name__} does not take this chip ({sorted(missing)[0]}).",
            "Choose another pooling, or another backbone.",
        )
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Stored as published, computed in float32 unless the user asks otherwise: rounding the chip's
    # logits to bfloat16 would move probabilities by a percent.
    written = json.loads((folder / "config.json").read_text("utf-8"))
    written |= {"dtype": "float32", "architectures": [family.__name__]}
    (folder / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False), "utf-8")
    prompt.save(folder)
    return kind


def _about(
    cut: CutSpec, report: RunReport, kind: Kind, n_verified: int, difference: float
) -> dict[str, Any]:
    cost = report.cost_at(cut.cut_layer, cut.pooling)
    scores = [
        report.score_at(cut.cut_layer, cut.pooling, cut.chip, split).__dict__
        for split in ("validation", "test")
    ]
    return {
        "format": FORMAT,
        "kind": kind,
        "run_id": report.run_id,
        "preset": report.preset,
        "cut": cut.model_dump(),
        "backbone": report.backbone.model_dump(),
        "task": report.task.model_dump(),
        "cost": cost.model_dump(),
        "dense": report.dense.model_dump(),
        "scores": scores,
        "verification": {"n_texts": n_verified, "max_difference": difference},
        "versions": {
            "chipviz": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _bare(texts: Sequence[str]) -> list[tuple[str, str | None]]:
    return [(text, None) for text in texts]


def _refuse_in_the_way(out: Path) -> None:
    """A folder that is neither empty nor a bundle belongs to somebody."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "chip.json").exists()):
        raise BundleError(
            f"{out} exists and is no bundle.", "Give another --out; nothing was overwritten."
        )


def _compare(
    check: Sequence[tuple[str, str | None]], found: list[list[float]], expected: Tensor
) -> float:
    """Largest probability difference between what a fresh process found and what is expected.

    Raises:
        BundleError: If a difference is above `TOLERANCE`, naming the text.
    """
    differences = (torch.tensor(found) - expected).abs().amax(dim=1)
    worst = int(differences.argmax())
    if not differences[worst] <= TOLERANCE:
        raise BundleError(
            f"The bundle disagrees with its run's chip by {differences[worst]:.3g} on the text "
            f"{check[worst][0][:60]!r}.",
            "This is a fault of chipviz or of the model's family; the bundle was not kept.",
        )
    return float(differences[worst])


def _in_fresh_process(
    folder: Path, kind: Kind, check: Sequence[tuple[str, str | None]]
) -> list[list[float]]:
    """What stock transformers says of texts, without a line of chipviz: probabilities by class."""
    done = subprocess.run(
        [sys.executable, "-c", cards.STOCK[kind], str(folder)],
        input=json.dumps(check).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise BundleError(
            f"transformers could not load the bundle: {last[:200]}",
            "This is a fault of chipviz or of the model's family; the bundle was not kept.",
        )
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_sums(folder: Path) -> None:
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines), "utf-8")


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / "SHA256SUMS").read_text("utf-8").splitlines()
    except OSError:
        raise BundleError("SHA256SUMS is missing.", "Build or download the bundle again.") from None
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines if line)}
