"""What each layer's chip says at each token of one text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chipviz.backbones.backbone import Backbone, watch_layers
from chipviz.backbones.pooling import pool, pool_so_far
from chipviz.backbones.sites import FFN_SITES
from chipviz.chips.chip import Chip, Chips
from chipviz.data.prompt import Prompt, encode
from chipviz.data.task import check_fields
from chipviz.features.forward import watch_neurons
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut
from chipviz.results.answers import Token, TokenReading


@torch.inference_mode()
def read_tokens(
    backbone: Backbone,
    prompt: Prompt,
    chips: Chips,
    text: str,
    *,
    cut: Cut,
    label_names: Sequence[str],
    text_pair: str | None = None,
    single: bool = False,
) -> TokenReading:
    """Read one text, or two, with the chips of all layers, token by token.

    In a causal model the answer at a token has seen only the text up to it. A chip on the mean, or
    on the maximum, is asked about the text so far, so that its last answer is that for the text.

    Args:
        backbone: The run's own.
        prompt: The run's own.
        chips: The run's own.
        text: The user's text, without the template.
        cut: Which chips to ask, and the layer whose probabilities are wanted in full.
        label_names: Names of the classes.
        text_pair: The second text, where the task has one.
        single: Ask such a chip about each token alone. It was trained on whole texts, so that is
            an extrapolation.

    Raises:
        ConfigError: If the second text is missing, or given where one text is read.
    """
    check_fields(prompt.takes_pair, [text], None if text_pair is None else [text_pair])
    device = backbone.device
    pairs = None if text_pair is None else [text_pair]
    encoding = encode(prompt.tokenizer, [text], pairs, return_offsets_mapping=True)
    ids = torch.tensor(encoding["input_ids"], device=device)
    mask = torch.ones_like(ids)
    if cut.chip.joins or cut.chip.site in FFN_SITES:
        probabilities, whole = _joined(backbone, chips, cut.chip, ids, single=single)
        return _reading(
            prompt, encoding, [text, text_pair or ""], probabilities, whole, cut, label_names
        )
    at_tokens: list[Tensor] = []
    for_text: list[Tensor] = []

    def on_hidden(at: int, hidden: Tensor) -> None:
        if at == EMBEDDING_LAYER:
            return
        own = chips.at(Cut(at, cut.chip)).to(hidden.device)
        states = (hidden if cut.chip.site == "raw" else backbone.apply_final_norm(hidden)).float()
        so_far = states[0] if single else pool_so_far(states[0], cut.chip.pooling)
        at_tokens.append(own.probabilities(so_far).cpu())
        whole = pool(states, mask.to(states.device), cut.chip.pooling)
        for_text.append(own.probabilities(whole)[0].cpu())

    with watch_layers(backbone, on_hidden):
        backbone.forward(ids, mask)
    probabilities = torch.stack(at_tokens)  # (L, T, C)
    whole = torch.stack(for_text)  # (L, C)
    return _reading(
        prompt, encoding, [text, text_pair or ""], probabilities, whole, cut, label_names
    )


def _joined(
    backbone: Backbone, chips: Chips, key: ChipKey, ids: Tensor, *, single: bool
) -> tuple[Tensor, Tensor]:
    """What the classifier of every depth says at each token, (L, T, C), and of the text, (L, C).

    A classifier on the mean or the maximum is asked about the text so far, or, `single`, about each
    token's own values. Both are outside of what it was trained on but for the last token's.
    """
    mask = torch.ones_like(ids)
    at_tokens, of_text = [], []
    for chip, values in read_depths(
        backbone, chips, key, ids.shape, lambda: backbone.forward(ids, mask)
    ):
        so_far = values if single else pool_so_far(values, key.pooling)
        at_tokens.append(chip.probabilities(so_far))
        whole = pool(values[None], torch.ones(1, len(values)), key.pooling)
        of_text.append(chip.probabilities(whole)[0])
    return torch.stack(at_tokens), torch.stack(of_text)


def read_depths(
    backbone: Backbone,
    chips: Chips,
    key: ChipKey,
    shape: Sequence[int],
    run: Callable[[], None],
) -> list[tuple[Chip, Tensor]]:
    """Chips that read neurons, and what each reads at every token, in one pass.

    Args:
        backbone: The run's own.
        chips: The run's own.
        key: Which of them.
        shape: Rows and tokens of the pass. It has one row.
        run: Makes the pass.

    Returns:
        For every layer its chip and the values of the neurons it reads, shape (T, u), on the CPU.
    """
    layers = range(backbone.n_layers)
    depths = [chips.at(Cut(layer, key)).of_neurons(key.site, layer) for layer in layers]
    places = [depth.neurons for depth in depths if depth.neurons is not None]
    neurons, which = torch.cat(places).unique(dim=0, return_inverse=True)
    with watch_neurons(backbone, neurons, shape, lambda values: values[0].float()) as taken:
        run()
        values = taken().cpu()  # (T, U)
    own = which.split([len(place) for place in places])
    return [(depth, values[:, columns]) for depth, columns in zip(depths, own, strict=True)]


def _reading(
    prompt: Prompt,
    encoding: Any,
    texts: list[str],
    probabilities: Tensor,
    whole: Tensor,
    cut: Cut,
    label_names: Sequence[str],
) -> TokenReading:
    confidence, label = probabilities.max(dim=-1)
    return TokenReading(
        tokens=_pieces(prompt.tokenizer, encoding, texts),
        layer=cut.layer,
        label_index=label.tolist(),
        confidence=rounded(confidence),
        at_cut=rounded(probabilities[cut.layer]),
        by_layer=rounded(whole),
        settled_layer=settled_layer(whole.argmax(dim=-1)),
        label_names=list(label_names),
    )


def settled_layer(answers: Tensor) -> int:
    """The shallowest layer from which on every answer (L,) is the last one."""
    differs = (answers != answers[-1]).nonzero()
    return int(differs[-1]) + 1 if len(differs) else 0


def rounded(values: Tensor) -> list[Any]:
    """Rows of numbers as plain data, four decimals each."""
    return [[round(v, 4) for v in row] for row in values.tolist()]


def _pieces(tokenizer: Any, encoding: Any, texts: list[str]) -> list[Token]:
    """Every token as it stands in the prompt. Those of the template have no place in a text."""
    pieces = []
    spans = zip(
        *(encoding["input_ids"][0], encoding["offset_mapping"][0], encoding.sequence_ids(0)),
        strict=True,
    )
    for token, (start, end), which in spans:
        shown = tokenizer.decode([token]) if which is None else texts[which][start:end]
        pieces.append(Token(shown, start, end, in_text=which == 0, in_pair=which == 1))
    return pieces
