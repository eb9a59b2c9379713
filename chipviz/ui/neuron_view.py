"""The Sparsify page: curves over depth, what-which-where, the strongest neurons, what it costs."""

import html
from collections.abc import Sequence

import streamlit as st

from chipviz.errors import JobError
from chipviz.keys import ChipKey, Cut, Vector
from chipviz.results.neurons import Neuron, SparsifyReport
from chipviz.results.report import RunReport
from chipviz.runs.store import Job
from chipviz.ui import formatting, nav, state, thumbnails, widgets
from chipviz.ui.plots import neurons
from chipviz.ui.plots.theme import chip_name

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the layers that the table of costs has a row for."""
FFN_RATIO, RHO, N_FEATURES = 4, 0.1, 3
"""The paper's k, rho and N_f: width of the feed-forward part, share of neurons, feature sets."""


def show(job: Job, report: RunReport) -> None:
    """Draw all of it, or what to do where a run has none."""
    found = _read(job)
    joined = [key for key in report.chips if key.joins]
    if found is None or not joined:
        st.info(
            "This run has not joined neurons. Start one with Sparsify-then-Classify switched on: "
            "New run, More options."
        )
        nav.link("train", "New run", icon=":material/play_arrow:")
        return
    names = [chip_name(key) for key in joined]
    name = st.selectbox("Neurons of", names, _start(report, joined), key="joined")
    key = joined[names.index(name)]
    left, right = st.columns(2, gap="large")
    with left:
        _chart(neurons.depth_figure(report, key, look=state.look()), "depth")
        st.caption(_claim(report, key))
    with right:
        own = [a for a in found.aggregates if (a.recipe, a.site) == (key.recipe, key.site)]
        _chart(neurons.what_which_where(own, report, look=state.look()), "www")
    _costs(report, key, found)
    _layer(report, key, found)


def _read(job: Job) -> SparsifyReport | None:
    try:
        return state.store().folder(job.run_id).read_neurons()
    except JobError as error:
        widgets.show_error(error)
        return None


def _start(report: RunReport, joined: Sequence[ChipKey]) -> int:
    """The curve of the chosen cut, else the last, which joins most."""
    chosen = state.current_cut(report).chip
    return joined.index(chosen) if chosen in joined else len(joined) - 1


def _claim(report: RunReport, key: ChipKey) -> str:
    """The best joined and the best single layer, each chosen on validation, in a sentence."""
    alike = [k for k in report.chips if key.lucky or not k.lucky]
    single = [k for k in alike if k.kind in ("linear", "sparse") and not k.joins]
    joined, one = (_best(report, keys) for keys in ([key], single))
    test = [100 * report.score_at(cut, "test").accuracy for cut in (joined, one)]
    return (
        f"Chosen on validation: joined up to layer {joined.layer} {test[0]:.1f} % on test, the "
        f"best single layer (layer {one.layer}, {formatting.plain(chip_name(one.chip))}) "
        f"{test[1]:.1f} %: {test[0] - test[1]:+.1f} points. The paper reports about +1."
    )


def _best(report: RunReport, keys: Sequence[ChipKey]) -> Cut:
    """Of some curves the cut with the best validation accuracy; ties go to the shallower."""
    scores = [
        s for s in report.scores if s.split == "validation" and s.layer >= 0 and s.key in keys
    ]
    return max(scores, key=lambda s: (s.accuracy, -s.layer)).cut


def _costs(report: RunReport, key: ChipKey, found: SparsifyReport) -> None:
    """What a share of the layers costs and reaches, beside the paper's formulas."""
    n_layers, n_classes = report.backbone.n_layers, report.task.n_classes
    rows = []
    for share in SHARES:
        layer = max(0, round(share * n_layers) - 1)
        cut = Cut(layer, key)
        cost, score = report.cost_at(cut), report.score_at(cut, "test")
        rows.append(
            {
                "layers": f"{100 * share:.0f} %, {layer + 1} of {n_layers}",
                "accuracy, %": round(100 * score.accuracy, 1),
                "95 %": f"{100 * score.accuracy_low:.1f} to {100 * score.accuracy_high:.1f}",
                "neurons": found.n_read(key, layer),
                "trained numbers": cost.chip_parameters,
                "by the paper's formula": _formula(report, layer + 1) * n_classes,
                "forward saving, %": round(100 * cost.layer_ratio, 1),
                "parameters kept, M": round(cost.n_parameters / 1e6, 1),
                "latency, ms": None if cost.latency_s is None else round(1e3 * cost.latency_s, 1),
            }
        )
    st.subheader("What a depth costs", anchor=False)
    st.dataframe(rows, hide_index=True)
    st.caption(
        f"Trained numbers: weights, biases, scaler and places of the neurons that are read. The "
        f"paper's formula, (1 + rho N (l + 1) / 2) l (1 + k) D with k = {FFN_RATIO}, rho = {RHO}, "
        f"N = {N_FEATURES}, counts its layer-wise probes as well, for each class."
    )


def _formula(report: RunReport, n_layers: int) -> int:
    """Trained numbers of one class over so many layers. Source: arXiv:2311.15983."""
    probes = n_layers * (1 + FFN_RATIO) * report.backbone.hidden_size
    return round((1 + RHO * N_FEATURES * (n_layers + 1) / 2) * probes)


def _layer(report: RunReport, key: ChipKey, found: SparsifyReport) -> None:
    """The strongest neurons of one layer: their values by class, and the texts that excite them."""
    sites = [key.vector] if key.site != "all" else _vectors(found, key)
    st.subheader("The neurons of one layer", anchor=False)
    left, right = st.columns([1, 2])
    with left:
        names = [vector.name for vector in sites]
        name = st.selectbox("Site", names, key="neuron_site") if len(sites) > 1 else names[0]
    vector = sites[names.index(name)]
    with right:
        last = report.backbone.n_layers - 1
        layer = st.slider("Layer", 0, max(1, last), min(last, last // 2), key="neuron_layer")
    place = ("published" if key.by_paper else "sound", vector.site, vector.pooling, layer)
    share = next(
        (s for s in found.layers if s.place == place),
        None,
    )
    if share is not None:
        st.caption(
            f"{share.n_used:,} of {share.width:,} neurons have a weight; the strongest tenth holds "
            f"{100 * share.top_tenth:.0f} % of it."
        )
    own = [n for n in found.neurons if n.place == place]
    if not own:
        st.info("No neuron of this layer has a weight.")
        return
    for place, (i, neuron) in zip(st.columns(len(own)), enumerate(own), strict=True):
        with place:
            _neuron(neuron, report, i)


def _vectors(found: SparsifyReport, key: ChipKey) -> list[Vector]:
    return list(
        dict.fromkeys(
            Vector(s.site, s.pooling)
            for s in found.layers
            if (s.recipe, s.pooling) == ("sound", key.pooling)
        )
    )


def _neuron(neuron: Neuron, report: RunReport, place: int) -> None:
    figure = neurons.neuron_figure(neuron, report.task.label_names, look=state.look())
    _chart(figure, f"neuron_{place}")
    st.html(strongest_html(neuron.strongest, report.task.rows))


def strongest_html(strongest: Sequence[str], rows: str) -> str:
    """The texts or pictures that excite a neuron most, in HTML. All text escaped."""
    head = f'<div class="cv-muted">{rows.capitalize()} that excite it most</div>'
    if rows == "pictures":
        shown = (thumbnails.figure(thumbnails.opened(one), "") for one in strongest)
        return f'{head}<div class="cv-grid">{"".join(shown)}</div>'
    texts = "".join(f"<li>{html.escape(text)}</li>" for text in strongest)
    return f'{head}<ol class="cv-texts">{texts}</ol>'


def _chart(figure: object, key: str) -> None:
    alt = {
        "depth": "Accuracy of joined neurons and of single layers over depth",
        "www": "Accuracy and depth over the number of neurons",
    }.get(key, "Values of a neuron by class")
    st.plotly_chart(
        figure,  # pyright: ignore[reportArgumentType]
        key=f"{key}_chart",
        theme=None,
        config={"displayModeBar": False},
        alt=alt,
    )
