"""LoRA adapters: merged once into their backbone, so that all else sees a plain model folder.

An adapter's files come from strangers as a backbone's do: only its numbers and the settings that
merging needs are taken, never a module's name to import.
"""

import hashlib
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors.torch import load_file

from chipviz.backbone import convert_gguf
from chipviz.errors import BackboneError, SourceError
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.sources import ADAPTER, find_backbone, only_one, publish
from chipviz.vetting import FOREIGN, SAFE, read_json, vet, vet_weights

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


def find_model(source: str, home: Path, progress: ProgressFn = silent) -> Path:
    """The folder of a backbone, fetched, unpacked and merged first where needed.

    Args:
        source: Embedded name, folder of a saved model or LoRA adapter, GGUF file, or Hub id.
        home: The folder that holds `backbones/`.
        progress: Told what arrives.

    Raises:
        SourceError: If there is no such backbone, or it cannot be reached.
        BackboneError: If an adapter and its backbone cannot be merged.
    """
    folder = find_backbone(source, home, convert_gguf, progress)
    return _merged(folder, home, progress) if (folder / ADAPTER).is_file() else folder


def _merged(adapter: Path, home: Path, progress: ProgressFn) -> Path:
    """The model folder of an adapter: merged once, under a name made of all that went in."""
    said = read_json(adapter / ADAPTER)
    config = _lora_config(said, adapter.name)
    vet_adapter(adapter)
    base = _base(said, adapter, home, progress)
    files = [adapter / ADAPTER, adapter / WEIGHTS, base / "config.json", *vet(base)]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    final = home / "backbones" / f"lora-{digest.hexdigest()[:24]}"
    with only_one(final):
        if not final.exists():
            with publish(final) as work:
                progress(Progress("loading", f"merging {adapter.name} into its backbone (once)"))
                merge(base, adapter, config, said.get("task_type"), work)
    return final


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


def _lora_config(said: dict[str, Any], name: str) -> "LoraConfig":
    """Only what is known to be harmless: other settings import modules by name."""
    if said.get("peft_type") != "LORA":
        raise BackboneError(
            f"{name} is an adapter of kind {str(said.get('peft_type'))[:20]}, not LoRA.",
            "Merge it yourself (merge_and_unload, save_pretrained) and give that folder.",
        )
    odd = sorted(key for key, value in said.items() if value and key not in TAKEN | IGNORED)
    if odd:
        raise BackboneError(
            f"The adapter {name} uses {odd[0][:40]!r}, which cannot be merged here.",
            "Merge it yourself (merge_and_unload, save_pretrained) and give that folder.",
        )
    from peft import LoraConfig  # takes a second, which most runs need not spend

    try:
        return LoraConfig(**{key: said[key] for key in TAKEN if said.get(key) is not None})
    except FOREIGN as error:
        raise BackboneError(
            f"The settings of adapter {name} are malformed: {str(error)[:120]}.", "Save it again."
        ) from None


def _base(said: dict[str, Any], adapter: Path, home: Path, progress: ProgressFn) -> Path:
    """The folder of the backbone that an adapter was trained on."""
    source, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(source, str) or not source:
        raise BackboneError(
            f"The adapter {adapter.name} does not name its backbone.",
            f"Write base_model_name_or_path into its {ADAPTER}.",
        )
    if isinstance(revision, str) and revision and not Path(source).exists():
        source = f"{source}@{revision}"
    try:
        base = find_backbone(source, home, convert_gguf, progress)
    except SourceError as error:
        raise SourceError(
            f"The backbone of adapter {adapter.name} is out of reach. {error.message}", error.hint
        ) from None
    if not (base / "config.json").is_file():
        raise BackboneError(
            f"The backbone of adapter {adapter.name} is an adapter itself.",
            "Merge that one first and give its folder.",
        )
    return base


def merge(
    base: Path, adapter: Path, config: "LoraConfig", task_type: str | None, folder: Path
) -> None:
    """Write the model folder of a backbone with an adapter merged into its weights.

    Args:
        base: The backbone's folder.
        adapter: The adapter's folder.
        config: The adapter's settings.
        task_type: What kind of model it was trained in, as peft names it.
        folder: To be filled.

    Raises:
        BackboneError: If they do not fit each other.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    head = _HEADS.get(task_type, transformers.AutoModel)
    numbers = load_file(adapter / WEIGHTS)
    options = {"dtype": "auto", "use_safetensors": True, **SAFE}
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):  # its head is of no use here, but has to fit
        rows = (len(v) for k, v in numbers.items() if re.search(r"(score|classifier).*weight$", k))
        options["num_labels"] = max(rows, default=2)
    try:
        with warnings.catch_warnings(action="ignore"):  # of two libraries, about each other
            model = head.from_pretrained(base, **options)
            tuned: Any = get_peft_model(model, config)
            taken = set_peft_model_state_dict(tuned, numbers)
            left = [*taken.unexpected_keys, *(k for k in taken.missing_keys if "lora_" in k)]
            if left:
                raise ValueError(f"{left[0]} has no counterpart")
            merged: Any = tuned.merge_and_unload()
    except FOREIGN as error:
        raise BackboneError(
            f"{adapter.name} does not fit its backbone {base.name}: "
            f"{' '.join(str(error).split())[:160]}.",
            "Give the adapter with the very backbone it was trained on.",
        ) from None
    merged.save_pretrained(folder)
    words = adapter if (adapter / "tokenizer.json").is_file() else base
    for pattern in _TOKENIZER:
        for file in words.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
