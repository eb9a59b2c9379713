"""Check several chips on one backbone: every file, and the test of every task."""

from pathlib import Path
from typing import Any

from chipviz.bundle import joined, tasks, verify
from chipviz.bundle.opening import refuse_unfit


def verify_joined(path: Path) -> dict[str, Any]:
    """Check what was joined: every checksum, and each task's own test in a fresh process.

    Returns:
        Files checked, texts compared and the largest probability difference.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    found = tasks.read_joined(path)
    refuse_unfit(path, "chipviz")
    n_files = verify.check_sums(path)
    limit = verify.MEMORY_BYTES + 4 * sum(f.stat().st_size for f in path.glob("*.safetensors"))
    n_texts, worst = 0, 0.0
    for name, metadata in found.items():
        texts, expected = verify.self_test_of(metadata)
        said = verify.in_fresh_process(
            path,
            "chipviz",
            texts,
            memory=limit,
            patience_s=verify.PATIENCE_S,
            program=joined.PROGRAM.replace("NAME", repr(name)),
        )
        n_texts += len(texts)
        worst = max(worst, verify.compare(texts, said, expected))
    return {
        "path": str(path),
        "kind": "joined",
        "n_files": n_files,
        "n_texts": n_texts,
        "max_difference": worst,
    }
