"""What a web page must not do with a browser that can reach this server.

A page may send requests anywhere without asking first; only their answers are kept from it (the same-origin policy).
So a request from a page of another origin is refused before it acts. And a page may give its own name our address (DNS
rebinding), which makes it the same origin: so only names that are known to be ours are answered. Neither stops
anything but browsers: who may use the server is what the API key is for.
"""

import ipaddress
from collections.abc import Iterable
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.ingress.failures import json_error
from deploy.ingress.openai import errors
from deploy.ingress.openai.errors import APIError

ANY = "*"
LOCAL_NAMES = ("localhost", "*.localhost")


class WebSafety:
    """ASGI middleware. `allowed_hosts` None: any name is answered."""

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] | None, allowed_origins: Iterable[str] = ()) -> None:
        self.app = app
        self.hosts = (ANY,) if allowed_hosts is None else (*LOCAL_NAMES, *allowed_hosts)
        self.origins = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (json_error(refusal) if refusal else self.app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> APIError | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self._is_ours(host):
            return errors.misdirected(host)
        if origin is None or ANY in self.origins or origin in self.origins or _authority(origin) == host:
            return None
        return errors.foreign_origin(origin)

    def _is_ours(self, host: str) -> bool:
        """An address is never rebound: it needs no name. So probes and scrapers reach us by theirs."""
        name = _name(host)
        return not name or _is_address(name) or any(fnmatchcase(name, pattern) for pattern in self.hosts)


def _authority(origin: str) -> str | None:
    """HOST or HOST:PORT, which a browser writes as it does in `Host`. Not the scheme: TLS may end before us."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """Without port, brackets and the dot of the root."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
