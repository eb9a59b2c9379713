"""Laws of models made from models: what is taken out, merged, folded or fitted is what was said."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chipviz.backbones import answers
from chipviz.backbones.find import find_model
from chipviz.backbones.language_model import (
    load_language_model,
    mean_loss,
    pack,
    perplexity,
)
from chipviz.backbones.model_folder import open_folder
from chipviz.config import RunConfig
from chipviz.data.corpus import read_corpus
from chipviz.data.prompt import load_tokenizer
from chipviz.errors import BackboneError, ConfigError
from chipviz.files import PROJECT
from chipviz.progress import Cancelled, silent
from chipviz.pruning import laco, pretrain, ranking, replace, training, tune
from chipviz.pruning.blocks import PATTERNS, by_pattern, without
from chipviz.pruning.make import make
from chipviz.results.models import ModelSpec, made_folder, made_models, read_record
from tests.families import ALL, NAMED, make_tokenizer

DECODERS = [family for family in ALL if family.causal]
FOUR = [NAMED[name] for name in ("llama", "qwen3", "gpt2", "gpt_neox")]
ROWS = torch.randint(3, 400, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny published models by family, each built once."""
    built = {}

    def folder(family):
        if family.name not in built:
            built[family.name] = family.build(tmp_path_factory.mktemp(family.name))
        return built[family.name]

    return folder


def loaded(folders, family, **options):
    return load_language_model(open_folder(folders(family), family.name), **options)


def by_name(family):
    return family.name


def states(model, rows=ROWS):
    """Output of every block by plain transformers, the embedding first; the last is not normed."""
    taken = []
    handles = [
        block.register_forward_hook(
            lambda _m, args, kwargs, out: taken.append(
                (
                    args[0] if args else kwargs["hidden_states"],
                    out[0] if isinstance(out, tuple) else out,
                )
            ),
            with_kwargs=True,
        )
        for block in model.blocks
    ]
    with torch.inference_mode():
        model.model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return [taken[0][0], *(out for _, out in taken)]


# --- whole blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS, ids=by_name)
def test_a_model_without_no_block_gives_the_same_logits(folders, family):
    model = loaded(folders, family)
    assert torch.equal(without(model, []).logits(ROWS), model.logits(ROWS))


@pytest.mark.parametrize("family", DECODERS, ids=by_name)
def test_a_model_without_blocks_is_saved_and_loaded_by_stock_code(folders, family, tmp_path):
    model = loaded(folders, family)
    shorter = without(model, [1, 2])
    assert shorter.n_layers == 2
    shorter.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ROWS).logits, shorter.logits(ROWS), rtol=0, atol=1e-6)
    # The blocks that stay are the published ones, and the cache counts them right.
    long = again.generate(ROWS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    short = again.generate(ROWS[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(long, short)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n_layers", "n_removed"), [(4, 1), (12, 4), (30, 7), (7, 3)])
def test_a_pattern_takes_so_many_different_blocks(pattern, n_layers, n_removed):
    removed = by_pattern(pattern, n_layers, n_removed)
    assert len(set(removed)) == n_removed
    assert removed == sorted(removed)
    assert set(removed) <= set(range(n_layers))
    if pattern == "top":
        assert removed[-1] == n_layers - 1
    if pattern == "bottom":
        assert removed[0] == 0
    if pattern == "alternate":
        assert min(np.diff(removed), default=2) >= 2
    if pattern == "middle":
        assert abs((n_layers - 1 - removed[-1]) - removed[0]) <= 1


# --- which blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOUR, ids=by_name)
def test_influence_is_recomputed_from_states(folders, family):
    model = loaded(folders, family)
    outs = states(model)
    expected = [
        1 - np.mean([float(torch.cosine_similarity(a, b, dim=0)) for a, b in tokens(one, two)])
        for one, two in pairwise(outs)
    ]
    found = ranking.influence(model, ROWS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ranking.least_influential(found, 2) == sorted(np.argsort(expected)[:2].tolist())


def tokens(one, two):
    return zip(one.flatten(0, 1), two.flatten(0, 1), strict=True)


@pytest.mark.parametrize("family", FOUR, ids=by_name)
def test_angular_distance_is_recomputed_from_the_last_tokens(folders, family):
    model = loaded(folders, family)
    outs = [out[:, -1].double().numpy() for out in states(model)]

    def angle(a, b):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return float(np.mean(np.arccos(cosine)) / math.pi)

    expected = [angle(outs[i], outs[i + 2]) for i in range(3)]
    np.testing.assert_allclose(ranking.angular(model, ROWS, 2), expected, atol=1e-6)


@pytest.mark.parametrize("family", FOUR, ids=by_name)
def test_greedy_takes_what_really_costs_least(folders, family):
    model = loaded(folders, family)

    def loss(blocks):
        logits = without(model, blocks).logits(ROWS)
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten()))

    first = min(range(4), key=lambda block: loss([block]))
    second = min(set(range(4)) - {first}, key=lambda block: loss([first, block]))
    assert ranking.greedy_blocks(model, ROWS, 2) == [first, second]


def test_a_planted_idle_block_goes_first(folders):
    model = loaded(folders, NAMED["llama"])
    for name, parameter in model.blocks[2].named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    assert ranking.least_influential(ranking.influence(model, ROWS), 1) == [2]
    assert ranking.nearest_run(ranking.angular(model, ROWS, 1), 1) == [2]
    torch.testing.assert_close(without(model, [2]).logits(ROWS), model.logits(ROWS))


# --- LaCo ---------------------------------------------------------------------------------------


def test_laco_merges_by_the_formula():
    group = [{"w": torch.randn(3, 2)} for _ in range(3)]
    a, b, c = (part["w"] for part in group)
    torch.testing.assert_close(laco.merged("paper", group)["w"], a + (b - a) + (c - a))
    assert torch.equal(laco.merged("released", group)["w"], c)


@pytest.mark.parametrize("rule", ["paper", "released"])
@pytest.mark.parametrize("family", FOUR, ids=by_name)
def test_laco_removes_as_many_as_asked_and_reports_its_similarity(folders, family, rule):
    model = loaded(folders, family)
    dense = model.model.base_model(ROWS[: laco.TEXTS]).last_hidden_state.flatten(1)
    found = laco.merge(model, ROWS, 2, rule)
    assert len(found.removed) == 2
    before = mean_loss(model, ROWS)
    laco.put(model, found.weights)
    shorter = without(model, found.removed)
    states = shorter.model.base_model(ROWS[: laco.TEXTS]).last_hidden_state.flatten(1)
    alike = float(torch.cosine_similarity(states, dense, dim=1).mean())
    assert alike == pytest.approx(found.similarity, abs=1e-5)
    assert found.similarity > found.threshold - 1e-9
    assert mean_loss(loaded(folders, family), ROWS) == before  # nothing on disk changed


# --- ReplaceMe ----------------------------------------------------------------------------------

FOLDING = [f for f in DECODERS if f.name not in ("gemma3_text", "gemma2", "olmo2", "mixtral")]
FOLDING = [f for f in FOLDING if f.name != "gpt_oss"]


@pytest.mark.parametrize("family", FOLDING, ids=by_name)
def test_a_folded_map_computes_what_the_map_itself_does(folders, family):
    model = loaded(folders, family)
    linear = replace.fit_map(model, ROWS, [2, 3])
    shorter = without(model, [2, 3])
    part = replace._down_projection(shorter, 1)

    def apply(_module, _args, output):
        return (output.double() @ linear).float()

    handle = part.register_forward_hook(apply)
    explicit = shorter.logits(ROWS)
    handle.remove()
    replace.fold(shorter, 1, linear)
    torch.testing.assert_close(shorter.logits(ROWS), explicit, rtol=1e-5, atol=1e-5)


def test_a_map_is_the_least_squares_solution(folders):
    model = loaded(folders, NAMED["llama"])
    outs = [out.flatten(0, 1).double().numpy() for out in states(model)]
    part = replace._down_projection(model, 1)
    seen = []
    handle = part.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model.logits(ROWS)
    handle.remove()
    m = seen[0].flatten(0, 1).double().numpy()
    expected = np.linalg.lstsq(m, outs[4] - (outs[2] - m), rcond=None)[0]
    np.testing.assert_allclose(replace.fit_map(model, ROWS, [2, 3]), expected, atol=1e-4)


def test_a_token_of_outlying_norm_counts_as_one_of_ten_medians():
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(101, 8, generator=draw) for _ in range(3)]
    assert (replace._weights(*states) == 1).all()
    states[1][5] *= 1000 * states[1].norm(dim=1).median() / states[1][5].norm()
    weights = replace._weights(*states)
    assert weights[5] == pytest.approx(1e-4, rel=0.05)  # the median moves a little
    assert (weights[torch.arange(101) != 5] == 1).all()


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral"])
def test_a_family_that_adds_something_else_is_refused(folders, name):
    with pytest.raises(BackboneError, match="no map can be"):
        replace.fit_map(loaded(folders, NAMED[name]), ROWS, [2, 3])


@pytest.mark.parametrize("blocks", [[0, 1], [1, 3]])
def test_only_a_run_behind_a_block_can_be_replaced(folders, blocks):
    with pytest.raises(ConfigError, match="ReplaceMe"):
        replace.fit_map(loaded(folders, NAMED["llama"]), ROWS, blocks)


# --- answers and perplexity ---------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS, ids=by_name)
def test_answers_are_as_likely_as_plain_passes_say(folders, family):
    model = loaded(folders, family)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (n,), generator=draw).tolist() for n in (5, 5, 9, 17)]
    words = [[7], [9, 20, 33], [50, 51]]

    def likelihood(prompt, answer):
        scores = model.logits(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        return sum(float(scores[len(prompt) + i - 1, t]) for i, t in enumerate(answer))

    expected = [[likelihood(prompt, answer) for answer in words] for prompt in prompts]
    found = answers.read_answers(model, prompts, words)
    np.testing.assert_allclose(found.likelihood, expected, atol=1e-4)
    assert found.raw.tolist() == np.argmax(expected, axis=1).tolist()
    assert found.normalised.tolist() == np.argmax(np.divide(expected, [1, 3, 2]), axis=1).tolist()
    one = answers.read_answers(model, prompts, [[7], [8]])  # no further pass is needed
    np.testing.assert_allclose(one.likelihood[:, 0], np.array(expected)[:, 0], atol=1e-4)


def test_perplexity_weighs_every_token_the_same(folders):
    model = loaded(folders, NAMED["llama"])
    loss = AutoModelForCausalLM.from_pretrained(folders(NAMED["llama"]))(
        ROWS, labels=ROWS
    ).loss.detach()
    assert perplexity(model, ROWS) == pytest.approx(math.exp(loss), rel=1e-5)


def test_texts_are_packed_without_losing_or_adding_any_token():
    tokenizer = make_tokenizer("bytes")
    texts = ["we saw the old red house", "near a river and", "went on and on " * 9]
    rows = pack(tokenizer, texts, 8)
    end = tokenizer.eos_token_id
    whole = [t for text in texts for t in [*tokenizer(text)["input_ids"], end]]
    assert rows.flatten().tolist() == whole[: len(whole) // 8 * 8]
    with pytest.raises(ConfigError, match="rows of 512 are needed"):
        pack(tokenizer, texts, 512)


def test_a_prompt_without_a_question_gets_a_cue():
    assert answers.asking(None, takes_pair=False) == "{text}\nAnswer:"
    assert answers.asking("News: {text}\nTopic:", takes_pair=False) == "News: {text}\nTopic:"
    assert answers.label_words(["card_arrival"], "x:") == [" card arrival"]
    assert answers.label_words(["A"], "Answer: ") == ["A"]


# --- fits ---------------------------------------------------------------------------------------


def plan(n_steps, **options):
    return training.Plan(n_steps=n_steps, lr=1e-2, seed=3, **options)


def pretrained(folders, checkpoint, n_steps, stop_after=None, optimizer="adamw"):
    model = loaded(folders, NAMED["llama"])
    marks = []

    def see(mark):
        marks.append(mark)
        if stop_after and mark.name == "loss" and mark.step == stop_after:
            raise Cancelled

    options = {"checkpoint": checkpoint, "on_mark": see}
    how = plan(n_steps, validate_every=2, optimizer=optimizer)
    found = pretrain.pretrain(model, ROWS, ROWS[:2], how, 4, **options)
    return model, found, marks


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_broken_pretraining_goes_on_to_the_very_same_weights(
    folders, tmp_path, monkeypatch, optimizer
):
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    whole, found, marks = pretrained(folders, tmp_path / "a.safetensors", 6, optimizer=optimizer)
    assert found.loss < marks[0].value
    with pytest.raises(Cancelled):
        pretrained(folders, tmp_path / "b.safetensors", 6, 4, optimizer)
    again, resumed, late = pretrained(folders, tmp_path / "b.safetensors", 6, optimizer=optimizer)
    assert min(mark.step for mark in late) == 4  # the step whose checkpoint was not written
    assert resumed.n_tokens == found.n_tokens == 6 * 4 * 15
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_damaged_checkpoint_is_worth_nothing(folders, tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"half")
    _, found, marks = pretrained(folders, tmp_path / "c.safetensors", 2)
    assert (found.n_steps, marks[0].step) == (2, 1)


def test_a_step_does_not_depend_on_how_its_batch_is_parted(folders, monkeypatch):
    whole, _, _ = pretrained(folders, None, 3)
    monkeypatch.setattr(pretrain, "BATCH_TOKENS", 16)
    parted, _, _ = pretrained(folders, None, 3)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parted.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_lion_steps_by_the_published_rule():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer, momentum = training.Lion([weight], lr=0.1, weight_decay=0.01), torch.zeros(3)
    expected = weight.detach().clone()
    for gradient in (torch.tensor([1.0, -1.0, 0.5]), torch.tensor([-9.0, 0.1, 0.2])):
        weight.grad = gradient.clone()
        optimizer.step()
        update = (0.9 * momentum + 0.1 * gradient).sign()
        expected = expected - 0.1 * (update + 0.01 * expected)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("family", FOUR, ids=by_name)
def test_a_merged_adapter_computes_what_the_adapter_did(folders, family, monkeypatch):
    texts = tune.with_answers(ROWS[:, :9].tolist(), [0, 1] * 6, [[7], [9, 20]])
    model = loaded(folders, family).model
    dense = model(ROWS).logits
    kept, unload = [], LoraModel.merge_and_unload

    def watching(self):
        kept.append(self(input_ids=ROWS).logits.detach())
        return unload(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", watching)
    merged, found = tune.fit_lora(
        model,
        tune.Lora(rank=4),
        texts,
        texts,
        plan=lambda per_epoch: plan(5 * per_epoch),
        loss_of=tune.answer_loss,
        batch=4,
    )
    torch.testing.assert_close(merged(ROWS).logits, kept[0], rtol=1e-4, atol=1e-5)
    assert (merged(ROWS).logits - dense).abs().max() > 0.1
    assert type(merged) is type(loaded(folders, family).model)
    assert found.n_steps == 15


def test_the_loss_is_on_the_answer_alone(folders):
    model = loaded(folders, NAMED["llama"]).model
    (text,) = tune.with_answers([[5, 6, 7]], [1], [[8], [9, 10]])
    scores = model(torch.tensor([[5, 6, 7, 9, 10]])).logits[0].log_softmax(-1)
    loss, n = tune.answer_loss(model, [text])
    assert n == 2
    assert float(loss) == pytest.approx(-float(scores[2, 9] + scores[3, 10]), rel=1e-5)
    both, n = tune.answer_loss(model, [text, *tune.with_answers([[5]], [0], [[8], []])])
    alone, _ = tune.answer_loss(model, tune.with_answers([[5]], [0], [[8], []]))
    assert n == 3
    assert float(both) == pytest.approx(float(loss + alone), rel=1e-5)  # padding counts nothing


# --- jobs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = make_texts(120)
    path = tmp_path_factory.mktemp("corpus") / "texts.csv"
    path.write_text("words\n" + "\n".join(words) + "\n", "utf-8")
    return path


def make_texts(n):
    draw = np.random.default_rng(0)
    filler = ("we", "saw", "the", "old", "red", "house", "near", "a", "river", "and", "went")
    return [" ".join(draw.choice(filler, 12)) + f" {i}" for i in range(n)]


def made(home, backbone, **options):
    spec = ModelSpec.checked(backbone=str(backbone), **options)
    return make(spec, home=home, scratch=home / "scratch", progress=silent)


@pytest.mark.parametrize("heal", [None, "replaceme"])
def test_a_pruned_model_is_a_plain_folder_with_a_lineage(tiny_backbone_folder, corpus, home, heal):
    options = {"calibrate": str(corpus), "length": 16, "method": "angular", "layers": 2}
    record = made(home, tiny_backbone_folder, name="short", heal=heal, **options)
    folder = made_folder(home, "short")
    assert read_record(folder) == record == made_models(home)[0][1]
    assert record.n_layers == 2
    assert record.root.n_layers == 4
    assert find_model("short", home).n_published == record.n_parameters
    assert not (home / "scratch").exists()
    # A fresh process of stock code measures what the record says.
    code = (
        "import sys, torch, json\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "rows = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(float(model(rows, labels=rows).loss))\n"
    )
    from chipviz.data.corpus import read_corpus
    from chipviz.data.prompt import load_tokenizer

    held = read_corpus(str(corpus), home, 0).held_out
    rows = pack(load_tokenizer(folder), held, 16, most=64)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(rows.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert math.exp(float(done.stdout)) == pytest.approx(record.perplexity_after, rel=1e-4)


def test_a_child_of_a_made_model_knows_its_root(tiny_backbone_folder, corpus, home):
    options = {"calibrate": str(corpus), "length": 16, "method": "top", "layers": 1}
    made(home, tiny_backbone_folder, name="one", **options)
    record = made(home, "one", name="two", **options)
    assert (record.parent, record.root.n_layers, record.n_layers) == ("one", 4, 2)
    shutil.rmtree(made_folder(home, "one"))
    assert find_model("two", home).config.num_hidden_layers == 2  # it stands by itself


def test_pretraining_heals(tiny_backbone_folder, corpus, home):
    record = made(
        home,
        tiny_backbone_folder,
        name="healed",
        method="bottom",
        layers=1,
        calibrate=str(corpus),
        length=16,
        heal="pretrain",
        fit={"tokens": 4_000, "lr": 3e-3, "batch": 8},
    )
    assert record.perplexity_after < record.perplexity_pruned
    assert record.found["n_tokens"] > 3_000


KILLED = """\
import os, signal, sys
from pathlib import Path
from chipviz.progress import silent
from chipviz.pruning import training
from chipviz.pruning.make import make
from chipviz.results.models import ModelSpec

training.CHECKPOINT_S = 0.0

def see(mark):
    if mark.name == "loss" and mark.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

home = Path(sys.argv[1])
spec = ModelSpec.model_validate_json(sys.argv[2])
make(spec, home=home, scratch=home / "scratch", progress=silent, on_mark=see)
"""


@pytest.mark.parametrize("kind", ["pretrain", "lora", "lora on text"])
def test_a_job_killed_at_work_ends_as_an_unbroken_one(
    tiny_backbone_folder, toy_csv, corpus, home, kind
):
    if kind == "lora":
        task = RunConfig.checked(backbone=str(tiny_backbone_folder), data=str(toy_csv))
        options = {"method": "lora", "task": task, "fit": {"lr": 1e-3, "epochs": 1}}
    else:
        fit = {"tokens": 1_200, "lr": 1e-3, "batch": 8}
        heal = "pretrain" if kind == "pretrain" else "lora"
        options = {"method": "top", "layers": 1, "heal": heal, "fit": fit}
        options |= {"calibrate": str(corpus), "length": 16}
    spec = ModelSpec.checked(backbone=str(tiny_backbone_folder), name="broken", **options)
    command = [sys.executable, "-c", KILLED, str(home), spec.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (home / "scratch" / "checkpoint.safetensors").exists()
    assert not list((home / "models").glob("[!.]*"))  # nothing at a final name
    broken = make(spec, home=home, scratch=home / "scratch", progress=silent)
    whole = made(home, tiny_backbone_folder, name="whole", **options)
    assert broken.found["loss"] == pytest.approx(whole.found["loss"], rel=1e-4)
    one, other = (
        load_file(made_folder(home, n) / "model.safetensors") for n in ("broken", "whole")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["influence", "llm-pruner"])
def test_lora_on_text_heals(tiny_backbone_folder, corpus, home, method):
    fit = {"tokens": 4_000, "lr": 1e-2, "batch": 8}
    options = {"calibrate": str(corpus), "length": 16, "layers": 1, "heal": "lora", "fit": fit}
    record = made(home, tiny_backbone_folder, name="healed", method=method, **options)
    assert record.perplexity_after < 0.9 * record.perplexity_pruned
    folder = open_folder(made_folder(home, "healed"), "healed")
    assert perplexity(load_language_model(folder), _held_out(folder, corpus)) == pytest.approx(
        record.perplexity_after, rel=1e-4
    )  # merged, saved, loaded


def _held_out(folder, corpus):
    found = read_corpus(str(corpus), corpus.parent, 0)
    return pack(load_tokenizer(folder.path), found.held_out, 16, most=64)


def test_tuning_teaches_the_answers(tiny_backbone_folder, toy_csv, home):
    before = evaluated(str(tiny_backbone_folder), toy_csv, home)
    task = RunConfig.checked(backbone=str(tiny_backbone_folder), data=str(toy_csv), max_length=32)
    fit = {"lr": 1e-2, "epochs": 12}
    made(home, tiny_backbone_folder, name="tuned", method="lora", task=task, fit=fit)
    after = evaluated("tuned", toy_csv, home)
    assert after.accuracy > max(0.8, before.accuracy)  # one word plants the class
    assert after.accuracy_low < after.accuracy <= after.accuracy_high + 1e-9


def evaluated(backbone, data, home):
    from chipviz.pruning.evaluate import evaluate_answers

    config = RunConfig.checked(backbone=backbone, data=str(data), max_length=32)
    return evaluate_answers(config, home)


def test_an_encoder_is_tuned_through_a_head(tiny_tokenizer_folder, home, tmp_path):
    folder = NAMED["bert"].build(tmp_path / "bert", initializer_range=0.2)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    words = ("good", "bad", "fine")
    rows = [f"{f'{words[i % 3]} ' * 3}{i},{words[i % 3]}" for i in range(300)]
    data = tmp_path / "words.csv"
    data.write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    task = RunConfig.checked(backbone=str(folder), data=str(data), max_length=32)
    for name in ("taught", "again"):
        spec = ModelSpec.checked(
            name=name, backbone=str(folder), method="lora", task=task, fit={"lr": 3e-3}
        )
        record = make(spec, home=home, scratch=home / name, progress=silent)
        assert record.found["validation_loss"] < 0.3  # guessing costs log 3, which is 1.1
    tuned, parent = find_model("taught", home), find_model(str(folder), home)
    assert tuned.n_published == parent.n_published
    assert tuned.fingerprint != parent.fingerprint
    files = [made_folder(home, name) / "model.safetensors" for name in ("taught", "again")]
    weights, again = map(load_file, files)
    assert not any("lora" in name or "classifier" in name for name in weights)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), "the seed decides everything, the head included"


def test_a_classifiers_loss_is_that_of_its_classes(folders):
    model = AutoModelForSequenceClassification.from_pretrained(
        NAMED["bert"].build(folders(NAMED["llama"]).parent / "bert"), num_labels=3
    ).eval()
    texts = tune.with_answers([[5, 6, 7], [8]], [2, 0], [])
    loss, n = tune.class_loss(model, texts)
    alone = [
        cross_entropy(model(torch.tensor([text.ids])).logits, torch.tensor([text.label]))
        for text in texts
    ]
    assert n == 2
    torch.testing.assert_close(loss, sum(alone))


def test_an_encoder_may_be_chopped_but_has_no_loss(tiny_tokenizer_folder, corpus, home, tmp_path):
    folder = NAMED["bert"].build(tmp_path / "bert")
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    options = {"calibrate": str(corpus), "length": 16, "layers": 1}
    record = made(home, folder, name="short", method="influence", **options)
    assert (record.n_layers, record.perplexity_after) == (3, None)
    with pytest.raises(BackboneError, match="no language-model loss"):
        made(home, folder, name="other", method="greedy", **options)
    assert not (home / "models" / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 4}, "none would stay"),
        ({"layers": 0}, "at least one layer"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"layers": 1, "ratio": 0.1}, "either a number"),
        ({"layers": 1, "name": "../up"}, "name has 1 to 64"),
        ({"layers": 1, "name": "smollm2-135m"}, "embedded backbone"),
        ({"layers": None, "method": "lora"}, "needs data of a task"),
        ({"layers": 1, "task": {"backbone": "b", "data": "d"}}, "Only LoRA learns a task"),
        ({"layers": 1, "method": "other"}, "Methods are lora"),
        ({"layers": 3, "method": "alternate"}, "every second block"),
        ({"layers": 1, "length": 4096}, "tokens, and 2 rows"),
        ({"layers": 2, "method": "bottom", "heal": "replaceme"}, "ReplaceMe changes"),
        ({"layers": 2, "method": "slicegpt", "heal": "replaceme"}, "stands for whole blocks"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tiny_backbone_folder, corpus, home, options, said
):
    given = {"name": "x", "method": "top", "calibrate": str(corpus), "length": 16, **options}
    with pytest.raises((ConfigError, BackboneError), match=said):
        made(home, tiny_backbone_folder, **given)
    assert not list((home / "models").glob("[!.]*"))


def test_a_taken_name_is_refused(tiny_backbone_folder, corpus, home):
    options = {"calibrate": str(corpus), "length": 16, "method": "top", "layers": 1}
    made(home, tiny_backbone_folder, name="one", **options)
    with pytest.raises(ConfigError, match="There is a model one already"):
        made(home, tiny_backbone_folder, name="one", **options)


def test_commands_make_list_and_delete(tiny_backbone_folder, corpus, tmp_path):
    def chipviz(*words):
        command = [sys.executable, "-m", "chipviz", "--home", str(tmp_path / "home"), *words]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        options = {"capture_output": True, "text": True, "check": False, "env": environment}
        return subprocess.run(command, cwd=tmp_path, **options)

    source = ("--backbone", str(tiny_backbone_folder), "--calibrate", str(corpus))
    short = ("--length", "16", "--ratio", "0.2", "--json")
    done = chipviz("prune", *source, "--method", "influence", "--name", "short", *short)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["parent"] == tiny_backbone_folder.name
    (listed,) = json.loads(chipviz("models", "--json").stdout)["models"]
    assert listed == record
    assert listed["bytes"] > 0
    # A folder of the same name where the command is given is not meant.
    (tmp_path / "short").mkdir()
    measured = chipviz(
        "evaluate", "--backbone", "short", "--perplexity", str(corpus), "--length", "16", "--json"
    )
    found = json.loads(measured.stdout)
    assert found["perplexity"] == pytest.approx(record["perplexity_after"], rel=1e-4)
    assert chipviz("models", "--delete", "short").returncode == 0
    assert json.loads(chipviz("models", "--json").stdout) == {"models": []}
    again = chipviz("models", "--delete", "short")
    assert again.returncode == 1
    assert "There is no model 'short'" in again.stderr
