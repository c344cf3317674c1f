"""Entry point of ``python -m followups.cli``, an alternative to the command ``followups``."""

import sys

from followups.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
