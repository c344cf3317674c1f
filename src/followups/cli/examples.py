"""The examples at the end of each command's help."""

from __future__ import annotations


def examples(*lines: str) -> str:
    r"""Return the last section of a help text, with each example as a command to type.

    >>> examples("followups up")
    'Examples:\n\n**$ followups up**'
    """
    # Without a blank line in between, the help would join them into one paragraph.
    return "\n\n".join(["Examples:", *(f"**$ {line}**" for line in lines)])
