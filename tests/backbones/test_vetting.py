"""Hostile model folders, ids and paths: refused in a sentence, and nothing of theirs has run."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from chipviz.backbones.find import find_model
from chipviz.backbones.vetting import licence_of, vet, vet_weights
from chipviz.data.prompt import load_tokenizer
from chipviz.errors import BackboneError, ChipvizError
from chipviz.files import PROJECT
from tests.families import load_backbone


@pytest.fixture
def folder(tiny_backbone_folder, tmp_path):
    """A copy of the tiny backbone, to be harmed."""
    return Path(shutil.copytree(tiny_backbone_folder, tmp_path / "model"))


@pytest.fixture
def canary(folder, monkeypatch):
    """A module that leaves a mark when it is run, in the folder; nobody may ask a question."""
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    return mark


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


# --- code ---------------------------------------------------------------------------------------

KERNEL = "somebody/evil-kernel"
FOREIGN_CODE = [
    {"attn_implementation": KERNEL},
    {"_attn_implementation": KERNEL},
    {"_attn_implementation_internal": KERNEL},
    {"attn_implementation": {"": "sdpa", "text": f"{KERNEL}@main:forward"}},
    {"attn_implementation": 7},
    {"experts_implementation": KERNEL},
    {"_experts_implementation_internal": KERNEL},
    {"text_config": {"_attn_implementation_internal": KERNEL}},
    {"layers": [{"attn_implementation": "paged|kernels-community/x"}]},
]


@pytest.mark.parametrize("setting", FOREIGN_CODE, ids=str)
def test_b3_a_config_that_asks_for_foreign_kernels_is_refused(folder, canary, setting):
    change(folder / "config.json", **setting)
    with pytest.raises(BackboneError, match="asks for foreign code"):
        load_backbone(folder, "evil", device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("asked", [None, "eager", "sdpa"])
def test_attention_that_comes_with_torch_may_be_named(folder, asked):
    change(folder / "config.json", attn_implementation=asked)
    assert load_backbone(folder, "fine", device="cpu").n_layers == 4


@pytest.mark.parametrize("setting", [{"quant_method": "gptq", "bits": 4}, "evil", [1]], ids=str)
def test_b3_quantised_weights_are_refused(folder, canary, setting):
    change(folder / "config.json", quantization_config=setting)
    with pytest.raises(BackboneError, match="is quantised"):
        load_backbone(folder, "evil", device="cpu")
    assert not canary.exists()


EVIL_MAP = dict.fromkeys(["AutoConfig", "AutoModel", "AutoModelForCausalLM"], "evil.Evil")


def test_b3_code_beside_a_known_model_is_never_run(folder, canary):
    change(folder / "config.json", auto_map=EVIL_MAP)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert load_backbone(folder, "evil", device="cpu").n_layers == 4
    assert load_tokenizer(folder)("the bank")["input_ids"]
    assert not canary.exists()


def test_a_model_that_is_only_code_is_refused(folder, canary):
    change(folder / "config.json", auto_map=EVIL_MAP, model_type="evil")
    with pytest.raises(BackboneError, match="is of no architecture known"):
        load_backbone(folder, "evil", device="cpu")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
    )
    with pytest.raises(ChipvizError, match="No tokenizer can be loaded"):
        load_tokenizer(folder)
    assert not canary.exists()


class Canary:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("listed", [False, True])
def test_b2_pickled_weights_are_refused_and_never_read(folder, canary, listed):
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    if listed:  # as one of the shards of a list that should hold safetensors alone
        index = {"weight_map": {"norm.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"pytorch_model\.bin"):
        load_backbone(folder, "pickled", device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "gone.safetensors"])
def test_weights_that_are_listed_but_not_beside_the_list_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"among its weights|lacks its weight file"):
        vet(folder)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"num_hidden_layers": 1e9}',
        '{"num_hidden_layers": -1}',
    ],
)
def test_a_config_that_is_none_is_refused(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(BackboneError, match=r"config\.json|layers") as refused:
        vet(folder)
    assert "\n" not in refused.value.message


def test_a_config_that_is_a_pipe_is_not_opened(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BackboneError, match="missing or no file"):
        vet(folder)


# --- weights ------------------------------------------------------------------------------------


def safetensors(header, data=b"\0" * 32, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


WHOLE = {"a": entry(0, 16), "b": entry(16, 32)}
BROKEN = {
    "header of 1 GiB": safetensors(WHOLE, size=1 << 30),
    "header of 2^63": safetensors(WHOLE, size=(1 << 63) + 1),
    "header past the end": safetensors(WHOLE, size=10_000),
    "overlap": safetensors({"a": entry(0, 16), "b": entry(8, 24)}),
    "hole": safetensors({"a": entry(0, 8, (2,)), "b": entry(16, 32)}),
    "rest without a name": safetensors({"a": entry(0, 16)}),
    "negative offset": safetensors({"a": entry(-16, 0), "b": entry(0, 32, (8,))}),
    "huge offset": safetensors({"a": entry(0, 1 << 62, (1 << 60,))}),
    "offsets in reverse": safetensors({"a": entry(16, 0)}),
    "name given twice": safetensors(
        b'{"a": '
        + json.dumps(entry(0, 32, (8,))).encode()
        + b', "a": '
        + json.dumps(entry(0, 32, (8,))).encode()
        + b"}"
    ),
    "size of another dtype": safetensors({"a": entry(0, 32, (8,), "F16")}),
    "unknown dtype": safetensors({"a": entry(0, 32, (8,), "X99")}),
    "negative shape": safetensors({"a": entry(0, 32, (-8,))}),
    "shape that overflows": safetensors({"a": entry(0, 32, (1 << 40, 1 << 40))}),
    "no JSON": safetensors(b"\x80\x04N." * 4),
    "deep JSON": safetensors(b"[" * 100_000),
    "a list": safetensors([1, 2]),
    "empty": b"",
    "cut": safetensors(WHOLE)[:-7],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_b4_broken_weights_are_refused_without_being_read(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    before = psutil.Process().memory_info().rss
    with pytest.raises(BackboneError, match="no well-formed safetensors") as refused:
        load_backbone(folder, "broken", device="cpu")
    assert psutil.Process().memory_info().rss - before < 50 << 20
    assert "\n" not in refused.value.message


def test_whole_weights_pass(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(WHOLE))
    vet_weights(tmp_path / "model.safetensors")


def test_a_model_that_lacks_weights_is_refused_rather_than_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks the weights of 1 parts, such as .*layers\.2"):
        load_backbone(folder, "part", device="cpu")


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(folder, "odd", device="cpu")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\n", None),
        ("# no front matter", None),
        ("\xff\xfe", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_card_says(tmp_path, card, said):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert licence_of(tmp_path) == said


# --- ids and paths ------------------------------------------------------------------------------

HOSTILE = [
    *("../../etc", "../model", "..", "./..", "../" * 40, "a/../../b", "owner/../name", "owner/.."),
    *("~nobodyhere", "~nobodyhere/x", "~root/../nosuch", "$HOME/x", "%USERPROFILE%\\x", "C:\\x"),
    *("\\\\host\\x", "\\\\host\\c$\\x", "//host/x", "///x/y", "\\\\?\\C:\\x", "file:///etc/passwd"),
    *("file://host/x", "http://host/x", "https://host/a/b", "ftp://host/x", "git+ssh://h/x"),
    *("s3://bucket/x", "hf://owner/name", "data:text/plain,x", "a\0b", "owner/na\0me", "\0"),
    *("a\nb", "owner/name\n", "\r", "\t", "a\x1b[31mb", "x" * 4096, "owner/" + "x" * 300),
    *("/" + "x" * 300, "-flag", "--revision=x", "-o/x", "owner/-flag", "owner/--x", "owner/name@"),
    *("owner/name@../x", "owner/name@-x", "owner/name@a b", "@main", "owner/name@@", "a b"),
    *(" ", "", "owner/na me", "owner//name", "/owner/name/", "a/b/c", "owner/name;ls", "`ls`"),
    *("$(ls)", "owner/name|x", "owner/name&", "<img src=x>", "{{x}}", "ówner/name", "owner/näme"),
    *("\u202eowner/name", "/dev/zero", "/dev/stdin", "/proc/self/mem", "x.gguf", "../x.gguf"),
]


REFUSED = "There is no folder or file|is no embedded backbone|is no GGUF file|holds no config.json"


@pytest.fixture(scope="module")
def watched():
    """Every file opened, host asked and process started, while the switch is on."""
    seen: list = []
    on = [False]

    def hook(event, args):
        if on[0] and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
            seen.append((event, str(args[0])))

    sys.addaudithook(hook)  # stays for good, and is silent when the switch is off
    yield on, seen
    on[0] = False


@pytest.mark.parametrize("source", HOSTILE, ids=repr)
def test_b1_a_hostile_id_or_path_is_refused_before_anything_is_touched(
    source, home, watched, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    on, seen = watched
    seen.clear()
    on[0] = True
    try:
        with pytest.raises(ChipvizError, match=REFUSED) as refused:
            find_model(source, home)
    finally:
        on[0] = False
    assert not seen
    assert "\n" not in refused.value.message
    assert "\0" not in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("source", ["\\\\host\\x", "//host/x", "file://host/x", "http://host/x"])
def test_b1_names_of_other_machines_are_not_even_looked_for(source, home, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: pytest.fail("looked for"))
    with pytest.raises(ChipvizError, match=REFUSED):
        find_model(source, home)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "text"])
def test_what_is_no_model_file_is_not_read(kind, home, tmp_path):
    path = tmp_path / "x.gguf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("GGML")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ChipvizError, match=r"no folder or file|no GGUF file"):
        find_model(str(path), home)


# --- numbers that would take the memory of the machine --------------------------------------------

HUGE = [
    {"hidden_size": 10**6},
    {"vocab_size": 10**9},
    {"intermediate_size": 10**8},
    {"num_labels": 10**9},
    {"num_attention_heads": 10**9},
    {"num_hidden_layers": 10**9},
    {"vocab_size": 1e12},
]
LOOK = """
import resource, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModel
from chipviz import bundle
from chipviz.backbones.model_folder import open_folder
from chipviz.errors import ChipvizError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in map(Path, sys.argv[1:]):
    before = peak()
    try:
        bundle.load(folder) if (folder / "chip.json").exists() else open_folder(folder, "x")
        print("loaded")
    except ChipvizError as error:
        print(peak() - before, error.message)
"""


def refuse_all_that_is_huge(folder, scratch, names):
    """Each is refused in a sentence, and takes less than 100 MB."""
    folders = []
    for i, change_to in enumerate(HUGE):
        folders.append(shutil.copytree(folder, scratch / f"huge{i}"))
        change(folders[-1] / "config.json", **change_to)
    for name in names:  # sparse: no byte of them is on the disk
        folders.append(shutil.copytree(folder, scratch / f"sparse-{name}"))
        os.truncate(folders[-1] / name, 3 << 30)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(folder), *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONPATH=str(PROJECT)),
    )
    first, *said = done.stdout.splitlines()
    assert first == "loaded"  # what the libraries take is taken
    assert len(said) == len(folders)
    for line in said:
        n_kib, message = line.split(" ", 1)
        assert int(n_kib) < 100_000, message


def test_a_config_cannot_take_the_memory_of_the_machine(folder, tmp_path):
    refuse_all_that_is_huge(folder, tmp_path, ["config.json", "tokenizer.json"])


def test_a_tokenizer_that_cannot_pad_is_refused_in_words(folder):
    change(folder / "tokenizer_config.json", pad_token=None, eos_token=None, unk_token=None)
    with pytest.raises(ChipvizError, match="names no pad, end or unknown token"):
        load_tokenizer(folder)
