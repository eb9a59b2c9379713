"""Exports: what another place says of raw texts is what the bundle says."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from chipviz.backbones.pooling import pool
from chipviz.bundle import folders, graph, llama_cpp, targets, written
from chipviz.bundle.asked import Batches, rows_of_run
from chipviz.bundle.classifier import load
from chipviz.bundle.export import export
from chipviz.bundle.head_reader import load_head
from chipviz.bundle.metadata import read_metadata
from chipviz.data.prompt import hard_endings
from chipviz.errors import BundleError, ChipvizError, ConfigError
from chipviz.progress import silent
from tests.bundle.test_save import built, finished, finished_encoder  # noqa: F401
from tests.cli.test_cli import chipviz
from tests.families import NAMED, planted_rows

TEXTS = [text for text, _ in planted_rows(40)]
ODD = ["", "bank " * 20_000, "the atom </s> <pad> and <s>", "a\n\nb\tc", "\u6cb3\u8fb9 \u0e01"]


def exported(bundle, target, out, **options):
    return export(bundle, target, out, rows=[], progress=silent, **options)


_MADE = {}


def graph_of(bundle, runtime, out):
    """A copy of a graph that is made once for all tests."""
    key = (bundle.name, runtime)
    if key not in _MADE:
        place = out.parent / "made"
        _MADE[key] = exported(bundle, runtime, place), place
    said, place = _MADE[key]
    shutil.copytree(place, out)
    return said


def run_as_told(folder: Path, text: str) -> str:
    """The label that the lines of a README print, run as they stand."""
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert lines
    program = lines.group(1).replace("PATH", str(folder)).replace('"TEXT"', repr(text))
    said: list[object] = []
    exec(program, {"print": said.append})  # noqa: S102 - our own card
    ((label,),) = said  # type: ignore[misc]
    return str(label)


@pytest.mark.parametrize(
    ("pooling", "chip"), [("last", "linear"), ("mean", "linear"), ("max", "mlp"), ("raw", "linear")]
)
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_graph_says_what_the_bundle_says(finished, tmp_path, pooling, chip, runtime):  # noqa: F811
    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    out = tmp_path / "out"
    said = graph_of(bundle, runtime, out)
    assert said.n_agree == said.n_checked
    assert said.max_difference < 1e-5
    classifier = load(bundle)
    texts = [*TEXTS, *ODD, *hard_endings(classifier.tokenizer)]
    truth = classifier.predict(texts)
    read = PreTrainedTokenizerFast.from_pretrained(out)
    run = graph.open_graph(out, runtime)
    for start, size in ((0, 1), (1, 3), (4, len(texts) - 4)):
        given = read(texts[start : start + size], padding=True, return_tensors="np")
        found = run({name: given[name] for name in ("input_ids", "attention_mask")})
        shares = torch.from_numpy(found).softmax(dim=1).numpy()
        for row, one in zip(shares, truth[start : start + size], strict=True):
            assert np.abs(row - list(one.probabilities.values())).max() < 1e-4
    assert run_as_told(out, TEXTS[3]) == truth[3].label


def test_every_encoder_goes_into_a_graph_too(finished_encoder, tmp_path):  # noqa: F811
    _, bundle = built(finished_encoder, tmp_path, "mean", fresh=False)
    for runtime in ("onnx", "openvino"):
        out = tmp_path / runtime
        assert exported(bundle, runtime, out).max_difference < 1e-5
        assert run_as_told(out, TEXTS[1]) == load(bundle).predict([TEXTS[1]])[0].label


@pytest.mark.parametrize(("pooling", "chip"), [("mean", "linear"), ("max", "mlp")])
def test_a_graph_meets_the_contract_of_embedding_servers(finished, tmp_path, pooling, chip):  # noqa: F811
    import onnxruntime

    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    out = tmp_path / "out"
    graph_of(bundle, "onnx", out)
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
    inputs = {one.name: (one.type, one.shape) for one in session.get_inputs()}
    axes = ("tensor(int64)", ["batch", "length"])
    assert inputs == {"input_ids": axes, "attention_mask": axes}
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("logits", ["batch", 3])]
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"][0].endswith("SequenceClassification")
    labels = load(bundle).metadata.task.label_names
    assert config["id2label"] == {str(i): name for i, name in enumerate(labels)}
    assert config["label2id"] == {name: i for i, name in enumerate(labels)}
    wanted = {"model_type", "max_position_embeddings", "pad_token_id", "hidden_size"}
    assert {name for name in wanted if config.get(name) is None} == set()
    assert config["num_hidden_layers"] == 2
    assert (out / "tokenizer.json").is_file()


def test_weights_beyond_a_gibibyte_lie_beside_the_graph(finished, tmp_path, monkeypatch):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    monkeypatch.setattr(graph, "MAX_INSIDE", 1)
    out = tmp_path / "out"
    exported(bundle, "onnx", out)
    assert {f.name for f in (out / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    run = graph.open_graph(moved, "onnx")
    given = {name: np.ones((2, 3), dtype=np.int64) for name in ("input_ids", "attention_mask")}
    assert run(given).shape == (2, 3)


def test_what_differs_is_not_kept(finished, tmp_path, monkeypatch):  # noqa: F811
    _, bundle = built(finished, tmp_path, "last", fresh=False)
    true = graph.open_graph

    def wrong(folder, runtime):
        run = true(folder, runtime)
        return lambda given: run(given) + np.array([0.05, 0, 0], dtype=np.float32)

    monkeypatch.setattr(graph, "open_graph", wrong)
    with pytest.raises(BundleError, match="differs from the bundle"):
        exported(bundle, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_rounded_weights_keep_the_labels_or_are_refused(finished, tmp_path, runtime):  # noqa: F811
    _, bundle = built(finished, tmp_path, "last", fresh=False)
    out, rows = tmp_path / "out", [(text, None) for text, _ in planted_rows(200)]
    with pytest.raises(ConfigError, match="100 rows or more"):
        export(bundle, runtime, out, rows=rows[:50], progress=silent, int8=True)
    plain = graph_of(bundle, runtime, tmp_path / "plain")
    refused = ""
    try:
        said = export(bundle, runtime, out, rows=rows, progress=silent, int8=True)
    except BundleError as error:
        refused = error.message
    if refused:
        assert "of the labels" in refused
        assert not out.exists()
        return
    read = PreTrainedTokenizerFast.from_pretrained(out)
    run, names = graph.open_graph(out, runtime), load(bundle).metadata.task.label_names
    same = 0
    for (text, _), one in zip(rows, load(bundle).predict([t for t, _ in rows]), strict=True):
        given = read([text], return_tensors="np")
        found = run({name: given[name] for name in ("input_ids", "attention_mask")})
        same += names[int(found.argmax())] == one.label
    assert same >= 0.99 * len(rows)
    assert said.max_difference > 0, "something was rounded"
    assert said.n_bytes < plain.n_bytes


@pytest.mark.parametrize(
    ("pooling", "chip", "runtime"), [("mean", "linear", "openvino"), ("max", "mlp", "onnx")]
)
def test_weights_of_a_chip_that_cancel_are_never_rounded(
    finished,  # noqa: F811
    tmp_path,
    runtime,
    pooling,
    chip,
):
    """A large part that all classes share says nothing, and would swallow the rest in 8 bits."""
    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    name = "model.safetensors" if pooling == "mean" else "chip.safetensors"
    weights = load_file(bundle / name)
    key = "score.weight" if pooling == "mean" else "weight"
    weights[key] += 200 * torch.randn(
        weights[key].shape[1], generator=torch.Generator().manual_seed(0)
    )
    save_file(weights, bundle / name, {"format": "pt"})
    rows = [(text, None) for text, _ in planted_rows(200)]
    classifier = load(bundle)
    example = Batches.of(classifier, rows).example
    folder = tmp_path / "out"
    folder.mkdir()
    written.write(bundle, classifier, runtime, folder, example, int8=True)
    run = graph.open_graph(folder, runtime)
    found = run({name: value.numpy() for name, value in example.items()})
    with torch.inference_mode():
        truth = classifier.scores(example["input_ids"], example["attention_mask"])
    assert np.abs(softmax(found, axis=1) - truth.softmax(dim=1).numpy()).max() < 0.15


def test_a_mean_chip_becomes_a_sequence_folder_for_vllm(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    out = tmp_path / "out"
    exported(bundle, "vllm", out)
    model, found = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), "every weight has its place"
    assert model.score.bias is None
    read = PreTrainedTokenizerFast.from_pretrained(out)
    for text, one in zip(TEXTS, load(bundle).predict(TEXTS), strict=True):
        with torch.inference_mode():
            states = model.base_model(**read(text, return_tensors="pt")).last_hidden_state
            label = int(model.score(states.mean(dim=1)).argmax())  # what MEAN pooling does there
        assert model.config.id2label[label] == one.label
    card = (out / "README.md").read_text()
    assert '"pooling_type": "MEAN"' in card
    assert "--dtype float32" in card


def test_a_chip_with_a_bias_does_not_go_to_vllm(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    (file,) = bundle.glob("model*.safetensors")
    weights = load_file(file)
    weights["score.bias"] = torch.tensor([1.0, 0.0, 0.0])
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(BundleError, match="has a bias"):
        exported(bundle, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pooling", "chip"), [("last", "linear"), ("mean", "linear"), ("max", "mlp")]
)
def test_sentence_transformers_embeds_what_the_chip_reads(finished, tmp_path, pooling, chip):  # noqa: F811
    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    out = tmp_path / "out"
    exported(bundle, "sentence-transformers", out)
    for text in (TEXTS[0], ODD[1], ODD[2]):
        assert run_as_told(out, text) == load(bundle).predict([text])[0].label


def test_the_first_token_of_an_encoder_is_embedded_too(finished_encoder, tmp_path):  # noqa: F811
    _, bundle = built(finished_encoder, tmp_path, "first", fresh=False)
    exported(bundle, "sentence-transformers", tmp_path / "out")
    for text in (TEXTS[0], ODD[2]):
        assert run_as_told(tmp_path / "out", text) == load(bundle).predict([text])[0].label


def read_gguf(folder):
    """By transformers' own reader."""
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    return AutoModel.from_pretrained(folder, **options).eval()


def of_family(name, **changes):
    if name in ("mistral", "qwen3"):  # llama's shape
        return replace(NAMED["llama"], name=name).published(sliding_window=None, **changes)
    return NAMED[name].published(**changes)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_holds_the_numbers_of_its_model(tmp_path, name, dtype):
    """Written by our own hand, read by transformers' reader of GGUF."""
    model = of_family(name).base_model
    stored = {name: value.to(dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(stored)  # rounded, in float32
    llama_cpp.write_file(model.config, stored, tmp_path)
    read = read_gguf(tmp_path)
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        truth = model(ids).last_hidden_state
        said = read(ids).last_hidden_state
    torch.testing.assert_close(said, truth, atol=2e-5, rtol=1e-4)
    reader = GGUFReader(tmp_path / "model.gguf")
    kinds = {str(t.name): t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == {torch.float32: "F32"}.get(dtype, "BF16")
    assert kinds["output_norm.weight"] == "F32"


class _Embeds(BaseHTTPRequestHandler):
    """Answers as llama-server's /embedding does, from the file itself."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = torch.tensor([asked["content"]])
        with torch.inference_mode():
            states = self.server.model(ids).last_hidden_state
        pooled = pool(states, torch.ones_like(ids), self.server.pooling)
        answer = json.dumps([{"index": 0, "embedding": pooled.tolist()}]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("pooling", "chip"), [("last", "linear"), ("mean", "mlp")])
def test_an_embedding_server_of_llama_cpp_is_asked_by_the_cards_lines(
    finished,  # noqa: F811
    tmp_path,
    pooling,
    chip,
):
    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    out = tmp_path / "out"
    said = exported(bundle, "gguf", out)
    assert said.n_agree == said.n_checked
    assert said.max_difference < 1e-5
    assert f"--pooling {pooling} --embd-normalize -1" in (out / "README.md").read_text()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Embeds)
    server.model, server.pooling = read_gguf(out), pooling
    Thread(target=server.serve_forever, daemon=True).start()
    lines = (out / "README.md").read_text().replace(":8080/", f":{server.server_port}/")
    (out / "README.md").write_text(lines)
    try:
        for text in (TEXTS[0], ODD[1], ODD[2]):
            assert run_as_told(out, text) == load(bundle).predict([text])[0].label
    finally:
        server.shutdown()
        server.server_close()


def test_what_llama_cpp_would_compute_otherwise_is_refused(
    finished,  # noqa: F811
    finished_encoder,  # noqa: F811
    tmp_path,
):
    _, bundle = built(finished_encoder, tmp_path / "bert", "mean", fresh=False)
    with pytest.raises(ConfigError, match="is not written as GGUF"):
        exported(bundle, "gguf", tmp_path / "out")
    _, bundle = built(finished, tmp_path / "max", "max", fresh=False)
    with pytest.raises(ConfigError, match="pools normed states"):
        exported(bundle, "gguf", tmp_path / "out")
    config = of_family("llama").config
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(BundleError, match="positions of kind linear"):
        llama_cpp.write_file(config, {}, tmp_path)
    config = of_family("mistral").config
    config.sliding_window = 8
    with pytest.raises(BundleError, match="sliding window"):
        llama_cpp.write_file(config, {}, tmp_path)


def test_replaced_modules_go_to_no_stock_loader(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    (bundle / "surgery.json").write_text("{}")
    with pytest.raises(BundleError):
        exported(bundle, "sentence-transformers", tmp_path / "out")
    classifier = load(built(finished, tmp_path / "whole", "mean", fresh=False)[1])
    with pytest.raises(BundleError, match="were replaced"):
        folders.write_embedder(bundle, classifier, tmp_path / "out")


def test_a_bundle_that_says_nothing_of_its_backbone_is_refused_in_words(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    said = json.loads((bundle / "chip.json").read_text())
    said.pop("backbone")
    (bundle / "chip.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="build it again"):
        exported(bundle, "head", tmp_path / "out")


@pytest.mark.parametrize(
    ("pooling", "chip"), [("last", "linear"), ("mean", "linear"), ("max", "mlp"), ("raw", "linear")]
)
def test_a_chip_alone_reads_the_whole_backbone(finished, tmp_path, pooling, chip):  # noqa: F811
    config, _, home, _ = finished
    _, bundle = built(finished, tmp_path, pooling, chip=chip, fresh=False)
    out = tmp_path / "head"
    assert exported(bundle, "head", out).n_bytes < 100_000
    alone = load_head(out, config.backbone, home=home, progress=silent)
    texts = [*TEXTS, *ODD]
    for ours, truth in zip(alone.predict(texts), load(bundle).predict(texts), strict=True):
        assert ours.label == truth.label
        assert ours.probabilities == pytest.approx(truth.probabilities, abs=1e-5)


def test_a_chip_alone_refuses_another_backbone(finished, finished_encoder, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    exported(bundle, "head", tmp_path / "head")
    other = finished_encoder[0].backbone
    with pytest.raises(BundleError, match="another model"):
        load_head(tmp_path / "head", other, home=finished[2], progress=silent)
    note = tmp_path / "head" / "head.json"
    said = json.loads(note.read_text())
    said["prompt"]["sha256"] = "0" * 64
    note.write_text(json.dumps(said))
    with pytest.raises(BundleError, match="tokenizer beside"):
        load_head(tmp_path / "head", finished[0].backbone, home=finished[2], progress=silent)


@pytest.mark.parametrize("damage", ["[]", "{", '{"format": 1}', '{"format": 2, "cut": 1}'])
def test_a_damaged_head_is_refused_in_a_sentence(finished, tmp_path, damage):  # noqa: F811
    folder = tmp_path / "head"
    folder.mkdir()
    (folder / "head.json").write_text(damage)
    with pytest.raises(ChipvizError, match="no chip alone"):
        load_head(folder, finished[0].backbone, home=finished[2], progress=silent)


def test_places_say_why_they_cannot(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "max", chip="mlp", fresh=False)
    metadata = read_metadata(bundle)
    assert "last token or the mean" in str(targets.refusal("vllm", metadata))
    assert targets.refusal("onnx", metadata) is None
    _, raw = built(finished, tmp_path, "raw", fresh=False)
    assert "final norm" in str(targets.refusal("sentence-transformers", read_metadata(raw)))
    with pytest.raises(ConfigError, match="No export for vllm"):
        exported(bundle, "vllm", tmp_path / "out")
    with pytest.raises(ConfigError, match="no 8-bit weights"):
        exported(bundle, "head", tmp_path / "out", int8=True)


def test_a_name_on_a_command_line_is_one_word(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    note = bundle / "chip.json"
    said = json.loads(note.read_text())
    said["backbone"]["name"] = "a; rm -rf ~\n`b` $(c)"
    note.write_text(json.dumps(said))
    words = shlex.split(targets.use("head", read_metadata(bundle)))
    assert words[words.index("--backbone") + 1] == "a; rm -rf ~ `b` $(c)"


def test_only_an_export_is_overwritten(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no export"):
        exported(bundle, "head", out)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BundleError, match="inside the bundle"):
        exported(bundle, "head", bundle / "head")
    exported(bundle, "head", tmp_path / "again")
    assert exported(bundle, "head", tmp_path / "again").n_bytes > 0


def test_the_command_compares_on_the_rows_of_the_run(finished, tmp_path):  # noqa: F811
    config, _, home, _ = finished
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    rows = rows_of_run(read_metadata(bundle), home)
    assert len(rows) > 60
    done = chipviz(home, "export", str(bundle), "--to", "head", "--out", str(tmp_path / "head"),
                   "--json")  # fmt: skip
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert said["n_checked"] >= len(rows)
    assert said["n_agree"] == said["n_checked"]
    asked = chipviz(home, "predict", str(tmp_path / "head"), "--backbone", config.backbone,
                    "--text", TEXTS[0], "--json")  # fmt: skip
    assert asked.status == 0, asked.err
    (one,) = json.loads(asked.out)["predictions"]
    assert one["label"] == load(bundle).predict([TEXTS[0]])[0].label
    refused = chipviz(home, "export", str(bundle), "--to", "abacus", "--out", str(tmp_path / "x"))
    assert refused.status == 1
    assert "There is no target 'abacus'" in refused.err


def test_a_run_id_is_no_path(finished, tmp_path):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)
    note = bundle / "chip.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps(said | {"run_id": "../../runs/one"}))
    assert rows_of_run(read_metadata(bundle), finished[2]) == []


def test_a_missing_converter_is_a_sentence(finished, tmp_path, monkeypatch):  # noqa: F811
    _, bundle = built(finished, tmp_path, "mean", fresh=False)

    def absent(*_args, **_options):
        raise ImportError("No module named 'onnxscript'")

    monkeypatch.setattr(graph, "_exporter", absent)
    with pytest.raises(BundleError, match="not installed") as caught:
        exported(bundle, "onnx", tmp_path / "out")
    assert "requirements-export.txt" in caught.value.hint
