"""Learned optimizers as files: to and from the disk without a bit lost, and nothing in a file ever run."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plug_in_cases import bare
from safetensors import safe_open
from safetensors.torch import save_file
from test_rules import RULES, template

import learnedopt
from benchmarks.package_theta import package
from learnedopt import cards, checkpoint, inner_objectives
from learnedopt.core import files, theta_file
from learnedopt.core.inner_objective import TaskLoss
from learnedopt.core.rule import UpdateRule
from learnedopt.core.tree import Theta
from learnedopt.optimizers import LSTM, SGD, describe

NAMES = checkpoint.packaged()


def lstm() -> tuple[LSTM, Theta]:
    rule = LSTM(hidden_size=3, output_scale=0.02)
    return rule, rule.init_theta(torch.Generator().manual_seed(4))


def header(rule: UpdateRule, /, **changes: Any) -> dict[str, str]:
    """Return the header of a file of before, without a SHA-256."""
    config = {"format": checkpoint.FORMATS[1], "rule": describe(rule), "metadata": {}, **changes}
    return {"learnedopt": json.dumps(config)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the path of a checkpoint of an LSTM."""
    return learnedopt.save(tmp_path / "mine", *lstm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", RULES)
def test_a_rule_and_its_theta_come_back(kind: str, tmp_path: Path) -> None:
    rule = RULES[kind](template())
    theta = {k: v + 0.1 for k, v in rule.init_theta(torch.Generator().manual_seed(1)).items()}
    path = learnedopt.save(tmp_path / "deep" / "er" / "optimizer", rule, theta)
    again, loaded = learnedopt.load(path)
    assert path.name == "optimizer.safetensors"
    assert describe(again) == describe(rule)
    assert list(loaded) == list(theta)
    assert all(v.dtype == theta[k].dtype and torch.equal(v, theta[k]) for k, v in loaded.items())


def test_dtypes_views_and_graphs(tmp_path: Path) -> None:
    """What is saved is values: not the graph, not the storage that a tensor is a view of."""
    rule, theta = lstm()
    whole = torch.randn(24, 5, generator=torch.Generator().manual_seed(2))
    theta["lstm1/weight"] = whole[::2].requires_grad_()
    theta["lstm1/bias"] = whole[0:12, 1].requires_grad_()
    theta["lstm2/bias"] = theta["lstm2/bias"].bfloat16()
    theta["readout/weight"] = theta["readout/weight"].double()
    loaded = learnedopt.load(learnedopt.save(tmp_path / "mine", rule, theta))[1]
    assert all(v.dtype == theta[k].dtype and torch.equal(v, theta[k]) for k, v in loaded.items())
    assert not any(v.requires_grad for v in loaded.values())


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    rule, theta = lstm()
    metadata = {"task": "sine", "losses": [1.0, 0.5]}
    path = learnedopt.save(tmp_path / "mine.safetensors", rule, theta, metadata)
    beside = json.loads((tmp_path / "mine.json").read_text("utf-8"))
    with safe_open(str(path), framework="pt") as file:
        inside = json.loads(file.metadata()["learnedopt"])
    assert len(inside.pop("sha256")) == 64 and inside == beside
    assert beside == {"format": checkpoint.FORMAT, "rule": describe(rule), "metadata": metadata}
    (tmp_path / "mine.json").write_text("{}")  # for readers only: the file alone decides
    assert checkpoint.load_with_metadata(path)[2] == metadata


@pytest.mark.parametrize("per", ["scalar", "coordinate"])
def test_an_inner_objective_and_its_theta_come_back(per: str, tmp_path: Path) -> None:
    rule, like = LSTM(hidden_size=3), template()
    inner_objective = inner_objectives.make("l2", template=like, strength=0.5, per=per)
    own = rule.init_theta(torch.Generator().manual_seed(4))
    extra = {k: v + 0.1 for k, v in inner_objective.init_theta(torch.Generator()).items()}
    assert extra
    path = learnedopt.save(tmp_path / "mine", rule, {**own, **extra}, {"a": 1}, inner_objective)
    described = inner_objectives.describe(inner_objective)
    assert json.loads(path.with_suffix(".json").read_text("utf-8"))["inner_objective"] == described
    again, found, theta, metadata = checkpoint.load_checkpoint(path)
    assert describe(again) == describe(rule) and metadata == {"a": 1}
    assert inner_objectives.describe(found) == described
    assert list(theta) == [*own, *extra] and all(torch.equal(theta[k], v) for k, v in {**own, **extra}.items())
    assert list(learnedopt.load(path)[1]) == list(own)  # the rule's alone: what LearnedOptimizer steps with
    for wrong in (own, extra, {**own, **extra, "more": torch.ones(())}):
        with pytest.raises(ValueError, match="theta does not fit the rule LSTM with the inner objective L2"):
            learnedopt.save(path, rule, wrong, inner_objective=inner_objective)
    with pytest.raises(ValueError, match="theta does not fit the rule LSTM: "):
        learnedopt.save(path, rule, {**own, **extra})


def test_an_inner_objective_that_nothing_can_build(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(lstm()[1], path, metadata=header(lstm()[0], inner_objective={"name": "os", "options": {}}))
    with pytest.raises(ValueError, match=r"mine\.safetensors describes .* no inner objective 'os'"):
        learnedopt.load(path)


def test_the_tasks_loss_is_not_worth_a_word(tmp_path: Path) -> None:
    path = learnedopt.save(tmp_path / "mine", *lstm(), inner_objective=TaskLoss())
    assert "inner_objective" not in json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert isinstance(checkpoint.load_checkpoint(path).inner_objective, TaskLoss)


def test_a_folder_of_a_run_is_a_checkpoint(tmp_path: Path) -> None:
    rule, theta = lstm()
    learnedopt.save(tmp_path / "run" / "theta", rule, theta)
    assert torch.equal(learnedopt.load(tmp_path / "run")[1]["readout/bias"], theta["readout/bias"])
    assert torch.equal(learnedopt.load(str(tmp_path / "run"))[1]["readout/bias"], theta["readout/bias"])


@pytest.mark.parametrize("name", NAMES)
def test_packaged_optimizers_load_by_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a packaged optimizer must need no network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.chdir(tmp_path)
    rule, theta = learnedopt.load(name)
    assert isinstance(rule, UpdateRule) and all(v.isfinite().all() for v in theta.values())
    model = torch.nn.Linear(4, 3)
    before = model.weight.detach().clone()
    optimizer = bare(model.named_parameters(), name, num_steps=10)
    loss = model(torch.ones(2, 4)).square().sum()
    loss.backward()
    optimizer.step(loss=loss)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_the_packaged_optimizers_are_there_and_small() -> None:
    networks = {"lstm-mnist", "normalised-lstm-mnist", "normalised-mlp-mnist"}
    assert {"general", "lstm-quadratic", "tensor-gru-quadratic"} | networks <= set(NAMES)
    assert learnedopt.packaged() == NAMES == sorted(NAMES)
    folder = Path(checkpoint.__file__).parent / "pretrained"
    assert {path.name for path in folder.iterdir()} == {f"{n}.{end}" for n in NAMES for end in ("safetensors", "json")}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_a_run_is_packaged_with_a_card(tmp_path: Path) -> None:
    rule, theta = lstm()
    learnedopt.save(tmp_path / "run" / "theta", rule, theta, {"seed": 3})
    with pytest.raises(ValueError, match="this is no card"):
        package(str(tmp_path / "run"), "mine", None, tmp_path)
    with pytest.raises(ValueError, match="'My rule' is not of small letters"):
        package(str(tmp_path / "run"), "My rule", None, tmp_path)
    card = {**dict.fromkeys(cards.FIELDS, "something"), cards.HOLDS_UP_TO: 7}
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    found = checkpoint.load_checkpoint(package(str(tmp_path / "run"), "mine", tmp_path / "card.json", tmp_path))
    assert found.metadata == {"seed": 3, "card": card} and found.rule == rule
    assert all(torch.equal(found.theta[name], theta[name]) for name in theta)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match=r"'lstm-minst' is neither a checkpoint .*optimizers general, "):
        learnedopt.load("lstm-minst")
    with pytest.raises(FileNotFoundError, match="did you mean 'tensor-gru-quadratic'"):
        bare(torch.nn.Linear(2, 1).parameters(), "tensor_gru_quadratic")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nor a run's folder"):
        learnedopt.load(tmp_path)


# Files that are not what they seem.


def test_a_file_cut_short_anywhere(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"mine\.safetensors is no readable safetensors file"):
            learnedopt.load(saved)


@pytest.mark.parametrize("position", [0, 3, 8, 9])
def test_a_header_with_flipped_bits(saved: Path, position: int) -> None:
    content = bytearray(saved.read_bytes())
    content[position] ^= 0xFF
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.safetensors is no readable safetensors file"):
        learnedopt.load(saved)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [lambda x, f: pickle.dump(x, f), torch.save], ids=["pickle", "torch"])
def test_a_pickle_in_disguise_is_never_run(tmp_path: Path, write: Any) -> None:
    mark, path = tmp_path / "exploded", tmp_path / "mine.safetensors"
    with path.open("wb") as file:
        write({"theta": Bomb(str(mark))}, file)
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        learnedopt.load(path)
    assert not mark.exists()
    with path.open("rb") as file:  # the bomb is a real one
        pickle.load(file) if write is not torch.save else torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"learnedopt": "not JSON"},
        {"learnedopt": "[]"},
        {"learnedopt": "{}"},
        {"learnedopt": json.dumps({"format": checkpoint.FORMAT})},
        header(LSTM(), format="another-format-1"),
    ],
)
def test_foreign_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.weight": torch.ones(2, 2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors .* learnedopt\.save did not write it"):
        learnedopt.load(path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "os.system", "options": {"command": "true"}}, "no update rule 'os.system'"),
        ({"name": "lstm", "options": {"hidden_sise": 3}}, "did you mean 'hidden_size'"),
        ({"name": "lstm", "options": {"hidden_size": "3"}}, "hidden_size='3'"),
        ({"name": "lstm", "options": {"hidden_size": -3}}, "hidden_size=-3"),
        ({"name": "lstm"}, "no configuration of update rules"),
        ("lstm", "no configuration of update rules"),
        ({"name": "learned-rates", "options": {"template": {"w": {"shape": [2], "dtype": "object"}}}}, "dtype"),
    ],
)
def test_descriptions_that_no_rule_can_be_built_from(tmp_path: Path, rule: Any, message: str) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(lstm()[1], path, metadata=header(LSTM(), rule=rule))
    with pytest.raises(ValueError, match=rf"mine\.safetensors.*{message}"):
        learnedopt.load(path)


def test_theta_of_another_rule(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    rule, theta = lstm()
    for wrong in (SGD(lr=0.1), LSTM(hidden_size=4)):
        with pytest.raises(ValueError, match=r"mine\.safetensors: theta does not fit the rule (SGD|LSTM)"):
            learnedopt.save(path, wrong, theta)
        assert not list(tmp_path.iterdir())
        save_file(theta, path, metadata=header(wrong))
        with pytest.raises(ValueError, match=r"mine\.safetensors: theta does not fit the rule (SGD|LSTM)"):
            learnedopt.load(path)
        path.unlink()
    with pytest.raises(ValueError, match="does not fit the rule LSTM"):
        learnedopt.save(path, rule, {k: v.tolist() for k, v in theta.items()})  # type: ignore[misc]


def test_metadata_that_json_cannot_hold(saved: Path) -> None:
    before = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        learnedopt.save(saved, *lstm(), {"model": torch.nn.Linear(1, 1)})
    assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == before


# Whole or not at all.


def test_a_write_that_fails_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def half(path: Path, *_: Any) -> None:
        path.write_bytes(before[:50])
        raise OSError("no space left on device")

    monkeypatch.setattr(theta_file, "seal", half)
    rule, theta = lstm()
    with pytest.raises(OSError, match="no space left"):
        learnedopt.save(saved, rule, {k: 2 * v for k, v in theta.items()})
    assert saved.read_bytes() == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["mine.json", "mine.safetensors"]


def test_a_process_that_dies_while_writing_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from learnedopt.core.files import write_atomically\n"
        "def half(path):\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), half)\n"
    )
    root = Path(learnedopt.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(saved)], cwd=root)
    assert done.returncode == -9
    assert saved.read_bytes() == before
    assert len([p for p in saved.parent.iterdir() if p.name.endswith(".partial")]) == 1
    files.remove_partials(saved.parent)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["mine.json", "mine.safetensors"]


def test_a_new_file_replaces_the_old_and_is_readable_as_usual(saved: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    rule, theta = lstm()
    learnedopt.save(saved, rule, {k: 2 * v for k, v in theta.items()})
    assert torch.equal(learnedopt.load(saved)[1]["readout/bias"], 2 * theta["readout/bias"])
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_write_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source: Any, target: Any) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_json(tmp_path / "value.json", {"α": [1, 2.5, None]})
    assert done == ["file", "replace", "folder"]
    assert json.loads((tmp_path / "value.json").read_text("utf-8")) == {"α": [1, 2.5, None]}
