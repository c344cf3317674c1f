"""Templates and static files of the console.

A static file's name contains a hash of its content, so browsers may cache it forever.
"""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

KEPT = {"cache-control": "public, max-age=31536000, immutable"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # With the referrer policy no-referrer, browsers might omit Origin when the console's forms are sent. Without an
    # Origin header, the console's origin check would fail.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-frame-options": "DENY",
}
"""The headers of every console response."""

ENVIRONMENT = Environment(
    loader=PackageLoader("followups.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A static file."""

    name: str
    """The name of the static file, which contains a hash of its content."""
    content: bytes
    media_type: str


def _load() -> dict[str, Asset]:
    found = {}
    for file in (files(__package__) / "static").iterdir():
        content = file.read_bytes()
        stem, _, suffix = file.name.rpartition(".")
        media_type = "text/javascript" if suffix == "js" else mimetypes.guess_type(file.name)[0]
        name = f"{stem}-{sha256(content).hexdigest()[:12]}.{suffix}"
        found[file.name] = Asset(name, content, media_type or "application/octet-stream")
    return found


ASSETS = _load()
"""The static files, keyed by their names in the source tree."""

BY_NAME = {asset.name: asset for asset in ASSETS.values()}
