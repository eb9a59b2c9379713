"""A finished run + a cut -> a verified bundle."""

from pathlib import Path

from chipviz.backbones.opening import reopen
from chipviz.bundle import check, save
from chipviz.bundle.dense import ask_dense
from chipviz.bundle.extras import choose_extras
from chipviz.bundle.kinds import Cutting
from chipviz.chips.chip import Chips
from chipviz.config import CutSpec
from chipviz.progress import Progress, ProgressFn
from chipviz.results.report import BundleReport
from chipviz.results.run_folder import RunFolder
from chipviz.results.selection import refuse_layer


def build(
    folder: RunFolder, spec: CutSpec, *, home: Path, out: Path, progress: ProgressFn
) -> BundleReport:
    """Cut a finished run's backbone and write the verified bundle to `out`.

    Args:
        folder: The run's folder.
        spec: Where to cut, and the rule that chose it.
        home: The folder that holds `backbones/`.
        out: The bundle's folder. Must not exist, or be an older bundle.
        progress: Told each step.

    Raises:
        ChipvizError: If the cut does not exist, the backbone is gone or is another one now, or the
            bundle fails its verification.
    """
    config, report = folder.read_config(), folder.read_report()
    refuse_layer(spec.cut_layer, report.backbone.no_cut, report.backbone.n_layers)
    extras = choose_extras(spec, report, folder)
    progress(Progress("building", f"loading {report.backbone.name}"))
    backbone, prompt = reopen(config, report, home=home, folder=folder, stored=True)
    chips = Chips.load(folder.whole(folder.chips), backbone.folder.fingerprint)
    with check.rows_to_check(prompt, folder.read_examples("validation")) as rows:
        what = f"{len(rows)} {report.task.rows}"
        progress(Progress("verifying", f"asking the dense model about {what}"))
        said, extras = ask_dense(backbone, prompt, chips, spec, rows, extras)
        doing = f"cutting after layer {spec.cut_layer}, writing and verifying"
        progress(Progress("building", doing))
        made_of = Cutting(backbone, prompt, chips.at(spec.cut), spec, report)
        return save.save(made_of, out, rows, said, extras)
