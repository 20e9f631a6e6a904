"""``python -m fx_approx``."""

import sys

from fx_approx.cli import main

if __name__ == "__main__":
    sys.exit(main())
