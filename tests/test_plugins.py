"""Plug-ins: modules that are named, or that distributions bring, register things for every command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learnedopt import cli, plugins, recipes, tasks
from learnedopt.core.plugged import needed
from learnedopt.core.registry import Registry
from learnedopt.estimators.registry import ESTIMATORS
from learnedopt.inner_objectives.registry import INNER_OBJECTIVES
from learnedopt.objectives.registry import OBJECTIVES
from learnedopt.optimizers.registry import RULES
from learnedopt.tasks.registry import FAMILIES

OWN = '''
"""A rule, a family, an inner objective and a recipe of somebody's own."""

from dataclasses import dataclass, replace

import torch

from learnedopt import InnerObjective, UpdateRule, inner_objectives, optimizers, recipes, tasks
from learnedopt.core.registry import Choice
from learnedopt.recipes import HeldOut
from learnedopt.tasks.quadratic import Quadratic


@dataclass(frozen=True)
class Mine(UpdateRule):
    """-exp(theta) g."""

    def init_theta(self, generator):
        return {"log_rate": torch.tensor(-3.0)}

    def init(self, theta, params):
        return params, {}

    def update(self, theta, grads, state, params, loss):
        return {k: -theta["log_rate"].exp() * g for k, g in grads.items()}, state


@dataclass(frozen=True)
class Pulled(InnerObjective):
    """A pull to zero beside the task's loss."""

    def loss(self, theta, family, params, batch):
        return family.loss(params, batch) + 0.01 * sum((p**2).sum() for p in params.values())


@dataclass(frozen=True)
class Steep(Quadratic):
    """The quadratics."""


def my_recipe():
    """Train a rule of one's own on quadratics of one's own."""
    recipe = recipes.meta_training("lstm-quadratic")
    return replace(
        recipe, name="my-recipe", rule=Choice("mine"), family=Choice("steep"), inner_objective=Choice("pulled"),
        num_meta_steps=2, num_tasks=2, validation=HeldOut(num_tasks=2, num_steps=2),
    )


optimizers.register("mine", Mine)
tasks.register("steep", Steep)
inner_objectives.register("pulled", Pulled)
recipes.register("my-recipe", my_recipe)
'''


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder of its own, and let nothing that a test registers outlive it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_loaded", {"imports": {}, "plugins": {}})
    monkeypatch.setattr(recipes, "_registered", {})
    registries: list[Registry[object]] = [RULES, FAMILIES, INNER_OBJECTIVES]  # pyright: ignore[reportAssignmentType]
    for registry in registries:
        monkeypatch.setattr(registry, "registered", {**registry.registered})
    for group in (ESTIMATORS, OBJECTIVES):
        monkeypatch.setattr(group, "registered", {})
    known = {*sys.modules}
    yield
    for name in {*sys.modules} - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def forget(*modules: str) -> None:
    """Be as another process, which has imported none of it."""
    for name in modules:
        del sys.modules[name]
    for registry in (RULES, FAMILIES, ESTIMATORS, OBJECTIVES):
        registry.registered.clear()
    INNER_OBJECTIVES.registered.pop("pulled", None)
    recipes._registered.clear()
    plugins._loaded["imports"].clear()


def test_a_module_of_the_current_folder_works_and_a_run_says_that_it_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_module.py").write_text(OWN, "utf-8")
    plugins.load(["my_module"])
    plugins.load(["my_module"])  # once
    assert "my-recipe" in recipes.names() and recipes.summary("my-recipe").startswith("Train a rule of one's own")
    assert cli.main(["train", "my-recipe", "--wandb", "disabled"]) == 0, capsys.readouterr().err
    assert cli.main(["check", "my-recipe"]) == 0, capsys.readouterr().out
    folder = Path("runs/my-recipe")
    assert json.loads((folder / "config.json").read_text("utf-8"))["imports"] == ["my_module"]
    assert json.loads((folder / "theta.json").read_text("utf-8"))["metadata"]["imports"] == ["my_module"]
    few = ["--family", "steep", "--tasks", "2", "--steps", "2", "--baselines", "SGD", "--wandb", "disabled"]
    assert cli.main(["evaluate", str(folder), *few]) == 0, capsys.readouterr().err
    assert cli.main(["card", str(folder)]) == cli.main(["report", str(folder)]) == 0
    assert cli.main(["hub", "push", str(folder), "--to", "shelf"]) == 0
    card = Path("shelf/README.md").read_text("utf-8")
    assert "registers `mine`, `pulled`, which the library does not have: it was the module `my_module` (`--im" in card
    assert " --import my_module\n```\n" in card and 'plugins.load(["my_module"])  # registers mine, pulled\n' in card
    assert (
        "`mine`, 1 number;" in card and "(`FinalLoss` in runs of 2 inner steps, a mean over 2 held-out tasks)" in card
    )
    forget("my_module")
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), *few]) == 2
    told = capsys.readouterr().err
    assert "there is no update rule 'mine'" in told
    assert told.endswith("plug-ins were loaded: pass --import my_module if you trust what that runs\n")
    assert "my_module" not in sys.modules
    plugins.load(["my_module"])
    assert cli.main(["evaluate", str(folder), *few]) == 0


ESTIMATED = '''
"""A gradient estimator and a meta-objective of somebody's own."""

from dataclasses import dataclass

from learnedopt import GradientEstimator, OfLosses, Unrolled, estimators, objectives


@estimators.register
@dataclass(frozen=True)
class Doubled(GradientEstimator):
    """Twice the gradient through a window, which starts from where the last one ended.

    Args:
        window: steps.
    """

    window: int
    factor: float = 2.0

    def estimate(self, loop, theta, objective, carry):
        found = Unrolled(self.window).estimate(loop, theta, objective, carry)
        grads = {k: self.factor * g for k, g in found.grads.items()}
        return found._replace(grads=grads, carry=loop.run(theta, carry, self.window).end)


@objectives.register
@dataclass(frozen=True)
class Power(OfLosses):
    """The last loss to a power."""

    power: float = 2.0

    def of_losses(self, before, end):
        return end**self.power
'''


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own forward mode
def test_an_estimator_and_an_objective_of_ones_own_work_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("estimated.py").write_text(ESTIMATED, "utf-8")
    small = ["rule=sgd", 'rule.learn=["lr"]', "family.dim=3", "num_tasks=2", "validation.num_tasks=2",
             "validation.num_steps=2", "checkpoint_every=1", "execution.compile=false", "--name", "mine"]  # fmt: skip
    named = ["estimator=Doubled", "estimator.window=2", "--objective.power=3", "objective=Power"]
    train, silent = ["train", "lstm-quadratic", *small], ["--wandb", "disabled"]
    imports, folder = ["--import", "estimated"], Path("runs/mine")
    assert cli.main([*train, *named, "num_meta_steps=2", *silent, *imports]) == 0, capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text("utf-8"))
    about = json.loads((folder / "theta.json").read_text("utf-8"))["metadata"]
    for record in (config["recipe"], about):
        assert record["estimator"] == {"type": "Doubled", "window": 2, "factor": 2.0}
        assert record["objective"] == {"type": "Power", "power": 3.0}
    assert config["imports"] == about["imports"] == ["estimated"]
    forget("estimated")  # a carry that goes on, and a configuration of text, are read again
    capsys.readouterr()
    assert cli.main([*train, *named, "num_meta_steps=3", *imports, "--print_config"]) == 0
    Path("longer.yaml").write_text(capsys.readouterr().out, "utf-8")
    longer = ["train", "lstm-quadratic", "--name", "mine", "--config", "longer.yaml", "--extend", *silent]
    assert cli.main([*longer, *imports]) == 0, capsys.readouterr().err
    assert "after meta-step 3" in capsys.readouterr().out
    few = ["--tasks", "2", "--steps", "2", "--baselines", "SGD"]
    assert cli.main(["evaluate", str(folder), *few, *silent, *imports]) == 0, capsys.readouterr().err
    found = [
        "diagnose",
        "lstm-quadratic",
        *small[:-2],
        *named,
        "--horizon",
        "2",
        "--batches",
        "3",
        "--theta",
        "runs/mine",
    ]
    assert cli.main([*found, *imports]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "The recipe's estimator is Doubled(window=2)." in said and re.search(r"^the recipe's: \S+ s an", said, re.M)
    assert "there is no hint" not in said
    forget("estimated")
    for words in (longer, [*train, "estimator=Doubled"]):
        assert cli.main([*words]) == 2
        told = capsys.readouterr().err
        assert re.search(r"estimator='Doubled' is none of Unrolled, .*\(yours: --import", told)
    assert cli.main(["list", *imports]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  TaskByTask .*\n  Doubled", said, re.M)
    assert re.search(r"^  HypergradientFeedback .*\n  Power", said, re.M)
    assert cli.main([*train, "estimator=Double", *imports]) == 2
    assert "did you mean 'Doubled'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_modul", r"--import my_modul: there is no module 'my_modul' here or installed; did you mean 'my_module'\?"),
        ("pkg.ruls", r"--import pkg\.ruls: there is no module 'pkg\.ruls' here or installed; did you mean 'rules'\?"),
        ("my_module.py", r".*is not the name of a module, as in Python's import statement; did you mean 'my_module'\?"),
        ("folder/my_module", r".*'folder/my_module' is not the name of a module"),
        ("", r".*'' is not the name of a module"),
        (
            "divides",
            r"--import divides: divides cannot be imported: ZeroDivisionError: division by .*divides.py:2",
        ),
        ("spelled", r".*spelled cannot be imported: SyntaxError: .*spelled.py:1\)"),
        ("needs", r"--import needs: No module named 'nowhere_to_be_found', which needs imports \(.*needs.py:1\)"),
        ("ends", r".*ends cannot be imported: SystemExit: 0 \(.*ends.py:2\)"),
        ("twice", r".*twice cannot be imported: ValueError: the name 'sgd' of update rules is already registered"),
    ],
    ids=lambda value: value if value.isidentifier() else "",
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(name: str, told: str) -> None:
    files = {
        "my_module.py": "", "pkg/__init__.py": "", "pkg/rules.py": "", "divides.py": "\n1 / 0\n",
        "spelled.py": "def (", "needs.py": "import nowhere_to_be_found\n", "ends.py": "import sys\nsys.exit(0)\n",
        "twice.py": "from learnedopt import optimizers\noptimizers.register('sgd', print)\n",
    }  # fmt: skip
    Path("pkg").mkdir()
    for path, text in files.items():
        Path(path).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=told) as raised:
        plugins.load([name])
    assert "\n" not in str(raised.value) and plugins.record() == {}


def installed(site: Path, name: str, value: str, text: str) -> None:
    """Lay a distribution that has an entry point on the path."""
    about = site / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (about / "entry_points.txt").write_text(f"[learnedopt.plugins]\nrules = {value}\n", "utf-8")
    (site / f"{value}.py").write_text(text, "utf-8")
    sys.path.append(str(site))


def test_what_an_installed_distribution_names_is_imported(tmp_path: Path) -> None:
    text = "from learnedopt import tasks\nfrom learnedopt.tasks.sine import Sine\ntasks.register('theirs', Sine)\n"
    installed(tmp_path / "site", "their-rules", "their_rules", text)
    plugins.load()
    assert "theirs" in tasks.names() and plugins.record() == {"plugins": ["their-rules"]}
    assert str(tmp_path) not in sys.path  # no module was named


def test_a_broken_plug_in_is_named_with_its_distribution(tmp_path: Path) -> None:
    installed(tmp_path / "site", "their-rules", "broken_rules", "raise RuntimeError('no licence')\n")
    told = "the plug-in 'rules' of the installed distribution 'their-rules': .* RuntimeError: no licence .*rules.py:1"
    with pytest.raises(ValueError, match=told):
        plugins.load()


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, ""),
        ({"imports": "my_module", "plugins": 3}, ""),
        ({"imports": ["a.b", "a b; rm", 3, "..", "x" * 300, "\x1b[31m"]}, "pass --import a.b if you trust"),
        ({"imports": ["json"], "plugins": ["their-rules", "x y"]}, "loaded: install their-rules"),
    ],
)
def test_only_names_of_modules_are_shown(record: dict[str, object], told: str) -> None:
    found = needed(record)
    assert told in found and (found == "") == (told == "")
    assert not re.search(r"rm|xxx|\x1b|x y|json", found)


def test_a_recipe_of_ones_own_is_refused_where_it_cannot_be_one() -> None:
    with pytest.raises(ValueError, match="'demo' is already registered"):
        recipes.register("demo", lambda: recipes.make("ridge"))
    with pytest.raises(ValueError, match="is not the name of a folder"):
        recipes.register("my/recipe", lambda: recipes.make("ridge"))
    with pytest.raises(TypeError, match="pass a name, and the function"):
        recipes.register("mine", recipes.make("ridge"))  # pyright: ignore[reportArgumentType]
    recipes.register("my-recipe", lambda: recipes.make("ridge"))
    with pytest.raises(ValueError, match="did you mean 'my-recipe'"):
        recipes.make("my-recip")
