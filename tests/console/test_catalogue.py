"""Every message in the console has a translation, and every translation belongs to a message."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from followups import errors
from followups.console.language import catalogue
from followups.console.timeline import ACTIONS, OUTCOMES
from followups.console.visit import MENU
from followups.console.zones import WEEKDAYS
from followups.errors import ConflictError, InvalidRequestError, NotFoundError
from followups.models import WAYS
from followups.operations.explain import ENDINGS
from followups.sending_hours import DAYS
from followups.states import Status
from followups.store.console_sessions import ROLES
from followups.store.quotas import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator


ROOT = Path(str(files("followups")))
IN_TEMPLATES = re.compile(r'\bt\(\s*"((?:[^"\\]|\\.)*)"|\bt\(\s*\'((?:[^\'\\]|\\.)*)\'')
BY_VALUE = {
    *(status.value for status in Status),
    *ROLES,
    *DAYS,
    *WEEKDAYS,
    *WAYS.values(),
    *ENDINGS.values(),
    *NAMES.values(),
    *ACTIONS.values(),
    *OUTCOMES.values(),
    *(label for _, label, _ in MENU),
    *("user", "message", "due date", "reason", "chat", "Not allowed", "Not found", "Not available"),
}
"""Texts that no call contains literally, because a value selects them."""


def sentences() -> Iterator[str]:
    """Yield each text given to ``t`` or ``Sentence``, and each refusal's default text."""
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in {"t", "Sentence"}:
                    yield node.args[0].value
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, ConflictError | InvalidRequestError | NotFoundError):
            yield str(error())


def used() -> set[str]:
    """Return every text that the console uses."""
    templates = [each.read_text("utf-8") for each in ROOT.rglob("*.html")]
    return {*sentences(), *(found[1] or found[2] for each in templates for found in IN_TEMPLATES.finditer(each))}


def test_the_catalogues_have_exactly_the_texts_in_use() -> None:
    """Every text of the console has a translation with the same placeholders.

    No translation is left over from a removed text.
    """
    portuguese = catalogue("pt-BR")
    assert set(portuguese) == used() | BY_VALUE
    for english, translated in portuguese.items():
        assert set(re.findall(r"\{\w+", english)) == set(re.findall(r"\{\w+", translated)), english
