"""The languages of the console: English, and the translations in the `locale` folder."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

LANGUAGES = {"en": "English", "pt-BR": "Português (Brasil)"}


@lru_cache
def catalogue(language: str) -> dict[str, str]:
    """Return a language's translations, keyed by the English text. For English, the mapping is empty."""
    if language not in LANGUAGES or language == "en":
        return {}
    found: dict[str, str] = json.loads((files(__package__) / "locale" / f"{language}.json").read_text("utf-8"))
    return found


def translate(language: str, text: str) -> str:
    """Return the text in the given language, or in English if there is no translation.

    >>> translate("pt-BR", "Follow-up"), translate("pt-BR", "a stranger's words")
    ('Follow-up', "a stranger's words")
    """
    return catalogue(language).get(text, text)


def preferred(accepted: str) -> str:
    """Return the console language that an Accept-Language header prefers.

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
