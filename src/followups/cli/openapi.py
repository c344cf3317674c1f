"""``followups openapi``: print the REST API's OpenAPI document."""

from __future__ import annotations

import typer

from followups.api.app import openapi_document
from followups.cli.entry import examples
from followups.cli.output import print_json

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog=examples("followups openapi > openapi.json"))
def openapi() -> None:
    """Print the REST API's OpenAPI document (3.1). The command needs no settings and no database."""
    print_json(openapi_document())
