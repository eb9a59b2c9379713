"""What will be built of a cut, how it goes, and what is built."""

import streamlit as st

from chipviz.keys import Cut
from chipviz.results.report import BundleKind, BundleReport, RunReport
from chipviz.runs import scheduler
from chipviz.runs.store import Job
from chipviz.ui import bundle_beside, extras_step, formatting, live, state, widgets
from chipviz.ui import cut as cut_widgets
from chipviz.ui.plots.theme import chip_name

_LOADS: dict[BundleKind, str] = {
    "sequence": 'loads with `pipeline("text-classification", PATH)`, nothing else needed',
    "token": "loads with `AutoModelForTokenClassification`; three lines give the label",
    "image": 'loads with `pipeline("image-classification", PATH)`, nothing else needed',
    "chipviz": "loads with `chipviz.bundle.load(PATH)`, for no stock class holds this chip",
}


def plan(job: Job, report: RunReport, cut: Cut) -> None:
    """Say what will be built at this cut, and build it."""
    cost = report.cost_at(cut)
    st.html(
        f'<div class="cv-big">{formatting.megabytes(report.dense.weight_bytes)} → '
        f'<span class="cv-accent">{formatting.megabytes(cost.weight_bytes)}</span></div>'
    )
    blocks = f"layers 0 to {cut.layer} of {report.backbone.n_layers}"
    st.write(f"A **{cost.bundle}** bundle, {blocks}: {_LOADS[cost.bundle]}.")
    working = [bundle for bundle in state.store().bundles(job.run_id) if widgets.at_work(bundle)]
    if working:
        live.watch_bundle(working[-1])
        return
    spec = extras_step.extras(report, cut_widgets.spec_of(report, cut))
    there = any(_is_at(bundle, cut) for bundle in _done(job))
    st.button(
        "Build it again" if there else "Build the bundle",
        type="secondary" if there else "primary",
        key="build",
        on_click=widgets.act,
        args=(scheduler.enqueue_bundle, state.store(), job.run_id, spec),
    )


def built(job: Job, cut: Cut) -> Job | None:
    """List what was built. The newest bundle at this cut (else the newest of all) is opened."""
    bundles = state.store().bundles(job.run_id)
    if bundles and bundles[0].status in ("failed", "stopped", "interrupted"):
        _ended_badly(bundles[0])
    done = _done(job)
    if not done:
        return None
    shown = next((bundle for bundle in done if _is_at(bundle, cut)), done[0])
    st.subheader("Built", anchor=False)
    for bundle in done:
        _built_row(bundle, opened=bundle is shown)
    return shown


def _done(job: Job) -> list[Job]:
    """Finished bundles, newest first, only the newest per folder."""
    by_folder: dict[str, Job] = {}
    for bundle in state.store().bundles(job.run_id):
        if bundle.bundle:
            by_folder.setdefault(bundle.bundle.path, bundle)
    return list(by_folder.values())


def _is_at(bundle: Job, cut: Cut) -> bool:
    return bundle.cut.cut == cut


def name_of(bundle: BundleReport) -> str:
    """What a bundle is called on the page."""
    return f"Layer {bundle.cut_layer}, {chip_name(bundle.key)}"


def _ended_badly(job: Job) -> None:
    if job.status == "failed":
        widgets.show_failure(job.refusal)
    else:
        st.warning(f"The last build was {job.status}. Build it again.")


def _built_row(job: Job, *, opened: bool) -> None:
    bundle = job.bundle
    assert bundle is not None
    name = f"{name_of(bundle)}: {formatting.megabytes(bundle.folder_bytes)}"
    with st.expander(name, expanded=opened, icon=":material/verified:"):
        st.write(
            f"Verified in a fresh process: {bundle.n_verified} of {bundle.n_verified} agree, "
            f"largest difference {bundle.max_difference:.0e}."
        )
        bundle_beside.show(bundle)
        st.dataframe(
            {
                "file": list(bundle.files),
                "size": [f"{size:,} bytes" for size in bundle.files.values()],
            },
            hide_index=True,
        )
