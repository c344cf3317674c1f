"""The `web` process, started by `python -m followups.api`.

It listens on port $PORT (default 8000) of all IPv6 and IPv4 addresses.
"""

from __future__ import annotations

import argparse
import os
import sys

from followups.api.app import app_from_environment
from followups.api.listening import ListeningError, listen
from followups.api.server import serve
from followups.urls import HIGHEST_PORT, port_of


def main() -> None:
    """Read the settings and serve requests; exit with code 2 if a setting is invalid."""
    parser = argparse.ArgumentParser(prog="python -m followups.api", description="Serve the REST API.")
    parser.add_argument("--host", default="", help="address to listen on (default: all addresses, IPv6 and IPv4)")
    parser.add_argument("--port", default=port_of(os.environ.get("PORT"), "8000"), help="default: $PORT, else 8000")
    arguments = parser.parse_args()
    if not arguments.port.isascii() or not arguments.port.isdigit() or int(arguments.port) > HIGHEST_PORT:
        sys.stderr.write(f"followups: PORT should be a number from 0 to {HIGHEST_PORT}\n")
        raise SystemExit(2)
    app = app_from_environment()
    try:
        sockets = [listen(arguments.host, int(arguments.port))]
        if app.state.metrics_port:
            sockets.append(listen(arguments.host, app.state.metrics_port))
    except ListeningError as error:
        sys.stderr.write(f"followups: {error}.\n")
        raise SystemExit(1) from None
    serve(app, sockets)


if __name__ == "__main__":
    main()
