"""`python -m jaxlayout`: the command line."""

import sys

from jaxlayout.cli import main

if __name__ == "__main__":
    sys.exit(main())
