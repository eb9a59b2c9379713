"""A pruned classifier as a folder: write it, and verify it in a fresh process.

Only safetensors and JSON, a tokenizer, a card and checksums. Nothing in it is ever run. Two kinds
are stock classes of `transformers`, which loads them without chipviz. The third holds what those
cannot: other poolings, chips with more than one matrix, families whose class has layers of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from chipviz.backbones.backbone import Backbone
from chipviz.bundle import card
from chipviz.bundle.classifier import CHIP_FILE
from chipviz.bundle.classifier import load as load  # reading and writing are one subject to callers
from chipviz.bundle.metadata import describe, read_metadata, write_metadata
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.prompt import Prompt, pad_ends_prompts
from chipviz.errors import BundleError
from chipviz.files import PROJECT, publish
from chipviz.keys import Vector, fields_of
from chipviz.pruning.cut import cut_config, cut_weights
from chipviz.results.report import BundleKind, BundleReport, RunReport

TOLERANCE = 1e-3
"""Largest probability difference between a bundle and its run's own chip, both in float32."""
MAX_SHARD = "5GB"
SELF_TEST = (
    ("The match ended two to one after extra time.", "Was there extra time?"),
    ("Shares rose as the central bank kept its rate.", "Did the bank change its rate?"),
    ("I would not watch this film again.", "The film was a joy."),
)
"""Texts, with a second text where one is read, whose probabilities stand in every bundle, so that
`verify` needs nothing else."""
_STOCK: dict[Vector, BundleKind] = {
    Vector("block", "last"): "sequence",
    Vector("block", "mean"): "token",
}


def kind_of(backbone: Backbone, prompt: Prompt, vector: Vector, chip: Chip) -> BundleKind:
    """Which class can hold a chip: the stock one that computes the same, else our own.

    Args:
        backbone: What is cut. Its family may have no such class, or one with layers of its own.
        prompt: Baked for the task.
        vector: What the chip reads.
        chip: One chip, or a stack of them.
    """
    kind = _STOCK.get(vector)
    if kind is None or not {"weight"} <= set(chip.tensors()) <= {"weight", "bias"}:
        return "chipviz"
    if not backbone.causal or _has_tokenizer_of_its_own(backbone.config):
        return "chipviz"
    if kind == "sequence" and pad_ends_prompts(prompt.tokenizer):
        return "chipviz"
    model = _empty_model(backbone, cut_config(backbone, 0), kind)
    if model is None or set(model.state_dict()) != set(_stock_weights(model, backbone, 0, chip)):
        return "chipviz"
    return kind


def save(
    backbone: Backbone,
    prompt: Prompt,
    chip: Chip,
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
        chip: What reads the last layer kept.
        cut: What to keep.
        report: The run the chip comes from.
        out: The bundle's folder. Must not exist, or be an older bundle.
        check: Validation texts (and second texts).
        expected: Probabilities of the run's own chip for them, in float32, shape (N, C).

    Raises:
        BundleError: If `out` is in the way, or the verification finds a difference. Nothing is left
            at `out` then.
    """
    _refuse_in_the_way(out)
    kind = kind_of(backbone, prompt, cut.key.vector, chip)
    with publish(out) as folder:
        _write_model(backbone, prompt, chip, cut, report, kind, folder)
        metadata = describe(cut, report, kind)
        write_metadata(folder, metadata)  # our own kind is loaded by it
        own = [(text, pair if prompt.takes_pair else None) for text, pair in SELF_TEST]
        found = _in_fresh_process(folder, kind, [*check, *own])
        difference = _compare(check, found[: len(check)], expected)
        metadata["verification"] = {"n_texts": len(check), "max_difference": difference}
        metadata["self_test"] = [
            {"text": text, "text_pair": pair, "probabilities": row}
            for (text, pair), row in zip(own, found[len(check) :], strict=True)
        ]
        write_metadata(folder, metadata)
        text = card.model_card(cut, report, kind, len(check), difference)
        (folder / "README.md").write_text(text, "utf-8")
        _write_sums(folder)
        cost = report.cost_at(cut.cut)
        files = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    return BundleReport(
        path=str(out),
        kind=kind,
        cut_layer=cut.cut_layer,
        **fields_of(cut.key),
        n_parameters=cost.n_parameters,
        weight_bytes=cost.weight_bytes,
        folder_bytes=sum(files.values()),
        n_verified=len(check),
        max_difference=difference,
        files=files,
    )


def verify(path: Path) -> dict[str, Any]:
    """Check a bundle: every checksum, nothing foreign inside, and its own test in a fresh process.

    Returns:
        Files checked, texts compared and the largest probability difference.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    metadata = read_metadata(path)
    sums = _read_sums(path)
    for file in sorted(path.iterdir()):
        if file.name != "SHA256SUMS" and sums.get(file.name) != _sha256(file):
            raise BundleError(
                f"{file.name} is not what its checksum says.", "Build or download the bundle again."
            )
    if absent := sorted(set(sums) - {f.name for f in path.iterdir()}):
        raise BundleError(f"{absent[0]} is missing.", "Build or download the bundle again.")
    tests = metadata.everything["self_test"]
    expected = torch.tensor([list(t["probabilities"]) for t in tests])
    texts = [(test["text"], test.get("text_pair")) for test in tests]
    difference = _compare(texts, _in_fresh_process(path, metadata.kind, texts), expected)
    return {
        "path": str(path),
        "kind": metadata.kind,
        "n_files": len(sums),
        "n_texts": len(tests),
        "max_difference": difference,
    }


def _write_model(
    backbone: Backbone,
    prompt: Prompt,
    chip: Chip,
    cut: CutSpec,
    report: RunReport,
    kind: BundleKind,
    folder: Path,
) -> None:
    config = cut_config(backbone, cut.cut_layer)
    config.id2label = dict(enumerate(report.task.label_names))
    config.label2id = {name: i for i, name in enumerate(report.task.label_names)}
    config.get_text_config().pad_token_id = prompt.tokenizer.pad_token_id
    if kind != "chipviz":
        config.problem_type = "single_label_classification"
    model = _empty_model(backbone, config, kind)
    if kind == "chipviz":
        weights = cut_weights(backbone, cut.cut_layer)
        tensors = {name: value.float().contiguous() for name, value in chip.tensors().items()}
        save_file(tensors, folder / CHIP_FILE)
    else:
        weights = _stock_weights(model, backbone, cut.cut_layer, chip)
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Stored as published, computed in float32 unless the user asks otherwise: rounding the chip's
    # logits to bfloat16 would move probabilities by a percent.
    written = json.loads((folder / "config.json").read_text("utf-8"))
    written |= {"dtype": "float32", "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False), "utf-8")
    prompt.save(folder)


def _empty_model(backbone: Backbone, config: Any, kind: BundleKind) -> Any:
    """A model of this kind without its weights. None where the family has no such class."""
    family: Any = {
        "sequence": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "token": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "chipviz": {type(config): type(backbone.model)},
    }[kind].get(type(config), None)
    if family is None:
        return None
    with torch.device("meta"):
        return family(config)


def _stock_weights(model: Any, backbone: Backbone, cut_layer: int, chip: Chip) -> dict[str, Tensor]:
    """A stock classifier's weights under the names it would have for them."""
    kept = cut_weights(backbone, cut_layer)
    weights = {f"{model.base_model_prefix}.{name}": value for name, value in kept.items()}
    weights["score.weight"] = chip.weight
    if chip.bias is not None:
        weights["score.bias"] = chip.bias
    elif "score.bias" in model.state_dict():  # the class for tokens insists on a bias
        weights["score.bias"] = torch.zeros(len(chip.weight))
    return weights


def _has_tokenizer_of_its_own(config: Any) -> bool:
    """Whether stock code takes the family's class of tokenizers, whatever a folder asks for.

    It builds its steps anew, and so would drop the length limit and the space before a text.
    """
    own = TOKENIZER_MAPPING_NAMES.get(config.model_type) or ""
    distrusted = config.model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    return distrusted and own not in ("", "TokenizersBackend", "PreTrainedTokenizerFast")


def _refuse_in_the_way(out: Path) -> None:
    """A folder that is neither empty nor a bundle belongs to somebody."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "chip.json").exists()):
        raise BundleError(
            f"{out} exists and is no bundle.", "Give another folder; nothing was overwritten."
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
    folder: Path, kind: BundleKind, check: Sequence[tuple[str, str | None]]
) -> list[list[float]]:
    """Probabilities by class of texts. Of the stock kinds, without a line of chipviz."""
    environment = dict(os.environ)
    if kind == "chipviz":  # which may not be installed, only be at hand
        places = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run(
        [sys.executable, "-c", card.PROGRAMS[kind], str(folder)],
        input=json.dumps(check).encode(),
        capture_output=True,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        raise BundleError(
            f"A fresh process could not load the bundle: {last[:200]}",
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
