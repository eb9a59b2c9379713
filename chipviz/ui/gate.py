"""Who may ask this server, and what stands on every answer. Knows no page and no store."""

import base64
import hashlib
import hmac
import re
import secrets
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import streamlit
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOADS = 100
"""Addresses for uploads that pages were given last, and that are good."""

_UPLOAD = re.compile(rb"/_stcore/upload_file/[0-9a-f-]+/[0-9a-f-]+")

COOKIE = "chipviz_token"
"""Cookie of a browser that came with the token."""

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


def _own_scripts() -> str:
    """Hashes of the scripts that stand in Streamlit's own page, whatever version is installed."""
    page = (Path(streamlit.__file__).parent / "static" / "index.html").read_text("utf-8")
    found = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", page, re.DOTALL)
    digests = (hashlib.sha256(script.encode()).digest() for script in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


SECURITY_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'self'; script-src 'self' 'wasm-unsafe-eval' {_own_scripts()}; "
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


class Guard:
    """Refuses foreign host names, web pages and people, and guards every answer with headers.

    By a foreign name a page elsewhere would get to this server as its own (DNS rebinding). A web
    socket of a foreign page would make Streamlit call an outside address inside its loop. An upload
    is read only at an address that a page was given for it: Streamlit keeps any other in memory.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str | None = None) -> None:
        """Stands before an app.

        Args:
            app: What answers whom it lets in.
            hosts: Names this server answers to.
            token: What a browser must know, on a machine that others use as well.
        """
        self._app = app
        self._hosts = hosts
        self._token = token
        self._uploads: deque[bytes] = deque(maxlen=MAX_UPLOADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        answer = self._welcome(request) or self._refusal(request)
        if scope["type"] == "websocket":
            if answer is None:
                await self._app(scope, receive, self._noting_uploads(send))
            else:
                await send({"type": "websocket.close", "code": 1008})  # HTTP status 403
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await (answer or self._app)(scope, receive, send_with_headers)

    def _welcome(self, request: HTTPConnection) -> Response | None:
        """The way on for an address that carries the token: it becomes a cookie."""
        given = request.query_params.get("token")
        known = _host_name(request.headers.get("host", "")) in self._hosts
        if self._token is None or given is None or not known or not self._is_token(given):
            return None
        rest = [pair for pair in parse_qsl(request.url.query) if pair[0] != "token"]
        target = f"/{request.url.path.lstrip('/')}" + (f"?{urlencode(rest)}" if rest else "")
        answer = RedirectResponse(target, 303, headers={"Cache-Control": "no-store"})
        answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
        return answer

    def _refusal(self, request: HTTPConnection) -> Response | None:
        """Why this connection is not answered. None if it is."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        method = request.scope.get("method", "GET")
        if _host_name(host) not in self._hosts:
            return refuse(
                "This server does not answer to that host name. "
                "Open it as localhost, or add the name to server.allowedHosts.",
                403,
            )
        if self._token is not None and not self._is_token(request.cookies.get(COOKIE, "")):
            return refuse(
                "This server wants its token: open the address that it printed when it started.",
                401,
            )
        other = method not in ("GET", "HEAD") or request.scope["type"] == "websocket"
        if other and not self._is_own(origin, host):
            return refuse("This server takes nothing from other pages.", 403)
        if method == "PUT":
            asked = _UPLOAD.search(request.url.path.encode())
            if asked is None or asked[0] not in self._uploads:
                return refuse("No page asked for this file.", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())

    def _noting_uploads(self, send: Send) -> Send:
        """A way to a browser that notes which addresses for uploads it is told."""

        async def noting(message: Message) -> None:
            if message["type"] == "websocket.send":
                self._uploads.extend(_UPLOAD.findall(message.get("bytes") or b""))
            await send(message)

        return noting

    def _is_own(self, origin: str | None, host: str) -> bool:
        """Whether a web page's origin is this app, or a name that the server was told.

        Other ports of this machine are other programs. What is no browser names no origin.
        """
        if origin is None:
            return True
        scheme, _, place = origin.lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme, "")
        if place.removesuffix(port) == host.lower().removesuffix(port):
            return True
        return _host_name(place) in self._hosts - LOCAL_HOSTS  # behind a proxy with another port


def token_of(arguments: Sequence[str]) -> str | None:
    """The token that arguments of the server ask for: a made one, a given one, or none."""
    for argument in arguments:
        name, _, given = argument.partition("=")
        if name == "--token":
            return given or secrets.token_urlsafe(24)
    return None


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).lower()


def refuse(sentence: str, status: int) -> Response:
    """An answer of one sentence."""
    return PlainTextResponse(sentence, status_code=status, headers={"Cache-Control": "no-store"})
