"""The house: which module may import which, and what importing the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ("tree", "task", "rule", "checks", "execution", "inner", "objective", "estimator")

# Module of the library -> the modules of the library that it may import. A new module gets a line here.
ALLOWED: dict[str, tuple[str, ...]] = {
    # the core, each on top of the ones before
    "tree": (),
    "task": ("tree",),
    "rule": ("tree",),
    "checks": ("tree", "task", "rule"),
    "mixed_mode": ("tree",),
    "allocator": (),
    "execution": ("tree", "checks"),
    "inner": ("tree", "task", "rule", "checks", "execution", "mixed_mode", "allocator"),
    "objective": ("tree", "task", "rule", "checks", "inner"),
    "estimator": ("tree", "task", "rule", "execution", "inner", "objective"),
    # meta-gradients and their solvers
    "linear_solvers": ("tree", "checks"),
    "flat_state": ("tree", "rule"),
    "coordinatewise": (*CORE, "compiled", "flat_state"),
    "compiled": CORE,
    "unrolled": (*CORE, "coordinatewise", "compiled"),
    "memory": (*CORE, "coordinatewise", "unrolled"),
    "systems": (*CORE, "linear_solvers"),
    "hessian_free": (*CORE, "linear_solvers", "systems"),
    "implicit": (*CORE, "compiled", "linear_solvers", "systems"),
    # the outer loop and what surrounds it
    "files": (),
    "tracker": ("files",),
    "json_tracker": ("files", "tracker"),
    "wandb_tracker": ("files", "tracker"),
    "progress": ("tree", "inner", "files"),
    "trainer": (*CORE, "tracker", "progress"),
    # what the edge is made of
    "overrides": (),
    "plots": ("files",),
    "comparison": ("files", "tracker", "plots"),
    "few_shot": (*CORE, "hessian_free", "files", "tracker", "plots", "comparison"),
    # the folders: update rules and task families, neither the other
    "optimizers": ("tree", "rule"),
    "tasks": ("tree", "task"),
}
# The edge may import everything, the two folders only inside functions; nothing else imports the edge.
EDGE = ("__init__", "optim", "checkpoint", "evaluate", "cli")
FOLDERS = ("optimizers", "tasks")
WANDB = ("wandb_tracker",)  # the modules that may import wandb, inside functions
HEAVY = ("wandb", "matplotlib", "PIL", "pooch", "jsonargparse", "rich")


class Import(NamedTuple):
    """One imported name, such as ``learnedopt.rule.UpdateRule``."""

    name: str
    line: int
    at_import_time: bool


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Yield every import of a module in ``package``: top-level, nested, relative, and ``import_module("...")``."""
    tree = ast.parse(source)
    deferred = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.unparse(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            yield Import(name, getattr(node, "lineno", 0), id(node) not in deferred)


def violations(module: str, source: str) -> list[str]:
    """Say which imports of ``module``, such as ``learnedopt.inner`` or ``train_meta``, break the rules.

    ``learnedopt`` itself is ``learnedopt.__init__``; a module of a folder is ``learnedopt.optimizers.<name>``.
    """
    root, _, rest = module.partition(".")
    part = rest.split(".")[0] if root == "learnedopt" else ""
    if part and part not in ALLOWED and part not in EDGE:
        return [f"{module} has no line in the table of allowed imports"]
    found = []
    for name, line, at_import_time in imports(source, module.rpartition(".")[0]):
        first, *others = name.split(".")
        where = f"{module}:{line} imports {name}: "
        if first in FOLDERS:
            found.append(where + f"say learnedopt.{name}, or its classes exist twice")
        if first == "wandb" and root != "tests" and (part not in WANDB or at_import_time):
            found.append(where + "wandb is imported inside functions of its tracker only")
        if first != "learnedopt" or not part:
            continue
        target = others[0] if others and others[0] in (*ALLOWED, *EDGE) else "__init__"
        if part in EDGE:
            if target in FOLDERS and at_import_time:
                found.append(where + "the edge imports the folders lazily, inside functions")
        elif part != target and target not in ALLOWED[part]:
            found.append(where + f"{part} may import only {', '.join(ALLOWED[part]) or 'nothing'}")
    return found


def modules() -> dict[str, Path]:
    """Return every module of the project by name, those of the two folders as the package's."""
    found = {}
    for top in ("learnedopt", "optimizers", "tasks", "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("learnedopt", *parts) if top in FOLDERS else parts)] = path
    return found | {path.stem: path for path in ROOT.glob("*.py")}


def test_imports_follow_the_layout() -> None:
    sources = modules()
    assert {"learnedopt.tree", "learnedopt.rule", "learnedopt.inner", "tests.test_layout"} <= set(sources)
    broken = [line for module, path in sources.items() for line in violations(module, path.read_text("utf-8"))]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("learnedopt.tree", "from learnedopt.rule import UpdateRule"),
        ("learnedopt.rule", "def f():\n    import learnedopt.inner"),
        ("learnedopt.inner", "from learnedopt import objective"),
        ("learnedopt.inner", "from .estimator import MetaGrad"),
        ("learnedopt.estimator", "from . import unrolled"),
        ("learnedopt.trainer", "from learnedopt.unrolled import Unrolled"),
        ("learnedopt.trainer", "from learnedopt.checkpoint import save"),
        ("learnedopt.trainer", "from learnedopt import save"),
        ("learnedopt.trainer", "import learnedopt"),
        ("learnedopt.implicit", "from learnedopt.optimizers.sgd import SGD"),
        ("learnedopt.implicit", "import importlib\nimportlib.import_module('learnedopt.tasks')"),
        ("learnedopt.evaluate", "from learnedopt.optimizers import make"),
        ("learnedopt.optimizers.lstm", "from learnedopt.inner import InnerLoop"),
        ("learnedopt.optimizers.lstm", "from learnedopt.task import TaskFamily"),
        ("learnedopt.optimizers.lstm", "from ..tasks import make"),
        ("learnedopt.optimizers.lstm", "from optimizers.registry import register"),
        ("learnedopt.tasks.quadratic", "from learnedopt.rule import UpdateRule"),
        ("learnedopt.tasks.quadratic", "if TYPE_CHECKING:\n    from learnedopt.optimizers import make"),
        ("learnedopt.utils", ""),
        ("learnedopt.trainer", "def f():\n    import wandb"),
        ("learnedopt.wandb_tracker", "import wandb"),
        ("train_meta", "from wandb import init"),
        ("train_meta", "from tasks import make"),
        ("tests.test_rules", "import optimizers.lstm"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("learnedopt.inner", "from learnedopt.tree import Params\nimport torch\nfrom .rule import UpdateRule"),
        ("learnedopt.optimizers.__init__", "from learnedopt.optimizers.registry import make"),
        ("learnedopt.optimizers.lstm", "from learnedopt import rule, tree"),
        ("learnedopt.evaluate", "from learnedopt import load\ndef f():\n    from learnedopt.tasks import make"),
        ("learnedopt.__init__", "if TYPE_CHECKING:\n    from learnedopt import optimizers"),
        ("learnedopt.wandb_tracker", "def f():\n    import wandb"),
        ("train_meta", "import learnedopt\nfrom learnedopt.optimizers import make"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_are_the_packages(folder: str) -> None:
    link = ROOT / "learnedopt" / folder
    assert link.is_symlink() and link.readlink() == Path("..") / folder


def loaded_after(code: str) -> set[str]:
    """Return the top-level names of the modules that a fresh interpreter has loaded after ``code``."""
    report = "import sys\nprint('loaded', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_is_light() -> None:
    loaded = loaded_after("import learnedopt")
    assert "torch" in loaded
    assert not loaded & {*HEAVY, *FOLDERS}


def test_no_module_of_the_package_is_loaded_twice() -> None:
    names = [name.removesuffix(".__init__") for name in modules() if name.startswith("learnedopt.")]
    loaded = loaded_after("import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in names))
    assert not loaded & {"wandb", *FOLDERS}


def test_the_version_has_its_changes_written_down() -> None:
    declared = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "learnedopt" / "__init__.py").read_text("utf-8"), re.M)
    assert declared is not None
    assert f"## {declared[1]}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
