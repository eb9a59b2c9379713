"""What long measurements share: runs and models that are there already, and pages by section."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chipviz import experiment
from chipviz.chips.live import PointsFn
from chipviz.config import RunConfig
from chipviz.errors import JobError
from chipviz.progress import silent
from chipviz.pruning.make import make
from chipviz.results.models import ModelRecord, ModelSpec, delete_model, made_folder, read_record
from chipviz.results.report import RunReport
from chipviz.results.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.md"


def finished(config: RunConfig, folder: RunFolder) -> RunReport | None:
    """The report of a finished run of these settings, where there is one."""
    with suppress(JobError):
        if folder.read_config() == config:
            return folder.read_report()
    return None


def trained(
    config: RunConfig,
    home: Path,
    folder: RunFolder,
    on_points: PointsFn = lambda _points: None,
) -> RunReport:
    """The report of a run of these settings: read where it is there, else trained.

    Args:
        config: The settings.
        home: The folder of backbones, data and features.
        folder: The run's own.
        on_points: Told the points of a curve that grows.
    """
    found = finished(config, folder)
    if found is not None:
        return found
    folder.path.mkdir(parents=True, exist_ok=True)
    return experiment.run(
        config,
        home=home,
        run_id=folder.path.name,
        folder=folder,
        progress=silent,
        on_points=on_points,
    )


def made(spec: ModelSpec, home: Path) -> ModelRecord:
    """The record of a model of these settings: read where it is there, else made."""
    folder = made_folder(home, spec.name)
    record = folder and read_record(folder)
    if record and record.spec == spec:
        return record
    if folder:
        delete_model(home, spec.name)
    with tempfile.TemporaryDirectory() as scratch:
        return make(spec, home=home, scratch=Path(scratch) / "s", progress=silent)


def write_section(page: Path, heading: str, lines: Sequence[str]) -> None:
    """Put lines below a heading of a page, in place of what stands there.

    Args:
        page: A file of Markdown. It may lack the heading, or not exist.
        heading: Without marks.
        lines: What stands below it.
    """
    text = page.read_text("utf-8") if page.exists() else "# Results\n"
    first, *sections = text.split("\n## ")
    found = {section.partition("\n")[0]: section for section in sections}
    found[heading] = "\n".join([heading, "", *lines])
    parts = [first.rstrip("\n"), *(section.rstrip("\n") for section in found.values())]
    page.write_text("\n\n## ".join(parts) + "\n", "utf-8")
