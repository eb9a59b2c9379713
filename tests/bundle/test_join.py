"""Several chips on one backbone: each task gets what its own bundle says, in as few passes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from starlette.testclient import TestClient

from chipviz import experiment
from chipviz.bundle import joined, serve_joined
from chipviz.bundle.classifier import load
from chipviz.bundle.join import join
from chipviz.bundle.joined import load_joined
from chipviz.bundle.tasks import read_joined, read_report
from chipviz.bundle.verify_joined import verify_joined
from chipviz.config import RunConfig
from chipviz.errors import BundleError, ConfigError
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder
from tests.bundle.test_save import run, spec
from tests.cli.test_cli import chipviz
from tests.families import NAMED, planted_rows
from tests.here import verified_here

TEXTS = ["we saw the old goal", "", "the bank of a river " * 40, "</s> and <pad>", "a\n\nb\tc"]


def build(finished, out, pooling="mean", layer=1, chip="linear", **extras):
    _, _, home, folder = finished
    cut = spec(pooling, layer, chip).asking(**extras)
    with verified_here():
        experiment.build(folder, cut, home=home, out=out, progress=silent)
    return out


@pytest.fixture(scope="module")
def news(tiny_backbone_folder, toy_csv, tmp_path_factory):
    home = tmp_path_factory.mktemp("news")
    return run(
        tiny_backbone_folder, toy_csv, home, poolings=("last", "mean"), chips=("linear", "mlp")
    )


@pytest.fixture(scope="module")
def spam(tiny_backbone_folder, tmp_path_factory):
    """Another task on the same texts in another column, with the same prompt."""
    rows = planted_rows(300)
    table = pd.DataFrame(rows, columns=["body", "topic"])
    table["kind"] = ["spam" if topic == rows[0][1] else "ham" for topic in table["topic"]]
    data = tmp_path_factory.mktemp("spam") / "spam.csv"
    table[["body", "kind"]].to_csv(data, index=False)
    home = tmp_path_factory.mktemp("spam-home")
    return run(tiny_backbone_folder, data, home, text="body", label="kind", preset="published")


@pytest.fixture(scope="module")
def bundles(news, spam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "news": build(news, folder / "news", "mean", 1),
        "deep": build(news, folder / "deep", "last", 3, "mlp"),
        "spam": build(spam, folder / "spam", "raw", 2, threshold="cost=1:20", positive="spam"),
    }


@pytest.fixture(scope="module")
def whole(bundles, news, tmp_path_factory):
    out = tmp_path_factory.mktemp("joined") / "whole"
    done = join(list(bundles.values()), out, home=news[2], progress=silent, names=list(bundles))
    return done, out


def test_each_task_gets_what_its_own_bundle_says(whole, bundles):
    done, out = whole
    found = load_joined(out).predict(TEXTS)
    for name, bundle in bundles.items():
        alone = load(bundle).predict(TEXTS)
        for row, one in zip(found, alone, strict=True):
            assert row[name].label == one.label
            for label, share in one.probabilities.items():
                assert row[name].probabilities[label] == pytest.approx(share, abs=1e-5)
    assert [task.name for task in done.tasks] == list(bundles)
    assert done.max_difference < 1e-5
    assert done.n_checked > 60


def test_tasks_of_one_prompt_share_a_pass_which_ends_at_the_deepest(whole):
    both = load_joined(whole[1])
    assert whole[0].n_passes == 1
    runs = []
    handles = [
        block.register_forward_hook(lambda *_a, i=i: runs.append(i))
        for i, block in enumerate(both.backbone.blocks)
    ]
    both.predict(["one text"])
    assert runs == [0, 1, 2, 3], "three tasks, one pass"
    runs.clear()
    both.of("news").predict(["one text"])
    assert runs == [0, 1], "a shallow task runs no deeper than its layer"
    for handle in handles:
        handle.remove()


def test_the_figures_of_the_whole_are_those_of_its_files(whole, bundles):
    done, out = whole
    alone = {name: json.loads((b / "chip.json").read_text()) for name, b in bundles.items()}
    for task in done.tasks:
        assert task.n_parameters == alone[task.name]["cost"]["n_parameters"]
        test = next(s for s in alone[task.name]["scores"] if s["split"] == "test")
        assert task.test_accuracy == test["accuracy"]
    assert done.cut_layer == 3
    assert done.n_parameters < sum(task.n_parameters for task in done.tasks)
    assert done.n_bytes == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert "one pass answers them all" in (out / "README.md").read_text()


def test_other_prompts_share_weights_and_not_passes(
    tiny_backbone_folder, toy_csv, bundles, news, tmp_path
):
    home = tmp_path / "home"
    other = run(tiny_backbone_folder, toy_csv, home, poolings=("mean",), seed=1)
    config = other[0]
    build(other, tmp_path / "same", "mean", 0)
    asked = tmp_path / "asked"
    changed = RunConfig.checked(**{**config.model_dump(), "template": "about {text}:"})
    second = RunFolder(home / "runs" / "two")
    second.path.mkdir(parents=True)
    report = experiment.run(
        changed, home=home, run_id="two", folder=second, progress=silent, on_points=lambda _: None
    )
    build((changed, report, home, second), asked, "mean", 2)
    done = join(
        [bundles["news"], tmp_path / "same", asked], tmp_path / "out", home=news[2], progress=silent
    )
    assert done.n_passes == 2
    assert [task.name for task in done.tasks] == ["toy", "toy-2", "toy-3"]
    assert "the passes are not (2 a text)" in (tmp_path / "out" / "README.md").read_text()
    found = load_joined(tmp_path / "out").predict(TEXTS)
    truth = load(asked).predict(TEXTS)
    assert [row["toy-3"].label for row in found] == [one.label for one in truth]


def test_a_task_is_added_to_what_was_joined(whole, bundles, news, tmp_path):
    fourth = build(news, tmp_path / "fourth", "last", 0)
    done = join([whole[1], fourth], tmp_path / "more", home=news[2], progress=silent)
    assert [task.name for task in done.tasks] == ["news", "deep", "spam", "toy"]
    found = load_joined(tmp_path / "more").predict(TEXTS)
    before = load_joined(whole[1]).predict(TEXTS)
    for row, old in zip(found, before, strict=True):
        for name in bundles:
            assert row[name].probabilities == pytest.approx(old[name].probabilities, abs=1e-6)


def test_the_threshold_of_a_task_decides_in_the_whole_too(whole, bundles):
    texts = [text for text, _ in planted_rows(80)]
    found = [row["spam"] for row in load_joined(whole[1]).predict(texts)]
    at = load(bundles["spam"]).metadata.threshold.at
    assert [p.label == "spam" for p in found] == [p.probabilities["spam"] >= at for p in found]
    assert any((p.probabilities["spam"] >= 0.5) != (p.label == "spam") for p in found)


def test_the_command_line_gives_one_column_a_task(whole, bundles, tmp_path):
    _, out = whole
    table = tmp_path / "table.csv"
    pd.DataFrame({"text": TEXTS[:1] * 3, "body": ["a goal", "a bank", "it"]}).to_csv(table)
    done = chipviz(tmp_path, "predict", out, "--file", table, "--out", tmp_path / "said.csv")
    assert done.status == 0, done.err
    said = pd.read_csv(tmp_path / "said.csv")
    assert list(said.columns[-6:]) == [
        f"{task}_{what}" for task in bundles for what in ("label", "score")
    ]
    truth = load(bundles["spam"]).predict(["a goal", "a bank", "it"])
    assert said["spam_label"].tolist() == [one.label for one in truth]
    (news,) = load(bundles["news"]).predict(TEXTS[:1])
    assert said["news_label"].tolist() == [news.label] * 3
    assert said["news_score"].tolist() == pytest.approx([news.score] * 3, abs=1e-5)


def test_the_command_line_says_what_the_whole_says(whole, bundles, tmp_path):
    _, out = whole
    done = chipviz(tmp_path, "predict", out, "--text", "we saw the goal", "--json")
    (said,) = done.json["predictions"]
    (truth,) = load_joined(out).predict(["we saw the goal"])
    assert {name: said[f"{name}_label"] for name in bundles} == {
        name: one.label for name, one in truth.items()
    }
    shown = chipviz(tmp_path, "predict", out, "--text", "we saw the goal").out
    assert f"news: {truth['news'].label}" in shown


def test_verify_repeats_the_test_of_every_task_in_a_fresh_process(whole, tmp_path):
    found = verify_joined(whole[1])
    assert found["n_texts"] == 9
    assert found["max_difference"] < 1e-5
    copy = tmp_path / "copy"
    shutil.copytree(whole[1], copy)
    file = copy / "tasks" / "news" / "chip.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(BundleError, match=r"tasks/news/chip\.safetensors is not what"):
        verify_joined(copy)
    said = json.loads((copy / "joined.json").read_text())
    for names in (["../news"], [], ["news", "news"], "news", [1]):
        (copy / "joined.json").write_text(json.dumps(said | {"tasks": names}))
        with pytest.raises(BundleError, match="unreadable"):
            read_joined(copy)


def test_the_report_stands_in_the_folder_for_the_page(whole):
    assert read_report(whole[1]) == whole[0]
    assert read_report(whole[1] / "tasks") is None
    for file in (*whole[1].glob("*.json"), whole[1] / "README.md"):
        assert str(whole[1].parent) not in file.read_text(), "it says where it was made"


def test_what_does_not_go_together_is_refused(bundles, news, tmp_path, toy_csv):
    folder = NAMED["llama"].build(tmp_path / "other", tie_word_embeddings=True)
    for part in Path(news[0].backbone).glob("tokenizer*"):
        shutil.copy(part, folder)
    stranger = run(folder, toy_csv, tmp_path / "home", poolings=("mean",))
    foreign = build(stranger, tmp_path / "foreign", "mean", 1)
    rounded = build(news, tmp_path / "rounded", "mean", 1, dtype="bfloat16")
    for others, words in (
        ([foreign], "another model"),
        ([rounded], "different number formats"),
    ):
        with pytest.raises(BundleError, match=words):
            join([bundles["news"], *others], tmp_path / "out", home=news[2], progress=silent)
    with pytest.raises(ConfigError, match="1 tasks to join"):
        join([bundles["news"]], tmp_path / "out", home=news[2], progress=silent)
    with pytest.raises(ConfigError, match="2 tasks and 1 names"):
        join(
            [bundles["news"], bundles["deep"]],
            tmp_path / "out",
            home=news[2],
            progress=silent,
            names=["a"],
        )
    assert not (tmp_path / "out").exists()


def test_a_whole_that_says_something_else_gets_no_name(bundles, news, tmp_path, monkeypatch):
    read = joined.read_several
    monkeypatch.setattr(
        joined,
        "read_several",
        lambda *given: [one + torch.arange(one.shape[1]) for one in read(*given)],
    )
    with pytest.raises(BundleError, match="disagrees with the bundle"):
        join([bundles["news"], bundles["deep"]], tmp_path / "out", home=news[2], progress=silent)
    assert not (tmp_path / "out").exists()


def test_a_service_answers_every_task_or_one_by_its_name(whole):
    out = whole[1]
    truth = load_joined(out).predict(TEXTS)
    names = {name: metadata.task.label_names for name, metadata in read_joined(out).items()}
    batcher = serve_joined.open_batcher(out, pair=False)
    app = serve_joined.make_app(read_joined(out), batcher, name="whole")
    with TestClient(app) as client:
        assert client.get("/health").json()["labels"] == names
        said = client.post("/predict", json={"texts": TEXTS}).json()["predictions"]
        for one, row in zip(said, truth, strict=True):
            assert list(one) == list(names)
            for task, answer in one.items():
                assert answer["label"] == row[task].label
                assert answer["probabilities"] == pytest.approx(row[task].probabilities, abs=1e-5)
        asked = client.post("/classify", json={"model": "spam", "input": TEXTS}).json()
        assert [one["label"] for one in asked["data"]] == [row["spam"].label for row in truth]
        assert asked["model"] == "spam"
        assert asked["data"][0]["num_classes"] == 2
        lost = client.post("/classify", json={"model": "ham", "input": "a"})
        assert (lost.status_code, lost.json()["hint"]) == (404, "Tasks: news, deep, spam.")
        for body, status in (
            ({"texts": []}, 422),
            ({"texts": ["a"], "text_pairs": ["b"]}, 422),
            ({"rows": [{"text": "a"}]}, 422),
            ({"texts": ["a"] * 513}, 413),
        ):
            refused = client.post("/predict", json=body)
            assert refused.status_code == status
            assert refused.json()["error"]
        counted = client.get("/metrics").text
        assert 'chipviz_requests_total{path="/classify",status="404"} 1.0' in counted


def test_tasks_of_one_text_and_of_two_are_not_served_together(whole):
    tasks = read_joined(whole[1])
    first = next(iter(tasks))
    task = tasks[first].task.model_copy(update={"template": "{text} and {text_pair}"})
    with pytest.raises(ConfigError, match="some one"):
        serve_joined.refuse_mixed(tasks | {first: replace(tasks[first], task=task)})


def test_the_command_serves_a_joined_folder(whole, monkeypatch):
    served = []
    monkeypatch.setattr("chipviz.bundle.listening.run", lambda app, *_: served.append(app))
    done = chipviz(whole[1].parent, "serve", whole[1])
    assert done.status == 0, done.err
    with TestClient(served[0], base_url="http://localhost") as client:
        assert len(client.post("/predict", json={"texts": ["a"]}).json()["predictions"][0]) == 3
    early = chipviz(whole[1].parent, "serve", whole[1], "--adaptive")
    assert "read whole" in early.refusal
