"""Tiny models, tokenizers and tables made here: no test needs a network or a published model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, at its import
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
from pathlib import Path

import pytest
import threadpoolctl
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny models: a second thread would only wait for the first
threadpoolctl.threadpool_limits(1)

# The same draws every time, and no test asserts a time.
settings.register_profile(
    "chipviz", max_examples=50, deadline=None, derandomize=True, database=None
)
settings.load_profile("chipviz")


def pytest_collection_modifyitems(items):
    """In two processes (`make test`) files stay whole, and those that run the example together."""
    for item in items:
        example = item.path.parent.name == "browser" or item.path.stem == "test_embedded_example"
        item.add_marker(pytest.mark.xdist_group("example" if example else item.path.stem))


def shared_home(tmp_path_factory):
    """A fresh home; what was fetched outlives the session, features are shared within it.

    Fetching and converting the real backbone takes half a minute, reading the example another one:
    the browser's story and the test of the example's figures need both.
    """
    home = tmp_path_factory.mktemp("home")
    cache = Path(os.environ.get("CHIPVIZ_TEST_CACHE") or "~/.cache/chipviz-tests").expanduser()
    places = {name: cache / name for name in ("backbones", "data")}
    places["features"] = tmp_path_factory.getbasetemp() / "shared-features"
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(place)
    return home


CLASSES = {"sport": "goal", "money": "bank", "science": "atom"}
"""Class -> the one word that plants it in a text."""

FILLER = ("we", "saw", "the", "old", "red", "house", "near", "a", "river", "and", "went", "on")

CORPUS = [
    "News: the bank lost money on Tuesday.\nTopic of this article:",
    "A goal late in the match, and an atom in a cloud: we saw the old red house near a river.",
    "Passage: it went on and on.\nQuestion: did it end?\nAnswer:",
    'Résumé, naïve café: 12,5 % of 007 - "quoted" (and so on)\t\n\n...',
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty CHIPVIZ_HOME."""
    folder = tmp_path / "chipviz-home"
    monkeypatch.setenv("CHIPVIZ_HOME", str(folder))
    return folder


def planted_rows(n, seed=0):
    """Texts of filler words in which one word, somewhere, gives the class away."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = list(CLASSES)[i % len(CLASSES)]
        words = [draw.choice(FILLER) for _ in range(draw.randint(4, 9))]
        words.insert(draw.randrange(len(words) + 1), CLASSES[label])
        rows.append((f"{' '.join(words)} {i}", label))
    return rows


@pytest.fixture(scope="session")
def toy_csv(tmp_path_factory):
    """300 different short texts in 3 classes."""
    lines = [f"{text},{label}" for text, label in planted_rows(300)]
    path = tmp_path_factory.mktemp("toy") / "toy.csv"
    path.write_text("text,label\n" + "\n".join(lines) + "\n", "utf-8")
    return path


def train_tokenizer(*, bos_added=False):
    """A byte-level BPE tokenizer of about 400 tokens, like GPT-2's and SmolLM2's in kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [text for text, _ in planted_rows(60)]
    backend.train_from_iterator(CORPUS + words, trainer)
    if bos_added:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    """A saved tokenizer that adds nothing around a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bos_tokenizer_folder(tmp_path_factory) -> Path:
    """A saved tokenizer that puts <s> before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("bos-tokenizer")
    train_tokenizer(bos_added=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory, tiny_tokenizer_folder) -> Path:
    """A random Llama of 4 layers, 32 wide, in float32, with the tiny tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide enough that layers differ
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
