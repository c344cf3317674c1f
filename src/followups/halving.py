"""A batch of which one may be refused: it is halved until that one stands alone, and the others go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from followups.database import concerns_a_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Halved(Generic[T, R]):
    """What became of a batch: what the work returned for each part, which were refused, and what was not tried."""

    done: list[R] = field(default_factory=list)
    refused: list[tuple[T, Exception]] = field(default_factory=list)
    left: list[T] = field(default_factory=list)
    """Not done, since the database went away when others had been."""


def halve(batch: Sequence[T], work: Callable[[Sequence[T]], R]) -> Halved[T, R]:
    """Do the work for all of a batch at once; where a row's content fails it, for each half, down to that row alone.

    Raises what the work raises for any other reason, as long as nothing is done yet.
    """
    halved: Halved[T, R] = Halved()
    parts = [batch]
    while parts:
        part = parts.pop()
        try:
            halved.done.append(work(part))
        except Exception as error:
            if not concerns_a_row(error):
                if not halved.done:
                    raise
                halved.left = [one for rest in (part, *parts) for one in rest]
                break
            if len(part) == 1:
                halved.refused.append((part[0], error))
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
    return halved
