"""A bundle as one graph, for ONNX Runtime and OpenVINO: written, and run again from its files.

The conversion is that of `transformers.exporters`. Pooling and chip are part of the graph.
"""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chipviz.bundle.classifier import Classifier
from chipviz.bundle.pictures import PictureClassifier
from chipviz.errors import BundleError

Runtime = Literal["onnx", "openvino"]
Arrays = dict[str, NDArray[Any]]
FILES: dict[Runtime, str] = {"onnx": "onnx/model.onnx", "openvino": "openvino_model.xml"}
"""The graph's place in the folder of an export."""
MAX_INSIDE = 1 << 30
"""Bytes of weights that stay inside model.onnx. Its format ends at 2 GiB."""
INSTALL = "pip install -r requirements-export.txt"


class _TextGraph(nn.Module):
    """Token ids and mask, shape (B, T) both, to class scores (B, C)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.scores = classifier.model, classifier.scores

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.scores(input_ids, attention_mask)}


class _PictureGraph(nn.Module):
    """Pixels, shape (B, 3, H, W), to class scores (B, C)."""

    def __init__(self, classifier: PictureClassifier) -> None:
        super().__init__()
        self.model, self.scores = classifier.model, classifier.scores

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.scores({"pixel_values": pixel_values})}


def write_graph(
    classifier: Classifier | PictureClassifier,
    example: dict[str, Tensor],
    runtime: Runtime,
    folder: Path,
    *,
    exact: Sequence[Tensor] = (),
    int8: bool = False,
) -> None:
    """Write a bundle as one graph with any number of texts of any length.

    Args:
        classifier: The loaded bundle, in float32.
        example: A batch of several texts of several tokens, or of several pictures.
        runtime: What will run it.
        folder: Where to.
        exact: Weights that are never rounded: those of the chip, which cancel by design.
        int8: Keep weights as 8-bit integers: a quarter of the bytes, and rounded scores.

    Raises:
        BundleError: If the model's family cannot be converted, or the converter is not installed.
    """
    pictures = isinstance(classifier, PictureClassifier)
    graph = (_PictureGraph(classifier) if pictures else _TextGraph(classifier)).eval()
    path = folder / FILES[runtime]
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: "batch"} if pictures else {0: "batch", 1: "length"}
    with _quiet(), _as_refusal(runtime):
        exporter, config = _exporter(runtime, exact if int8 else None)
        config.dynamic_shapes = {
            name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name in example
        }
        program = exporter.export(graph, example, config=config).program
        if runtime == "openvino":
            exporter.save_program(program, path)
            return
        _name_axes(program, axes)
        import onnx_ir

        n_bytes = sum(value.const_value.nbytes for value in program.graph.initializers.values())
        beside = f"{path.name}_data" if n_bytes > MAX_INSIDE else None
        onnx_ir.save(program, path, external_data=beside)


def open_graph(folder: Path, runtime: Runtime) -> Callable[[Arrays], NDArray[np.float32]]:
    """A graph read from its files: from inputs by name to class scores (B, C).

    Raises:
        BundleError: If the runtime cannot open it, or when it is run.
    """
    with _as_refusal(runtime):
        run = _runner(folder, runtime)

    def asked(given: Arrays) -> NDArray[np.float32]:
        with _as_refusal(runtime):
            return run(given)

    return asked


def _runner(folder: Path, runtime: Runtime) -> Callable[[Arrays], NDArray[np.float32]]:
    path = folder / FILES[runtime]
    if runtime == "openvino":
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs would take bfloat16
        model = openvino.Core().compile_model(path, "CPU", exact)
        return lambda given: np.asarray(model(given)["logits"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: np.asarray(session.run(["logits"], given)[0])


def _exporter(runtime: Runtime, exact: Sequence[Tensor] | None) -> tuple[Any, Any]:
    """The converter and its settings. Weights but `exact` ones are rounded where there are any."""
    exporters: Any = importlib.import_module("transformers.exporters")
    onnx = runtime == "onnx"
    quantizer = None
    if exact is not None:
        nncf: Any = importlib.import_module("nncf")
        family = exporters.NNCFOnnxQuantizer if onnx else exporters.NNCFOpenVINOQuantizer
        rounding = exporters.NNCFWeightCompressionConfig(nncf.CompressWeightsMode.INT8_SYM)
        quantizer = family(rounding)
        arrays = [weight.detach().float().cpu().numpy() for weight in exact]
        round_all, find = quantizer.quantize, _onnx_products if onnx else _openvino_products

        def round_others(model: Any, *given: Any) -> Any:
            names = find(model, arrays)
            if len(names) < len(arrays):
                raise ValueError("its chip could not be kept out of the rounding")
            rounding.ignored_scope = nncf.IgnoredScope(names=names)
            return round_all(model, *given)

        quantizer.quantize = round_others
    if onnx:
        return exporters.OnnxExporter(), exporters.OnnxConfig(quantizer=quantizer)
    config = exporters.OpenVINOConfig(quantizer=quantizer, stateful=False)
    return exporters.OpenVINOExporter(), config


def _onnx_products(program: Any, weights: Sequence[NDArray[Any]]) -> list[str]:
    """Names of the nodes of an ONNX program that multiply by one of some weights."""
    found: list[str] = []
    for node in program.graph:
        for value in node.inputs if node.op_type in ("MatMul", "Gemm") else ():
            made = value.producer() if value is not None else None
            if made is not None and made.op_type == "Transpose":
                value = made.inputs[0]
            held = getattr(value, "const_value", None)
            if held is not None and _is_one(held.numpy(), weights):
                found.append(node.name)
    return found


def _openvino_products(model: Any, weights: Sequence[NDArray[Any]]) -> list[str]:
    """Names of the operations of an OpenVINO model that multiply by one of some weights."""
    found: list[str] = []
    for op in model.get_ordered_ops():
        for i in range(op.get_input_size() if op.get_type_name() == "MatMul" else 0):
            held = op.input_value(i).get_node()
            while held.get_type_name() in ("Convert", "Transpose"):
                held = held.input_value(0).get_node()
            if held.get_type_name() == "Constant" and _is_one(held.data, weights):
                found.append(op.get_friendly_name())
    return found


def _is_one(array: NDArray[Any], weights: Sequence[NDArray[Any]]) -> bool:
    """Whether an array is one of some matrices, or one of them turned."""
    return any(
        array.shape in (weight.shape, weight.T.shape)
        and (np.array_equal(array, weight) or np.array_equal(array, weight.T))
        for weight in weights
    )


def _name_axes(program: Any, axes: dict[int, str]) -> None:
    """Call the free axes of inputs and scores what they are, in place of the tracer's numbers."""
    import onnx_ir

    free: dict[str, str] = {}
    for given in program.graph.inputs:
        for axis, name in axes.items():
            if isinstance(given.shape[axis], int):
                raise ValueError(f"its {name} would be fixed")
            free[str(given.shape[axis])] = name
    for value in [*program.graph.inputs, *program.graph.outputs]:
        shape = [
            dim if isinstance(dim, int) else free.get(str(dim), str(dim)) for dim in value.shape
        ]
        value.shape = onnx_ir.Shape(shape)


@contextmanager
def _as_refusal(runtime: Runtime) -> Iterator[None]:
    """Say what a converter or a runtime cannot do as a refusal.

    Raises:
        BundleError: In place of what was raised.
    """
    try:
        yield
    except ImportError as error:
        raise BundleError(
            f"The converter is not installed: {error}.", f"Run `{INSTALL}`."
        ) from None
    except Exception as error:  # noqa: BLE001 - tracers and runtimes raise no kind of their own
        said = " ".join(str(error).split())[:200]
        raise BundleError(
            f"This model cannot be written or run for {runtime}: {type(error).__name__}: {said}",
            "Its family computes something that the converter does not know.",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what converters print and warn of to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
