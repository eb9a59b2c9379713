"""What the web server adds around the pages: bundle downloads, health, the scheduler.

Plain ASGI parts that `app.py` hands to Streamlit. Knows no page.
"""

import gc
import hashlib
import logging
import os
import re
import secrets
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import streamlit
from anyio import to_thread
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from zipstream import ZipStream

from chipviz.bundle.targets import Target, place_of
from chipviz.errors import JobError
from chipviz.runs import tidy
from chipviz.runs.scheduler import Scheduler
from chipviz.runs.store import Job, Store
from chipviz.ui.gate import LOCAL_HOSTS, Guard, refuse

LINK_AGE_S = 24 * 60 * 60
"""How long a download link is good for."""

_log = logging.getLogger("chipviz")


class Server:
    """Routes, middleware and lifespan of one home folder, for `streamlit.starlette.App`."""

    def __init__(self, home: Path, hosts: Sequence[str] = (), token: str | None = None) -> None:
        """Knows its home, which it opens when it starts. One that cannot be opened is said so.

        Args:
            home: The folder with the store.
            hosts: Names this server answers to, next to this machine's own.
            token: What a browser must know. None lets everybody in who reaches the server.
        """
        self._home = home
        self._opened: tuple[Store, Scheduler] | None = None
        self.routes = [
            Route("/bundles/{token}", self._bundle, methods=["GET"]),
            Route("/api/health", self._health, methods=["GET"]),
        ]
        self.middleware = [Middleware(Guard, hosts=frozenset(hosts) | LOCAL_HOSTS, token=token)]
        self._token = token

    @property
    def store(self) -> Store:
        """The store of the home folder.

        Raises:
            JobError: If it cannot be opened. The next who asks tries again.
        """
        return self._open()[0]

    @property
    def scheduler(self) -> Scheduler:
        """Starts queued jobs. Raises as `store` does."""
        return self._open()[1]

    def _open(self) -> tuple[Store, Scheduler]:
        if self._opened is None:
            store = Store(self._home)
            self._opened = store, Scheduler(store)
        return self._opened

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncIterator[None]:
        """Schedule while the server runs. Processes at work outlive it."""
        os.umask(0o077)  # what people upload and what runs read is theirs alone
        if self._token is not None:
            port = streamlit.get_option("server.port")
            sys.stderr.write(f"Open http://127.0.0.1:{port}/?token={self._token}\n")
        gc.freeze()  # what is imported now stays: collections after a page's run skip it
        try:
            self.scheduler.start()
            await to_thread.run_sync(_sweep, self.store)
        except JobError as error:
            # The pages say so too, and the server answers: whoever mends the folder starts it anew.
            sys.stderr.write(f"error: {error.message}\nhint: {error.hint} Then start again.\n")
        try:
            yield
        finally:
            if self._opened is not None:
                await to_thread.run_sync(self.scheduler.close)

    def _bundle(self, request: Request) -> Response:
        try:
            store = self.store
            run_id, job_id, *more = _serializer(store).loads(
                request.path_params["token"], max_age=LINK_AGE_S
            )
        except SignatureExpired:
            return refuse("This link has expired. Open the Bundle page for a new one.", 403)
        except (BadSignature, ValueError, TypeError):
            return refuse("This link is not valid. Open the Bundle page for a good one.", 403)
        except (JobError, OSError):
            return refuse("The server cannot read its home folder.", 503)
        try:
            job, run = store.get(job_id), store.get(run_id)
        except JobError:
            return refuse("This bundle has been deleted.", 404)
        folder = Path(job.bundle.path) if job.bundle else None
        if folder is not None and more:
            folder = place_of(folder, more[0])
        if folder is None or not folder.is_dir():
            return refuse("There is no such bundle any more. Build it again.", 404)
        return _zip_of(folder, "-".join([_file_name(run, job), *more]), request)

    def _health(self, _request: Request) -> Response:
        facts: dict[str, Any] = {"scheduler": "stopped", "store": "writable"}
        alive = False
        try:
            alive = self.scheduler.alive
            if alive:
                leads = self.scheduler.leads
                facts["scheduler"] = "leads" if leads else "waits for another server"
            self.store.check()
            facts["free_disk_bytes"] = shutil.disk_usage(self.store.home).free
        except (JobError, sqlite3.Error, OSError) as error:
            _log.warning("the store is not writable: %s", error)
            facts["store"] = "not writable"
        well = alive and facts["store"] == "writable"
        return JSONResponse({"ok": well} | facts, status_code=200 if well else 503)


def _sweep(store: Store) -> None:
    try:
        freed = tidy.sweep(store)
    except (JobError, OSError, sqlite3.Error) as error:
        _log.warning("what crashes left behind could not be removed: %s", error)
    else:
        if freed:
            _log.info("%d bytes that crashes left behind are free again", freed)


def bundle_link(store: Store, job: Job, *target: Target | Literal["joined"]) -> str:
    """The address of a zip, relative to the server's root. Good for `LINK_AGE_S`.

    Args:
        store: Of the server.
        job: The bundle.
        target: The place whose export is wanted, or what it was joined to. None is the bundle.
    """
    return f"/bundles/{_serializer(store).dumps([job.run_id, job.job_id, *target])}"


def _zip_of(folder: Path, name: str, request: Request) -> Response:
    """A zip of a folder, packed while it is sent: no copy on disk, flat memory, exact length.

    A range of it is cut out of the same bytes, so that a download that broke off goes on.
    """
    archive = ZipStream.from_path(folder, arcname=name, sized=True)
    length = len(archive)
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.zip"',
        "Cache-Control": "private, no-store",
        "Accept-Ranges": "bytes",
        "ETag": _tag_of(folder),
    }
    wanted = request.headers.get("range", "")
    if request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        wanted = ""  # the bundle is another now: all of it
    try:
        start, end = _range_of(wanted, length)
    except ValueError:
        headers["Content-Range"] = f"bytes */{length}"
        return Response(status_code=416, headers=headers)
    headers["Content-Length"] = str(end - start)
    partial = end - start < length
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{length}"
    status = 206 if partial else 200
    if request.method != "GET":
        return Response(status_code=status, headers=headers, media_type="application/zip")
    content = _between(archive, start, end)
    return StreamingResponse(content, status, headers=headers, media_type="application/zip")


def _range_of(wanted: str, length: int) -> tuple[int, int]:
    """The first byte that a Range header asks for and the one after its last.

    What is no single range of bytes counts as not asked, as RFC 9110 wants.

    Raises:
        ValueError: If it lies beyond the end.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted.strip(), re.ASCII)
    if found is None or not any(found.groups()) or len(wanted) > 60:
        return 0, length
    first, last = found.groups()
    if not first:
        start, end = max(0, length - int(last)), length
    else:
        start, end = int(first), min(length, int(last) + 1) if last else length
        if last and int(last) < start:
            return 0, length
    if start >= end:
        raise ValueError(wanted)
    return start, end


def _between(chunks: Iterable[bytes], start: int, end: int) -> Iterator[bytes]:
    place = 0
    for chunk in chunks:
        here = chunk[max(0, start - place) : max(0, end - place)]
        place += len(chunk)
        if here:
            yield here
        if place >= end:
            return


def _tag_of(folder: Path) -> str:
    """What changes when a file of a folder does."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f'"{digest.hexdigest()[:32]}"'


def _file_name(run: Job, job: Job) -> str:
    """A name that is safe in a header and on every file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"chipviz-{run.name}-{job.name}")[:120]


def _serializer(store: Store) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(_secret(store.home / "secret.key"), salt="chipviz.bundle")


def _secret(path: Path) -> str:
    """The key that signs links, made once per home and readable by its owner alone."""
    try:
        kept = path.read_text("ascii")
        if re.fullmatch(r"[0-9a-f]{64}", kept):
            return kept
        path.unlink(missing_ok=True)  # damaged: links that were signed with it are over
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:
        path.unlink(missing_ok=True)
    return _new_secret(path)


def _new_secret(path: Path) -> str:
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(part, path)  # fails where another server was faster: then its key counts
    except FileExistsError:
        pass
    finally:
        part.unlink()
    return path.read_text("ascii")
