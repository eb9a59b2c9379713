"""Pages of made models, without a browser."""

import pytest

from chipviz.results.models import Ancestor, Mark, ModelRecord, ModelSpec, write_record
from chipviz.runs.store import Store
from chipviz.ui.plots import fits
from tests.page_driver import button, html_of, open_page, text_of

HOSTILE = "<img src=x onerror=alert(1)>"


def spec(**options):
    given = {"name": "short", "backbone": HOSTILE, "method": "angular", "layers": 2, **options}
    return ModelSpec.checked(**given)


def record(**options):
    given = {
        "name": "short",
        "parent": HOSTILE,
        "root": Ancestor(name=HOSTILE, n_layers=8, n_parameters=2_000_000),
        "method": "angular+replaceme",
        "spec": spec(heal="replaceme"),
        "removed": [3, 4],
        "n_layers": 6,
        "n_parameters": 1_500_000,
        "perplexity_before": 37.6,
        "perplexity_pruned": 330.5,
        "perplexity_after": 130.2,
        "n_perplexity": 16_320,
        "created": 1.0,
        "seconds": 60.0,
    }
    return ModelRecord(**given | options)


@pytest.fixture
def made(home):
    store = Store(home)
    folder = home / "models" / "short"
    folder.mkdir(parents=True)
    write_record(folder, record())
    return store


def test_no_models_yet_says_what_one_could_do(home):
    Store(home)
    assert "Take layers out" in text_of(open_page("models"))


@pytest.mark.usefixtures("made")
def test_a_model_shows_its_lineage_and_what_the_healing_gave_back():
    said = html_of(open_page("models"))
    assert "angular+replaceme of &lt;img" in said
    assert "<img" not in said
    assert "6 of 8 layers" in said
    assert "25 % fewer" in said
    assert "330.5" in said


def test_a_model_can_be_deleted(made):
    at = open_page("models")
    button(at, "delete_short").click().run()
    assert not (made.home / "models" / "short").exists()
    assert "No models yet" in text_of(at)


def test_a_job_that_failed_says_why_and_can_be_removed(home):
    store = Store(home)
    job = store.create_model(spec(), claim=True)
    store.add_mark(job.job_id, Mark(1, 100, "loss", 3.5))
    store.finish(job.job_id, "failed", message="It did not fit.", hint="Take out fewer.")
    at = open_page("models")
    assert "It did not fit" in text_of(at)
    assert button(at, f"resume_{job.job_id}")
    button(at, f"forget_{job.job_id}").click().run()
    assert store.models() == []
    assert store.marks(job.job_id) == []


def test_the_form_queues_what_it_says(home):
    Store(home)
    at = open_page("models", new="1")
    assert button(at, "make").disabled
    at.selectbox(key="make_method").select("bottom").run()
    at.number_input(key="make_layers").set_value(3).run()
    at.text_input(key="make_name").set_value("chopped").run()
    button(at, "make").click().run()
    (job,) = Store(home).models()
    assert (job.name, job.model.method, job.model.layers) == ("chopped", "bottom", 3)
    assert job.model.backbone == "smollm2-135m"
    assert job.state == "queued"


def test_the_form_refuses_in_a_sentence(home):
    Store(home)
    at = open_page("models", new="1")
    at.text_input(key="make_name").set_value("../up").run()
    button(at, "make").click().run()
    assert "name has 1 to 64 letters" in text_of(at)
    assert Store(home).models() == []


@pytest.mark.usefixtures("made")
def test_a_link_names_the_made_model_in_the_form_of_a_run():
    at = open_page("train", backbone="short")
    assert at.session_state["backbone_source"] == "Made here"
    assert at.session_state["backbone_made"] == "short"


def test_a_long_fit_is_drawn_with_few_points():
    marks = [Mark(i, 10 * i, "loss", 1 / i) for i in range(1, 5001)]
    figure = fits.fit_figure(marks)
    assert len(figure.data[0].x) <= fits.MOST_POINTS
    assert figure.data[0].x[-1] == 50_000
    assert fits.fit_figure([]).data == ()


def test_compare_asks_for_runs_where_there_are_none(home):
    Store(home)
    assert "No finished run yet" in text_of(open_page("compare"))
