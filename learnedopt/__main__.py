"""``python -m learnedopt``, and ``torchrun -m learnedopt``: the same as the command ``learnedopt``."""

from __future__ import annotations

import sys

from learnedopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
