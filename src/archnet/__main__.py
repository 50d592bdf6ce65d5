"""`python -m archnet`: the `archnet` command."""

import sys

from archnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
