"""Features: streamed equals whole, batch mates change nothing, and a broken run goes on."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from chipviz.backbones import batching
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.data.task import Examples, Task
from chipviz.errors import BackboneError
from chipviz.features.extract import ORDER, extract
from chipviz.features.forward import forward_pooled, reentrant
from chipviz.keys import RAW, Vector
from chipviz.progress import Cancelled
from tests.families import ALL, NAMED, load_backbone

VECTORS = tuple(map(Vector.named, ("last", "mean", "first", "max", "raw")))
LAST, MEAN, MAX = map(Vector.named, ("last", "mean", "max"))


@pytest.fixture
def line(tiny_backbone_folder, monkeypatch):
    """A tiny backbone, a prompt and a task of texts of many lengths, in small chunks."""
    monkeypatch.setattr(batching, "BATCH_TOKENS", {"cpu": 30})
    for name, n_batches in (("FIRST", 1), ("CHUNK", 2), ("MOST", 2)):
        monkeypatch.setattr(batching, f"{name}_BATCHES", n_batches)
    backbone = load_backbone(tiny_backbone_folder, "tiny", dtype=torch.float32, device="cpu")
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon"]
    random = np.random.default_rng(0)

    def some(n):
        texts = [" ".join(random.choice(words, random.integers(1, 14))) for _ in range(n)]
        return Examples(texts, None, random.integers(0, 2, n))

    task = Task("toy", ("a", "b"), {"train": some(30), "validation": some(11), "test": some(9)})
    prompt = bake(load_tokenizer(tiny_backbone_folder), "say {text} now", 40, task.splits["train"])
    return backbone, prompt, task


def everything(features):
    return {
        (split, vector, layer): features.read(split, vector, layer)
        for split in ORDER
        for vector in VECTORS
        for layer in range(-1, features.n_layers)
    }


def test_streamed_features_equal_transformers_own_hidden_states(line, home):
    backbone, prompt, task = line
    found = extract(backbone, prompt, task, home, vectors=VECTORS)
    features, n_tokens, total = found.features, found.n_tokens, 0
    for split in ORDER:
        for row, ids in enumerate(prompt.encode(task.splits[split].texts)):
            total += len(ids)
            output = backbone.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            for layer in range(-1, backbone.n_layers):
                state = output.hidden_states[layer + 1][0]
                if layer < backbone.n_layers - 1:  # the last entry is normed already
                    got = features.read(split, RAW, layer)[row]
                    torch.testing.assert_close(got, state[-1], atol=1e-5, rtol=0)
                    state = backbone.apply_final_norm(state)
                for pooling, truth in pooled(state).items():
                    got = features.read(split, Vector.named(pooling), layer)[row]
                    torch.testing.assert_close(got, truth, atol=1e-5, rtol=0)
    assert n_tokens == total == sum(sum(lengths) for lengths in found.lengths.values())
    assert {split: len(lengths) for split, lengths in found.lengths.items()} == features.sizes


def pooled(state):
    """One text's states (T, D), pooled plainly."""
    return {
        "last": state[-1],
        "first": state[0],
        "mean": state.mean(dim=0),
        "max": state.max(dim=0).values,
    }


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_every_family_is_read_as_transformers_reads_it(family, tmp_path):
    """Streamed = whole = hidden_states + final norm; batch mates and padding change nothing."""
    backbone = load_backbone(family.build(tmp_path), family.name, dtype=torch.float32, device="cpu")
    random = np.random.default_rng(0)
    ids = [random.integers(3, 400, n).tolist() for n in (11, 3, 7, 1, 19)]
    together = forward_pooled(backbone, ids, 2, VECTORS)
    norm = backbone.model.get_submodule(family.norm) if family.norm else torch.nn.Identity()
    last = len(together[0]) - 1
    for row, tokens in enumerate(ids):
        alone = forward_pooled(backbone, [tokens], 2, VECTORS)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[:, 0], all_of_them[:, row], atol=1e-5, rtol=0)
        with torch.inference_mode():
            states = backbone.model(
                input_ids=torch.tensor([tokens]), output_hidden_states=True
            ).hidden_states
        assert len(states) == last + 1
        for layer, state in enumerate(states):
            normed = state[0] if layer == last else norm(state[0])
            truth = pooled(normed)
            if layer < last or family.norm is None:
                truth["raw"] = state[0, -1]
            for pooling, expected in truth.items():
                got = together[VECTORS.index(Vector.named(pooling))][layer, row]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_texts_features_do_not_depend_on_its_batch_mates(line):
    backbone, prompt, task = line
    ids = prompt.encode(task.splits["train"].texts)
    together = forward_pooled(backbone, ids, prompt.tokenizer.pad_token_id, VECTORS)
    for row, alone in enumerate(ids):
        single = forward_pooled(backbone, [alone], prompt.tokenizer.pad_token_id, VECTORS)
        for one, all_of_them in zip(single, together, strict=True):
            torch.testing.assert_close(one[:, 0], all_of_them[:, row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop_after", [1, 3, 7, 12])
def test_a_stopped_extraction_goes_on_and_ends_with_the_same_bytes(line, tmp_path, stop_after):
    backbone, prompt, task = line
    begun = extract(backbone, prompt, task, tmp_path / "a", vectors=VECTORS)
    whole, n_tokens = begun.features, begun.n_tokens
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) > stop_after:
            raise Cancelled

    with pytest.raises(Cancelled):
        extract(backbone, prompt, task, tmp_path / "b", vectors=VECTORS, progress=stop)
    ended = extract(backbone, prompt, task, tmp_path / "b", vectors=VECTORS)
    again, rest = ended.features, ended.n_tokens
    assert 0 < rest <= n_tokens
    for split in ORDER:
        for vector in VECTORS:
            one, other = whole.path(split, vector), again.path(split, vector)
            assert one.read_bytes() == other.read_bytes()


def test_f1_kill_9_at_20_random_moments_ends_with_the_same_bytes(tiny_backbone_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.features.kill_extraction",
        tiny_backbone_folder,
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-1000:]
    found = json.loads(done.stdout)
    assert found["files"] == 10
    assert found["odd"] == []  # of each: which kill, its exit status, the files that differ
    assert found["broken"] >= 10  # or nothing was tested


def test_passes_side_by_side_end_with_the_bytes_of_one_after_another(line, home):
    backbone, prompt, task = line
    alone = extract(backbone, prompt, task, home / "alone", vectors=VECTORS).features
    torch.set_num_threads(2)
    try:
        beside = extract(backbone, prompt, task, home / "beside", vectors=VECTORS).features
    finally:
        torch.set_num_threads(1)
    for file in alone.folder.iterdir():
        assert file.read_bytes() == (beside.folder / file.name).read_bytes()


def test_a_model_that_a_pass_changes_is_read_one_pass_at_a_time(tmp_path):
    ropes = {"plain": "default", "stretching": "dynamic"}
    for name, kind in ropes.items():
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10_000.0}
        folder = NAMED["llama"].build(tmp_path / name, rope_parameters=rope)
        backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
        assert reentrant(backbone) is (name == "plain")


def test_a_second_run_reads_what_is_there(line, home):
    backbone, prompt, task = line
    extract(backbone, prompt, task, home, vectors=VECTORS)
    chunks = []
    again = extract(
        backbone, prompt, task, home, vectors=VECTORS, on_chunk=lambda _, c: chunks.append(c)
    )
    assert again.n_tokens == 0
    first, second, *rest = (c.split for c in chunks)  # a curve can be drawn after two chunks
    assert (first, second) == ("validation", "train")
    assert rest == sorted(rest, key=ORDER.index)


def test_runs_with_other_poolings_share_what_both_need(line, home):
    backbone, prompt, task = line
    both = extract(backbone, prompt, task, home, vectors=(LAST, MEAN))
    one = extract(backbone, prompt, task, home, vectors=(MEAN,))
    more = extract(backbone, prompt, task, home, vectors=(MEAN, MAX))
    assert both.features.folder == one.features.folder == more.features.folder
    assert (one.n_tokens, more.n_tokens) == (
        0,
        both.n_tokens,
    )  # what is there is kept, what is new is read
    truth = extract(backbone, prompt, task, home / "apart", vectors=(MAX,)).features
    for layer in range(-1, backbone.n_layers):
        assert torch.equal(more.features.read("train", MAX, layer), truth.read("train", MAX, layer))


def test_a_part_of_the_rows_is_that_part(line, home):
    backbone, prompt, task = line
    features = extract(backbone, prompt, task, home, vectors=(LAST,)).features
    whole = features.read("train", LAST, 2)
    assert torch.equal(features.read("train", LAST, 2, 5, 9), whole[5:9])
    assert torch.equal(features.read("train", LAST, 2, 25, 99), whole[25:])
    stored = np.load(features.folder / "train-last.npy")
    assert torch.equal(whole, torch.from_numpy(stored[3]))


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_f7_harmed_features_are_noticed_and_made_again(line, home, harm):
    backbone, prompt, task = line
    features = extract(backbone, prompt, task, home, vectors=VECTORS).features
    before = everything(features)
    victim = features.folder / "train-mean.npy"
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-40] ^= 1
        victim.write_bytes(content)
    elif harm == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif harm == "delete":
        victim.unlink()
    else:
        manifest = features.folder / "manifest.json"
        manifest.write_text(manifest.read_text()[:100])
    again = extract(backbone, prompt, task, home, vectors=VECTORS)
    assert again.n_tokens > 0
    for key, value in everything(again.features).items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)


def test_other_texts_prompts_or_precision_never_share_features(line, home):
    backbone, prompt, task = line
    folders = [extract(backbone, prompt, task, home, vectors=VECTORS).features.folder]
    train = task.splits["train"]
    other = Examples([*train.texts[:-1], "changed"], None, train.labels)
    other_task = replace(task, splits={**task.splits, "train": other})
    folders.append(extract(backbone, prompt, other_task, home, vectors=VECTORS).features.folder)
    fresh = load_tokenizer(backbone.folder.path)
    other_prompt = bake(fresh, "say {text} then", 40, train)
    folders.append(extract(backbone, other_prompt, task, home, vectors=VECTORS).features.folder)
    coarse = load_backbone(backbone.folder.path, "tiny", dtype=torch.bfloat16, device="cpu")
    folders.append(extract(coarse, prompt, task, home, vectors=VECTORS).features.folder)
    assert len(set(folders)) == 4


def test_a_layer_outside_of_the_model_is_refused(line, home):
    backbone, prompt, task = line
    features = extract(backbone, prompt, task, home, vectors=VECTORS).features
    with pytest.raises(IndexError, match="-1 to 3"):
        features.read("train", LAST, 4)
    manifest = json.loads((features.folder / "manifest.json").read_text())
    assert manifest["identity"]["dtype"] == "torch.float32"


def test_states_that_are_no_numbers_are_refused_by_the_first_layer(line, home):
    backbone, prompt, task = line
    weight = backbone.blocks[2].mlp.down_proj.weight
    before = weight.clone()
    weight.data.fill_(float("inf"))
    try:
        with pytest.raises(BackboneError, match="no finite numbers from layer 2 on") as refused:
            extract(backbone, prompt, task, home, vectors=VECTORS)
    finally:
        weight.data.copy_(before)
    assert refused.value.fields == ("dtype",)


def test_tokens_beyond_the_embedding_are_refused(line, home, monkeypatch):
    backbone, prompt, task = line
    table = torch.nn.Embedding(40, 32)
    monkeypatch.setattr(backbone.model, "get_input_embeddings", lambda: table)
    with pytest.raises(BackboneError, match=r"holds token \d+, and tiny.* has embeddings for 40"):
        extract(backbone, prompt, task, home, vectors=VECTORS)
