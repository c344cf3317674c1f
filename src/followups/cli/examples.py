"""Examples, as they stand at the end of each command's help."""

from __future__ import annotations


def examples(*lines: str) -> str:
    r"""Return the end of a help text that shows each line as a command to type.

    >>> examples("followups up")
    'Examples:\n\n**$ followups up**'
    """
    # A blank line between, or the help would join them into one paragraph.
    return "\n\n".join(["Examples:", *(f"**$ {line}**" for line in lines)])
