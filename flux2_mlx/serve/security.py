"""Who may ask: Host and Origin, the API key, the size of a body; and the headers that keep the page to itself.

A page of another site can have a browser send requests to this machine. Its requests bear that site's Origin; where it
has its name resolve to this machine (DNS rebinding), they bear its name as Host. Both are refused.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InputError
from .answers import fault_body

MAX_BODY = 64 * 1024 * 1024  # bytes
SAFE = ("GET", "HEAD", "OPTIONS")
HOSTS = ("localhost", "host.docker.internal")  # this machine, and how a container on it calls it
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # or a browser mixes the page's new modules with old ones
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """
    Attributes:
        host: the address that is bound.
        api_key: demanded where there is one.
        origins: other sites whose pages may ask; "*" for all.
        open_paths: what needs no key: the page's files hold nothing of their own.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    origins: Sequence[str] = ()
    open_paths: Sequence[str] = ("/health",)

    def check_exposure(self, insists: bool) -> None:
        """Refuse an address that others reach, where no key is demanded.

        Raises:
            InputError: with the way out.
        """
        if not is_loopback(self.host) and self.api_key is None and not insists:
            raise InputError(
                f"others reach {self.host}: demand a key (--api-key KEY, or the variable FLUX2_MLX_API_KEY), or insist "
                "with --no-api-key"
            )

    def allows_host(self, host: str) -> bool:
        """Whether this is a name of the server; an address cannot be made to mean another machine, a name can."""
        name = urlsplit(f"//{host}").hostname or ""
        if name in HOSTS or any(name == urlsplit(origin).hostname for origin in self.origins):
            return True
        if is_loopback(self.host):
            return is_loopback(name)
        own = socket.gethostname().lower()
        return is_address(name) or name in (own, own.partition(".")[0], f"{own.partition('.')[0]}.local")

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask: one of this server, or of a site that the owner allowed."""
        return self.is_other(origin) or (urlsplit(origin).netloc == host and origin != "null")

    def is_other(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def allows_key(self, authorization: str, key: str) -> bool:
        """Whether a request bears the key: as a bearer's, as the password of Basic, or in X-Api-Key."""
        if self.api_key is None:
            return True
        kind, _, text = authorization.partition(" ")
        given = text.strip().encode("latin-1")  # as the header's bytes were
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                given = b""
        elif kind.lower() != "bearer":
            given = key.encode("latin-1")
        return hmac.compare_digest(given, self.api_key.encode())


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


class TooLarge(Exception):
    """A body of more than MAX_BODY."""


class Guard:
    """Refuses what Rules do not allow, before anything of a request is read."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_other = origin is not None and self.rules.is_other(origin)
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                if is_other and origin is not None:
                    answer["Access-Control-Allow-Origin"] = origin
                    answer["Vary"] = "Origin"
                    answer["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        refusal = self._refusal(scope, headers, origin)
        if refusal is not None:
            await refusal(scope, receive, guarded_send)
            return
        try:
            await self.app(scope, _bounded(receive), guarded_send)
        except TooLarge:
            if not started:
                await _too_large()(scope, receive, guarded_send)

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None) -> Response | None:
        rules, host, method, path = self.rules, headers.get("host", ""), scope["method"], scope["path"]
        if not rules.allows_host(host):
            return _refuse(403, f"this server does not answer for {host[:100]!r}; --allow-origin adds a site")
        if origin is not None and not rules.allows_origin(origin, host):
            return _refuse(403, f"pages of {origin[:100]!r} may not ask; --allow-origin adds a site")
        if origin is None and method not in SAFE and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return _refuse(403, "pages of other sites may not ask; --allow-origin adds a site")
        if method == "OPTIONS":
            return _preflight()
        is_open = path in rules.open_paths or (method in SAFE and not path.startswith(("/api/", "/v1/", "/sdapi/")))
        if not is_open and not rules.allows_key(headers.get("authorization", ""), headers.get("x-api-key", "")):
            return _refuse(401, "the API key is missing or wrong: Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        return _too_large() if length.isdecimal() and int(length) > MAX_BODY else None


def _bounded(receive: Receive) -> Receive:
    """What a client sends, as long as it is not too much."""
    read = 0

    async def bounded() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MAX_BODY:
            raise TooLarge
        return message

    return bounded


def _refuse(status: int, message: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(fault_body(message, status), status, headers)


def _too_large() -> Response:
    return _refuse(413, f"a request has at most {MAX_BODY // 1024**2} MB")


def _preflight() -> Response:
    allowed = {
        "Allow": "GET, POST, OPTIONS",
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key",
        "Access-Control-Max-Age": "600",
    }
    return Response(status_code=204, headers=allowed)
