"""Run ``followups`` as ``python -m followups.cli``."""

import sys

from followups.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
