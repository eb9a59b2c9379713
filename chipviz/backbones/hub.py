"""The Hub: a model's files, fetched by a process of their own that can be stopped.

`python -m chipviz.backbones.hub REPO REVISION` is that process. See `chipviz.download`.
"""

import re
import sys
from pathlib import Path
from typing import Any

from chipviz import download
from chipviz.download import ready, say
from chipviz.progress import ProgressFn

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
NOT_WANTED = ["*/*", "consolidated*"]
"""Files of a model stand at the top. Folders and one name hold the same weights in other forms."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)


def split_id(source: str) -> tuple[str, str] | None:
    """Repository and revision of `owner/name` or `owner/name@revision`. None if it is no such id.

    The revision is "main" where none is given.
    """
    repo, at, revision = source.partition("@")
    revision = revision if at else "main"
    if any(bad in source for bad in ("..", "--")):
        return None
    if not _ID.fullmatch(repo) or not _REVISION.fullmatch(revision):
        return None
    return repo, revision


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds."""
    found = re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if found and folder.parent.name == "snapshots" else None


def fetch(repo: str, revision: str, progress: ProgressFn) -> Path:
    """Fetch a model's configuration, tokenizer, card and safetensors into the Hub's cache.

    Args:
        repo: Such as `owner/name`.
        revision: A branch, tag or commit.
        progress: Told how many bytes have arrived. A cancel ends the process.

    Returns:
        The folder of one commit.

    Raises:
        SourceError: One sentence for each way in which the Hub says no, or nothing.
    """
    answer = download.ask("backbones.hub", [repo, revision], repo, progress)
    if "folder" in answer:
        return Path(answer["folder"])
    raise download.refusal(answer, "backbone", repo, revision)


# --- the process that fetches -------------------------------------------------------------------


def _fetch(repo: str, revision: str) -> None:
    from huggingface_hub import errors, snapshot_download
    from tqdm.auto import tqdm

    class Said(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        """A bar that is a line of JSON."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            if self.unit == "B" and self.n != getattr(self, "said", 0):
                self.said = self.n
                say(done=self.n, total=self.total)

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=ready(),
            allow_patterns=WANTED,
            ignore_patterns=NOT_WANTED,
            max_workers=4,
            tqdm_class=Said,
        )
    except errors.GatedRepoError:
        say(refused="gated")
    except errors.RevisionNotFoundError:
        say(refused="revision")
    except errors.RepositoryNotFoundError:
        say(refused="missing")
    else:
        say(folder=str(folder))


if __name__ == "__main__":
    with download.saying_full():
        _fetch(*sys.argv[1:])
