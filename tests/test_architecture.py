"""The line stays a line: who may import whom, what stays light, and words nobody may write."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = {
    "": ["errors", "progress", "files", "keys", "config", "parallel", "sources", "download"],
    "data": [
        *[
            "hub",
            "delimited",
            "excel",
            "json_rows",
            "parquet",
            "streaming",
            "pictures",
            "picture_tables",
            "kept",
            "tables",
            "multiple_choice",
            "task",
            "columns",
        ],
        *["labels", "splits", "from_table", "prompt", "processor", "corpus"],
    ],
    "results": [
        *["answers", "metrics", "calibration", "selection", "models", "report", "neurons"],
        *["run_folder", "exits", "thresholds", "compare"],
    ],
    "backbones": [
        *["hub", "vetting", "structure", "surgery", "model_folder", "pooling", "batching"],
        *["backbone", "language_model", "answers", "sites", "adapters", "dinov2", "find"],
        *["memory", "vision", "opening"],
    ],
    "features": ["cache", "storage", "forward", "distributed", "extract"],
    "chips": [
        *["chip", "picture_controls", "controls", "lbfgs", "linear", "mlp", "published"],
        *["rows", "tokens", "patches"],
        *["live", "judge", "sparse", "stc", "stc_published", "recipes", "joiner", "scoring"],
        "training",
    ],
    "pruning": [
        *[
            "blocks",
            "cut",
            "cost",
            "ranking",
            "units",
            "width",
            "slicing",
            "laco",
            "replace",
            "training",
            "tune",
            "pretrain",
        ],
        *["job", "learn", "choose", "surgical", "shorten", "keep", "make", "helping"],
        "evaluate",
    ],
    "bundle": [
        *[
            "metadata",
            "tasks",
            "targets",
            "curve",
            "remarks",
            "card",
            "vision",
            "reader",
            "opening",
            "pictures",
            "adaptive",
            "classifier",
            "verify",
            "check",
            "exit_check",
            "extras",
            "drift",
            "dense",
        ],
        *[
            "kinds",
            "save",
            "build",
            "asked",
            "graph",
            "head",
            "head_reader",
            "folders",
            "llama_cpp",
            "written",
            "export",
            "joined",
            "parts",
            "join",
            "verify_joined",
            "fields",
            "rows_out",
            "bulk",
            "batcher",
            "web",
            "serve",
            "serve_joined",
            "listening",
            "push",
        ],
    ],
    "preview": [],
    "reporting": [],
    "experiment": [],
    "runs": [
        *["processes", "schema", "store", "questions", "model_process", "model_client"],
        *["worker", "scheduler", "tidy"],
    ],
    "ui.plots": [
        *["theme", "curves", "heatmaps", "neurons", "token_lengths", "fits", "comparison"],
        *["patches", "exits"],
    ],
    "ui": [
        *[
            "style",
            "nav",
            "state",
            "gate",
            "server",
            "formatting",
            "widgets",
            "guard",
            "lookups",
            "uploads",
            "draft",
            "options",
        ],
        *[
            "thumbnails",
            "patch_view",
            "backbone_step",
            "data_step",
            "prompt_step",
            "form",
            "live",
            "run_list",
        ],
        *[
            "require_run",
            "cut",
            "cut_summary",
            "rule_table",
            "result_tabs",
            "token_view",
            "neuron_view",
            "extras_step",
            "bundle_beside",
            "bundle_view",
            "export_view",
            "join_view",
            "bundle_try",
            "bundle_use",
            "model_list",
            "model_form",
            "compare_view",
            "main",
        ],
    ],
    "cli": [
        "inputs",
        "options",
        "printing",
        "asked",
        "predicting",
        "asking",
        "making",
        "shipping",
        "serving",
        "joining",
    ],
    "__main__": [],
}
"""Rooms in order, each with its modules in order. The room without a name is the words that
everybody uses; a name without modules is a module beside the rooms."""

ORDER = [
    ".".join(part for part in (room, module) if part)
    for room, modules in HOUSE.items()
    for module in modules or [""]
]
"""Every module; each imports only modules that stand before it."""

LIGHT = [
    *HOUSE[""],
    *(f"results.{module}" for module in HOUSE["results"]),
    *[
        "data.task",
        "data.pictures",
        "features.cache",
        "features.distributed",
        "bundle",
        "bundle.card",
        "bundle.remarks",
        "bundle.metadata",
        "bundle.tasks",
        "bundle.targets",
        "preview",
    ],
    *["runs.store", "runs.questions", "runs.model_client", "runs.scheduler", "runs.tidy"],
    *(f"ui.plots.{module}" for module in HOUSE["ui.plots"]),
]
"""Modules that pages may import: they open fast because these never load torch. The tests of the
pages hold the same for `ui` itself."""

MOST_IMPORTS = 12
"""Maximum modules of ours that one module imports."""
FREE = ("__main__.py", "experiment.py")
"""They hold all commands and all steps of the line."""
MOST_AT_THE_TOP = 13
"""Maximum modules beside the rooms."""

MAY_IMPORT = {
    "plotly": {f"ui.plots.{module}" for module in HOUSE["ui.plots"]},
    "streamlit": {*(f"ui.{module}" for module in HOUSE["ui"]), "pages", "app"},
    "transformers": {
        *["backbones.adapters", "backbones.backbone", "backbones.model_folder"],
        *["backbones.structure", "bundle.opening", "bundle.kinds", "data.prompt"],
        *["bundle.folders", "bundle.written"],
        *["backbones.dinov2", "backbones.vision", "bundle.vision", "data.processor"],
        *["backbones.language_model", "pruning.blocks", "pruning.learn", "pruning.slicing"],
    },
    "peft": {"backbones.adapters", "pruning.tune"},
}

OURS = sorted(ROOT.glob("chipviz/**/*.py"))
CODE = [*OURS, *sorted(ROOT.glob("pages/*.py")), ROOT / "app.py"]


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


def name_of(path):
    """A module of ours by its place in `chipviz`; `pages` or `app` of another file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:]) if parts[0] == "chipviz" else parts[0]


def ours(path):
    """The modules of ours that a file imports, by their places."""
    known = {*ORDER, *HOUSE}
    for name in imports(path):
        if name.startswith("chipviz."):
            place = name.removeprefix("chipviz.")
            while place and place not in known:  # a name in a module
                place = place.rpartition(".")[0]
            if place:
                yield place


def room_of(module):
    """The room of a module; the words that everybody uses are one room."""
    room = module.rpartition(".")[0]
    return room if room or module not in HOUSE else module


def test_every_module_has_its_place_in_the_order():
    found = {name_of(path) for path in OURS if path.name != "__init__.py"}
    assert found == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_the_top_holds_few_modules():
    assert len(list((ROOT / "chipviz").glob("*.py"))) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("path", [p for p in OURS if p.name != "__init__.py"], ids=short)
def test_a_module_imports_only_modules_that_stand_before_it(path):
    before = ORDER[: ORDER.index(name_of(path))]
    assert set(ours(path)) <= {*before, "bundle"}


@pytest.mark.parametrize("path", [p for p in OURS if p.name not in FREE], ids=short)
def test_no_module_imports_many_others(path):
    assert len(set(ours(path))) <= MOST_IMPORTS


def test_the_graph_of_rooms_has_no_cycle():
    """`pytest -s` prints it."""
    graph = {room: set() for room in HOUSE}
    for path in OURS:
        if path.name != "__init__.py":
            here = room_of(name_of(path))
            graph[here] |= {room_of(module) for module in ours(path)} - {here}
    for room, needs in graph.items():
        print(f"{room or '(words)':12} <- {', '.join(sorted(need for need in needs if need))}")
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_in_its_own_rooms(library):
    users = {
        name_of(path)
        for path in CODE
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= MAY_IMPORT[library]
    assert users  # or the rule is about nothing


def test_pages_and_ui_use_the_engine_only_through_light_modules():
    for path in CODE:
        if name_of(path).split(".")[0] in ("ui", "pages", "app"):
            engine = {module for module in ours(path) if module.split(".")[0] != "ui"}
            assert engine <= set(LIGHT), short(path)


def loaded(modules, banned):
    """What a fresh process says that loads these modules: which of the banned libraries it has."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module('chipviz.' + name)\n"
        f"sys.exit(', '.join(m for m in {banned} if m in sys.modules) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_light_modules_load_no_torch_in_a_fresh_process():
    assert not loaded(LIGHT, ("torch", "transformers", "datasets", "sklearn"))


def test_a_bundle_is_read_without_pandas():
    assert not loaded(["bundle.classifier"], ("pandas", "pyarrow", "datasets", "sklearn"))


def test_the_command_line_answers_without_loading_torch():
    assert not loaded(["__main__"], ("torch",))


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
