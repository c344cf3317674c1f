"""The languages of the console: English, and the catalogues beside it."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

LANGUAGES = {"en": "English", "pt-BR": "Português (Brasil)"}


@lru_cache
def catalogue(language: str) -> dict[str, str]:
    """Return the translations of a language by the English texts; English itself needs none."""
    if language not in LANGUAGES or language == "en":
        return {}
    found: dict[str, str] = json.loads((files(__package__) / "locale" / f"{language}.json").read_text("utf-8"))
    return found


def translate(language: str, text: str, **values: object) -> str:
    """Return a text in the language, with its values filled in; English where there is no translation.

    >>> translate("en", "{number} new", number=3)
    '3 new'
    """
    chosen = catalogue(language).get(text, text)
    return chosen.format(**values) if values else chosen


def preferred(accepted: str) -> str:
    """Return the first language of an Accept-Language header that the console has.

    >>> preferred("pt;q=0.8, en;q=0.7"), preferred("de, en-GB"), preferred("")
    ('pt-BR', 'en', 'en')
    """
    weighed = []
    for place, part in enumerate(accepted[:200].split(",")):
        tag, _, weight = part.strip().partition(";q=")
        try:
            weighed.append((-float(weight or 1), place, tag.strip().lower()))
        except ValueError:
            continue
    for _, _, tag in sorted(weighed):
        for language in LANGUAGES:
            if tag.split("-")[0] == language.lower().split("-")[0]:
                return language
    return "en"
