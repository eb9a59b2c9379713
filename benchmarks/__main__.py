"""`python -m benchmarks`: measure every row, print one table, write JSON."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# As chipviz's own worker has it, and before torch is loaded, so that both sides of a row get it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import chips, cut, features, load, memory, pages, paper, runs, sparse
from benchmarks.bench import Bench
from benchmarks.measure import Row, machine, markdown, missing_row
from chipviz.backbones.backbone import fast_dtype
from chipviz.config import home_dir
from chipviz.errors import ChipvizError

ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "features": features.against_plain_loop,
    "nnsight": features.against_nnsight,
    "transformer-lens": features.against_transformer_lens,
    "paper": paper.against_paper,
    "linear": chips.against_scikit_learn,
    "sparse": sparse.against_saga,
    "memory": memory.flat_memory,
    "second-run": runs.against_first_run,
    "cut": cut.against_dense,
    "example": runs.embedded_example,
    "page": pages.rerun_while_computing,
    "sessions": load.fifty_sessions,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        0 when every row was measured, whether it holds or not. 1 when one could not be.
    """
    options = _options(arguments)
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="chipviz-bench-") as scratch:
        bench = Bench(home_dir(options.home), Path(scratch), quick=options.quick)
        for name in options.only or ROWS:
            sys.stderr.write(f"{name} ...\n")
            try:
                rows += ROWS[name](bench)
            except ChipvizError as error:  # the other rows are worth having
                failed = True
                sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
                rows.append(missing_row(name, None, f"failed: {error.message}"))
            if options.json not in (None, "-"):
                Path(options.json).write_text(_json(rows, bench), "utf-8")
    text = _json(rows, bench) if options.json == "-" else markdown(rows)
    sys.stdout.write(text + "\n")
    return int(failed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or print it in place of the table",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(ROWS),
        metavar="NAME",
        help=f"measure only these: {', '.join(ROWS)}",
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes: a look, no figure")
    parser.add_argument("--home", help="where backbones and data are cached (CHIPVIZ_HOME)")
    return parser.parse_args(arguments)


def _json(rows: Sequence[Row], bench: Bench) -> str:
    found: dict[str, Any] = {
        "machine": machine(fast_dtype(torch.device("cpu"), bench.home)),
        "backbone": Path(bench.backbone).name,
        "data": Path(bench.data).name,
        "quick": bench.quick,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(found, indent=1)


if __name__ == "__main__":
    sys.exit(main())
