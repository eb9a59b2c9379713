"""What the web server adds around the pages: bundle downloads, health, headers, the scheduler.

Plain ASGI parts that `app.py` hands to Streamlit. Knows no page.
"""

import gc
import logging
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import to_thread
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from zipstream import ZipStream

from chipviz.errors import JobError
from chipviz.runs.scheduler import Scheduler
from chipviz.runs.store import Job, Store

LINK_AGE_S = 24 * 60 * 60
"""How long a download link is good for."""

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
"""On every answer. Streamlit sends none of them. With these, injected script and foreign images
stay dead even if a page should ever render hostile text as HTML."""

_log = logging.getLogger("chipviz")


class Server:
    """Routes, middleware and lifespan of one home folder, for `streamlit.starlette.App`."""

    def __init__(self, home: Path, hosts: Sequence[str] = ()) -> None:
        """Open the store of `home`.

        Args:
            home: The folder with the store.
            hosts: Names this server answers to, next to this machine's own.
        """
        self.store = Store(home)
        self.scheduler = Scheduler(self.store)
        self.routes = [
            Route("/bundles/{token}", self._bundle, methods=["GET"]),
            Route("/api/health", self._health, methods=["GET"]),
        ]
        self.middleware = [Middleware(Guard, hosts=frozenset(hosts) | LOCAL_HOSTS)]

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncIterator[None]:
        """Schedule while the server runs. Processes at work outlive it."""
        gc.freeze()  # what is imported now stays: collections after a page's run skip it
        self.scheduler.start()
        try:
            yield
        finally:
            await to_thread.run_sync(self.scheduler.close)

    def _bundle(self, request: Request) -> Response:
        try:
            run_id, job_id = _serializer(self.store).loads(
                request.path_params["token"], max_age=LINK_AGE_S
            )
        except SignatureExpired:
            return _refuse("This link has expired. Open the Bundle page for a new one.", 403)
        except (BadSignature, ValueError, TypeError):
            return _refuse("This link is not valid. Open the Bundle page for a good one.", 403)
        try:
            job, run = self.store.get(job_id), self.store.get(run_id)
        except JobError:
            return _refuse("This bundle has been deleted.", 404)
        folder = Path(job.bundle.path) if job.bundle else None
        if folder is None or not folder.is_dir():
            return _refuse("There is no such bundle any more. Build it again.", 404)
        return _zip_of(folder, _file_name(run, job), body=request.method == "GET")

    def _health(self, _request: Request) -> Response:
        scheduler = "stopped"
        if self.scheduler.alive:
            scheduler = "leads" if self.scheduler.leads else "waits for another server"
        facts: dict[str, Any] = {"scheduler": scheduler, "store": "writable"}
        try:
            self.store.check()
            facts["free_disk_bytes"] = shutil.disk_usage(self.store.home).free
        except (sqlite3.Error, OSError) as error:
            _log.warning("the store is not writable: %s", error)
            facts["store"] = "not writable"
        well = self.scheduler.alive and facts["store"] == "writable"
        return JSONResponse({"ok": well} | facts, status_code=200 if well else 503)


def bundle_link(store: Store, job: Job) -> str:
    """The address of a bundle's zip, relative to the server's root. Good for `LINK_AGE_S`."""
    return f"/bundles/{_serializer(store).dumps([job.run_id, job.job_id])}"


class Guard:
    """Refuses foreign host names (DNS rebinding) and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection. Streamlit itself checks the host of web sockets."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        host = _host_name(Headers(scope=scope).get("host", ""))
        if host in self._hosts:
            await self._app(scope, receive, send_with_headers)
        else:
            refusal = _refuse(
                "This server does not answer to that host name. "
                "Open it as localhost, or add the name to server.allowedHosts.",
                403,
            )
            await refusal(scope, receive, send_with_headers)


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).lower()


def _refuse(sentence: str, status: int) -> Response:
    return PlainTextResponse(sentence, status_code=status, headers={"Cache-Control": "no-store"})


def _zip_of(folder: Path, name: str, *, body: bool) -> Response:
    """A zip of a folder, packed while it is sent: no copy on disk, flat memory, exact length."""
    archive = ZipStream.from_path(folder, arcname=name, sized=True)
    headers = {
        "Content-Length": str(len(archive)),
        "Content-Disposition": f'attachment; filename="{name}.zip"',
        "Cache-Control": "private, no-store",
        "Accept-Ranges": "none",
    }
    if not body:
        return Response(headers=headers, media_type="application/zip")
    return StreamingResponse(iter(archive), headers=headers, media_type="application/zip")


def _file_name(run: Job, job: Job) -> str:
    """A name that is safe in a header and on every file system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"chipviz-{run.name}-{job.name}")[:120]


def _serializer(store: Store) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(_secret(store.home / "secret.key"), salt="chipviz.bundle")


def _secret(path: Path) -> str:
    """The key that signs links, made once per home and readable by its owner alone."""
    try:
        return path.read_text("ascii")
    except FileNotFoundError:
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
