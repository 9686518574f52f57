"""The queue as a local web page, and an endpoint where other services can add answers.

`gate` says who may ask, `site` what is answered, `bodies` how what clients send is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, printable
from .queue import Queue

if TYPE_CHECKING:
    from flask import Flask

__all__ = ["create_app", "serve"]

QUEUE, SECRET = "lvlm_fastxai_queue", "lvlm_fastxai_secret"
"""What `create_app` leaves in the application's extensions."""


def create_app(
    queue: str | Path, *, names: Sequence[str] = (), addresses: bool = False, service_token: str = ""
) -> Flask:
    """Return the WSGI application over a queue, which is made if there is none.

    Its addresses begin with a secret, ``app.extensions["lvlm_fastxai_secret"]``, which every application has anew.

    Args:
        queue: path of the SQLite file.
        names: host names that requests may carry besides "localhost" and loopback addresses.
        addresses: also take any literal IP address as Host: right where the server listens beyond this machine, and
            not a rebinding, since that needs a name.
        service_token: other services may ``POST /items`` with ``Authorization: Bearer <it>``; "": none may.

    Raises:
        ArgumentError: Flask is not installed, the file is not a queue, or the token is short.
    """
    try:
        import flask
    except ImportError:
        raise ArgumentError("review serve: Flask is not installed (pip install 'lvlm_fastxai[fastrm]')") from None
    from .gate import Gate
    from .site import Site, limit_bodies

    gate = Gate(names, addresses, service_token)
    opened = Queue(queue)
    app = flask.Flask(__name__, static_folder=None, template_folder=None)
    limit_bodies(app)
    Site(opened, gate).add_to(app)
    app.wsgi_app = gate.wrap(app.wsgi_app)  # type: ignore[method-assign, assignment]
    app.extensions |= {QUEUE: opened, SECRET: gate.secret}
    return app


def serve(
    queue: str | Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    names: Sequence[str] = (),
    service_token: str = "",
) -> None:
    """Serve the page until Ctrl-C. Its address, with the secret that opens it, is printed once.

    Args:
        queue: path of the SQLite file, made if there is none.
        host: address to listen on; any but a loopback address opens the port to the network, and a warning says so.
        port: 0 for any that is free.
        names, service_token: as `create_app`.

    Raises:
        ArgumentError: Flask or waitress is not installed, the file is not a queue, or the address cannot be listened
            on.
    """
    try:
        import waitress
    except ImportError:
        raise ArgumentError("review serve: waitress is not installed (pip install 'lvlm_fastxai[fastrm]')") from None
    try:
        from .gate import is_local, parse_address
    except ImportError:
        raise ArgumentError("review serve: Flask is not installed (pip install 'lvlm_fastxai[fastrm]')") from None
    local = is_local(host)
    own = () if parse_address(host) is not None else (host,)
    app = create_app(queue, names=(*names, *own), addresses=not local, service_token=service_token)
    try:
        server = _listen(waitress, app, host, port)
        if not local:
            print(
                f"warning: {printable(host)} can be reached from other machines, and there is no encryption: whoever "
                "reads the traffic learns the page's address, sees every picture and can decide. Keep it behind a "
                "gateway that encrypts",
                file=sys.stderr,
                flush=True,
            )
        print(f"review page: {_address(server)}{app.extensions[SECRET]}/ (Ctrl-C ends it)", flush=True)
        try:
            server.run()
        finally:
            server.close()
    finally:
        app.extensions[QUEUE].close()


def _listen(waitress: Any, app: Flask, host: str, port: int) -> Any:
    from .bodies import UPLOAD_MOST

    try:
        return waitress.create_server(
            app,
            listen=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            threads=4,
            ident=None,
            max_request_body_size=UPLOAD_MOST,
            clear_untrusted_proxy_headers=True,
        )
    # waitress raises ValueError for a name that it cannot resolve, Python OverflowError for a port beyond 65535.
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"review serve: cannot listen on {host}, port {port}: {reason}") from error


def _address(server: Any) -> str:
    """Return the address that a server listens on, as a browser takes it."""
    if hasattr(server, "effective_listen"):  # a name with several addresses
        host, port = server.effective_listen[0]
    else:
        host, port = server.effective_host, server.effective_port
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
