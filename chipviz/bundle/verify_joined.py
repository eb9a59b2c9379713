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
    tests = {name: verify.self_test_of(metadata) for name, metadata in found.items()}
    asked = [(name, *row) for name, (texts, _) in tests.items() for row in texts]
    said = verify.in_fresh_process(
        path,
        "chipviz",
        asked,
        memory=limit,
        patience_s=verify.PATIENCE_S,
        program=joined.PROGRAM,
    )
    start, worst = 0, 0.0
    for texts, expected in tests.values():
        own = said[start : start + len(texts)]
        worst = max(worst, verify.compare(texts, own, expected))
        start += len(texts)
    return {
        "path": str(path),
        "kind": "joined",
        "n_files": n_files,
        "n_texts": len(asked),
        "max_difference": worst,
    }
