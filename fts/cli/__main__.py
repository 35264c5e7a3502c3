"""`python -m fts.cli`."""

import sys

from fts.cli import main

if __name__ == "__main__":
    sys.exit(main())
