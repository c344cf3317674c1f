"""Entry point of ``python -m followups.cli``, which is the same as ``followups``."""

import sys

from followups.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
