"""LoRA adapters: merged once into their backbone, so that all else sees a plain model folder.

An adapter's files come from strangers as a backbone's do: only its numbers and the settings that
merging needs are taken, never a module's name to import.
"""

import hashlib
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors.torch import load_file

from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.vetting import FOREIGN, SAFE, read_json, vet_weights
from chipviz.errors import BackboneError
from chipviz.sources import ADAPTER

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
TAKEN = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "bias"),
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"),
}
"""Settings that say what the numbers mean."""
IGNORED = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "lora_dropout", "init_lora_weights", "peft_version", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "use_qalora"),
    *("runtime_config", "ensure_weight_tying", "megatron_core"),
}
"""Settings of training, or those read elsewhere."""
_HEADS: dict[str | None, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    None: transformers.AutoModel,
}
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter whose settings and weight file are known to be harmless."""

    path: Path
    base: str
    """Source of the backbone that it was trained on."""
    config: "LoraConfig"
    task_type: str | None
    """What kind of model it was trained in, as peft names it."""


def open_adapter(path: Path) -> Adapter:
    """Read an adapter's settings and look at its weights. None is loaded.

    Raises:
        BackboneError: If it is no LoRA adapter, or one that cannot be merged here.
    """
    settings = read_json(path / ADAPTER)
    config = _lora_config(settings, path.name)
    vet_adapter(path)
    return Adapter(path, _base(settings, path), config, settings.get("task_type"))


def digest(base: ModelFolder, adapter: Adapter) -> str:
    """Hash of all that a merged model is made of."""
    files = [adapter.path / ADAPTER, adapter.path / WEIGHTS, base.path / "config.json", *base.files]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def vet_adapter(adapter: Path) -> None:
    """Check an adapter's weight file.

    Raises:
        BackboneError: If it is missing or not well-formed.
    """
    if not (adapter / WEIGHTS).is_file():
        raise BackboneError(
            f"The adapter {adapter.name} holds no {WEIGHTS}.",
            "Save it again with save_pretrained, which writes safetensors.",
        )
    vet_weights(adapter / WEIGHTS)


def _lora_config(settings: dict[str, Any], name: str) -> "LoraConfig":
    """Only what is known to be harmless: other settings import modules by name."""
    if settings.get("peft_type") != "LORA":
        raise BackboneError(
            f"{name} is an adapter of kind {str(settings.get('peft_type'))[:20]}, not LoRA.",
            "Merge it yourself (merge_and_unload, save_pretrained) and give that folder.",
        )
    odd = sorted(key for key, value in settings.items() if value and key not in TAKEN | IGNORED)
    if odd:
        raise BackboneError(
            f"The adapter {name} uses {odd[0][:40]!r}, which cannot be merged here.",
            "Merge it yourself (merge_and_unload, save_pretrained) and give that folder.",
        )
    from peft import LoraConfig  # takes a second, which most runs need not spend

    try:
        return LoraConfig(**{key: settings[key] for key in TAKEN if settings.get(key) is not None})
    except FOREIGN as error:
        raise BackboneError(
            f"The settings of adapter {name} are malformed: {str(error)[:120]}.", "Save it again."
        ) from None


def _base(settings: dict[str, Any], adapter: Path) -> str:
    """The source of the backbone that an adapter was trained on."""
    source, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(source, str) or not source:
        raise BackboneError(
            f"The adapter {adapter.name} does not name its backbone.",
            f"Write base_model_name_or_path into its {ADAPTER}.",
        )
    pinned = isinstance(revision, str) and revision and not Path(source).exists()
    return f"{source}@{revision}" if pinned else source


def merge(base: ModelFolder, adapter: Adapter, folder: Path) -> None:
    """Write the model folder of a backbone with an adapter merged into its weights.

    Args:
        base: The backbone.
        adapter: The adapter.
        folder: To be filled.

    Raises:
        BackboneError: If they do not fit each other.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    head = _HEADS.get(adapter.task_type, transformers.AutoModel)
    numbers = load_file(adapter.path / WEIGHTS)
    options = {"dtype": "auto", "use_safetensors": True, **SAFE}
    if adapter.task_type in ("SEQ_CLS", "TOKEN_CLS"):  # its head is of no use here, but has to fit
        rows = (len(v) for k, v in numbers.items() if re.search(r"(score|classifier).*weight$", k))
        options["num_labels"] = max(rows, default=2)
    try:
        with warnings.catch_warnings(action="ignore"):  # of two libraries, about each other
            model = head.from_pretrained(base.path, **options)
            tuned: Any = get_peft_model(model, adapter.config)
            taken = set_peft_model_state_dict(tuned, numbers)
            left = [*taken.unexpected_keys, *(k for k in taken.missing_keys if "lora_" in k)]
            if left:
                raise ValueError(f"{left[0]} has no counterpart")
            merged: Any = tuned.merge_and_unload()
    except FOREIGN as error:
        raise BackboneError(
            f"{adapter.path.name} does not fit its backbone {base.path.name}: "
            f"{' '.join(str(error).split())[:160]}.",
            "Give the adapter with the very backbone it was trained on.",
        ) from None
    merged.save_pretrained(folder)
    own = (adapter.path / "tokenizer.json").is_file()
    copy_tokenizer(adapter.path if own else base.path, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a model folder into another one."""
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
