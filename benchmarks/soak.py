"""Faults met by real trainings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import soak_memory


def main() -> int:
    """Soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    if arguments.memory:
        found = soak_memory.soak(arguments.folder.absolute(), arguments.minutes)
        print(json.dumps(found, indent=2))
        return 0 if found["passed"] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
