"""`python -m benchmarks.places DATA_FOLDER`: one bundle in every place that runs it.

For each set and backbone a run, its cut, and 200 raw test texts through the stock pipeline, ONNX
Runtime, OpenVINO, sentence-transformers with the chip, the chip alone on the whole backbone, and
the service: how many labels are the run's own, and how far scores are from the bundle's. Writes a
section of docs/results.md, a bundle at a time.
"""

import argparse
import http.client
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, pipeline

from benchmarks.serving import Server
from benchmarks.stored import RESULTS, trained, write_section
from chipviz.bundle import build, graph, load, targets, written
from chipviz.bundle.asked import rows_of_run
from chipviz.bundle.export import export
from chipviz.bundle.head_reader import load_head
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec, RunConfig, home_dir
from chipviz.data.from_table import load_task
from chipviz.errors import ChipvizError
from chipviz.progress import silent
from chipviz.results.run_folder import RunFolder

SETS = ("sst2", "banking77", "bbc_news")
BACKBONES = (("minilm-l6", "mean"), ("smollm2-135m", "last"), ("smollm2-135m", "mean"))
N_TEXTS = 200
Shares = dict[str, list[float]]
"""Probabilities of each text, classes in order, by place."""


def everywhere(bundle: Path, source: str, texts: list[str], home: Path, scratch: Path) -> Shares:
    """What every place that takes a bundle says of texts. One that refuses is left out."""
    metadata = read_metadata(bundle)
    names, rows = metadata.task.label_names, rows_of_run(metadata, home)
    found: Any = {"bundle": [list(p.probabilities.values()) for p in load(bundle).predict(texts)]}
    if metadata.kind == "sequence":
        said: Any = pipeline("text-classification", str(bundle), top_k=None)(texts)
        by_name: Any = [{one["label"]: one["score"] for one in row} for row in said]
        found["stock pipeline"] = [[row[name] for name in names] for row in by_name]

    def exported(target: targets.Target, *, int8: bool = False) -> Path | None:
        out = scratch / f"{target}{'-int8' * int8}"
        try:
            export(bundle, target, out, rows=rows, progress=silent, int8=int8)
        except ChipvizError as error:
            sys.stdout.write(f"  {target}{' int8' * int8}: {error.message}\n")
            return None
        return out

    for runtime in targets.GRAPHS:
        for int8 in (False, True):
            if out := exported(runtime, int8=int8):
                said = _graph(out, runtime, texts)
                found[f"{runtime}{' int8' * int8}"] = said
    if out := exported("sentence-transformers"):
        found["sentence-transformers"] = _embedded(out, texts)
    if out := exported("gguf"):
        found["GGUF, read by transformers"] = _gguf(out, load(bundle), texts)
    if out := exported("head"):
        alone = load_head(out, source, home=home, progress=silent)
        found["chip alone"] = [list(p.probabilities.values()) for p in alone.predict(texts)]
    found["serve"] = _served(bundle, texts)
    return found


def _graph(folder: Path, runtime: Any, texts: list[str]) -> list[list[float]]:
    read: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    run = graph.open_graph(folder, runtime)
    found: list[list[float]] = []
    for start in range(0, len(texts), 8):
        given = read(texts[start : start + 8], padding=True, return_tensors="np")
        said = run({name: given[name] for name in ("input_ids", "attention_mask")})
        found += torch.from_numpy(said).float().softmax(dim=1).tolist()
    return found


def _embedded(folder: Path, texts: list[str]) -> list[list[float]]:
    from sentence_transformers import SentenceTransformer

    states = torch.from_numpy(np.asarray(SentenceTransformer(str(folder)).encode(texts)))
    chip = Chip(**load_file(folder / "head" / "head.safetensors"))
    return chip.probabilities(states.float()).tolist()


def _gguf(folder: Path, classifier: Any, texts: list[str]) -> list[list[float]]:
    answer, read = written.opened("gguf", folder, classifier), classifier.tokenizer
    found: list[list[float]] = []
    for text in texts:
        with torch.inference_mode():
            said = answer(dict(read([text], return_tensors="pt")))
        found += torch.from_numpy(said).float().softmax(dim=1).tolist()
    return found


def _served(bundle: Path, texts: list[str]) -> list[list[float]]:
    server = Server(["-m", "chipviz", "serve", str(bundle), "--port", "PORT"])
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        found = server.ask(connection, texts)["predictions"]
    finally:
        connection.close()
        server.stop()
    return [list(one["probabilities"].values()) for one in found]


def table_rows(name: str, found: Shares, own: Sequence[int]) -> list[str]:
    """A row for each place: labels that are the run's own, largest difference to the bundle."""
    bundle = np.array(found["bundle"])
    rows = []
    for place, shares in found.items():
        said = np.array(shares)
        same = int((said.argmax(axis=1) == np.array(own)).sum())
        gap = np.abs(said - bundle).max()
        rows.append(f"| {name} | {place} | {same} of {len(own)} | {gap:.1e} |")
    return rows


def measure(config: RunConfig, home: Path, scratch: Path, name: str) -> list[str]:
    """A run, its bundle, and the rows of its table."""
    folder = RunFolder(home / "runs" / name)
    report = trained(config, home, folder)
    chosen = report.select("within")
    bundle = home / "runs" / name / "bundle" / "places"
    shutil.rmtree(bundle, ignore_errors=True)
    spec = CutSpec.at(chosen.cut, "within")
    build.build(folder, spec, home=home, out=bundle, progress=silent)
    texts = load_task(config, home, silent).splits["test"].texts[:N_TEXTS]
    own = folder.read_predictions().at(chosen.cut, "test")[: len(texts)].tolist()
    found = everywhere(bundle, str(config.backbone), texts, home, scratch)
    return table_rows(_called(read_metadata(bundle), config), found, own)


def _called(metadata: Metadata, config: RunConfig) -> str:
    where = f"layer {metadata.cut.cut_layer} {metadata.cut.pooling}"
    return f"{metadata.task.name}, {config.backbone}, {where} ({metadata.kind})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, export, ask, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.places", description=__doc__)
    parser.add_argument("data", type=Path, help="a folder of the data sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args(arguments)
    home = home_dir()
    lines = [
        "Made by `python -m benchmarks.places DATA_FOLDER`; not by hand. Raw test texts, 64 tokens "
        "at most, everything in float32: labels that are",
        "those of the run itself (its chip on states of the whole model), and the largest "
        "difference of a probability to the bundle's. 8-bit weights only where 99 % of the labels "
        "stay.",
        "",
        "| bundle | place | labels | difference |",
        "| --- | --- | ---: | ---: |",
    ]
    for backbone, pooling in BACKBONES:
        for data in options.sets:
            name = f"places-{data}-{backbone}-{pooling}"
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
            config = RunConfig.checked(
                backbone=backbone,
                data=str(options.data / data),
                poolings=(pooling,),
                dtype="float32",
                folds=1,
                max_length=64,
                max_train=600,
                max_validation=200,
                max_test=N_TEXTS,
            )
            scratch = home / "places"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            lines += measure(config, home, scratch, name)
            write_section(options.out, "The same bundle in every place", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
