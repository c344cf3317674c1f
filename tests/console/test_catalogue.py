"""Every text of the console has a translation, and no translation is of a text that no longer exists."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from followups.console.language import catalogue
from followups.sending_hours import DAYS
from followups.states import Status
from followups.store.console_sessions import ROLES

ROOT = Path(str(files("followups.console")))
TEXT = re.compile(
    r'\bt\(\s*"((?:[^"\\]|\\.)*)"|\bt\(\s*\'((?:[^\'\\]|\\.)*)\'|^    \("/[\w-]*", "([^"]+)"', re.MULTILINE
)
BY_NAME = {*(status.value for status in Status), *ROLES, *DAYS, "user", "Not allowed", "Not found", "Not available"}
"""Texts that the code chooses by a value, so that no call contains them literally."""


def used() -> set[str]:
    """Return every translatable text in the templates and in the code."""
    sources = [*ROOT.rglob("*.html"), *ROOT.rglob("*.py")]
    return {next(filter(None, found.groups())) for each in sources for found in TEXT.finditer(each.read_text("utf-8"))}


def test_the_catalogues_have_every_text_and_nothing_else() -> None:
    """Every text of the console has a translation with the same placeholders.

    No translation is of a text that does not exist.
    """
    portuguese = catalogue("pt-BR")
    assert set(portuguese) == used() | BY_NAME
    for english, translated in portuguese.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", translated)), english
