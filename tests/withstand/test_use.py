"""Use: two tabs, odd addresses, exports that people open, what a run leaves of a secret.

The letter and number in a test's name are those of the list that these tests go through.
"""

import csv
import io
import os
import random
import subprocess
import sys

import pytest

from chipviz.files import PROJECT
from chipviz.runs.store import Store
from chipviz.ui.result_tabs import mistakes_csv
from tests.example_run import active_run, finished_run
from tests.page_driver import button, open_page, text_of

PIECES = [
    *("0", "-1", "9" * 40, "1e3", "½", "٣", "nan", "null", "true", "[]", "{}", "%00", "\0"),
    *("../../etc/passwd", "<script>", "' OR 1=1 --", "\u202e", "😀" * 30, "x" * 5_000, " "),
    *("mean", "last", "linear", "mlp", "8"),
]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path))
    return Store(tmp_path)


def test_f13_two_tabs_that_move_one_cut_both_show_their_last_word(store):
    run = finished_run(store)
    tabs = [open_page("layers", run=run.run_id) for _ in range(2)]
    for layer, tab in ((3, 0), (20, 1), (7, 0)):
        slider = next(s for s in tabs[tab].slider if s.key == "cut")
        slider.set_value(layer).run()
        assert not tabs[tab].exception
        assert tabs[tab].query_params["cut"] == str(layer)


def test_f13_two_tabs_that_stop_one_run_stop_it_once(store):
    run = active_run(store)
    tabs = [open_page("train", run=run.run_id) for _ in range(2)]
    for tab in tabs:
        button(tab, "stop_run").click().run()
        assert not tab.exception
        assert not tab.error
    assert store.get(run.job_id).stop_requested


def test_f13_a_run_that_another_tab_deleted_is_said_in_words(store):
    run = finished_run(store)
    tabs = [open_page("layers", run=run.run_id) for _ in range(2)]
    store.delete(run.run_id)
    for tab in tabs:
        tab.run()
        assert not tab.exception
        assert f"There is no run '{run.run_id}'" in text_of(tab).replace("\\", "")


def test_b9_no_address_breaks_a_page(store):
    run = finished_run(store)
    rng = random.Random(0)
    at = open_page("layers", run=run.run_id)
    for _ in range(60):
        at.query_params.clear()
        for key in rng.sample(["run", "cut", "pooling", "chip", "rule", "x"], 3):
            at.query_params[key] = rng.choice([*PIECES, run.run_id])
        at.run()
        assert not at.exception
        assert not [e.value for e in at.error if "Unexpected" in e.value or "Traceback" in e.value]


def test_b8_no_cell_of_an_export_is_a_formula():
    cells = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\tx",
        "\rx",
        "plain",
        'a "quoted", cell\nof two lines',
    ]
    rows = [(cell, cell, "sport") for cell in cells]
    read = list(csv.reader(io.StringIO(mistakes_csv(rows), newline="")))
    assert read[0] == ["text", "label", "prediction"]
    back = [tuple(cell.removeprefix("'") for cell in row) for row in read[1:]]
    assert back == rows
    assert not [cell for row in read for cell in row if cell[:1] in "=+-@\t\r"]


def test_b12_a_token_of_the_environment_is_nowhere_afterwards(tmp_path, toy_csv):
    secret = "hf_averysecrettokenofthisuser"
    told = []
    for command, backbone, data in [
        ("inspect", "owner/model", str(toy_csv)),
        ("train", "smollm2-135m", "owner/data"),
        ("train", str(tmp_path / "nosuch"), str(toy_csv)),
        ("train", "smollm2-135m", str(tmp_path / "nosuch.csv")),
        ("train", "x" * 3_000, "y"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "chipviz", command, "--backbone", backbone, "--data", data],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
            env={
                **_environment(tmp_path),
                "HF_TOKEN": secret,
                "HF_HUB_OFFLINE": "1",
                "HTTPS_PROXY": f"http://user:{secret}@127.0.0.1:9",
                "PIP_INDEX_URL": f"http://user:{secret}@127.0.0.1:9/simple",
            },
        )
        assert done.returncode == 1
        told.append(done.stdout + done.stderr)
    kept = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(told) == 5
    assert all(told)
    assert not [text for text in told if secret in text]
    assert not [content for content in kept if secret.encode() in content]


def _environment(home):
    return os.environ | {"CHIPVIZ_HOME": str(home), "HF_HOME": str(home / "hf")}
