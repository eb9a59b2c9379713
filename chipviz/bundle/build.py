"""A finished run + a cut -> a verified bundle."""

from pathlib import Path

from chipviz.backbones.opening import reopen
from chipviz.bundle import check, save
from chipviz.chips.chip import Chips
from chipviz.config import CutSpec
from chipviz.errors import ConfigError
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
    if spec.cut_layer >= report.backbone.n_layers:
        raise ConfigError(
            f"Layer {spec.cut_layer} does not exist, the last is {report.backbone.n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    refuse_layer(spec.cut_layer, report.backbone.no_cut)
    progress(Progress("building", f"loading {report.backbone.name}"))
    backbone, prompt = reopen(config, report, home=home, folder=folder, stored=True)
    chip = Chips.load(folder.whole(folder.chips), backbone.folder.fingerprint).at(spec.cut)
    with check.rows_to_check(prompt, folder.read_examples("validation")) as rows:
        what = f"{len(rows)} {report.task.rows}"
        progress(Progress("verifying", f"asking the dense model about {what}"))
        said = check.expected(backbone, prompt, chip, spec, rows)
        doing = f"cutting after layer {spec.cut_layer}, writing and verifying"
        progress(Progress("building", doing))
        return save.save(backbone, prompt, chip, spec, report, out, rows, said)
