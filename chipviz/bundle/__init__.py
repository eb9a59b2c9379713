"""The exported classifier: save, verify, load.

`load` is public: the programs on model cards and in the README call it. It is imported when it is
first asked for, so that who only reads a card loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipviz.bundle.classifier import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from chipviz.bundle.classifier import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
