"""``python -m eggroll_trainer``, as ``torchrun -m`` needs it: the command ``eggroll``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
