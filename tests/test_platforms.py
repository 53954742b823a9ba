"""What is said about versions in one place holds in the others."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_python_that_is_named_is_tested() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in PROJECT and f'pythonVersion = "{named[0]}"' in PROJECT


def test_what_the_workflow_and_ci_call_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    scripts = [path.read_text() for path in (ROOT / ".github" / "workflows" / "tests.yml", ROOT / ".ci" / "run")]
    called = {target for text in scripts for target in re.findall(r"\bmake (?:--\S+ )*([a-z-]+)", text)}
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert {"test", "test-lowest", "wheel-check", "docs"} <= called <= targets
    listed = re.search(r"^CORE_TESTS := .*?\.py,(.*?)\)\)$", makefile, re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = listed.group(1).replace("\\", " ").split()
    assert len(names) > 10 and not [name for name in names if not (ROOT / "tests" / f"test_{name}.py").exists()]


def test_every_requirement_is_pinned_for_development() -> None:
    pinned = {
        name.lower() for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    block = PROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    required = [name.lower() for name in re.findall(r'^  "([\w-]+)', block, re.MULTILINE)]
    assert len(required) > 8 and not [name for name in required if name not in pinned]
