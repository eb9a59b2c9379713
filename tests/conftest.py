"""Tiny models, tokenizers and tables made here: no test needs a network or a published model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, at its import
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import threadpoolctl
import torch
from hypothesis import settings

from tests.families import NAMED, SEVEN, make_tokenizer, planted_rows

torch.set_num_threads(1)  # tiny models: a second thread would only wait for the first
threadpoolctl.threadpool_limits(1)

# The same draws every time, and no test asserts a time.
settings.register_profile(
    "chipviz", max_examples=50, deadline=None, derandomize=True, database=None
)
settings.load_profile("chipviz")


EXAMPLE = ("test_main_job.py", "test_embedded_example.py")
"""Files that read the embedded example, which one process does for both."""
LONG = (*EXAMPLE, "test_peers.py", "test_export.py", "test_elsewhere.py")
"""Files that take minutes: they begin first, so that no process is left alone with one."""


def pytest_collection_modifyitems(items):
    """Long files first. The order is the same in every process."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """In two processes (`make test`) files stay whole: what a module shares is made once.

    Marks of groups would say the same, but pytest 9.2 does not let xdist 3.8 rename tests by them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Whole(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "example" if file.endswith(EXAMPLE) else file

    return Whole(config, log)


def shared_home(tmp_path_factory):
    """A fresh home; what was fetched outlives the session, features are shared within it.

    Fetching and converting the real backbone takes half a minute, reading the example another one:
    the browser's story and the test of the example's figures need both.
    """
    home = tmp_path_factory.mktemp("home")
    cache = Path(os.environ.get("CHIPVIZ_TEST_CACHE") or "~/.cache/chipviz-tests").expanduser()
    places = {name: cache / name for name in ("backbones", "data")}
    places["features"] = tmp_path_factory.getbasetemp() / "shared-features"
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(place)
    return home


@pytest.fixture
def full_disk():
    """A disk that takes no file's bytes beyond a number: a limit on files stands for it."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def full_after(n_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full_after


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty CHIPVIZ_HOME."""
    folder = tmp_path / "chipviz-home"
    monkeypatch.setenv("CHIPVIZ_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def toy_csv(tmp_path_factory):
    """300 different short texts in 3 classes."""
    lines = [f"{text},{label}" for text, label in planted_rows(300)]
    path = tmp_path_factory.mktemp("toy") / "toy.csv"
    path.write_text("text,label\n" + "\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    """A saved tokenizer that adds nothing around a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bos_tokenizer_folder(tmp_path_factory) -> Path:
    """A saved tokenizer that puts <s> before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("bos-tokenizer")
    make_tokenizer("bos-bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory, tiny_tokenizer_folder) -> Path:
    """A random Llama of 4 layers, 32 wide, in float32, with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    NAMED["llama"].build(folder, tie_word_embeddings=True, initializer_range=0.2)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session", params=SEVEN, ids=lambda family: family.name)
def family(request, tmp_path_factory):
    """A random model of one family on disk: its name, folder and published form."""
    model = request.param.published()
    folder = tmp_path_factory.mktemp(request.param.name)
    model.save_pretrained(folder)
    return request.param.name, folder, model
