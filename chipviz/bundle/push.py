"""A bundle or an export -> a repository of a model hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from chipviz.bundle.metadata import METADATA
from chipviz.bundle.targets import NOTE
from chipviz.bundle.verify import check_sums
from chipviz.errors import BundleError, ConfigError

TOKEN = "HF_TOKEN"
"""Variable that holds the token. It is read from nowhere else."""


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be."""

    repo_id: str
    files: dict[str, int]
    """Path in the repository -> bytes."""
    address: str | None = None
    """Of the commit. None of a dry run."""


def push(folder: Path, repo_id: str, *, private: bool, dry_run: bool) -> Pushed:
    """Send a bundle or an export to a repository, which is made if it is not there.

    Args:
        folder: The bundle or the export.
        repo_id: As `owner/name`.
        private: Whether a new repository is for its owner alone.
        dry_run: Only say what would be sent.

    Raises:
        ConfigError: If the name is none, or there is no token.
        BundleError: If the folder is neither, was altered, or the hub refuses it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} names no repository: {error}", "Give owner/name.") from None
    if (folder / METADATA).is_file():
        check_sums(folder)
    elif not (folder / NOTE).is_file():
        raise BundleError(
            f"{folder} is no bundle and no export.", "Give a folder of `cut` or `export`."
        )
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    if dry_run:
        return Pushed(repo_id, files)
    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(
            f"There is no token: the variable {TOKEN} is empty.",
            "Set it to a token that may write, or look first with --dry-run.",
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be sent.", "Unset it.")
    api = HfApi(token=token)
    with _as_refusal(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Add {folder.name}"
        )
    return Pushed(repo_id, files, str(commit.commit_url))


@contextmanager
def _as_refusal(repo_id: str) -> Iterator[None]:
    """Say what a hub refuses in a sentence.

    Raises:
        BundleError: In place of what was raised.
    """
    try:
        yield
    except HfHubHTTPError as error:
        said = " ".join(str(error.server_message or error).split())[:200]
        hint = f"Check that the token in {TOKEN} may write there."
        raise BundleError(f"The hub refused {repo_id}: {said}", hint) from None
    except OSError as error:
        said = " ".join(str(error).split())[:200]
        hint = "Check the connection and try again; what arrived is not sent again."
        raise BundleError(f"The hub cannot be reached: {said}", hint) from None
