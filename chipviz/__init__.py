"""chipviz finds the shallowest layer of a language model that a classifier needs."""

__version__ = "0.1.0"
