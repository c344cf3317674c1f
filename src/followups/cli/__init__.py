"""The ``followups`` command line: one module for each command, imported when the command is called."""

from followups.cli.entry import main

__all__ = ["main"]
