"""Meta-train an optimizer: ``python train_meta.py RECIPE [--set key=value ...]``, the same as ``learnedopt train``."""

from __future__ import annotations

import sys

from learnedopt import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``learnedopt train ...`` and return its exit code."""
    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
