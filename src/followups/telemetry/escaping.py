"""Escapes control characters, so that text from outside cannot control a terminal."""

from __future__ import annotations

import re

# The set contains bidirectional marks, embeddings, overrides and isolates, which reorder the text after them. The set
# also contains line separators, paragraph separators and lone surrogates. UTF-8 cannot encode a lone surrogate.
_BEYOND_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROLS = re.compile(f"[\x00-\x1f{_BEYOND_ASCII}]")
_BUT_LINE_FEEDS = re.compile(f"[\x00-\x09\x0b-\x1f{_BEYOND_ASCII}]")
_RAW_IN_JSON = re.compile(f"[{_BEYOND_ASCII}]")


def escape(text: str, *, lines: bool = False) -> str:
    r"""Return the text with control characters escaped; if ``lines`` is true, line feeds are kept.

    >>> print(escape("red \x1b[31m, left\u202e, next\n"))
    red \x1b[31m, left\u202e, next\n
    """
    return (_BUT_LINE_FEEDS if lines else _CONTROLS).sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def escape_json(document: str) -> str:
    r"""Return the JSON document with all control characters escaped, even those that JSON permits.

    >>> print(escape_json('"left\u202e"'))
    "left\u202e"
    """
    return document if document.isascii() and "\x7f" not in document else _RAW_IN_JSON.sub(_as_json, document)


def _as_json(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
