"""Linear chips on real states of a real backbone: scikit-learn's answers, and none from noise.

Needs the real data sets beside the checkout (or CHIPVIZ_DATA) and the embedded backbone.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chipviz.backbones.backbone import fast_dtype
from chipviz.backbones.find import fetch_backbone
from chipviz.chips.linear import STRENGTHS, Turn, fit_linear
from chipviz.chips.rows import Rows
from chipviz.config import RunConfig
from chipviz.data import tables
from chipviz.data.from_table import make_task
from chipviz.data.prompt import bake, load_tokenizer
from chipviz.features.extract import extract
from chipviz.keys import Vector
from tests.conftest import shared_home
from tests.families import load_backbone

pytestmark = pytest.mark.slow
DATA = Path(os.environ.get("CHIPVIZ_DATA") or Path(__file__).resolve().parents[3] / "shared/data")
SIZES = {  # most training and test texts, most tokens of one
    "sst2": (600, 900, 48),
    "banking77": (800, 1_500, 32),
    "20newsgroups": (400, 680, 48),
}
LAYERS = (12, 29)
LAST = Vector.named("last")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}; set CHIPVIZ_DATA")
    home = shared_home(tmp_path_factory)
    os.environ.pop("HF_HUB_OFFLINE", None)
    folder = fetch_backbone("smollm2-135m", home)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_backbone(folder, "smollm2-135m", dtype=fast_dtype(torch.device("cpu"), home))
    yield home, model
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SIZES)
def real(request, backbone):
    """One data set's states of a middle and the last layer, and its labels."""
    home, model = backbone
    n_train, n_test, max_length = SIZES[request.param]
    config = RunConfig.checked(
        backbone="smollm2-135m",
        data=str(DATA / request.param),
        max_train=n_train,
        max_validation=100,
        max_test=n_test,
        max_length=max_length,
    )
    task = make_task(tables.read_table(config.data, home), config)
    prompt = bake(load_tokenizer(model.folder.path), None, max_length, task.splits["train"])
    features = extract(model, prompt, task, home, vectors=(LAST,)).features
    return Rows(features, task, torch.device("cpu"))


def reader(rows, split, layer):
    return rows.reader(split, LAST, [layer])


@pytest.mark.parametrize("layer", LAYERS)
def test_chips_on_real_states_are_scikit_learns(real, layer):
    labels, test = real.labels("train"), real.labels("test")
    n, n_classes = len(labels), real.task.n_classes
    turn = Turn.of(reader(real, "train", layer), n)
    rows, held_out = (
        turn.into(reader(real, split, layer)(0, len(real.task.splits[split])))[0]
        for split in ("train", "test")
    )
    ours = turn.forth(fit_linear(reader(real, "train", layer), labels, n_classes)[0])
    for strength, weight in zip(STRENGTHS, ours, strict=True):
        two = n_classes == 2  # it keeps one weight of two; ours are its halves
        peer = LogisticRegression(
            C=(2 if two else 1) * strength, fit_intercept=False, tol=2e-5, max_iter=5000
        ).fit(rows.numpy(), labels.numpy())
        theirs = torch.from_numpy(np.asarray(peer.coef_)).float()
        theirs = torch.cat([-theirs, theirs]) / 2 if two else theirs

        def objective(w, c=strength):
            nll = torch.nn.functional.cross_entropy(rows.double() @ w.double().T, labels)
            return (nll + w.double().square().sum() / (2 * c * n)).item()

        assert objective(weight) == pytest.approx(objective(theirs), rel=1e-3)
        right = [
            ((held_out @ w.T).argmax(1) == test).double().mean().item() for w in (weight, theirs)
        ]
        assert right[0] == pytest.approx(right[1], abs=0.003)


def test_shuffled_labels_score_at_chance(real):
    """On average over shuffles: one of them may well lean the right way by chance."""
    labels, test = real.labels("train"), real.labels("test")
    share = float(torch.bincount(test).max()) / len(test)
    for layer in LAYERS:
        rows = reader(real, "test", layer)(0, len(test))[0]
        right = []
        for seed in range(6):
            shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            weights = fit_linear(
                reader(real, "train", layer), labels[shuffle], real.task.n_classes
            )[0]
            right.append(((rows @ weights.mT).argmax(-1) == test).double().mean(dim=-1))
        assert torch.stack(right).mean(dim=0).max().item() <= share + 0.05
