"""The command line, ``followups``: a module for each command, imported when that command is called."""

from followups.cli.entry import main

__all__ = ["main"]
