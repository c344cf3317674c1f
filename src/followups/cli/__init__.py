"""The command line: ``followups``, one file a command group, each loaded when it is called."""

from followups.cli.entry import main

__all__ = ["main"]
