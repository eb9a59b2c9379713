"""Data sets of the Hub: brought as Parquet splits by a process of their own that can be stopped.

`python -m chipviz.data.hub REPO SUBSET REVISION FOLDER` is that process. See `chipviz.download`.
Only data files are read. A data set that is a program is refused.
"""

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chipviz import download
from chipviz.download import ready, say
from chipviz.errors import SourceError, is_disk_full
from chipviz.files import publish
from chipviz.progress import ProgressFn

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?)"
    r"(:(?P<subset>[\w.-]{1,100}))?(@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?",
    re.ASCII,
)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "auxiliary_train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What sources call their splits. Anything else is one table to be split."""


def fetch_hub_data(source: str, home: Path, progress: ProgressFn) -> Path:
    """Bring a data set into the cache: a folder per commit, with one Parquet file per split.

    Args:
        source: `owner/name`, `owner/name:subset`, each also with `@revision`.
        home: The folder that holds `data/`.
        progress: Told that it goes on. A cancel ends the process.

    Raises:
        SourceError: One sentence for each way in which the Hub says no, or nothing.
    """
    named = _ID.fullmatch(source)
    if named is None or ".." in source or "--" in source:
        raise SourceError(
            f"{source[:80]!r} is no embedded data set, no file, no folder and no Hub id.",
            "Embedded is bbc-news. A Hub id looks like owner/name, owner/name:subset "
            "or owner/name:subset@revision.",
        )
    repo, subset, revision = (named[part] or "" for part in ("repo", "subset", "revision"))
    place = home / "data" / "hub"
    answer = download.ask("data.hub", [repo, subset, revision, str(place)], repo, progress)
    if "folder" in answer:
        return Path(answer["folder"])
    answer.setdefault("refused", "broken")
    fetched = sorted(place.glob(f"{_stem(repo, subset)}@{revision}*"), key=os.path.getmtime)
    if answer["refused"] in ("slow", "offline") and fetched:
        return fetched[-1]
    name = f"{repo}:{subset}" if subset else repo
    raise download.refusal(answer, "data set", name, revision)


def revision_of(folder: Path) -> str:
    """The commit that a folder written by `fetch_hub_data` holds."""
    return folder.name.rpartition("@")[2]


def _stem(repo: str, subset: str) -> str:
    return "--".join([*repo.split("/"), *([subset] if subset else [])])


# --- the process that fetches -------------------------------------------------------------------


def _fetch(repo: str, subset: str, revision: str, place: str) -> None:
    """Find the commit, and bring its splits unless they are there."""
    say(begun=repo)
    import httpx2
    from huggingface_hub import HfApi, errors

    token = ready()
    try:
        info = HfApi(token=token).dataset_info(repo, revision=revision or None, timeout=10)
    except errors.GatedRepoError:
        return say(refused="gated")
    except errors.RevisionNotFoundError:
        return say(refused="revision")
    except errors.RepositoryNotFoundError:
        return say(refused="missing")
    except (OSError, ValueError, httpx2.HTTPError):
        return say(refused="offline")
    final = Path(place) / f"{_stem(repo, subset)}@{info.sha}"
    if not final.exists():
        say(found=info.sha)
        refused = _bring(repo, subset, str(info.sha), token, final)
        if refused is not None:
            return say(**refused)
    return say(folder=str(final))


def _bring(
    repo: str, subset: str, sha: str, token: str | bool, final: Path
) -> dict[str, str] | None:
    """Write one Parquet file per split, class names and all. Returns why not, if not."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        loaded: Any = datasets.load_dataset(repo, subset or None, revision=sha, token=token)
    except DatasetNotFoundError as error:
        return {"refused": "gated" if "gated" in str(error) else "missing"}
    except (ConnectionError, TimeoutError):
        return {"refused": "offline"}
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if is_disk_full(error):
            raise
        return {"refused": "broken", "why": " ".join(str(error).split())[:200].rstrip(".")}
    with publish(final) as work:
        for split, name in _splits(loaded):
            _with_pictures(loaded[name]).to_parquet(work / f"{split}.parquet")
    return None


def _with_pictures(rows: Any) -> Any:
    """Rows whose pictures stand in their cells, not in files of a cache beside them."""
    from datasets import Image
    from datasets.table import embed_table_storage

    if not any(isinstance(feature, Image) for feature in rows.features.values()):
        return rows
    return rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=64)


def _splits(names: Iterable[str]) -> list[tuple[str, str]]:
    """Our splits and the source's names of them. Without a training split the first is all."""
    found: dict[str, str] = {}
    for name in map(str, names):
        split = SPLIT_NAMES.get(name.lower())
        if split is not None and (split not in found or name == split):
            found[split] = name
    if "train" not in found:
        found = {"train": next(iter(map(str, names)))}
    return list(found.items())


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), download.saying_full():
        _fetch(*sys.argv[1:])
