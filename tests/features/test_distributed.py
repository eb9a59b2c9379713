"""Several processes read for one run: the scores of one process, and no helper left behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from chipviz.backbones.backbone import fast_dtype
from chipviz.features.distributed import ALONE, is_helper, join


def test_a_process_alone_shares_with_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is ALONE
    assert ALONE.leads
    assert ALONE.share("value") == "value"
    assert ALONE.gather(3) == [3]


@pytest.mark.parametrize(
    ("size", "rank", "helps"), [("2", "1", True), ("2", "0", False), ("1", "0", False)]
)
def test_helpers_are_known_by_their_launchers_environment(monkeypatch, size, rank, helps):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert is_helper() is helps


def launch(arguments, *, processes):
    begin = [sys.executable, "-m"]
    if processes > 1:
        begin += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
    return subprocess.run(
        [*begin, "chipviz", *arguments],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )


PRETRAIN = [
    *("prune", "--method", "bottom", "--layers", "1", "--length", "16", "--heal", "pretrain"),
    *("--tokens", "1500", "--lr", "0.003", "--batch", "6", "--json"),
]


def test_two_processes_pretrain_what_one_would(tiny_backbone_folder, toy_csv, tmp_path):
    fast_dtype(torch.device("cpu"), tmp_path)
    memory = tmp_path / "fast_dtype.json"  # parts of a step are rounded apart in bfloat16
    memory.write_text(memory.read_text().replace("bfloat16", "float32"))
    weights, records = [], []
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        shutil.copy(tmp_path / "fast_dtype.json", home)
        where = ["--backbone", tiny_backbone_folder, "--calibrate", toy_csv, "--name", "healed"]
        done = launch([str(a) for a in ["--home", home, *PRETRAIN, *where]], processes=processes)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        records.append(json.loads(done.stdout))
        weights.append(load_file(home / "models" / "healed" / "model.safetensors"))
        assert [folder.name for folder in (home / "models").iterdir()] == ["healed"]
    one, two = records
    assert two["perplexity_after"] < two["perplexity_pruned"]
    assert two["perplexity_after"] == pytest.approx(one["perplexity_after"], rel=1e-3)
    gaps = torch.cat([(weights[1][n] - value).abs().flatten() for n, value in weights[0].items()])
    # AdamW's first steps are as long for a gradient of 1e-9 as for any, and such a one may turn.
    assert float((gaps > 5e-4).float().mean()) < 1e-3


def test_two_processes_end_with_the_scores_of_one(tiny_backbone_folder, toy_csv, tmp_path):
    found = []
    fast_dtype(torch.device("cpu"), tmp_path)  # measured once: two homes might choose differently
    for processes in (1, 2):
        home = tmp_path / str(processes)
        home.mkdir()
        shutil.copy(tmp_path / "fast_dtype.json", home)
        arguments = ["--home", home, "train", "--backbone", tiny_backbone_folder, "--data", toy_csv]
        arguments += ["--template", "{text} :", "--max-length", "24", "--json"]
        done = launch([str(a) for a in arguments], processes=processes)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        found.append(json.loads(done.stdout))
        assert len(list((home / "runs").iterdir())) == 1
    one, two = found
    assert two["scores"] == one["scores"]
    assert two["selection"] == one["selection"]
    assert two["timing"]["n_tokens"] == one["timing"]["n_tokens"]
