"""The line: task -> backbone -> features -> chips -> scores -> selection -> cut -> bundle.

The file to open first. Knows the order of the steps. Every step is another module's. Tells its
caller what happens and never asks who that is.
"""

from pathlib import Path

import torch

from chipviz import reporting
from chipviz.backbones import answers
from chipviz.backbones.opening import open_backbone
from chipviz.bundle.build import build as build
from chipviz.chips.rows import Rows
from chipviz.chips.scoring import score
from chipviz.chips.stc_published import stopped_early
from chipviz.chips.training import PointsFn, Trainer
from chipviz.config import RunConfig
from chipviz.data.from_table import load_task
from chipviz.features.distributed import join
from chipviz.features.extract import extract
from chipviz.parallel import Pool
from chipviz.progress import ProgressFn, silent
from chipviz.pruning.cut import impossible_cuts
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder


def run(
    config: RunConfig,
    *,
    home: Path,
    run_id: str,
    folder: RunFolder,
    progress: ProgressFn,
    on_points: PointsFn,
) -> RunReport:
    """Train chips on every layer and report. All that was found is left in `folder`.

    Args:
        config: What to do.
        home: The folder of shared backbones, data and features.
        run_id: Named in the report.
        folder: This run's own folder.
        progress: Told often. Raising `Cancelled` from it stops at a safe point.
        on_points: Told the validation accuracies of all layers each time they are known anew.

    Raises:
        ChipvizError: Whatever the user can mend.
        Cancelled: As raised by `progress`.
    """
    clock = reporting.Clock()
    team = join()
    folder.write_config(config)
    task = load_task(config, home, progress)
    config.refuse_classes(task.n_classes)
    backbone, prompt = open_backbone(config, task, home=home, progress=progress)
    config = config.resolved(causal=backbone.causal, class_token=backbone.class_token)
    no_cut = impossible_cuts(backbone)
    team.share(backbone.dtype)  # everything is in place: helpers may begin
    prompt.save(folder.prompt)
    clock.lap("load_s")
    # Sums of fits are float64, which MPS does not have.
    fitting = backbone.device if backbone.device.type == "cuda" else torch.device("cpu")
    with Pool(backbone.device) as pool, stopped_early():
        bias = backbone.final_norm is None
        trainer = Trainer(task, config, fitting, pool, progress, on_points, bias)
        live = trainer.live_curve()
        extracted = extract(
            backbone,
            prompt,
            task,
            home,
            vectors=config.vectors,
            progress=progress,
            on_key=folder.note_features,
            on_chunk=live.on_chunk,
            team=team,
            pool=pool,
        )
        clock.lap("extract_s", less=live.seconds)
        chips = trainer.fit(extracted.features)
        chips.save(folder.chips, backbone.folder.fingerprint)
        rows = Rows(extracted.features, task, fitting)
        trained = score(rows, chips, config.seed, progress)
    clock.lap("fit_s")  # what was drawn while reading is in it
    trained.predictions.asked = answers.zero_shot(backbone, task, config, progress)
    clock.lap("ask_s")
    folder.write_predictions(trained.predictions)
    for found in chips.sparsified:
        folder.write_neurons(found)
    folder.keep_examples(task)
    found = reporting.Findings(config, task, backbone, prompt, no_cut, extracted, trained)
    report = reporting.assemble(found, run_id, clock)
    folder.write_report(report)
    folder.seal()
    return report


def help_leader(config: RunConfig, *, home: Path) -> None:
    """Read texts for the run whose leader is another process of this launch.

    Raises:
        ChipvizError: As `run` does, or if the leader is gone.
    """
    team = join()
    dtype = team.share()
    task = load_task(config, home, silent)
    backbone, prompt = open_backbone(config, task, home=home, progress=silent, dtype=dtype)
    config = config.resolved(causal=backbone.causal, class_token=backbone.class_token)
    with Pool(backbone.device) as pool:
        extract(backbone, prompt, task, home, vectors=config.vectors, team=team, pool=pool)
