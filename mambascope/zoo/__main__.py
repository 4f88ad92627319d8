"""Command line of the zoo: ``python -m mambascope.zoo``."""

import sys

from mambascope.training.command import main

if __name__ == "__main__":
    sys.exit(main())
