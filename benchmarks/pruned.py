"""`python -m benchmarks.pruned`: perplexity of every way to prune, untouched and healed.

Makes models of the embedded backbone and reads their records. Writes docs/pruning.md, a row at a
time: what was measured when somebody stops it is there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, made
from chipviz.config import home_dir
from chipviz.results.models import ModelRecord, ModelSpec

WAYS: tuple[dict[str, Any], ...] = (
    {"method": "angular"},
    {"method": "angular", "heal": "replaceme"},
    {"method": "influence"},
    {"method": "laco"},
    {"method": "laco-released"},
    {"method": "llm-pruner"},
    {"method": "slicegpt"},
    {"method": "top"},
    {"method": "top", "heal": "replaceme"},
    {"method": "bottom"},
    {"method": "middle"},
    {"method": "middle", "heal": "replaceme"},
    {"method": "alternate"},
    {"method": "greedy"},
    {"method": "blockpruner"},
    {"method": "angular", "heal": "lora"},
    {"method": "llm-pruner", "heal": "lora"},
    {"method": "slicegpt", "heal": "lora"},
    {"method": "bottom", "heal": "pretrain"},
    {"method": "top", "heal": "pretrain"},
    {"method": "middle", "heal": "pretrain"},
    {"method": "alternate", "heal": "pretrain"},
)


def page(records: Sequence[ModelRecord], layers: int, tokens: int) -> str:
    """docs/pruning.md."""
    first = records[0]
    lines = [
        "# What pruning costs a language model, and what healing gives back",
        "",
        f"Made by `python -m benchmarks.pruned --layers {layers} --tokens {tokens}`; not by hand. "
        f"{first.root.name}, {layers} of its",
        f"{first.root.n_layers} blocks or as many parameters, perplexity on "
        f"{first.n_perplexity:,} tokens of held-out BBC news in rows of",
        f"{first.spec.length}. Pretraining and LoRA read {tokens:,} tokens of other BBC news: so "
        "they learn, too, how such news are written,",
        "which nobody told the dense model.",
        "",
        "| method | healed by | parameters left | dense | pruned | healed | minutes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in records:
        healed = f"{one.perplexity_after:,.1f}" if one.spec.heal else ""
        share = 100 * one.n_parameters / one.root.n_parameters
        lines.append(
            f"| {one.spec.method} | {one.spec.heal or ''} | {share:.1f} % | "
            f"{one.perplexity_before:,.1f} | {one.perplexity_pruned:,.1f} | {healed} | "
            f"{one.seconds / 60:.1f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, read, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruned", description=__doc__)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pruning.md")
    options = parser.parse_args(arguments)
    home, records = home_dir(), list[ModelRecord]()
    for way in WAYS:
        name = f"bench-{way['method']}-{way.get('heal', 'plain')}"
        spec = ModelSpec.checked(
            name=name,
            backbone=options.backbone,
            layers=options.layers,
            fit={"tokens": options.tokens, "batch": 8},
            **way,
        )
        record = made(spec, home)
        records.append(record)
        sys.stdout.write(f"{name}: {record.perplexity_pruned} {record.perplexity_after}\n")
        sys.stdout.flush()
        options.out.write_text(page(records, options.layers, options.tokens), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
