"""A model with its LM head: what it is loaded from, what it loses on text, and its perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

from chipviz.backbones.backbone import Backbone, refuse_missing, unloadable
from chipviz.backbones.model_folder import ModelFolder
from chipviz.backbones.structure import find_blocks, find_norm_and_causality, first_of, text_part
from chipviz.backbones.surgery import load_operated
from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError, ConfigError
from chipviz.progress import Progress, ProgressFn, silent

LENGTH = 256
"""Tokens of a row of text, unless a user says otherwise. Perplexities of two lengths are never
compared."""
BATCH_TOKENS = 2_048
MIN_ROWS = 2
"""Rows of text below which nothing is measured."""


@dataclass
class LanguageModel:
    """A language model in memory. Its list of blocks stays; parts of a block may change."""

    folder: ModelFolder
    model: Any
    """A class of transformers for causal language models. Of an encoder the part without a head."""
    has_head: bool = True
    """Whether it predicts tokens."""

    @property
    def keeps_cache(self) -> bool:
        """Whether its blocks may read on from what they kept of a prompt.

        Stock code counts the tokens kept by an attention that may have been taken out.
        """
        return self.folder.surgery is None

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.folder.name

    @property
    def base(self) -> nn.Module:
        """The part without the LM head."""
        return text_part(self.model.base_model)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The list of transformer blocks, looked for once."""
        return find_blocks(self.base, self.name)

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The configuration of the part that reads text."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def n_parameters(self) -> int:
        """Parameters, the LM head included. A tied head counts once."""
        return sum(p.numel() for p in self.model.parameters())

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of every next token, shape (B, T, V), float32. Of an encoder its last states.

        Args:
            ids: Shape (B, T).
            mask: Shape (B, T), 1 at tokens that are no padding. None where all are.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        output = self.model(input_ids=ids, attention_mask=mask, **self._uncached)
        return (output.logits if self.has_head else output.last_hidden_state).float()

    @property
    def _uncached(self) -> dict[str, Any]:
        return {"use_cache": False} if self.has_head else {}

    @cached_property
    def n_outputs(self) -> int:
        """Length of the tuple that a block gives, 0 where it gives a tensor alone."""
        lengths: list[int] = []

        def see(_: nn.Module, _args: Any, output: Any) -> None:
            lengths.append(0 if isinstance(output, Tensor) else len(output))

        handle = self.blocks[0].register_forward_hook(see)
        with torch.inference_mode():
            self.run(torch.ones((1, 2), dtype=torch.long, device=self.device))
        handle.remove()
        return lengths[0]

    def run(self, ids: Tensor) -> None:
        """Run all blocks on rows of text without the head. What is wanted is taken by hooks."""
        self.base(input_ids=ids, attention_mask=torch.ones_like(ids), **self._uncached)


def load_language_model(
    folder: ModelFolder,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    needs_loss: bool = True,
) -> LanguageModel:
    """Load a model folder with its LM head, frozen.

    Args:
        folder: The vetted folder.
        dtype: What to compute in.
        device: Where.
        needs_loss: Whether an encoder is refused. Otherwise it is loaded without a head.

    Raises:
        BackboneError: If it cannot be loaded, or is an encoder and must not be.
    """
    lost: BackboneError | None = None
    has_head = type(folder.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        found = _load(folder, AutoModelForCausalLM if has_head else AutoModel, dtype, device)
    except BackboneError as error:  # many encoders are saved without the head of their family
        lost, found = error, _load(folder, AutoModel, dtype, device)
    causal = find_norm_and_causality(found.base, found.blocks, folder.name)[1]
    if causal and lost:
        raise lost
    if not causal and needs_loss:
        raise no_language_model(folder.name)
    if not causal and has_head and not lost:
        found = _load(folder, AutoModel, dtype, device)
    return replace(found, has_head=causal and has_head)


def with_head(backbone: Backbone) -> LanguageModel | None:
    """A backbone with its LM head put on again. Its weights are shared, not loaded twice.

    Returns:
        None of an encoder, and where the files or the family's class do not give a head.
    """
    config = backbone.folder.config
    if not backbone.causal or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        prefix = model.base_model_prefix
        if type(getattr(model, prefix)) is not type(backbone.model):
            return None
        setattr(model, prefix, backbone.model)
        wanted = {n for n in model.state_dict() if not n.startswith(f"{prefix}.")}
        weights = _beyond(backbone, prefix)
        if len(wanted) == len(weights) == 1:  # some families call it otherwise in their files
            weights = dict(zip(wanted, weights.values(), strict=True))
        found = {name: weights[name] for name in wanted & weights.keys()}
        model.load_state_dict(found, strict=False, assign=True)
        model.tie_weights()
    except FOREIGN:
        return None
    if any(p.device.type == "meta" for p in model.parameters()):
        return None
    return LanguageModel(backbone.folder, model.eval().requires_grad_(False))


def _beyond(backbone: Backbone, prefix: str) -> dict[str, Tensor]:
    """Weights that a model folder holds beyond the backbone: those of its head."""
    weights: dict[str, Tensor] = {}
    for file in backbone.folder.files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                if not name.startswith(f"{prefix}."):
                    weights[name] = stored.get_tensor(name).to(backbone.device, backbone.dtype)
    return weights


def _load(
    folder: ModelFolder, kind: Any, dtype: torch.dtype, device: torch.device | str
) -> LanguageModel:
    try:
        model, loading = load_operated(kind, folder.path, folder.surgery, folder.files, dtype=dtype)
    except FOREIGN as error:
        raise unloadable(folder.name, error) from None
    model = model.eval().requires_grad_(False).to(device)
    refuse_missing(loading["missing_keys"], model, folder.name)
    return LanguageModel(folder, model)


def no_language_model(name: str) -> BackboneError:
    """The refusal of an encoder where a language model is needed."""
    return BackboneError(
        f"{name} reads its texts in both directions and predicts no next token, so it has no "
        "language-model loss.",
        "Take a decoder, or a method that needs no loss: top, bottom, middle, alternate, "
        "influence or angular, without healing.",
        "backbone",
    )


@contextmanager
def skipping(model: LanguageModel, blocks: Sequence[int]) -> Iterator[None]:
    """Let the hidden states pass some blocks by, inside the block."""
    n_more = model.n_outputs - 1

    def passing(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if n_more < 0 else (hidden_states, *[None] * n_more)

    changed = [model.blocks[i] for i in blocks]
    for block in changed:
        vars(block)["forward"] = passing
    try:
        yield
    finally:
        for block in changed:
            del vars(block)["forward"]


# --- text ---------------------------------------------------------------------------------------


def pack(tokenizer: Any, texts: Sequence[str], length: int, *, most: int | None = None) -> Tensor:
    """Texts as rows of so many tokens, one text after the other, parted by the end token.

    What is left at the end and fills no row is dropped.

    Args:
        tokenizer: The model's.
        texts: In order.
        length: Tokens a row.
        most: Maximum rows.

    Returns:
        Shape (N, length).

    Raises:
        ConfigError: If they fill fewer than `MIN_ROWS` rows.
    """
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    wanted = math.inf if most is None else most * length
    for start in range(0, len(texts), 64):
        some = tokenizer(list(texts[start : start + 64]), add_special_tokens=False)["input_ids"]
        for ids in some:
            tokens += ids if end is None else [*ids, end]
        if len(tokens) >= wanted:
            break
    n_rows = min(len(tokens) // length, most or len(tokens))
    if n_rows < MIN_ROWS:
        raise ConfigError(
            f"The texts have {len(tokens):,} tokens, and {MIN_ROWS} rows of {length} are needed.",
            "Give more or longer texts, or a shorter length.",
            "calibrate",
        )
    return torch.tensor(tokens[: n_rows * length]).view(n_rows, length)


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Rows of text, some at a time."""
    yield from rows.split(max(1, BATCH_TOKENS // rows.shape[1]))


def token_losses(logits: Tensor, rows: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first of each row, shape (B (T - 1),).

    Args:
        logits: Shape (B, T, V).
        rows: Shape (B, T).
    """
    return cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def mean_loss(
    model: LanguageModel, rows: Tensor, progress: ProgressFn = silent, label: str = "reading"
) -> float:
    """Mean negative log-likelihood of a token, in nats. Every token weighs the same."""
    total, done = 0.0, 0
    for some in batches(rows):
        some = some.to(model.device)
        total += float(token_losses(model.logits(some), some).double().sum())
        done += len(some)
        progress(Progress("fitting", label, done, len(rows)))
    return total / (len(rows) * (rows.shape[1] - 1))


def perplexity(
    model: LanguageModel, rows: Tensor, progress: ProgressFn = silent, label: str = "reading"
) -> float:
    """Exponential of the mean loss of a token, at the length of the rows."""
    loss = mean_loss(model, rows, progress, label)
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def watch_blocks(
    model: LanguageModel, rows: Tensor, see: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Read rows of text and call `see(layer, before, after)` for every block of every batch.

    `before` is what the block is given and `after` what it gives, both of shape (B, T, D).
    """

    def hook(layer: int) -> Callable[[nn.Module, Any, Any, Any], None]:
        def watching(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            see(layer, before, first_of(output))

        return watching

    handles = [
        block.register_forward_hook(hook(i), with_kwargs=True)
        for i, block in enumerate(model.blocks)
    ]
    try:
        for some in batches(rows):
            model.run(some.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
