"""The benchmarks compare like with like: both sides of a row compute the same thing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import chips, cut, features, gpu, measure, memory, pages, paper, runs, tables
from benchmarks.__main__ import ROWS, main
from benchmarks.bench import Bench
from benchmarks.stored import write_section
from chipviz.chips.mlp import initial
from chipviz.chips.published import fit_published
from chipviz.parallel import Pool
from chipviz.results.run_folder import RunFolder


@pytest.fixture
def bench(tiny_backbone_folder, toy_csv, tmp_path):
    example = {
        "backbone": str(tiny_backbone_folder),
        "data": str(toy_csv),
        "max_train": 60,
        "max_validation": 20,
        "max_test": 20,
    }
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Bench(
        tmp_path / "home",
        scratch,
        quick=True,
        backbone=str(tiny_backbone_folder),
        data=str(toy_csv),
        example=tuple(example.items()),
    )


# how a figure is judged


def test_both_sides_run_equally_often_and_who_is_first_changes():
    calls = []
    ratio = measure.alternate(
        lambda: calls.append("ours"), lambda: calls.append("peer"), 4, lambda: calls.append("-")
    )
    assert "".join(c[0] for c in calls) == "-o-p-p-o-o-p-p-o"
    assert len(ratio.ours) == len(ratio.peer) == 4


def test_a_ratio_is_the_median_of_the_pairs_with_its_spread():
    row = measure.Ratio((1.0, 2.0, 4.0), (10.0, 10.0, 10.0)).row("x", 3.0)
    assert (row.ratio, row.low, row.high, row.holds) == (5.0, 2.5, 10.0, True)
    assert (row.ours, row.peer) == (2.0, 10.0)


@pytest.mark.parametrize(
    ("values", "goal", "better", "holds"),
    [
        ([3.0], 3.0, "higher", True),
        ([2.9], 3.0, "higher", False),
        ([1.1], 1.1, "lower", True),
        ([1.2], 1.1, "lower", False),
        ([1.0, 1.05, 1.2], 1.1, "near 1", False),
        ([1.0, 0.8], 1.1, "near 1", False),
        ([0.95, 1.05], 1.1, "near 1", True),
        ([3.0], None, "higher", None),
    ],
)
def test_a_figure_holds_only_on_the_right_side_of_its_goal(values, goal, better, holds):
    assert measure.figure_row("x", values, goal, better=better).holds is holds


def test_a_wrong_answer_never_holds_however_fast():
    assert measure.Ratio((1.0,), (100.0,)).row("x", 3.0, right=False).holds is False


def test_what_could_not_be_measured_stays_in_the_table():
    row = measure.missing_row("a peer", None, "not installed")
    assert (row.ratio, row.holds) == (None, None)
    assert "| a peer |" in measure.markdown([row])
    assert "not installed" in measure.markdown([row])
    assert measure.missing_row("ours", 3.0, "failed").holds is False


# the same states


def test_the_plain_loop_reads_the_states_that_extraction_stores(bench):
    work = features.checked_work(bench)
    theirs = features.plain_loop(features.load_causal(bench, torch.float32), work)
    with work.extracted(features.VECTORS) as found:
        for vector in features.VECTORS:
            ours = features.states(found.features, vector)
            assert measure.difference(ours, theirs[vector]) < features.SAME
            assert measure.difference(ours.roll(1, 0), theirs[vector]) > 0.1  # one layer off
            assert measure.difference(ours.roll(1, 1), theirs[vector]) > 0.1  # one text off


@pytest.mark.parametrize(
    ("package", "opened", "read"),
    [
        ("nnsight", features.open_nnsight, features.read_nnsight),
        ("transformer_lens", features.open_transformer_lens, features.read_transformer_lens),
    ],
)
def test_a_peer_reads_the_states_that_extraction_stores(bench, package, opened, read):
    pytest.importorskip(package)
    assert features.check_reader(bench, opened, read) < features.SAME


def test_a_peer_that_is_not_installed_is_named_in_its_row(bench):
    row = features._against(bench, "no_such_peer", features.open_nnsight, features.read_nnsight)
    assert row.ratio is None
    assert "not installed" in row.note


def test_a_cut_model_has_its_layers_only_and_says_what_the_dense_one_says_there(bench):
    backbone = features.checked_work(bench).backbone
    ids = torch.arange(24).view(2, 12)
    for layer in range(backbone.n_layers):
        model = cut.really_cut(backbone, layer)
        assert len(model.layers) == layer + 1
        assert cut._gap(backbone, model, layer, ids) < features.SAME
    assert cut._gap(backbone, cut.really_cut(backbone, 1), 2, ids) > 0.01


# the same chips


def test_the_papers_recipe_written_plainly_trains_the_chips_of_preset_published(bench):
    """Two codes of one recipe: modules and a tape here, batched and written out there."""
    work = features.checked_work(bench)
    train = work.task.splits["train"]
    labels = torch.from_numpy(train.labels)
    n_layers, width, n_classes = work.backbone.n_layers, 32, 3
    model = features.load_causal(bench, torch.float32)
    mine = paper.PaperChips(n_layers, width, n_classes)
    begin = {
        kind: initial(
            n_layers,
            width,
            hidden,
            n_classes,
            torch.Generator().manual_seed(5),
            torch.device("cpu"),
        )
        for kind, hidden in (("linear", 0), ("mlp", paper.HIDDEN))
    }
    with torch.no_grad():
        for layer in range(n_layers):
            for kind in ("linear", "mlp"):
                parameters = mine.get_submodule(f"{kind}.{layer}").parameters()
                for parameter, value in zip(parameters, begin[kind], strict=True):
                    parameter.copy_(value[layer])
    ids = work.prompt.encode(train.texts)
    paper.train(model, ids, labels, mine)
    # What the recipe reads: raw states, but for the last layer's, which transformers norms.
    rows = torch.stack([torch.cat(paper.last_states(model, one)) for one in ids], dim=1)
    for kind in ("linear", "mlp"):
        ours = fit_published(kind, lambda a, b: rows[:, a:b], labels, n_classes, seed=5)
        for layer in range(n_layers):
            trained = list(mine.get_submodule(f"{kind}.{layer}").parameters())
            torch.testing.assert_close(ours.weight[layer], trained[-2].data, rtol=0, atol=1e-6)
            assert not torch.equal(begin[kind][-2][layer], trained[-2])
    accuracies = iter(paper.validate(model, ids, labels, mine))
    for kind in ("linear", "mlp"):
        for layer in range(n_layers):
            said = mine.get_submodule(f"{kind}.{layer}")(rows[layer]).argmax(dim=1)
            assert next(accuracies) == pytest.approx(float((said == labels).double().mean()))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_scikit_learn_and_chipviz_reach_the_same_objective(bench, n_classes, tmp_path):
    lines = Path(bench.data).read_text("utf-8").split("\n")
    kept = [line for line in lines if n_classes == 3 or not line.endswith("science")]
    data = tmp_path / "few.csv"
    data.write_text("\n".join(kept), "utf-8")
    work = replace(bench, data=str(data)).open(max_train=120, max_validation=20, max_test=40)
    assert work.task.n_classes == n_classes
    with work.extracted((chips.VECTOR,)) as found, Pool(chips.CPU) as pool:
        fits = chips.Fits(found.features, work, range(1, 2), pool)
        fits.fit_ours(fits.layers)
        fits.fit_peer(fits.layers)
        assert fits.gap() <= chips.SAME_OBJECTIVE
        assert fits.accuracy_gap() < 1.5 / 40  # one text may stand on the border
        fits.ours[1] = 0.9 * fits.ours[1]
        assert fits.gap() > chips.SAME_OBJECTIVE


# whole rows, on a toy


@pytest.mark.slow
def test_rows_of_a_toy_are_complete(bench):
    rows = [
        *features.against_plain_loop(bench),
        *chips.against_scikit_learn(bench),
        *cut.against_dense(bench),
        *paper.against_paper(bench),
        *runs.against_first_run(bench),
    ]
    for row in rows:
        assert row.low is not None
        assert row.high is not None
        assert row.ratio is not None
        assert row.low <= row.ratio <= row.high
        assert row.ours
        assert row.note
    assert measure.markdown(rows).count("\n") == len(rows) + 1


@pytest.mark.slow
def test_the_example_runs_through_a_worker_and_its_page_answers(bench):
    started = runs.example(bench)
    assert 0 < started.first_point_s <= started.total_s
    assert len(pages._moves(started.home, started.run_id, 3)) == 3


@pytest.mark.slow
def test_memory_is_that_of_another_process(bench):
    assert memory.of_extraction(bench, 20) > 100 * memory.MIB


def test_a_programs_peak_is_its_own_whoever_asks():
    """Measured by its starter, a peak was the starter's own: the same for any number of texts."""
    held = b"x" * (600 * memory.MIB)
    peaks = [
        memory.peak_of([sys.executable, "-c", f"b'x' * ({n} * 2**20)"]) / memory.MIB
        for n in (0, 200)
    ]
    assert len(held) > 2 * max(peaks) * memory.MIB
    assert peaks[1] - peaks[0] == pytest.approx(200, abs=20)


def test_the_gpu_benchmark_computes_on_a_toy_and_refuses_without_a_gpu(capsys, monkeypatch):
    assert gpu.main(["--tiny"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_s"] > 0
    assert found["share_of_matrix_rate"] > 0
    assert found["fit_train_accuracy"][0] > 0.7  # the classes were planted: chance is 0.25
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_json_keeps_what_was_measured_beside_what_failed(monkeypatch, tmp_path, capsys):
    from chipviz.errors import JobError

    def fail(_bench):
        raise JobError("It broke.", "Mend it.")

    good = measure.figure_row("good", [2.0], 1.0)
    monkeypatch.setitem(ROWS, "features", lambda _bench: [good])
    monkeypatch.setitem(ROWS, "linear", fail)
    out = tmp_path / "rows.json"
    assert main(["--home", str(tmp_path), "--only", "features", "linear", "--json", str(out)]) == 1
    found = json.loads(out.read_text("utf-8"))
    assert [row["name"] for row in found["rows"]] == ["good", "linear"]
    wanted = {"name", "ratio", "low", "high", "goal", "holds", "ours", "peer"}
    assert wanted <= set(found["rows"][0])
    assert {"cpu", "cores", "torch", "dtype"} <= set(found["machine"])
    assert "| good |" in capsys.readouterr().out
    assert main(["--home", str(tmp_path), "--only", "features", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["holds"] is True


# pages of results


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    page = tmp_path / "results.md"
    write_section(page, "One", ["first"])
    write_section(page, "Two", ["## not a heading here", "| a |"][1:])
    write_section(page, "One", ["### below", "second"])
    assert page.read_text() == "# Results\n\n## One\n\n### below\nsecond\n\n## Two\n\n| a |\n"


def test_the_table_of_pruned_models_says_what_the_reports_say(
    tiny_backbone_folder, toy_csv, tmp_path, monkeypatch
):
    monkeypatch.setenv("CHIPVIZ_HOME", str(tmp_path / "home"))
    data = tmp_path / "sst2"
    data.mkdir()
    (data / "train.csv").write_bytes(toy_csv.read_bytes())
    out = tmp_path / "results.md"
    words = [str(tmp_path), "--backbone", str(tiny_backbone_folder), "--sets", "sst2"]
    words += ["--methods", "top", "--layers", "1", "--max-train", "60", "--max-test", "40"]
    assert tables.main([*words, "--epochs", "1", "--out", str(out)]) == 0
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    models = [row[0].removeprefix("| ") for row in rows[2:]]
    assert list(dict.fromkeys(models)) == ["dense", "dense, LoRA", "top", "top, LoRA"]
    n_layers = 4
    said = {(m, row[1]): row for m, row in zip(models, rows[2:], strict=True)}
    assert said["dense", "chip on the last layer"][5].startswith("+0.0 (+0.0 to +0.0)")
    assert said["dense", "itself"][2] == str(n_layers)
    assert said["top", "itself"][2] == str(n_layers - 1)
    run = f"tables-{tiny_backbone_folder.name}-sst2"
    report = RunFolder(tmp_path / "home" / "runs" / run).read_report()
    last = [s for s in report.scores if (s.split, s.layer) == ("validation", n_layers - 1)]
    best = report.score_at(max(last, key=lambda s: s.accuracy).cut, "test")
    shown = said["dense", "chip on the last layer"][4]
    assert shown.startswith(f"{100 * best.accuracy:.1f} ({100 * best.accuracy_low:.1f} to ")
    assert said["top", "chip on the last layer"][3] != said["dense", "chip on the last layer"][3]
    before = out.read_text()
    assert tables.main([*words, "--epochs", "1", "--out", str(out), "--stored"]) == 0
    assert out.read_text() == before
