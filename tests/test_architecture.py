"""The line stays a line: who may import whom, what stays light, and words nobody may write."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    *["errors", "progress", "keys", "config", "metrics", "selection", "report"],
    *["files", "run_folder", "sharing", "sources", "download", "hub"],
    *["datahub", "tables", "choices", "task", "columns", "from_table", "prompt"],
    *["team", "streams", "controls", "pooling"],
    *["batching", "arrays", "vetting", "anatomy", "model_folder", "backbone", "adapters", "find"],
    *["outlook", "opening", "features"],
    *["chips", "lbfgs", "linear", "mlp", "published", "rows", "live", "training"],
    *["cost", "pruning", "cards", "classifier", "bundle", "build", "tokens", "preview"],
    *["reporting", "experiment"],
    *["store", "inference", "inference_client", "worker", "jobs", "server"],
    *["canvas", "charts", "heatmaps", "lengths"],
    *["asked", "options", "printing", "__main__", "ui"],
]
"""A module imports only modules that stand before it."""

LIGHT = [
    *["errors", "progress", "keys", "config", "metrics", "selection", "report", "files"],
    *["run_folder", "sharing", "sources", "download", "hub", "task"],
    *["store", "inference_client", "jobs", "server"],
    *["canvas", "charts", "heatmaps", "lengths", "team", "preview", "cards"],
]
"""Modules that pages import: they open fast because these never load torch (nor does `ui`, which
the tests of the pages hold)."""

MAY_IMPORT = {
    "plotly": {"canvas", "charts", "heatmaps", "lengths"},
    "streamlit": {"ui", "pages", "app"},
    "transformers": {
        "adapters",
        "anatomy",
        "backbone",
        "bundle",
        "classifier",
        "model_folder",
        "prompt",
    },
    "peft": {"adapters"},
}

CODE = sorted([*ROOT.glob("chipviz/**/*.py"), *ROOT.glob("pages/*.py"), ROOT / "app.py"])


def short(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Every module a file imports, in full, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)} imports by dots"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    """The room a file belongs to: a module of chipviz, `ui`, `pages` or `app`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "chipviz" else parts[0]


def test_every_module_has_its_place_in_the_order():
    found = {part_of(path) for path in CODE if path.parts[-2] == "chipviz"} - {"__init__"}
    assert found | {"ui"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", [p for p in CODE if "chipviz" in p.parts], ids=short)
def test_a_module_imports_only_modules_that_stand_before_it(path):
    here = part_of(path)
    allowed = (
        set(ORDER) if here == "ui" else set(ORDER[: ORDER.index(here)] if here in ORDER else ())
    )
    ours = (name.split(".") for name in imports(path) if name.startswith("chipviz."))
    used = {parts[1] for parts in ours if parts[1] != "__version__"}
    assert used <= allowed


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_in_its_own_rooms(library):
    users = {
        part_of(path)
        for path in CODE
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= MAY_IMPORT[library]
    assert users  # or the rule is about nothing


def test_pages_and_ui_use_the_engine_only_through_light_modules():
    for path in CODE:
        if part_of(path) in ("ui", "pages", "app"):
            ours = {n.split(".")[1] for n in imports(path) if n.startswith("chipviz.")}
            assert ours <= {*LIGHT, "ui"}, short(path)


def test_light_modules_load_no_torch_in_a_fresh_process():
    heavy = ("torch", "transformers", "datasets", "sklearn")
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT}: importlib.import_module('chipviz.' + name)\n"
        f"sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"loaded: {done.stderr}"


def test_the_command_line_answers_without_loading_torch():
    code = "import sys, chipviz.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


BANNED = {
    r"unsafe_allow_html": "text from data would be HTML",
    r"unsafe_allow_javascript": "text from data would be a program",
    r"trust_remote_code\s*=\s*True": "a model folder would run code",
    r"\b(pickle|dill|joblib|cloudpickle)\b": "a file would run code",
    r"\btorch\.(load|save)\b": "a file would run code",
    r"\bshell\s*=\s*True": "a name would be a command",
    r"\bos\.(system|popen)\b": "a name would be a command",
    r"(?<![\w.])(eval|exec)\(": "text would be a program",
    r"\byaml\.load\(": "a file would run code",
    r"allow_pickle\s*=\s*True": "a file would run code",
    r"\bnp\.load\((?!.*allow_pickle=False)": "say allow_pickle=False, so that it stays so",
}


@pytest.mark.parametrize("pattern", BANNED)
def test_nobody_writes_what_would_run_foreign_code(pattern):
    found = [
        f"{short(path)}:{number}"
        for path in CODE
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1)
        if re.search(pattern, line)
    ]
    assert not found, BANNED[pattern]


@pytest.mark.parametrize("path", [p for p in CODE if p.parts[-2] != "pages"], ids=short)
def test_every_module_says_what_it_knows(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))
