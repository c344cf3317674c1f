"""The process `web`: `python -m followups.api` listens on every interface, on $PORT (default 8000)."""

from __future__ import annotations

import argparse
import os
import sys

from followups.api.app import app_from_environment
from followups.api.server import serve

HIGHEST_PORT = 65_535


def main() -> None:
    """Read the settings and serve; invalid ones end with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m followups.api", description="Serve the REST API.")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")  # noqa: S104 - a container's
    parser.add_argument("--port", default=os.environ.get("PORT", "8000"), help="default: $PORT, else 8000")
    arguments = parser.parse_args()
    if not arguments.port.isascii() or not arguments.port.isdigit() or int(arguments.port) > HIGHEST_PORT:
        sys.stderr.write(f"followups: PORT should be a number from 0 to {HIGHEST_PORT}\n")
        raise SystemExit(2)
    serve(app_from_environment(), arguments.host, int(arguments.port))


if __name__ == "__main__":
    main()
