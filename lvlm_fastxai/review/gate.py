"""Who may ask the review page what: every check that stands before a request is answered.

* Its Host: a name that does not belong to this server means that somebody's DNS points at it (DNS rebinding).
* Its path: it begins with a secret that only the printed address holds. Other users of this machine can reach the port
  as well. A path, unlike a cookie, is not sent to other ports of the same host; it leaves no trace in referrers, which
  the page forbids, nor in logs, which the server does not keep.
* On POST, its Origin and a token that only the page holds (cross-site request forgery), or the bearer token of another
  service, which needs no secret and opens one endpoint.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import flask

from ..errors import ArgumentError

__all__ = ["Gate", "is_local", "parse_address"]

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

_OPENED = "lvlm_fastxai.review.opened"


class Gate:
    """The checks of one server, with a secret and a token of its own.

    Args:
        names: host names that requests may carry besides "localhost" and loopback addresses.
        addresses: also take any literal IP address as Host: right where the server listens beyond this machine, and
            not a rebinding, since that needs a name.
        service_token: other services may ``POST /items`` with ``Authorization: Bearer <it>``; "": none may.

    Raises:
        ArgumentError: the service token is short.

    Attributes:
        secret: first part of the path of every request but a service's.
        token: that the page sends with every POST.
    """

    def __init__(self, names: Sequence[str], addresses: bool, service_token: str) -> None:
        if service_token and len(service_token) < 16:
            raise ArgumentError(f"service token: expected 16 characters or more, got {len(service_token)}")
        self.secret, self.token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._names = frozenset(name.lower() for name in ("localhost", *names))
        self._addresses = addresses
        self._service_token = service_token

    def wrap(self, application: Application) -> Application:
        """Take the secret off the paths of requests before an application sees them."""

        def opened(environ: Environ, start_response: Any) -> Iterable[bytes]:
            first, slash, rest = environ.get("PATH_INFO", "").removeprefix("/").partition("/")
            if slash and _same(first, self.secret):
                environ["SCRIPT_NAME"] = f"{environ.get('SCRIPT_NAME', '')}/{first}"
                environ["PATH_INFO"] = f"/{rest}"
                environ[_OPENED] = True  # clients set names that begin with HTTP_ only
            return application(environ, start_response)

        return opened

    def check(self) -> None:
        """Refuse the current request, with status 401 or 403, unless it may be answered."""
        request = flask.request
        if not self._host_belongs(request.headers.get("Host", "")):
            flask.abort(403, "this name does not belong to the review page; see `review serve --name`")
        reads = request.method in ("GET", "HEAD")
        authorization = request.headers.get("Authorization")
        if authorization is not None and not reads:
            self._check_service(authorization)
            return
        if _OPENED not in request.environ:
            flask.abort(403, "open the address that `review serve` has printed: it holds a secret, new at every start")
        if not reads:
            self._check_page()

    def _check_service(self, authorization: str) -> None:
        right = bool(self._service_token) and _same(authorization, f"Bearer {self._service_token}")
        if flask.request.path != "/items" or not right:
            flask.abort(401, "the bearer token is not the one that this server was given, or opens only POST /items")

    def _check_page(self) -> None:
        request = flask.request
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.headers['Host']}":
            flask.abort(403, "this request comes from another site")
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            flask.abort(403, "this request comes from another site")
        if not _same(request.headers.get("X-Review-Token", ""), self.token):
            flask.abort(403, "the page is older than the server: load it again")

    def _host_belongs(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        address = parse_address(name)
        if address is None:
            return name in self._names
        return self._addresses or address.is_loopback


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a literal IP address; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_local(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    address = parse_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _same(given: str, expected: str) -> bool:
    """Compare in a time that does not tell how much is right."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
