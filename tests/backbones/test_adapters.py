"""LoRA adapters and GGUF files become plain folders once, and read as they did before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from chipviz import sources
from chipviz.backbones import adapters
from chipviz.backbones.find import find_model
from chipviz.errors import BackboneError, ChipvizError, SourceError
from chipviz.features.forward import forward_pooled
from chipviz.keys import RAW, Vector
from chipviz.progress import silent
from tests.families import NAMED, load_backbone

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
RAW_AND_LAST = [RAW, Vector.named("last")]
RAW_AND_MEAN = [RAW, Vector.named("mean")]
IDS = [[5, 9, 30, 31], [7, 8, 20, 40, 41, 42]]
KINDS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
    "SEQ_CLS": AutoModelForSequenceClassification,
}
TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query", "dense"]}


def train_adapter(base, folder, kind="CAUSAL_LM", name="llama", **settings):
    """An adapter with random numbers in both of its matrices, and the model it changed."""
    torch.manual_seed(5)
    options = {"num_labels": 3} if kind == "SEQ_CLS" else {}
    model = KINDS[kind].from_pretrained(base, dtype=torch.float32, **options)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], task_type=kind, **settings)
    config.fan_in_fan_out = name == "gpt2"
    tuned = get_peft_model(model, config)
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return tuned.eval()


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("llama", "CAUSAL_LM", {}),
        ("llama", "CAUSAL_LM", {"use_rslora": True, "rank_pattern": {"up_proj": 2}}),
        ("llama", "CAUSAL_LM", {"use_dora": True}),
        ("llama", "CAUSAL_LM", {"modules_to_save": ["embed_tokens"]}),
        ("llama", "SEQ_CLS", {}),
        ("gpt2", "CAUSAL_LM", {}),
        ("bert", "FEATURE_EXTRACTION", {}),
    ],
)
def test_a_merged_adapter_reads_as_peft_itself_does(name, kind, settings, tmp_path, home):
    base = NAMED[name].build(tmp_path / "base")
    tuned = train_adapter(base, tmp_path / "lora", kind, name, **settings)
    folder = find_model(str(tmp_path / "lora"), home, silent)
    assert folder.path.parent == home / "backbones"
    backbone = load_backbone(folder, "tuned", dtype=torch.float32, device="cpu")
    plain = load_backbone(base, "plain", dtype=torch.float32, device="cpu")
    inner = tuned.base_model.model
    inner = inner.base_model if kind != "FEATURE_EXTRACTION" else inner
    for ids in IDS:
        with torch.inference_mode():
            truth = inner(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        got = forward_pooled(backbone, [ids], 2, RAW_AND_LAST)
        for layer in range(5):
            kept = got[1 if layer == 4 else 0][layer, 0]  # the last entry is normed already
            torch.testing.assert_close(kept, truth[layer][0, -1], atol=1e-5, rtol=0)
        without = forward_pooled(plain, [ids], 2, RAW_AND_LAST)
        assert all((a - b).abs().max() > 0.01 for a, b in zip(got, without, strict=True))
    assert backbone.folder.fingerprint != plain.folder.fingerprint


def test_merging_happens_once_and_brings_the_tokenizer(tiny_backbone_folder, tmp_path, home):
    train_adapter(tiny_backbone_folder, tmp_path / "lora")
    first = find_model(str(tmp_path / "lora"), home)
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    assert find_model(str(tmp_path / "lora"), home).path == first.path
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written
    assert (first.path / "tokenizer.json").read_bytes() == (
        tiny_backbone_folder / "tokenizer.json"
    ).read_bytes()
    numbers = load_file(tmp_path / "lora" / adapters.WEIGHTS)
    save_file({k: 2 * v for k, v in numbers.items()}, tmp_path / "lora" / adapters.WEIGHTS)
    assert find_model(str(tmp_path / "lora"), home).path != first.path, (
        "other numbers, another model"
    )


def say(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


HARMS = {
    "another kind": (lambda f: say(f, peft_type="LOHA"), "of kind LOHA, not LoRA"),
    "imports a module": (
        lambda f: say(f, megatron_config={"a": 1}, megatron_core="os"),
        "uses 'megatron_config'",
    ),
    "no backbone": (lambda f: say(f, base_model_name_or_path=None), "does not name its backbone"),
    "backbone is gone": (
        lambda f: say(f, base_model_name_or_path="/nosuch/base"),
        "The backbone of adapter lora is out of reach",
    ),
    "hostile backbone": (
        lambda f: say(f, base_model_name_or_path="file:///etc/passwd"),
        "out of reach",
    ),
    "its own backbone": (lambda f: say(f, base_model_name_or_path=str(f)), "an adapter itself"),
    "malformed": (lambda f: say(f, r="four"), "malformed|does not fit"),
    "other parts": (lambda f: say(f, target_modules=["nosuch"]), "does not fit its backbone"),
    "pickled": (
        lambda f: (f / adapters.WEIGHTS).rename(f / "adapter_model.bin"),
        "holds no adapter_model.safetensors",
    ),
    "broken": (
        lambda f: (f / adapters.WEIGHTS).write_bytes(b"\xff" * 100),
        "no well-formed safetensors",
    ),
    "another shape": (
        lambda f: save_file(
            {k: v[:, :3].clone() for k, v in load_file(f / adapters.WEIGHTS).items()},
            f / adapters.WEIGHTS,
        ),
        "does not fit its backbone",
    ),
    "half of it": (
        lambda f: save_file(
            {k: v for k, v in load_file(f / adapters.WEIGHTS).items() if "lora_A" in k},
            f / adapters.WEIGHTS,
        ),
        "does not fit its backbone",
    ),
}


@pytest.fixture(scope="module")
def trained(tiny_backbone_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    train_adapter(tiny_backbone_folder, folder)
    return folder


@pytest.mark.parametrize(("harm", "said"), HARMS.values(), ids=HARMS.keys())
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    harm, said, trained, tmp_path, home
):
    folder = Path(shutil.copytree(trained, tmp_path / "lora"))
    harm(folder)
    with pytest.raises(ChipvizError, match=said) as refused:
        find_model(str(folder), home)
    assert "\n" not in refused.value.message
    left = list((home / "backbones").glob("*")) if (home / "backbones").exists() else []
    assert not [path for path in left if path.suffix != ".lock"]


# --- GGUF ---------------------------------------------------------------------------------------


def write_gguf(folder, path):
    """The tiny Llama as llama.cpp keeps it, in float32: names, metadata, permuted rotary rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    names += [f"<extra{i}>" for i in range(config.vocab_size - len(names))]
    writer.add_token_list(names)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(names))])
    writer.add_token_merges([" ".join(m) for m in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    theirs = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "mlp.up_proj": "ffn_up",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.model.state_dict().items():
        own = name.removesuffix(".weight")
        array = value.to(torch.bfloat16).float().numpy()
        if own.startswith("layers."):
            _, layer, part = own.split(".", 2)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2)
                array = np.ascontiguousarray(array.reshape(value.shape))
            own = f"blk.{layer}.{theirs[part]}"
        else:
            own = {"embed_tokens": "token_embd", "norm": "output_norm"}[own]
        writer.add_tensor(f"{own}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_reads_as_the_model_it_was_made_of(tiny_backbone_folder, tmp_path, home):
    path = write_gguf(tiny_backbone_folder, tmp_path / "x.gguf")
    # What lies beside a GGUF file takes no part.
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil"}')
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Evil"}}')
    folder = find_model(str(path), home)
    assert folder.path.parent == home / "backbones"
    found = load_backbone(folder, "x", dtype=torch.float32, device="cpu")
    truth = load_backbone(tiny_backbone_folder, "tiny", dtype=torch.bfloat16, device="cpu")
    truth.model.float()
    for ids in IDS:
        got, expected = (forward_pooled(b, [ids], 2, RAW_AND_MEAN) for b in (found, truth))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    plain = AutoTokenizer.from_pretrained(tiny_backbone_folder)
    own = AutoTokenizer.from_pretrained(folder.path)
    for text in ("the old red house", "News: bank\nTopic:", "Résumé 007"):
        assert own(text)["input_ids"] == plain(text)["input_ids"]


def test_a_gguf_file_is_converted_once_wherever_it_lies(tiny_backbone_folder, tmp_path, home):
    path = write_gguf(tiny_backbone_folder, tmp_path / "x.gguf")
    first = find_model(str(path), home).path
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "y.gguf")
    written = (first / "config.json").stat().st_mtime_ns
    assert find_model(str(moved), home).path == first
    assert (first / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("keep", [4, 100, 3000, -1])
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(
    keep, tiny_backbone_folder, tmp_path, home
):
    path = write_gguf(tiny_backbone_folder, tmp_path / "x.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    if keep == -1:
        path.write_bytes(content[:8] + b"\xff" * 16 + content[24:])
    with pytest.raises((BackboneError, SourceError), match=r"GGUF|gguf") as refused:
        find_model(str(path), home)
    assert "\n" not in refused.value.message
    assert [f.suffix for f in (home / "backbones").iterdir()] == [".lock"]


# --- the embedded encoder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 from the package registry."""
    from tests.conftest import shared_home

    try:
        folder = find_model("minilm-l6", shared_home(tmp_path_factory))
    except SourceError as error:
        if "could not be downloaded" not in error.message:
            raise
        pytest.skip(f"the package registry is out of reach: {error.message}")
    return folder


def test_the_embedded_encoder_is_what_it_is_said_to_be(minilm):
    """Cosines of mean states, as its authors publish them for the first two of these sentences."""
    backbone = load_backbone(minilm, "minilm-l6", dtype=torch.float32, device="cpu")
    assert (backbone.n_layers, backbone.hidden_size, backbone.causal) == (6, 384, False)
    assert not load_backbone(minilm, "minilm-l6", dtype=torch.bfloat16, device="cpu").causal
    assert sum(p.numel() for p in backbone.model.parameters()) == 22_713_216
    tokenizer = AutoTokenizer.from_pretrained(minilm.path)
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    states = forward_pooled(backbone, ids, tokenizer.pad_token_id, [Vector.named("mean")])[0][-1]
    states = torch.nn.functional.normalize(states, dim=-1)
    cosines = (states @ states.T).tolist()
    # Source: the README of sentence-transformers, its first example, of this very model.
    assert cosines[0][1] == pytest.approx(0.6660, abs=5e-4)
    assert cosines[0][2] == pytest.approx(0.1046, abs=5e-4)
    assert cosines[1][2] == pytest.approx(0.1411, abs=5e-4)


def test_the_embedded_wheels_are_pinned():
    assert set(sources.BACKBONE_WHEELS) == {"smollm2-135m", "minilm-l6", "dinov2-small"}
    assert all(
        len(w.sha256) == 64 and "==" in w.requirement for w in sources.BACKBONE_WHEELS.values()
    )
