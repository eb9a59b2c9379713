"""Sparsify-then-Classify to the letter of its code: preset *published* together with *stc*.

Two classes, features as they are, scikit-learn's `saga` with an L1 penalty, stopped after so many
passes, and every eta at every depth. Three faults of the public code are named and not repeated:
its probes of all penalties lie under one name, so that chance picks the one whose neurons are
taken; of the passes it keeps the last weights, not the best; and its pooling names are shifted.

Source: arXiv:2311.15983 and its public code, difanj0713/SPIN.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from chipviz.chips.chip import Chip
from chipviz.chips.linear import Read
from chipviz.chips.rows import Rows
from chipviz.chips.stc import ETAS, Aggregated, Neurons
from chipviz.keys import EMBEDDING_LAYER, ChipKey
from chipviz.results.neurons import Aggregate

PENALTIES = (0.1, 0.2, 1.0, 10.0, 100.0)
"""scikit-learn's C: the larger, the weaker."""
SEED = 42
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Passes:
    """How long a classifier is fitted."""

    at_once: int
    """Passes over the texts between two looks at the validation texts."""
    n_looks: int


PROBE = Passes(4, 16)
JOINED = Passes(2, 32)


@contextmanager
def stopped_early() -> Iterator[None]:
    """Say nothing of fits that end before they have converged: here that is on purpose.

    For a whole process: it is entered before threads begin.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        yield


@dataclass(frozen=True)
class Found:
    """The classifier that the held-out texts prefer."""

    weight: Floats
    """Of the second class against the first, shape (D,)."""
    bias: float
    penalty: float
    """scikit-learn's C."""
    accuracy: float
    log_loss: float


def fit(
    features: Floats,
    labels: NDArray[np.int64],
    held: Floats,
    held_labels: NDArray[np.int64],
    passes: Passes,
) -> Found:
    """Fit each penalty and keep what is right most often on the held-out texts.

    Ties go to the stronger penalty, then to fewer passes.

    Args:
        features: Shape (N, D).
        labels: 0 or 1, shape (N,).
        held: Those of the texts that choose, shape (N held, D).
        held_labels: Shape (N held,).
        passes: How long.
    """
    best: Found | None = None
    for penalty in PENALTIES:
        model: Any = LogisticRegression(
            C=penalty,
            l1_ratio=1,
            solver="saga",
            max_iter=passes.at_once,
            warm_start=True,
            random_state=SEED,
        )
        for _ in range(passes.n_looks):
            model.fit(features, labels)
            accuracy = float(np.mean(model.predict(held) == held_labels))
            if best is None or accuracy > best.accuracy:
                loss = log_loss(held_labels, model.predict_proba(held), labels=[0, 1])
                weight, bias = model.coef_[0].copy(), float(model.intercept_[0])
                best = Found(weight, bias, penalty, accuracy, float(loss))
            if model.n_iter_[0] < passes.at_once:
                break  # it has converged
    assert best is not None
    return best


def probes(read: Read, labels: Tensor, held: Read, held_labels: Tensor) -> tuple[Chip, list[float]]:
    """The sparse chips of K layers, and the penalty of each.

    Args:
        read: Features of K layers on the training texts.
        labels: 0 or 1, shape (N,).
        held: Those of the validation texts.
        held_labels: Shape (N held,).
    """
    layers, others = read(0, len(labels)).cpu(), held(0, len(held_labels)).cpu()
    truth, held_truth = labels.numpy(), held_labels.numpy()
    found = [
        fit(own.numpy(), truth, other.numpy(), held_truth, PROBE)
        for own, other in zip(layers, others, strict=True)
    ]
    return _chip(found), [one.penalty for one in found]


def _chip(found: list[Found]) -> Chip:
    """The same classifiers with scores for both classes. The first class's are zero."""
    weight = torch.from_numpy(np.stack([one.weight for one in found])).float()
    bias = torch.tensor([one.bias for one in found])
    return Chip(
        torch.stack([torch.zeros_like(weight), weight], dim=1),
        torch.stack([torch.zeros_like(bias), bias], dim=1),
    )


def join(rows: Rows, key: ChipKey, neurons: Neurons, on_depth: Callable[[int], None]) -> Aggregated:
    """Join the neurons of every depth, with each eta, and keep each depth's best on validation.

    Ties go to fewer neurons.

    Args:
        rows: The texts.
        key: The curve.
        neurons: Those that some eta selects.
        on_depth: Told each depth before its fits. May raise to stop.
    """
    train = rows.gather("train", key.pooling, neurons.places).numpy()
    held = rows.gather("validation", key.pooling, neurons.places).numpy()
    truth = tuple(rows.labels(split).numpy() for split in ("train", "validation"))
    found: list[Found] = []
    tried: list[Aggregate] = []
    for depth in range(EMBEDDING_LAYER, rows.features.n_layers):
        on_depth(depth)
        fits: list[Found] = []
        here: list[Aggregate] = []
        before: NDArray[np.bool_] | None = None
        for eta in ETAS:
            taken = neurons.up_to(depth, eta).numpy()
            if before is not None and np.array_equal(before, taken):
                continue  # this eta selects no neuron more
            before = taken
            fits.append(_joined(train[:, taken], truth[0], held[:, taken], truth[1]))
            here.append(_told(key, depth, eta, int(taken.sum()), fits[-1]))
            wide = np.zeros(len(taken), dtype=np.float32)
            wide[taken] = fits[-1].weight
            fits[-1] = replace(fits[-1], weight=wide)
        best = max(range(len(fits)), key=lambda i: (fits[i].accuracy, -i))
        found.append(fits[best])
        here[best] = here[best].model_copy(update={"chosen": True})
        tried += here
    chip = _chip(found)
    places = neurons.places.expand(len(found), -1, -1)
    stack = Chip(chip.weight, chip.bias, neurons=places)
    return Aggregated(stack, [one.penalty for one in found], None, tried)


def _joined(
    features: Floats, labels: NDArray[np.int64], held: Floats, held_labels: NDArray[np.int64]
) -> Found:
    """Fit one depth with one eta. Without a neuron it answers as often as the classes occur."""
    if features.shape[1]:
        return fit(features, labels, held, held_labels, JOINED)
    share = float(np.mean(labels))
    said = np.full(len(held_labels), share)
    return Found(
        np.zeros(0, dtype=np.float32),
        float(np.log(share / (1 - share))),
        PENALTIES[0],
        float(np.mean((said > 0.5) == held_labels)),
        float(log_loss(held_labels, said, labels=[0, 1])),
    )


def _told(key: ChipKey, depth: int, eta: float, n_selected: int, found: Found) -> Aggregate:
    return Aggregate(
        recipe=key.recipe,
        site=key.site,
        pooling=key.pooling,
        layer=depth,
        eta=eta,
        n_selected=n_selected,
        n_used=int(np.count_nonzero(found.weight)),
        accuracy=found.accuracy,
        log_loss=found.log_loss,
        chosen=False,
    )
