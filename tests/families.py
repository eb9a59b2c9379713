"""Tiny random models and tokenizers of many families, for the laws that hold whatever the model."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from chipviz.backbones import backbone
from chipviz.backbones.model_folder import ModelFolder, open_folder

Words = Literal["bytes", "bos-bytes", "unigram", "wordpiece"]

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # wide enough that layers differ
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one architecture, and where its parts are."""

    name: str
    blocks: str
    """Attribute path of the blocks in the base model."""
    norm: str | None
    """Of the final norm; None where there is none."""
    words: Words
    """The style of its tokenizer."""
    config: dict[str, Any] = field(default_factory=dict)
    causal: bool = True

    def published(self, **changes: Any) -> Any:
        """A random model as its makers publish it, in float32: decoders with their LM head."""
        config = AutoConfig.for_model(self.name, **{**SMALL, **self.config, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            maker = AutoModelForCausalLM if self.causal else AutoModel
            model = maker.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if any(part in name.lower() for part in ("norm", "ln_")):
                    # all ones would hide a norm that is not used
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    def build(self, folder: Path, **changes: Any) -> Path:
        """Save a published model and return its folder."""
        self.published(**changes).save_pretrained(folder)
        return folder


ALL = (
    Family("llama", "layers", "norm", "bos-bytes", _GROUPED),
    Family("qwen2", "layers", "norm", "bytes", _GROUPED),
    Family("gemma3_text", "layers", "norm", "unigram", {**_HEADS, "sliding_window": 8}),
    Family("gpt2", "h", "ln_f", "bytes", {"n_inner": 64}),
    Family("gpt_neox", "layers", "final_layer_norm", "bytes"),
    Family(
        "opt",
        "decoder.layers",
        "decoder.final_layer_norm",
        "bos-bytes",
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    Family("bert", "encoder.layer", None, "wordpiece", causal=False),
    Family("mistral", "layers", "norm", "unigram", _GROUPED),
    Family("qwen3", "layers", "norm", "bytes", _HEADS),
    Family("gemma", "layers", "norm", "unigram", _HEADS),
    Family("gemma2", "layers", "norm", "unigram", {**_HEADS, "sliding_window": 8}),
    Family("phi3", "layers", "norm", "unigram", _GROUPED),
    Family("falcon", "h", "ln_f", "bytes"),
    Family("stablelm", "layers", "norm", "bytes", _GROUPED),
    Family("olmo2", "layers", "norm", "bytes", _GROUPED),
    Family("smollm3", "layers", "norm", "bytes", _GROUPED),
    Family(
        "gpt_oss",
        "layers",
        "norm",
        "bytes",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    Family("mixtral", "layers", "norm", "unigram", {**_GROUPED, "num_local_experts": 4}),
    Family("mpt", "blocks", "norm_f", "bytes"),
    Family("bloom", "h", "ln_f", "bytes"),
    Family("roberta", "encoder.layer", None, "bos-bytes", causal=False),
    Family("distilbert", "transformer.layer", None, "wordpiece", {"hidden_dim": 64}, causal=False),
    Family("electra", "encoder.layer", None, "wordpiece", {"embedding_size": 16}, causal=False),
    Family("deberta-v2", "encoder.layer", None, "unigram", causal=False),
    Family(
        "modernbert",
        "layers",
        "final_norm",
        "wordpiece",
        {
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 0,
            "sep_token_id": 1,
        },
        causal=False,
    ),
)
"""Nineteen decoders, two of them mixtures of experts, and six encoders."""

SEVEN = ALL[:7]
"""Those the paper's users meet most: six decoders and an encoder without a final norm."""

NAMED = {family.name: family for family in ALL}


# --- tokenizers ---------------------------------------------------------------------------------

CLASSES = {"sport": "goal", "money": "bank", "science": "atom"}
"""Class -> the one word that plants it in a text."""

FILLER = ("we", "saw", "the", "old", "red", "house", "near", "a", "river", "and", "went", "on")

CORPUS = [
    "News: the bank lost money on Tuesday.\nTopic of this article:",
    "A goal late in the match, and an atom in a cloud: we saw the old red house near a river.",
    "Passage: it went on and on.\nQuestion: did it end?\nAnswer:",
    'Résumé, naïve café: 12,5 % of 007 - "quoted" (and so on)\t\n\n...',
]


def planted_rows(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of filler words in which one word, somewhere, gives the class away."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = list(CLASSES)[i % len(CLASSES)]
        words = [draw.choice(FILLER) for _ in range(draw.randint(4, 9))]
        words.insert(draw.randrange(len(words) + 1), CLASSES[label])
        rows.append((f"{' '.join(words)} {i}", label))
    return rows


_OURS = ("<s>", "</s>", "<pad>")
_BERTS = ("[CLS]", "[SEP]", "[PAD]")


def make_tokenizer(words: Words) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 400 tokens; ids 0, 1 and 2 are what begins, ends and pads."""
    first, last, _ = names = _BERTS if words == "wordpiece" else _OURS
    maker = {"wordpiece": _wordpiece, "unigram": _unigram}.get(words, _byte_level)
    backend, trainer = maker([*names, "<unk>"])
    backend.train_from_iterator(CORPUS + [text for text, _ in planted_rows(60)], trainer)
    if words != "bytes":
        after = f" {last}" if words == "wordpiece" else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A{after}",
            pair=f"{first} $A{after} $B{after}",
            special_tokens=[(first, 0), (last, 1)],
        )
    ends = ("cls_token", "sep_token") if words == "wordpiece" else ("bos_token", "eos_token")
    named = dict(zip((*ends, "pad_token"), names, strict=True))
    if words in ("wordpiece", "unigram"):
        named["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _byte_level(special: list[str]) -> tuple[Tokenizer, Any]:
    """Like GPT-2's and SmolLM2's in kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special[:3],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return backend, trainer


def _wordpiece(special: list[str]) -> tuple[Tokenizer, Any]:
    """Like BERT's: lower case, pieces of words."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    return backend, trainer


def _unigram(special: list[str]) -> tuple[Tokenizer, Any]:
    """Like Llama 2's and Gemma's: a mark for each space, one before the text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=380, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return backend, trainer


def add_words(family: Family, folder: Path) -> None:
    """Put a tokenizer of the family's style into a model folder, under the family's own class."""
    make_tokenizer(family.words).save_pretrained(folder)
    own = TOKENIZER_MAPPING_NAMES.get(family.name)
    if own:
        path = folder / "tokenizer_config.json"
        said = json.loads(path.read_text("utf-8")) | {"tokenizer_class": own}
        path.write_text(json.dumps(said), "utf-8")


def load_backbone(path, name, **options):
    """A model folder, looked at and loaded."""
    folder = path if isinstance(path, ModelFolder) else open_folder(Path(path), name)
    return backbone.load_backbone(folder, **options)
