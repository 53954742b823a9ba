"""The house: which module may import which, and what importing the package costs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from learnedopt import cli

ROOT = Path(__file__).resolve().parent.parent
# Room of the library -> the rooms that it may import beside itself. Files of the edge lie beside the rooms.
LAW: dict[str, tuple[str, ...]] = {
    "core": (),
    "execution": ("core",),
    "estimators": ("core", "execution"),
    **dict.fromkeys(("optimizers", "tasks", "inner_objectives", "objectives", "meta_optimizers"), ("core",)),
    "training": ("core",),
    "evaluation": ("core", "execution", "estimators"),
    "plug_in": ("core", "estimators", "objectives", "meta_optimizers"),
    "recipes": ("core", "estimators", "objectives", "meta_optimizers", "plug_in", "evaluation", "training"),
}
# The edge may import every room, those with a registry only inside functions; no room imports the edge, and nothing at
# all imports the bridges: users do, by name.
EDGE = (
    "__init__", "__main__", "bridges", "optim", "cards", "card_needs", "checkpoint", "config", "hub", "plugins", "run",
    "run_folder", "run_results", "stages", "sweep_file", "sweeps", "typed_values", "followed",
    "cli", "cli_check", "cli_compare", "cli_diagnose", "cli_evaluate", "cli_fields", "cli_given", "cli_hub", "cli_list",
    "cli_parser", "cli_recipe", "cli_report", "cli_suite", "cli_sweep", "cli_train",
)  # fmt: skip
FOLDERS = ("optimizers", "tasks")  # beside the package, and in it by a symlink
REGISTRIES = (*FOLDERS, "inner_objectives")
WANDB = ("learnedopt.training.wandb_tracker", "learnedopt.training.wandb_files")  # may import wandb, inside functions
BRIDGED = ("higher", "torchopt")  # packages that the modules of the bridges may import, but not the bridges' own
HEAVY = (*BRIDGED, "wandb", "matplotlib", "PIL", "pooch", "jsonargparse", "rich")


class Import(NamedTuple):
    """One imported name, such as ``learnedopt.core.rule.UpdateRule``."""

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
    """Say which imports of ``module``, such as ``learnedopt.core.inner`` or ``train_meta``, break the rules.

    ``learnedopt`` itself is ``learnedopt.__init__``; a module of a folder is ``learnedopt.optimizers.<name>``.
    """
    root, _, rest = module.partition(".")
    room = rest.split(".")[0] if root == "learnedopt" else ""
    if room and room not in LAW and room not in EDGE:
        return [f"{module} is in no room of the table, and not of the edge"]
    found = []
    for name, line, at_import_time in imports(source, module.rpartition(".")[0]):
        first, *others = name.split(".")
        where = f"{module}:{line} imports {name}: "
        if first in FOLDERS:
            found.append(where + f"say learnedopt.{name}, or its classes exist twice")
        if first == "wandb" and root != "tests" and (module not in WANDB or at_import_time):
            found.append(where + "wandb is imported inside functions of its tracker only")
        if first in BRIDGED and room and (room != "bridges" or rest == "bridges.__init__"):
            found.append(where + "other libraries are imported by the module of the bridges that is named after them")
        if first != "learnedopt" or not room:
            continue
        target = others[0] if others and others[0] in (*LAW, *EDGE) else "__init__"
        if target == "bridges" and room != "bridges":
            found.append(where + "nothing imports the bridges, or the library would need their packages")
        elif target in REGISTRIES and room not in REGISTRIES and at_import_time:
            found.append(where + "rules, families and inner objectives are imported lazily, inside functions")
        elif room not in EDGE and target not in (room, *LAW[room], *(REGISTRIES if room in LAZY else ())):
            found.append(where + f"{room} may import only {', '.join(LAW[room]) or 'nothing'}")
    return found


LAZY = ("evaluation", "recipes")
"""Rooms that make rules by name, inside functions: baselines, and the methods of a study."""


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
    assert {"learnedopt.core.rule", "learnedopt.optimizers.lstm", "tests.test_layout"} <= set(sources)
    broken = [line for module, path in sources.items() for line in violations(module, path.read_text("utf-8"))]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("learnedopt.core.inner", "def f():\n    import learnedopt.execution.compiled"),
        ("learnedopt.core.inner", "from learnedopt import estimators"),
        ("learnedopt.core.inner", "from ..estimators.unrolled import Unrolled"),
        ("learnedopt.execution.compiled", "from learnedopt.estimators import unrolled"),
        ("learnedopt.training.trainer", "from learnedopt.estimators.unrolled import Unrolled"),
        ("learnedopt.training.trainer", "from learnedopt.checkpoint import save"),
        ("learnedopt.training.trainer", "from learnedopt import save"),
        ("learnedopt.training.trainer", "import learnedopt"),
        ("learnedopt.estimators.implicit", "from learnedopt.optimizers.sgd import SGD"),
        ("learnedopt.estimators.implicit", "import importlib\nimportlib.import_module('learnedopt.tasks')"),
        ("learnedopt.evaluation.evaluate", "from learnedopt.optimizers import make"),
        ("learnedopt.evaluation.evaluate", "from learnedopt.training.tracker import Tracker"),
        ("learnedopt.optimizers.lstm", "from learnedopt.execution.compiled import gradient"),
        ("learnedopt.optimizers.lstm", "from ..tasks import make"),
        ("learnedopt.optimizers.lstm", "from optimizers.registry import register"),
        ("learnedopt.tasks.quadratic", "if TYPE_CHECKING:\n    from learnedopt.optimizers import make"),
        ("learnedopt.inner_objectives.l2", "from learnedopt.optimizers.learned_init import check_template"),
        ("learnedopt.__init__", "from learnedopt.inner_objectives import L2"),
        ("learnedopt.utils", ""),
        ("learnedopt.training.trainer", "def f():\n    import wandb"),
        ("learnedopt.training.wandb_tracker", "import wandb"),
        ("learnedopt.optim", "def f():\n    from learnedopt.bridges import celo"),
        ("learnedopt.core.inner", "from learnedopt.bridges.higher import HigherRule"),
        ("learnedopt.bridges.celo", "from learnedopt.optimizers import register"),
        ("learnedopt.bridges.__init__", "from torchopt import adam"),
        ("learnedopt.estimators.unrolled", "def f():\n    import higher"),
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
        ("learnedopt.core.inner", "from learnedopt.core.tree import Params\nimport torch\nfrom .rule import State"),
        ("learnedopt.optimizers.__init__", "from learnedopt.optimizers.registry import make"),
        ("learnedopt.optimizers.lstm", "from learnedopt.core import rule, tree"),
        ("learnedopt.evaluation.evaluate", "def f():\n    from learnedopt.optimizers import make"),
        ("learnedopt.__init__", "if TYPE_CHECKING:\n    from learnedopt import optimizers"),
        ("learnedopt.training.wandb_tracker", "def f():\n    import wandb"),
        ("learnedopt.bridges.higher", "import higher.optim\nfrom learnedopt.optim import LearnedOptimizer"),
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
    assert not loaded_after("import learnedopt") & {"torch", *HEAVY, *FOLDERS}
    engine = loaded_after("from learnedopt import InnerLoop, Unrolled")
    assert "torch" in engine and not engine & {*HEAVY, *FOLDERS}


def test_help_and_version_of_the_commands_wait_for_no_tensors() -> None:
    helps = [[*name.split(), "--help"] for name in cli.COMMANDS if name != "diagnose"]  # its file names estimators
    lines = [["--help"], ["--version"], *helps]
    loaded = loaded_after(f"from learnedopt import cli\nfor words in {lines}:\n    assert cli.main(words) == 0")
    assert "torch" not in loaded and "jsonargparse" in loaded


def test_no_module_of_the_package_is_loaded_twice() -> None:
    names = [name.removesuffix(".__init__") for name in modules() if name.startswith("learnedopt.")]
    missing = {name for name in BRIDGED if importlib.util.find_spec(name) is None}
    names = [
        name for name in names if name.rpartition(".")[2].partition("_")[0] not in missing
    ]  # their bridges ask for them
    code = "import contextlib, importlib"
    for name in names:  # without triton, or with an older one, its modules refuse to be loaded
        fault = "ImportError" if "triton" in name else ""
        code += f"\nwith contextlib.suppress({fault}): importlib.import_module({name!r})"
    loaded = loaded_after(code)
    assert not loaded & {"wandb", *FOLDERS}


def test_the_version_has_its_changes_written_down() -> None:
    declared = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "learnedopt" / "__init__.py").read_text("utf-8"), re.M)
    assert declared is not None
    assert f"## {declared[1]}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
