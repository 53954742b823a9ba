"""Put a trained theta into the package, with its card, and write docs/packaged.md anew.

Run ``python benchmarks/package_theta.py RUN NAME --card CARD.json``. RUN is a run's folder, a checkpoint, or the name
of a packaged optimizer; the card is a JSON object with text for each of ``learnedopt.cards.FIELDS`` and the number
``holds_up_to``. Without ``--card`` the one that is there is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import learnedopt
from learnedopt import cards
from learnedopt.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Package what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint or a packaged name")
    parser.add_argument("name", metavar="NAME", help="what it shall be called")
    parser.add_argument("--card", type=Path, metavar="CARD.json", help="default: the card that it has")
    arguments = parser.parse_args()
    print(package(arguments.run, arguments.name, arguments.card))
    (ROOT / "docs" / "packaged.md").write_text(cards.document(), encoding="utf-8")


def package(run: str, name: str, card: Path | None, folder: Path = ROOT / "learnedopt" / "pretrained") -> Path:
    """Write the two files of a packaged optimizer and return the path of the first.

    Raises:
        ValueError: the card lacks something, or the name is not of small letters, digits and dashes.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"the name {name!r} is not of small letters, digits and single dashes")
    learned = load_checkpoint(run)
    given = learned.metadata.get("card") if card is None else json.loads(card.read_text(encoding="utf-8"))
    metadata = {**learned.metadata, "card": cards.check_card(given)}
    return learnedopt.save(folder / name, learned.rule, learned.theta, metadata, learned.inner_objective)


if __name__ == "__main__":
    main()
