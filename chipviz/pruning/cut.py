"""Backbone + cut layer -> the configuration and weights of the shortened backbone."""

from typing import Any

from torch import Tensor

from chipviz.backbones.backbone import Backbone
from chipviz.errors import ConfigError


def cut_config(backbone: Backbone, cut_layer: int) -> Any:
    """The configuration of blocks 0 .. `cut_layer`.

    Every list with one entry a layer is cut, whatever its name: families keep attention kinds,
    rotary switches and more in such lists, and refuse to load when one has another length.

    Raises:
        ConfigError: If there is no such layer.
    """
    n_layers = backbone.n_layers
    if not 0 <= cut_layer < n_layers:
        raise ConfigError(
            f"Layer {cut_layer} does not exist, layers are 0 to {n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    kept = cut_layer + 1
    values = {
        key: value[:kept] if isinstance(value, list) and len(value) == n_layers else value
        for key, value in backbone.config.to_dict().items()
    }
    values |= {"num_hidden_layers": kept, "use_cache": False}
    for dropped in ("_name_or_path", "architectures", "auto_map"):
        values.pop(dropped, None)
    return type(backbone.config).from_dict(values)


def cut_weights(backbone: Backbone, cut_layer: int) -> dict[str, Tensor]:
    """Weights of the base model up to block `cut_layer`, under their own names."""
    path = next(name for name, m in backbone.model.named_modules() if m is backbone.blocks)

    def is_kept(key: str) -> bool:
        if not key.startswith(f"{path}."):
            return True
        return int(key[len(path) + 1 :].split(".", 1)[0]) <= cut_layer

    return {key: value for key, value in backbone.model.state_dict().items() if is_kept(key)}
