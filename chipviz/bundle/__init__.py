"""The exported classifier: save, verify, load, take elsewhere.

`load` is public: the programs on model cards and in the README call it. What is named here is
imported when it is first asked for, so that who only reads a card loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipviz.bundle.classifier import load
    from chipviz.bundle.export import export_beside
    from chipviz.bundle.join import join_beside

__all__ = ["export_beside", "join_beside", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from chipviz.bundle.classifier import load

        return load
    if name == "export_beside":
        from chipviz.bundle.export import export_beside

        return export_beside
    if name == "join_beside":
        from chipviz.bundle.join import join_beside

        return join_beside
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
