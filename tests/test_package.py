"""What surrounds the code: the citation, the hooks and the release say what the package says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import learnedopt

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_citation_is_of_this_version_and_names_the_papers() -> None:
    cited = yaml.safe_load(read("CITATION.cff"))
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["version"] == learnedopt.__version__
    assert f'license = "{cited["license"]}"' in read("pyproject.toml")
    assert {"message", "title", "authors"} <= set(cited)
    arxiv = [paper["identifiers"][0]["value"] for paper in cited["references"]]
    assert len(arxiv) == 4 and all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", number) for number in arxiv)
    assert all(paper["title"] and paper["year"] and paper["authors"] for paper in cited["references"])
