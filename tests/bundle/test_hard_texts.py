"""Bundles on texts that end in control tokens, hold none of the vocabulary, or never end.

The truth is the chip on hooked states of the dense model, text by text. The bundle is read from
disk in one fresh process: by plain `transformers` where the kind is a stock one.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import processors

from chipviz.bundle import save
from chipviz.bundle.kinds import Cutting
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.prompt import bake, hard_endings, load_tokenizer
from chipviz.data.task import Examples
from chipviz.features.forward import forward_pooled
from chipviz.files import PROJECT
from tests.backbones.test_families import small_report
from tests.families import ALL, NAMED, add_words, load_backbone
from tests.here import said_here

SAMPLE = Examples(["the old red house near a river"] * 8, None, np.zeros(8, dtype=np.int64))
OTHERS = [
    "red " * 25_000,
    "\u6cb3\u8fb9\u7684\u7ea2\u8272\u8001\u623f\u5b50",
    "\u0627\u0644\u0628\u064a\u062a \u0627\u0644\u0623\u062d\u0645\u0631",
    "\U0001f3e0\U0001f534 e\u0301\u0301",
    "\n\t \u2028",
]
READER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
found = {}
for name, (folder, kind, texts) in json.load(sys.stdin).items():
    if kind == "sequence":
        classify = pipeline("text-classification", folder, top_k=None)
        said = [max(one, key=lambda s: s["score"]) for one in classify(texts)]
        found[name] = [[one["label"], one["score"]] for one in said]
    elif kind == "token":
        model = AutoModelForTokenClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found[name] = []
        for text in texts:
            with torch.inference_mode():
                logits = model(**tokenizer(text, return_tensors="pt")).logits
            score, label = logits.mean(dim=1)[0].softmax(dim=0).max(dim=0)
            found[name].append([model.config.id2label[int(label)], float(score)])
    else:
        from chipviz import bundle
        said = bundle.load(Path(folder)).predict(texts)
        found[name] = [[one.label, one.score] for one in said]
print(json.dumps(found))
"""


def as_is(_tokenizer):
    """The family's own."""


def pad_is_unknown(tokenizer):
    """As tokenizers without a pad token are given one."""
    tokenizer.pad_token = tokenizer.unk_token


def pad_is_appended(tokenizer):
    """As Qwen3-Embedding ends every text."""
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
    )


CASES = [
    *((family.name, as_is, "News: {text}\nTopic:") for family in ALL),
    *((family.name, as_is, None) for family in ALL if family.words != "bytes"),
    *((name, pad_is_appended, None) for name in ("llama", "qwen3", "gpt2", "gpt_neox", "opt")),
    *((name, pad_is_unknown, None) for name in ("mistral", "gemma", "phi3")),
    *((name, as_is, "{text} so<pad>") for name in ("llama", "gemma3_text", "bloom")),
]
"""Family, what is done to its tokenizer, template."""


def build(name, change, template, pooling, folder):
    """A bundle, the texts for it and what the chip says of them on the dense model."""
    NAMED[name].build(folder / "whole")
    add_words(NAMED[name], folder / "whole")
    backbone = load_backbone(folder / "whole", name, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(folder / "whole", backbone.folder.n_positions)
    change(tokenizer)
    prompt = bake(tokenizer, template, 40, SAMPLE)
    draw = torch.Generator().manual_seed(3)
    chip = Chip(torch.randn(3, 32, generator=draw))
    cut = CutSpec(cut_layer=1, pooling=pooling)
    texts = [*hard_endings(prompt.tokenizer), *OTHERS]
    assert "" in texts
    states = [
        forward_pooled(backbone, [ids], 0, [cut.key.vector])[0][2] for ids in prompt.encode(texts)
    ]
    truth = chip.probabilities(torch.cat(states))
    about = save.save(
        Cutting(backbone, prompt, chip, cut, small_report(pooling)),
        folder / "bundle",
        [(text, None) for text in texts],
        truth,
    )
    return about.kind, texts, truth


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Every case's kind, texts and truth, and what one fresh process reads from all bundles."""
    made, asked = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "in_fresh_process", said_here)
        for name, change, template in CASES:
            for pooling in ("last", "mean"):
                key = f"{name} {change.__name__} {template} {pooling}"
                folder = tmp_path_factory.mktemp(name)
                made[key] = build(name, change, template, pooling, folder)
                asked[key] = [str(folder / "bundle"), *made[key][:2]]
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(PROJECT)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return made, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("name", "change", "template"), CASES)
def test_e1_a_bundle_reads_every_text_as_its_chip_did(told, name, change, template, pooling):
    made, found = told
    key = f"{name} {change.__name__} {template} {pooling}"
    kind, texts, truth = made[key]
    assert kind in {"last": ("sequence", "chipviz"), "mean": ("token", "chipviz")}[pooling]
    for text, (label, score), row in zip(texts, found[key], truth, strict=True):
        assert label == "abc"[int(row.argmax())], text[:60]
        assert score == pytest.approx(float(row.max()), abs=1e-4), text[:60]


def test_a_spare_control_token_pads_where_the_pad_token_can_end_a_text(told):
    """Then the stock class holds the chip; where no token is spare, our own kind does."""
    made, _ = told
    kinds = {key: kind for key, (kind, _, _) in made.items()}
    assert kinds["llama pad_is_appended None last"] == "sequence"
    assert kinds["llama as_is {text} so<pad> last"] == "sequence"
    # A vocabulary of whole words gives its control tokens to who spells them out.
    assert kinds["mistral pad_is_unknown None last"] == "chipviz"
