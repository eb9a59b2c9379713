"""Where the parts of a model are: its blocks, its final norm, and whether it reads both ways.

Found by structure and by running it, never by the name of an architecture.
"""

from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chipviz.backbones.vetting import FOREIGN
from chipviz.errors import BackboneError


def find_blocks(
    model: nn.Module, name: str = "the model", path: str | None = None
) -> nn.ModuleList:
    """The list of transformer blocks: the heaviest module list with one entry a layer.

    Args:
        model: Its configuration says how many layers it has.
        name: What the user calls it.
        path: Which list to take, as the model or the published model around it names it. None
            takes the heaviest.

    Raises:
        BackboneError: If there is none.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _no_chain(name, "it has an encoder and a decoder, and is no single chain")
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {
        where: module
        for where, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if path is not None:
        lists = {w: m for w, m in lists.items() if w == path or path.endswith(f".{w}")}
    if not lists:
        at = f" at {path!r}" if path is not None else ""
        raise BackboneError(
            f"{name} has no list of {n_layers} blocks{at}.",
            "chipviz needs a transformer whose layers stand in one module list; say where, such "
            "as transformer.h.",
            "blocks",
        )
    return max(lists.values(), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def find_norm_and_causality(
    model: nn.Module, blocks: nn.ModuleList, name: str, pixels: Tensor | None = None
) -> tuple[nn.Module | None, bool]:
    """The final norm, if there is one, and whether the model is causal: run two texts and look.

    Args:
        model: What is run.
        blocks: Its blocks.
        name: What the user calls it.
        pixels: Two pictures, shape (2, 3, H, W), in place of the texts. Nobody reads those one way.

    Raises:
        BackboneError: If the model is no chain: tokens in, block after block, at most a norm, out.
    """
    entered: list[Tensor] = []
    made: list[tuple[nn.Module, Tensor]] = []
    inside = {id(m) for m in blocks.modules()} - {id(block) for block in blocks}
    handles = [
        module.register_forward_hook(lambda m, _a, out: made.append((m, first_of(out))))
        for module in model.modules()
        if module is not model
        and not isinstance(module, nn.ModuleList)
        and id(module) not in inside
        and not any(child is blocks for child in module.modules())
    ]
    handles += [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: entered.append(entering(args, kwargs)), with_kwargs=True
        )
        for block in blocks
    ]
    inputs = {"pixel_values": pixels} if pixels is not None else _two_texts(model)
    try:
        with torch.inference_mode():
            output = model(**inputs).last_hidden_state
    except FOREIGN as error:
        what = "pixels" if pixels is not None else "tokens"
        raise _no_chain(name, f"it does not run on {what} alone ({str(error)[:80]})") from None
    finally:
        for handle in handles:
            handle.remove()
    norm = _after_blocks(blocks, entered, made, output, name)
    return norm, pixels is None and _is_causal(blocks, made)


def _two_texts(model: nn.Module) -> dict[str, Tensor]:
    """Two texts that differ from the second token on.

    Of the middle of the vocabulary: the first of it are often tokens that no training has seen.
    """
    size = int(cast(Any, model).config.get_text_config().vocab_size)
    ids = torch.tensor([[size // 3, *[other] * 7] for other in (size // 2, size // 4)])
    ids = ids.to(place_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _after_blocks(
    blocks: nn.ModuleList,
    entered: list[Tensor],
    made: list[tuple[nn.Module, Tensor]],
    output: Tensor,
    name: str,
) -> nn.Module | None:
    """What stands between the last block and the output, if anything does."""
    order = [i for i, (module, _) in enumerate(made) if any(module is b for b in blocks)]
    left = [made[i][1] for i in order]
    if len(left) != len(blocks) or len(entered) != len(blocks):
        raise _no_chain(name, "its blocks do not run once each")
    if not all(_same(out, into) for out, into in zip(left[:-1], entered[1:], strict=True)):
        raise _no_chain(name, "something stands between two of its blocks")
    if _same(left[-1], output):
        return None
    # By value: some families reshape after the norm, so the output is another tensor object.
    for module, out in made[order[-1] + 1 :]:
        if isinstance(out, Tensor) and _same(out, output):
            with torch.inference_mode(), suppress(*FOREIGN):
                if _same(module(left[-1]), output):
                    return module
    raise _no_chain(name, "more than a norm stands after its last block")


def _is_causal(blocks: nn.ModuleList, made: list[tuple[nn.Module, Tensor]]) -> bool:
    """Whether the first token of both texts leaves the last block alike, but for rounding.

    Measured: 0 of dense decoders, up to 5 eps of mixtures of experts, 0.1 to 0.5 of encoders.
    """
    last = next(out for module, out in made if module is blocks[-1])
    one, other = last[:, 0].float()
    noise = max(1e-3, 8 * torch.finfo(last.dtype).eps)
    return bool((one - other).norm() <= noise * one.norm())


def padding_is_ignored(model: nn.Module) -> bool:
    """Whether a text alone and the same text padded have the same states, but for rounding.

    Mixing by Fourier transforms, convolutions or landmarks (FNet, ConvBERT, Nystroemformer, YOSO)
    reads padding whatever the mask says: there a text's states depend on its neighbours.
    """
    size = int(cast(Any, model).config.get_text_config().vocab_size)
    text = [size // 3 + i % (size // 4 + 1) for i in range(8)]
    alone = torch.tensor([text], device=place_of(model))
    padded = torch.tensor([text + [0] * 5], device=place_of(model))
    with torch.inference_mode():
        one = model(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state
        mask = (torch.arange(13, device=padded.device) < 8).long()[None]
        other = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :8]
    noise = max(1e-3, 8 * torch.finfo(one.dtype).eps)
    return bool((one.float() - other.float()).norm() <= noise * one.float().norm())


def _no_chain(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"{name} cannot be cut: {why}.",
        "chipviz needs one chain of blocks from tokens to output; if the wrong list was taken, "
        "name the right one, such as transformer.h.",
        "blocks",
    )


def entering(args: Any, kwargs: Any) -> Tensor:
    """The hidden states that a block is given."""
    return args[0] if args else kwargs["hidden_states"]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def text_part(model: nn.Module) -> Any:
    """The part that reads text, of a model that sees or hears as well."""
    text = type(cast(Any, model).config.get_text_config())
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return next((m for m in parts if type(m.config) is text), model)


def place_of(model: nn.Module) -> torch.device:
    """Where a model is, or its first part that is not put away to disk."""
    places = (p.device for p in model.parameters())
    return next((device for device in places if device.type != "meta"), torch.device("cpu"))


def first_of(output: Any) -> Tensor:
    """Blocks return a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def refuse_unknown_token(largest: int, model: nn.Module, name: str) -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings.

    Args:
        largest: The largest token of any text.
        model: The base model, or a classifier around it.
        name: What the user calls it.

    Raises:
        BackboneError: If there is no embedding for it.
    """
    n_known = getattr(cast(Any, model).get_input_embeddings(), "num_embeddings", None)
    if n_known is not None and largest >= n_known:
        raise BackboneError(
            f"A text holds token {largest}, and {name} has embeddings for {n_known:,}.",
            "Tokenizer and model do not belong together: give the folder as it was published.",
        )
