"""Checks whether a state-changing request was sent by one of the console's own pages. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

OURS = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site for requests from a console page or from the browser's address bar."""


def own_origin(public_url: str | None, scheme: str, host: str) -> str:
    """Return the console's origin.

    The origin is taken from FOLLOWUPS_PUBLIC_URL if it is set, and otherwise from the URL of the request.

    >>> own_origin("https://chat.example/followups", "http", "10.0.0.7:8000")
    'https://chat.example'
    """
    if public_url is None:
        return _plain(f"{scheme}://{host}")
    return _plain(public_url)


def refusal(headers: Mapping[str, str], own: str, *, configured: bool) -> Sentence | None:
    """Return why the request is refused, or None if it comes from the console's own pages.

    >>> refusal({"origin": "http://localhost:8000"}, "http://localhost:8000", configured=False)
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if configured:
        hint = Sentence("FOLLOWUPS_PUBLIC_URL says that the console is at {own}; correct it if that is wrong.", own=own)
    else:
        hint = Sentence(
            "The request arrived at {own}; behind a proxy, set FOLLOWUPS_PUBLIC_URL to the address that people use.",
            own=own,
        )
    if site is not None and site not in OURS:
        return Sentence("The request comes from another site.") + hint
    if origin is None and site is None:
        return Sentence("The request has neither an Origin nor a Sec-Fetch-Site header.") + hint
    if origin is not None and _plain(origin) != own:
        return Sentence("The request comes from another origin.") + hint
    return None


def _plain(url: str) -> str:
    """Return the scheme, host and port of an origin, without a default port.

    >>> _plain("HTTPS://Chat.Example:443/x"), _plain("http://[::1]:8000")
    ('https://chat.example', 'http://[::1]:8000')
    """
    try:
        parts = urlsplit(url.lower())
    except ValueError:  # such as a URL with an unclosed bracket
        return ""
    host, default = parts.netloc.rpartition("@")[2], {"https": ":443", "http": ":80"}.get(parts.scheme, "")
    return f"{parts.scheme}://{host.removesuffix(default) if default else host}"
