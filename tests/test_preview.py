"""The preview says what a run with the same settings reads, and needs no weights for it."""

import json
import shutil
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from chipviz import experiment, preview
from chipviz.backbones import memory
from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.data.tables import read_table
from chipviz.errors import BackboneError, ConfigError
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder
from tests import families
from tests.families import load_backbone

TEMPLATE = "say {text} now:"
SETTINGS = {"template": TEMPLATE, "max_length": 16, "max_train": 60, "max_test": 20}


def config_of(folder, data, **changes):
    return RunConfig.checked(backbone=str(folder), data=str(data), **(SETTINGS | changes))


@pytest.fixture(scope="module")
def looked(tiny_backbone_folder, toy_csv, tmp_path_factory):
    config = config_of(tiny_backbone_folder, toy_csv)
    return config, preview.inspect(config, home=tmp_path_factory.mktemp("home"))


def test_a_run_with_the_same_settings_reports_what_the_preview_said(looked, tmp_path):
    config, found = looked
    (tmp_path / "run").mkdir()
    report = experiment.run(
        config,
        home=tmp_path,
        run_id="one",
        folder=RunFolder(tmp_path / "run"),
        progress=silent,
        on_points=lambda _: None,
    ).task
    assert (found.name, found.template) == (report.name, report.template)
    assert (found.max_length, found.max_chars) == (report.max_length, report.max_chars)
    assert (found.columns, list(found.guessed)) == (report.columns, report.guessed)
    sizes = [rows.n for rows in found.splits.values()]
    assert sizes == [report.n_train, report.n_validation, report.n_test]
    assert sum(rows.n_truncated for rows in found.splits.values()) == report.n_truncated
    assert [s for s, rows in found.splits.items() if rows.made] == report.made
    assert list(found.splits["train"].label_counts) == report.label_names


def test_counts_are_those_of_the_rows(looked, tiny_tokenizer_folder, tmp_path):
    config, found = looked
    task = make_task(read_table(config.data, tmp_path), config)
    prompt = bake(load_tokenizer(tiny_tokenizer_folder), TEMPLATE, 16, task.splits["train"])
    lengths = []
    for split, rows in task.splits.items():
        said = found.splits[split]
        assert said.label_counts == Counter(task.label_names[i] for i in rows.labels)
        assert said.n_truncated == sum(len(text) > prompt.max_chars for text in rows.texts)
        lengths += [len(ids) for ids in prompt.encode(rows.texts)]
    assert found.lengths.n_measured == len(lengths) == sum(found.lengths.counts)
    for (start, stop), count in zip(
        pairwise(found.lengths.edges), found.lengths.counts, strict=True
    ):
        assert count == sum(start <= n < stop for n in lengths)
    assert found.lengths.longest == max(lengths)
    assert found.lengths.n_over == sum(n > 16 for n in lengths)


def test_the_examples_are_whole_prompts_with_the_probed_tokens_marked(looked, toy_csv):
    _, found = looked
    assert len(found.examples) == 3
    written = dict(line.rsplit(",", 1) for line in toy_csv.read_text().splitlines()[1:])
    for example in found.examples:
        assert "".join(example.tokens) == example.prompt
        text = example.prompt.removeprefix("say ").removesuffix(" now:")
        assert written[text + "".join(end.begins for end in example.left_out)] == example.label
        assert all(len(end.begins) == end.n_chars for end in example.left_out)
        n = len(example.tokens)
        assert example.probed == {"last": (n - 1, n), "mean": (0, n)}
        assert example.tokens[-1] == ":"
    ends = [end for example in found.examples for end in example.left_out]
    assert ends
    said = [line for line in preview.in_words(found) if "left out: " in line]
    assert all(repr(end.begins[:60]) in line for end, line in zip(ends, said, strict=True))


def test_of_what_the_limit_removes_the_beginning_alone_is_kept(tiny_backbone_folder, tmp_path):
    """A cell may hold ten million characters; three of them are no preview."""
    rows = ["text,label", *(f"{'word ' * 4000}{i},{'ab'[i % 2]}" for i in range(40))]
    (tmp_path / "long.csv").write_text("\n".join(rows))
    config = RunConfig.checked(
        backbone=str(tiny_backbone_folder), data=str(tmp_path / "long.csv"), max_length=16
    )
    found = preview.inspect(config, home=tmp_path)
    for example in found.examples:
        (end,) = example.left_out
        assert len(end.begins) == preview.SHOWN_CHARS
        assert 19_000 < end.n_chars < 20_001
    assert len(json.dumps(found.to_dict())) < 10_000


def test_texts_that_splits_share_are_counted_once_whatever_their_case(
    tiny_backbone_folder, tmp_path
):
    rows = {
        "train": ["a b", "A  b", "c", "d"],
        "validation": ["e", "A B"],
        "test": ["D ", "d", "a b"],
    }
    for split, texts in rows.items():
        lines = [json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(texts)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    found = preview.inspect(config_of(tiny_backbone_folder, tmp_path), home=tmp_path)
    assert found.shared == {"train, validation": 1, "train, test": 2, "validation, test": 1}
    assert not any(rows.made for rows in found.splits.values())


def test_a_preview_is_plain_json_and_in_words_it_says_the_same(looked):
    _, found = looked
    again = json.loads(json.dumps(found.to_dict()))
    assert again["splits"]["train"]["n"] == 60
    assert again["lengths"]["counts"] == list(found.lengths.counts)
    words = "\n".join(preview.in_words(found))
    assert "toy: text = `text`, label = `label`, guessed" in words
    assert "test: 20 texts (made here)" in words
    for example in found.examples:
        assert repr(example.prompt) in words
    assert words.count("last reads ':'") == 3


@pytest.mark.parametrize(
    ("pooling", "expected"), [("first", (0, 1)), ("max", (0, 5)), ("last", (4, 5))]
)
def test_each_pooling_reads_its_own_tokens(pooling, expected):
    assert preview._probed(pooling, 5) == expected


def test_the_backbone_is_seen_before_it_is_loaded(
    tiny_backbone_folder, toy_csv, tmp_path, monkeypatch
):
    config = config_of(tiny_backbone_folder, toy_csv)
    facts = preview.inspect(config, home=tmp_path).backbone
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    assert facts.n_parameters == model.num_parameters()
    assert facts.n_layers == model.config.num_hidden_layers
    assert facts.refused is None
    monkeypatch.setattr(memory, "free_memory", lambda _: 1000)
    facts = preview.inspect(config, home=tmp_path).backbone
    assert "free" in facts.refused
    assert facts.fields == ("device_map",)
    spread = config_of(tiny_backbone_folder, toy_csv, device_map="auto")
    assert preview.inspect(spread, home=tmp_path).backbone.refused is None


def test_a_folder_without_weights_is_refused_before_anything_is_shown(
    tiny_backbone_folder, toy_csv, tmp_path
):
    light = tmp_path / "model"
    shutil.copytree(tiny_backbone_folder, light, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BackboneError, match=r"model\.safetensors"):
        preview.inspect(config_of(light, toy_csv), home=tmp_path)


@pytest.mark.parametrize(("n_poolings", "preset"), [(0, "sound"), (1, "sound"), (0, "published")])
def test_the_disk_that_features_need_is_what_the_run_keeps(
    n_poolings, preset, tiny_backbone_folder, toy_csv, tmp_path
):
    """Two poolings where none is named, and the published recipe's vector beside them."""
    config = config_of(
        tiny_backbone_folder, toy_csv, preset=preset, poolings=("mean",)[:n_poolings]
    )
    found = preview.inspect(config, home=tmp_path)
    n_vectors = (n_poolings or 2) + (preset == "published")
    n_texts = sum(rows.n for rows in found.splits.values())
    assert found.backbone.feature_bytes == 4 * n_texts * n_vectors * 5 * 32


@pytest.mark.parametrize(("name", "own"), [("bert", "first"), ("llama", "last")])
def test_without_poolings_those_are_marked_that_the_run_takes(name, own, toy_csv, tmp_path):
    folder = families.NAMED[name].build(tmp_path / name)
    families.add_words(families.NAMED[name], folder)
    config = config_of(folder, toy_csv)
    (example, *_) = preview.inspect(config, home=tmp_path).examples
    backbone = load_backbone(folder, name, dtype=torch.float32, device="cpu")
    assert (
        tuple(example.probed) == config.resolved(causal=backbone.causal).poolings == (own, "mean")
    )


def test_folds_of_what_has_none_are_refused_before_a_run_is_queued(
    tiny_backbone_folder, toy_csv, tmp_path
):
    asked = config_of(tiny_backbone_folder, toy_csv).model_copy(
        update={"folds": 3, "chips": ("linear", "mlp")}
    )
    with pytest.raises(ConfigError, match="Folds are for linear chips"):
        preview.inspect(asked, home=tmp_path)
