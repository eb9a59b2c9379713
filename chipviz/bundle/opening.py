"""The model and the tokenizer of a bundle: looked at, then loaded, then compared with its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from chipviz.backbones.surgery import load_operated, operate, read_surgery
from chipviz.backbones.vetting import FOREIGN, SAFE, Weights, vet
from chipviz.errors import BackboneError, BundleError, panics_as_errors
from chipviz.results.report import BundleKind

_CLASSES: dict[str, Any] = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "image": transformers.AutoModelForImageClassification,
    "chipviz": transformers.AutoModel,
}


@contextmanager
def as_refusals(path: Path) -> Iterator[None]:
    """Say what a library finds wrong with a bundle as a refusal of it.

    Raises:
        BundleError: In place of what was raised.
    """
    try:
        yield
    except BackboneError as error:
        raise BundleError(error.message, error.hint) from None
    except FOREIGN as error:
        raise BundleError(
            f"{path.name} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Run `python -m chipviz verify` on it, and build it again if a file was altered.",
        ) from None


def open_model(path: Path, kind: BundleKind) -> Any:
    """The model of a bundle.

    Raises:
        BundleError: If it cannot be loaded, or the weights are not exactly the model's.
    """
    refuse_unfit(path, kind)
    with as_refusals(path):
        surgery = read_surgery(path) if kind == "chipviz" else None
        files = sorted(path.glob("model*.safetensors"))
        model, loading = load_operated(_CLASSES[kind], path, surgery, files)
    _refuse_other_weights(path, loading)
    return model.eval()


def open_tokenizer(path: Path, kind: BundleKind) -> Any:
    """The tokenizer of a bundle of texts.

    Raises:
        BundleError: If it cannot be loaded, or has no token to pad with.
    """
    with as_refusals(path):
        # Stock kinds are read as stock code reads them; ours as tokenizer.json says.
        own = kind == "chipviz"
        words: Any = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        with panics_as_errors():
            tokenizer = words.from_pretrained(path, **SAFE)
    if tokenizer.pad_token_id is None:
        raise BundleError(
            f"The tokenizer of {path.name} has no pad token.", "Build the bundle again."
        )
    return tokenizer


def refuse_unfit(path: Path, kind: BundleKind) -> None:
    """Refuse a bundle whose files are no safe model, or not of one size, before memory is taken.

    Raises:
        BundleError: Naming what is wrong.
    """
    with as_refusals(path):
        _refuse_larger(path, _CLASSES[kind], vet(path))


def _refuse_larger(path: Path, kind: Any, weights: Weights) -> None:
    """Refuse a configuration of a larger model than the weights are, before memory is taken."""
    config = transformers.AutoConfig.from_pretrained(path, **SAFE)
    with torch.device("meta"):
        model: Any = kind.from_config(config, trust_remote_code=False)
        if (surgery := read_surgery(path)) is not None:
            operate(model.base_model, surgery)
    weights.refuse_larger(path.name, sum(p.numel() for p in model.parameters()))


def _refuse_other_weights(path: Path, loading: dict[str, Any]) -> None:
    """Refuse weights that are not exactly the model's: what is missing would be random numbers.

    Raises:
        BundleError: Naming one of them.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, loading[f"{kind}_keys"])):
            raise BundleError(
                f"{path.name} has {kind} weights: {len(keys)}, such as {keys[0][:80]}.",
                "Its files do not belong together; build or download the bundle again.",
            )
