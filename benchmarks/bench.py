"""What every row works on: a backbone, texts, folders of its own, and how much of each."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from chipviz.backbones.backbone import Backbone, fast_dtype, load_backbone
from chipviz.backbones.find import find_model
from chipviz.backbones.model_folder import ModelFolder
from chipviz.config import EXAMPLE, RunConfig
from chipviz.data.from_table import load_task
from chipviz.data.prompt import Prompt, bake, load_tokenizer
from chipviz.data.tables import fetch_data
from chipviz.data.task import Examples, Task
from chipviz.features.extract import ORDER, Extracted, extract
from chipviz.keys import Vector
from chipviz.progress import silent
from chipviz.sources import DATA_WHEELS

ROOT = Path(__file__).resolve().parents[1]
SST2 = ROOT.parent / "shared" / "data" / "sst2"
SENTIMENT = "Review: {text}\nSentiment of this review:"
NEWS = "News: {text}\nTopic of this article:"

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """A backbone in memory and a task it reads."""

    backbone: Backbone
    prompt: Prompt
    task: Task
    config: RunConfig

    def texts(self) -> list[str]:
        """All texts, in the order in which `extract` stores them."""
        return [text for split in ORDER for text in self.task.splits[split].texts]

    def ids(self) -> list[list[int]]:
        """Their token ids."""
        return self.prompt.encode(self.texts())

    @contextmanager
    def extracted(self, vectors: tuple[Vector, ...]) -> Iterator[Extracted]:
        """Features computed anew in a folder that goes with the block."""
        with tempfile.TemporaryDirectory(prefix="chipviz-bench-") as home:
            yield extract(self.backbone, self.prompt, self.task, Path(home), vectors=vectors)

    def compute(self, vectors: tuple[Vector, ...]) -> None:
        """Extract and throw away: the work that is timed."""
        with self.extracted(vectors):
            pass

    def take(self, n: int) -> "Work":
        """The same with at most `n` texts a split."""
        splits = {
            split: rows.take(range(min(n, len(rows)))) for split, rows in self.task.splits.items()
        }
        return replace(self, task=replace(self.task, splits=splits))


@dataclass(frozen=True)
class Bench:
    """Where the benchmarks find and leave things."""

    home: Path
    """Holds `backbones/` and `data/`, as `CHIPVIZ_HOME` does."""
    scratch: Path
    """Emptied by its owner."""
    quick: bool = False
    backbone: str = "smollm2-135m"
    data: str = str(SST2) if SST2.is_dir() else "bbc-news"
    example: tuple[tuple[str, object], ...] = tuple(EXAMPLE.items())
    """The embedded example's config."""

    @property
    def template(self) -> str:
        """A prompt that fits the data."""
        return SENTIMENT if Path(self.data).name == "sst2" else NEWS

    def pick(self, full: T, quick: T) -> T:
        """One of two sizes."""
        return quick if self.quick else full

    def config(self, **values: object) -> RunConfig:
        """A run on this backbone and these texts."""
        own = {"backbone": self.backbone, "data": self.data, "poolings": ("last", "mean")}
        return RunConfig.checked(**own | values)

    def folder(self) -> ModelFolder:
        """The backbone's folder, fetched first where needed."""
        return find_model(self.backbone, self.home)

    def open(self, dtype: torch.dtype | None = None, **values: object) -> Work:
        """Load backbone and texts. `values` are further fields of the config."""
        config = self.config(**values)
        folder = self.folder()
        task = load_task(config, self.home, silent)
        tokenizer = load_tokenizer(folder.path, folder.n_positions)
        prompt = bake(tokenizer, config.template, config.max_length, task.splits["train"])
        computed = dtype or fast_dtype(torch.device("cpu"), self.home)
        backbone = load_backbone(folder, dtype=computed, device="cpu")
        return Work(backbone, prompt, task, config)

    def fresh_home(self) -> Path:
        """A new CHIPVIZ_HOME without runs and features, where backbones and data are cached."""
        self.folder()
        for name in {self.data, str(dict(self.example)["data"])} & set(DATA_WHEELS):
            fetch_data(name, self.home)
        home = Path(tempfile.mkdtemp(prefix="home-", dir=self.scratch))
        for name in ("backbones", "data"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to((self.home / name).absolute())
        return home


def without_test(task: Task) -> Task:
    """The task with two test texts left: what training alone has to read."""
    few: Examples = task.splits["test"].take(range(2))
    return replace(task, splits={**task.splits, "test": few})
