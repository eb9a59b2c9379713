"""Places beside `transformers` where a bundle runs: which can take it, and the lines that run it.

Loads no torch.
"""

import hashlib
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from chipviz.bundle.metadata import SUMS, Metadata
from chipviz.files import read_small_json

Target = Literal["onnx", "openvino", "vllm", "sentence-transformers", "gguf", "head"]
GRAPHS: tuple[Target, ...] = ("onnx", "openvino")
"""Targets that hold the whole computation as one graph."""
TITLES: dict[Target, str] = {
    "onnx": "ONNX Runtime, text-embeddings-inference",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
    "sentence-transformers": "sentence-transformers",
    "gguf": "llama.cpp",
    "head": "The chip alone",
}
WHAT: dict[Target, str] = {
    "onnx": "one graph from token ids to class scores, with tokenizer and labels beside it",
    "openvino": "the same graph for Intel's runtime",
    "vllm": "a sequence classifier that vLLM serves, pooling said",
    "sentence-transformers": "the cut backbone as an embedder; the chip lies beside it",
    "gguf": "the cut backbone as one GGUF file for an embedding server; the chip lies beside it",
    "head": "kilobytes: the chip reads the backbone that you have",
}

GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families, as their configuration calls them, whose blocks are written as GGUF."""
GGUF_FILE = "model.gguf"
NOTE = "export.json"
"""What an export says of itself."""


@dataclass(frozen=True)
class Exported:
    """What was written for another place, and how its check went."""

    path: str
    target: Target
    int8: bool
    n_checked: int
    """Rows that both the bundle and the export were asked."""
    n_agree: int
    """Rows with the same label."""
    max_difference: float
    """Largest probability difference."""
    n_bytes: int

    def note(self, bundle: Path) -> dict[str, Any]:
        """What is written beside it: all but its place, and which bundle it was made of."""
        return asdict(self) | {"path": "", "bundle": _mark_of(bundle)}


def place_of(bundle: Path, target: Target) -> Path:
    """Where the page keeps an export of a bundle: beside it."""
    return bundle.with_name(f"{bundle.name}.{target}")


def read_export(bundle: Path, target: Target) -> Exported | None:
    """The export that lies beside a bundle. None if there is none, or of an older build."""
    place = place_of(bundle, target)
    try:
        found = read_small_json(place / NOTE)
        if found.pop("bundle") != _mark_of(bundle):
            return None
        return TypeAdapter(Exported).validate_python(found | {"path": str(place)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _mark_of(bundle: Path) -> str:
    """What changes when a bundle is built anew."""
    return hashlib.sha256((bundle / SUMS).read_bytes()).hexdigest()


_GIVEN = '"TEXT"'
_GIVEN_PAIR = '("TEXT", "SECOND TEXT")'
_READ = """\
import json, numpy
from pathlib import Path
from transformers import PreTrainedTokenizerFast
folder = Path("PATH")
read = PreTrainedTokenizerFast.from_pretrained(folder)
names = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
given = dict(read([GIVEN], padding=True, return_tensors="np"))
given = {name: given[name].astype("int64") for name in ("input_ids", "attention_mask")}
"""
_LOOK = """\
import json, numpy
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor
folder = Path("PATH")
read = AutoImageProcessor.from_pretrained(folder)
names = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
given = dict(read([Image.open("picture.jpg").convert("RGB")], return_tensors="np"))
"""
_SAY = "print([names[str(best)] for best in numpy.argmax(logits, axis=1)])"
_RUN: dict[Target, str] = {
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
(logits,) = session.run(["logits"], given)
""",
    "openvino": """\
import openvino
exact = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact)
logits = model(given)["logits"]
""",
}
_VLLM = """\
vllm serve PATH --runner pooling --dtype float32 --pooler-config '{"pooling_type": "POOLING"}'
curl localhost:8000/classify -H 'Content-Type: application/json' \\
  -d '{"model": "PATH", "input": "TEXT"}'"""
_EMBED = """\
import json
from pathlib import Path
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
folder = Path("PATH")
embed = SentenceTransformer(str(folder))
chip = load_file(folder / "head" / "head.safetensors")
names = json.loads((folder / "head" / "head.json").read_text("utf-8"))["labels"]
states = embed.encode(["TEXT"])
HIDDENlogits = states @ chip["weight"].T + chip.get("bias", 0)
print([names[best] for best in logits.argmax(axis=1)])"""
_LLAMA_CPP = """\
# llama-server -m PATH/model.gguf --embedding --pooling POOLING --embd-normalize -1 --port 8080 \\
#   --flash-attn off --cache-type-k f32 --cache-type-v f32
import json
from pathlib import Path
from urllib.request import Request, urlopen
import numpy
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast
folder = Path("PATH")
read = PreTrainedTokenizerFast.from_pretrained(folder)
chip = load_file(folder / "head" / "head.safetensors")
names = json.loads((folder / "head" / "head.json").read_text("utf-8"))["labels"]
asked = json.dumps({"content": read(GIVEN)["input_ids"]}).encode()
request = Request("http://127.0.0.1:8080/embedding", asked, {"Content-Type": "application/json"})
states = numpy.array(json.load(urlopen(request))[0]["embedding"], "float32").reshape(1, -1)
HIDDENlogits = states @ chip["weight"].T + chip.get("bias", 0)
print([names[best] for best in logits.argmax(axis=1)])"""
_HIDDEN = 'states = (states @ chip["hidden_weight"].T + chip["hidden_bias"]).clip(0)\n'
_HEAD = 'python -m chipviz predict PATH --backbone BACKBONE --text "TEXT"'


def refusal(target: Target, metadata: Metadata) -> str | None:
    """Why a place cannot take a bundle, in a sentence. None where it can.

    Args:
        target: The place.
        metadata: Of the bundle.
    """
    key, pictures = metadata.cut.key, metadata.task.kind == "image"
    if target in GRAPHS:
        if pictures and metadata.task.template:
            return "A decoder that is asked about pictures has no one graph."
        if not metadata.padded:
            return "Padding reaches the texts in this backbone, and graphs are fed padded batches."
        return None
    if pictures:
        return "It takes texts, and this bundle reads pictures."
    if target == "vllm":
        if metadata.kind in ("sequence", "token"):
            return None
        return "It reads the last token or the mean of a decoder's states with one matrix."
    if key.joins or key.kind == "sparse":
        return "This chip reads single neurons, not one vector of one layer."
    if target == "head" and not _backbone(metadata).get("fingerprint"):
        return "It does not say which files its backbone was read from; build it again."
    if target == "gguf":
        return _not_for_llama_cpp(metadata)
    if target == "sentence-transformers":
        if key.site != "block":
            return "It embeds states after the final norm, and this chip reads others."
        if metadata.takes_pair:
            return "It embeds one text at a time, and this bundle reads two."
    return None


def _not_for_llama_cpp(metadata: Metadata) -> str | None:
    if metadata.family not in GGUF_FAMILIES:
        return f"Family {metadata.family or 'unknown'} is not written as GGUF."
    if metadata.cut.key.site != "block" or metadata.cut.pooling not in ("last", "mean", "first"):
        return "It pools normed states at the last token, the first or all, and this chip no such."
    return None


def _backbone(metadata: Metadata) -> dict[str, Any]:
    """What is said of the backbone. A stranger's bundle may say nothing."""
    return metadata.everything.get("backbone") or {}


def use(target: Target, metadata: Metadata) -> str:
    """Lines to copy: PATH is the export's folder.

    Args:
        target: The place.
        metadata: Of the bundle.
    """
    if target in GRAPHS:
        read = _LOOK if metadata.task.kind == "image" else _READ
        given = _GIVEN_PAIR if metadata.takes_pair else _GIVEN
        return read.replace("GIVEN", given) + _RUN[target] + _SAY
    if target == "vllm":
        pooling = "MEAN" if metadata.cut.pooling == "mean" else "LAST"
        return _VLLM.replace("POOLING", pooling)
    if target == "head":
        name = " ".join(str(_backbone(metadata).get("name")).split())[:120]
        line = _HEAD.replace("BACKBONE", shlex.quote(name))
        return line + ' --text-pair "SECOND TEXT"' * metadata.takes_pair
    if target == "gguf":
        pooling = {"first": "cls"}.get(metadata.cut.pooling, metadata.cut.pooling)
        given = '"TEXT", "SECOND TEXT"' if metadata.takes_pair else _GIVEN
        lines = _LLAMA_CPP.replace("POOLING", pooling).replace("GIVEN", given)
        return lines.replace("HIDDEN", _HIDDEN if metadata.cut.chip == "mlp" else "")
    return _EMBED.replace("HIDDEN", _HIDDEN if metadata.cut.chip == "mlp" else "")


def notes(target: Target, metadata: Metadata) -> list[str]:
    """What must be known there, a paragraph each."""
    if target == "onnx" and metadata.task.kind == "text":
        return [
            "text-embeddings-inference serves this folder: pooling and chip are inside the graph, "
            "whose output is `logits`. Do not give it the bundle of kind *token* itself: it would "
            "misread the scores of tokens.",
            "Give raw texts: template and length limit are part of `tokenizer.json`.",
        ]
    if target == "vllm":
        return [
            "Without `--dtype` vLLM computes float32 models in float16. Older versions call the "
            "command's `--runner pooling` `--task classify`."
        ]
    if target == "gguf":
        return [
            "The file holds no vocabulary: give the server token ids, made of raw texts by the "
            "tokenizer here, which knows the template and the length limit.",
            "llama.cpp computes in the format of the weights, and keeps keys and values in float16 "
            "unless told: bfloat16 weights move a probability by up to 0.01. A bundle of `cut "
            "--dtype float32`, with the options above, keeps it within 1e-5. The check below read "
            "the file with transformers, in float32.",
        ]
    if target == "sentence-transformers":
        return ["Embeddings are not normalised: the chip reads them as they are."]
    return []


def card_section(metadata: Metadata) -> str:
    """What the card of a bundle says of other places: a command for each, or why there is none."""
    lines = ["## Other places", "", "| place | how |", "| --- | --- |"]
    for target, title in TITLES.items():
        why = refusal(target, metadata)
        how = why or f"`python -m chipviz export PATH --to {target} --out DIR`"
        lines.append(f"| {title} | {how} |")
    if metadata.task.kind == "text":
        lines.append("| HTTP | `python -m chipviz serve PATH` |")
    return "\n".join(lines) + "\n"
