"""Two texts to the end: trained, cut, asked from options and tables, and by the lines of a card."""

import json
import random
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from chipviz.bundle.classifier import load
from chipviz.errors import ConfigError
from chipviz.keys import ChipKey, Cut
from chipviz.runs.model_process import Answerer
from chipviz.runs.questions import Predict, ReadTokens
from tests.cli.test_cli import chipviz
from tests.families import CLASSES, FILLER, NAMED, add_words

POOLINGS = {"last": "sequence", "mean": "token", "max": "chipviz"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """120 pairs; one word of the hypothesis gives the class away."""
    draw = random.Random(0)

    def words(n):
        return [draw.choice(FILLER) for _ in range(n)]

    rows = []
    for i in range(120):
        label = list(CLASSES)[i % 3]
        premise = f"{' '.join(words(6))} {i}"
        hypothesis = " ".join([*words(2), CLASSES[label], *words(2)])
        rows.append({"premise": premise, "hypothesis": hypothesis, "gold_label": label})
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path, rows


def trained(home, folder, table, *options):
    start = ["--backbone", folder, "--data", table[0], "--max-length", "64", "--json"]
    return chipviz(home, "train", *start, *options).json


def cut(home, run, pooling, layer=1):
    out = home / f"{run['run_id']}-{pooling}"
    options = ["--layer", layer, "--pooling", pooling, "--out", out, "--json"]
    return out, chipviz(home, "cut", run["run_id"], *options).json


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tiny_backbone_folder, table):
    """A home with a finished run of a Llama on pairs, and a bundle of each kind."""
    home = tmp_path_factory.mktemp("pairs-home")
    run = trained(home, tiny_backbone_folder, table, "--pooling", ",".join(POOLINGS))
    return home, run, {pooling: cut(home, run, pooling) for pooling in POOLINGS}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, table):
    """The same of a BERT with its own tokenizer; nothing says how its prompt should look."""
    folder = NAMED["bert"].build(tmp_path_factory.mktemp("bert"), initializer_range=0.2)
    add_words(NAMED["bert"], folder)
    home = tmp_path_factory.mktemp("pairs-bert")
    run = trained(home, folder, table)
    return home, run, folder, cut(home, run, "first")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_lines_on_the_card_of_two_texts_run_and_agree(decoder, pooling, table):
    _, _, bundles = decoder
    out, about = bundles[pooling]
    assert about["kind"] == POOLINGS[pooling]
    text, pair = table[1][0]["premise"], table[1][0]["hypothesis"]
    card = (out / "README.md").read_text()
    assert "`premise` and `hypothesis` of the data" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("PATH", str(out)).replace("SECOND TEXT", pair).replace("TEXT", text)
    assert about["kind"] == "chipviz" or "chipviz" not in code.replace(str(out), "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    (expected,) = load(out).predict([text], [pair])
    said = done.stdout.decode()
    assert expected.label in said
    numbers = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", said)]
    assert any(number == pytest.approx(expected.score, abs=1e-5) for number in numbers)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_options_and_tables_give_the_same_predictions(decoder, pooling, table, tmp_path):
    home, _, bundles = decoder
    out, _ = bundles[pooling]
    rows = table[1][:4]
    options = [part for row in rows for part in ("--text", row["premise"])]
    options += [part for row in rows for part in ("--text-pair", row["hypothesis"])]
    by_options = chipviz(home, "predict", out, *options, "--json").json["predictions"]
    bare = pd.DataFrame(rows)[["hypothesis", "premise"]]  # no label, another order
    bare.to_csv(tmp_path / "rows.csv", index=False)
    bare.to_json(tmp_path / "rows.json", orient="records")
    for name in ("rows.csv", "rows.json"):
        asked = chipviz(home, "predict", out, "--file", tmp_path / name, "--json")
        assert asked.json["predictions"] == by_options
    (direct, *_) = load(out).predict([rows[0]["premise"]], [rows[0]["hypothesis"]])
    assert by_options[0] == {"label": direct.label, "score": pytest.approx(direct.score, abs=1e-5)}


def test_a_bundle_tests_itself_on_two_texts(decoder):
    home, _, bundles = decoder
    out, _ = bundles["last"]
    tests = json.loads((out / "chip.json").read_text())["self_test"]
    assert all(test["text"] and test["text_pair"] for test in tests)
    assert chipviz(home, "verify", out, "--json").json["max_difference"] < 1e-5


def test_tokens_shows_both_texts_and_answers_as_the_bundle_does(decoder, table):
    home, run, bundles = decoder
    text, pair = table[1][0]["premise"], table[1][0]["hypothesis"]
    options = ["--text", text, "--text-pair", pair, "--layer", 1, "--pooling", "max", "--json"]
    said = chipviz(home, "tokens", run["run_id"], *options).json
    for field, whole in (("in_text", text), ("in_pair", pair)):
        inside = [t for t in said["tokens"] if t[field]]
        assert all(t["text"] == whole[t["start"] : t["end"]] for t in inside)
        assert {i for t in inside for i in range(t["start"], t["end"])} == set(range(len(whole)))
    assert not any(t["in_text"] and t["in_pair"] for t in said["tokens"])
    (expected,) = load(bundles["max"][0]).predict([text], [pair])
    found = dict(zip(said["label_names"], said["by_layer"][1], strict=True))
    assert found == pytest.approx(expected.probabilities, abs=0.02)  # the run may be in bfloat16


def test_an_encoder_reads_two_texts_as_its_stock_tokenizer_and_model_do(encoder, table):
    """The dense model on the tokenizer's own pairs, segments and all, and the chip's formula."""
    home, run, folder, (out, about) = encoder
    assert about["kind"] == "chipviz"
    assert run["task"]["template"] == "{text}[SEP]{text_pair}"
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = load_file(out / "chip.safetensors")
    classifier = load(out)
    rows = table[1][:8]
    found = classifier.predict([r["premise"] for r in rows], [r["hypothesis"] for r in rows])
    for row, prediction in zip(rows, found, strict=True):
        inputs = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
        assert inputs["token_type_ids"].any()
        with torch.inference_mode():
            states = dense(**inputs, output_hidden_states=True).hidden_states[2]
        truth = (own["weight"] @ states[0, 0] + own["bias"]).softmax(dim=0)
        said = torch.tensor(list(prediction.probabilities.values()))
        torch.testing.assert_close(said, truth, atol=1e-5, rtol=0)
    assert chipviz(home, "verify", out, "--json").json["max_difference"] < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "x"], "A text and a second text must be given here; given was a text."),
        (["--text", "x", "--text-pair", "y", "--choices", "a|b"], "given was a text and a second"),
        (["--text", "x", "--text", "z", "--text-pair", "y"], "2 times and --text-pair 1 times"),
        (["--text-pair", "y"], "nothing to classify"),
        (["--text", " ", "--text-pair", "y"], "Row 1 has no value in column 'text'"),
    ],
)
def test_a_text_too_few_or_too_many_is_one_sentence(decoder, options, said):
    home, run, bundles = decoder
    refused = chipviz(home, "predict", bundles["last"][0], *options)
    assert said in refused.refusal
    if said.startswith("A text"):
        assert "`premise` and `hypothesis`" in refused.err
        assert said in chipviz(home, "tokens", run["run_id"], *options).refusal


def test_a_file_without_the_columns_of_the_run_is_refused(decoder, tmp_path):
    home, _, bundles = decoder
    (tmp_path / "a.csv").write_text("premise,question\na,b\n")
    (tmp_path / "a.txt").write_text("a\nb\n")
    for name, said in (("a.csv", "no column 'hypothesis'"), ("a.txt", "given was a text.")):
        ended = chipviz(home, "predict", bundles["last"][0], "--file", tmp_path / name)
        assert said in ended.refusal
    both = ["--file", tmp_path / "a.csv", "--text", "x"]
    assert "given twice" in chipviz(home, "predict", bundles["last"][0], *both).refusal


def test_a_page_that_gives_no_second_text_gets_the_sentence(decoder):
    home, run, bundles = decoder
    answerer = Answerer(home)
    path = str(bundles["max"][0])
    cut = Cut(1, ChipKey.sound("last"))
    for question in (Predict(path, ["x"], None), ReadTokens(run["run_id"], "x", None, cut)):
        with pytest.raises(ConfigError, match="second is missing"):
            answerer.answer(question)
    (found,) = answerer.answer(Predict(path, ["x"], ["y"]))
    assert set(found.probabilities) == set(CLASSES)
    with pytest.raises(ConfigError, match="1 texts and 2 second texts"):
        load(bundles["max"][0]).predict(["x"], ["y", "z"])
