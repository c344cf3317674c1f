"""Rates as people write them: follow-ups a second, a minute, an hour or a day."""

from __future__ import annotations

import math
import re

import typer

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h|d)", re.ASCII)
MOST = 1_000_000
"""Largest rate, in follow-ups a second, and largest bucket: more than this system can send."""
LEAST = 0.01 / SECONDS["d"]
"""Smallest rate, in follow-ups a second. With a lower one a large bucket takes longer to fill than a Redis key can
live.
"""


def parse_rate(text: str) -> float:
    """Parse ``50/s``, ``20/min``, ``1000/h`` or ``5/d`` into follow-ups a second. Raises `typer.BadParameter`.

    >>> parse_rate("90/min")
    1.5
    """
    found = RATE.fullmatch(text)
    if not found:
        message = f"{text!r} is no rate; write it as 50/s, 20/min or 1000/h."
        raise typer.BadParameter(message)
    rate = float(found[1]) / SECONDS[found[2]]
    if not LEAST <= rate <= MOST:
        message = f"{text!r} should be at least 0.01/d, and at most {MOST}/s; followups pause lets nothing begin."
        raise typer.BadParameter(message)
    return rate


def shown(rate: float) -> str:
    """Return a rate in the shortest unit of time in which it is a whole number.

    >>> shown(20 / 60), shown(1000 / 3600), shown(0.5), shown(1.25)
    ('20/min', '1000/h', '30/min', '75/min')
    """
    for unit, seconds in SECONDS.items():
        number = rate * seconds
        if number >= 1 and math.isclose(number, round(number), rel_tol=1e-9):
            return f"{round(number)}/{unit}"
    return f"{rate * SECONDS['d']:.6g}/d"


def default_burst(rate: float) -> int:
    """Return the default burst: one second's worth, and at least one.

    >>> default_burst(50), default_burst(1 / 3)
    (50, 1)
    """
    return max(1, math.floor(rate))
