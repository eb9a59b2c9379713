"""The embedded example on the real backbone: the figures the README and the design promise.

The same command a user types, in a fresh process; what it fetches is kept between sessions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chipviz.config import EXAMPLE
from tests.conftest import shared_home

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    home = shared_home(tmp_path_factory)
    command = [sys.executable, "-m", "chipviz", "--home", str(home), "train", "--json"]
    for option, value in EXAMPLE.items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


def accuracies(shown, pooling):
    return {
        s["layer"]: s["accuracy"]
        for s in shown["scores"]
        if s["pooling"] == pooling and s["split"] == "test" and s["layer"] >= 0
    }


def test_the_last_token_curve_shows_the_drastic_change(shown):
    last = accuracies(shown, "last")
    assert len(last) == 30
    assert max(last[layer] for layer in range(21)) < 0.90
    assert min(last[layer] for layer in range(23, 30)) > 0.91


def test_the_mean_is_good_long_before(shown):
    assert accuracies(shown, "mean")[8] > 0.92


def test_rules_name_a_layer_and_why_and_the_ratios_are_right(shown):
    n_published = 134_515_008
    embedding, norm = 49_152 * 576, 576
    block = (n_published - embedding - norm) // 30
    for rule in ("validate", "within"):
        chosen = shown["selection"][rule]
        layer, pooling = chosen["cut_layer"], chosen["pooling"]
        assert chosen["why"]
        chip = 5 * 576 + (5 if pooling == "mean" else 0)
        kept = embedding + norm + block * (layer + 1) + chip
        assert chosen["layer_ratio"] == pytest.approx((29 - layer) / 30, abs=1e-6)
        assert chosen["parameter_ratio"] == pytest.approx(1 - kept / n_published, abs=1e-6)


def test_chips_beat_what_needs_no_layer(shown):
    best = shown["selection"]["validate"]["test_accuracy"]
    assert best > shown["controls"]["majority"] + 0.5
    assert best > shown["controls"]["embedding"]
