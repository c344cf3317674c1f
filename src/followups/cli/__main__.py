"""``python -m followups.cli`` is ``followups``."""

import sys

from followups.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
