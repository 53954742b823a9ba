"""``learnedopt hub``: what is pushed is pulled to the byte, from a folder and from a hub; what cannot be says why."""

from __future__ import annotations

import builtins
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import COMMIT, Hub, running
from safetensors.torch import save_file

import learnedopt
from learnedopt import cli, hub
from learnedopt.checkpoint import file_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run with a theta that no packaged one has."""
    rule = learnedopt.optimizers.make("sgd", lr=0.5)
    return learnedopt.save(tmp_path / "mine" / "theta", rule, {"lr": torch.tensor(0.03)}, {"seed": 3}).parent


def point_client(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let the client take ``address`` for the only hub; it reads the environment once, when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub on this machine that the client takes for the only one."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with running() as (here, address):
        point_client(monkeypatch, address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield here


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["hub", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def front_matter(text: str) -> Any:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_folder_is_a_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["hub", "push", str(run), "--to", "./away/mine", "--license", "apache-2.0"]) == 0
    assert sorted(os.listdir("away/mine")) == ["README.md", "theta.safetensors"]
    assert cli.main(["hub", "pull", "away/mine", "--as", "taken"]) == 0
    assert "**Rule.** `sgd`, 1 number;" in capsys.readouterr().out
    assert os.listdir("runs/taken") == ["theta.safetensors"]
    assert file_of("runs/taken").read_bytes() == file_of(run).read_bytes()
    rule, theta = learnedopt.load("runs/taken")
    assert learnedopt.optimizers.describe(rule)["name"] == "sgd" and theta == {"lr": torch.tensor(0.03)}


def test_the_card_is_one_that_hubs_read(run: Path, tmp_path: Path) -> None:
    digest = hub.push(run, str(tmp_path / "plain")).sha256
    text = (tmp_path / "plain" / "README.md").read_text("utf-8")
    assert front_matter(text) == {
        "library_name": "learnedopt", "tags": ["learned-optimizer", "meta-learning", "pytorch", "sgd"],
    }  # fmt: skip
    assert digest in text and "## plain" in text and str(tmp_path) not in text  # no path of this machine goes along
    hub.push("general", str(tmp_path / "general"), license="no: yes")
    text = (tmp_path / "general" / "README.md").read_text("utf-8")
    assert front_matter(text)["license"] == "no: yes" and "num_steps=1000" in text
    assert learnedopt.card("general").sentences["fails"] in text


def test_a_push_replaces_an_earlier_one_and_no_other_readme(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    hub.push("lstm-mnist", str(there))
    hub.push(run, str(there))
    assert "`sgd`" in (there / "README.md").read_text("utf-8")
    hub.push(there, str(there))  # into itself
    assert file_of(there).read_bytes() == file_of(run).read_bytes()
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My thesis\n", "utf-8")
    with pytest.raises(ValueError, match="no card of this library, and would be lost"):
        hub.push(run, str(project))
    assert os.listdir(project) == ["README.md"]


def test_a_pull_is_pinned_and_overwrites_no_other_theta(run: Path, tmp_path: Path) -> None:
    digest = hub.push(run, str(tmp_path / "there")).sha256
    take = {"source": str(tmp_path / "there"), "root": tmp_path / "runs"}
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, and {'0' * 64} was asked for"):
        hub.pull(**take, name="a", sha256="0" * 64)
    assert not (tmp_path / "runs").exists()
    assert hub.pull(**take, name="a", sha256=digest.upper()).sha256 == digest
    hub.pull(**take, name="a")
    hub.push("lstm-mnist", str(tmp_path / "there"))
    with pytest.raises(ValueError, match="is another theta than that of"):
        hub.pull(**take, name="a")
    assert hub.sha256_of(tmp_path / "runs" / "a" / "theta.safetensors") == digest


def bad_folder(kind: str, run: Path, folder: Path) -> None:
    """Lay down what is no hub."""
    folder.mkdir()
    file = folder / "theta.safetensors"
    if kind == "foreign":
        save_file({"weight": torch.ones(3)}, file)
    elif kind == "cut":
        file.write_bytes(file_of(run).read_bytes()[:-1])
    elif kind == "changed":
        content = bytearray(file_of(run).read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(str(folder / "executed"))))
    elif kind == "pickle-beside":
        (folder / "theta.pt").write_bytes(pickle.dumps(Bomb(str(folder / "executed"))))


class Bomb:
    """What would make a folder if it were unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("foreign", "learnedopt.save did not write it"),
        ("cut", "corrupt or cut short"),
        ("changed", "is damaged"),
        ("pickle", "no readable safetensors file"),
        ("pickle-beside", "has no theta.safetensors"),
        ("empty", "has no theta.safetensors"),
    ],
)
def test_what_is_no_theta_is_refused_and_nothing_is_written_or_executed(
    kind: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_folder(kind, run, tmp_path / "bad")
    runs = tmp_path / "runs"
    assert message in refusal(capsys, "pull", str(tmp_path / "bad"), "--as", "x", "--runs", str(runs))
    assert not runs.exists() and not (tmp_path / "bad" / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pull", "./none/here", "--as", "x"), "is no folder, and no user/name of a hub"),
        (("pull", "nothing", "--as", "x"), "is no folder, and no user/name of a hub"),
        (("pull", "a/b/c", "--as", "x"), "is no folder, and no user/name of a hub"),
        (("pull", ".", "--as", "../x"), "--as '../x' is not the name of a folder"),
        (("pull", ".", "--as", "x", "--revision", "main"), "is a folder, which has no revision 'main'"),
        (("push", "genral", "--to", "away"), "did you mean 'general'"),
        (("push", "general"), "the following arguments are required: --to"),
        (("psuh", "general"), "did you mean hub push?"),
    ],
    ids=["missing", "a-word", "deep", "name", "revision", "packaged", "to", "action"],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments)
    assert os.listdir(tmp_path) == []


def test_what_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not hub.is_folder("user/name") and not hub.is_folder("a-b/c.d_e")
    assert all(map(hub.is_folder, ("./user/name", "name", "/a/b", "a/b/c", "~/x", "user/", "../x")))
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert hub.is_folder("user/name")


def test_without_the_client_a_hub_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(f"No module named {name!r}")
        return true_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for arguments in (("pull", "user/name", "--as", "x"), ("push", str(run), "--to", "user/name")):
        assert "pip install 'learnedopt[hub]'" in refusal(capsys, *arguments)


# With the real client, and a hub on this machine


def test_a_round_trip_through_a_hub(run: Path, tmp_path: Path, server: Hub) -> None:
    pushed = hub.push(run, "user/name", license="apache-2.0", private=True)
    assert pushed.where == "user/name" and server.created[0]["name"] == "name"
    assert sorted(server.files["user/name"]) == ["README.md", "theta.safetensors"]
    assert server.files["user/name"]["theta.safetensors"] == file_of(run).read_bytes()
    text = server.files["user/name"]["README.md"].decode()
    assert front_matter(text)["license"] == "apache-2.0" and "learnedopt hub pull user/name --as name" in text
    server.files["user/name"]["theta.pt"] = pickle.dumps(Bomb(str(tmp_path / "executed")))
    server.asked.clear()
    pulled = hub.pull("user/name", "back", root=tmp_path / "runs", sha256=pushed.sha256)
    assert file_of(pulled.where).read_bytes() == file_of(run).read_bytes() and pulled.sha256 == pushed.sha256
    assert {line.rpartition("/")[2] for line in server.asked} == {"theta.safetensors"}  # nothing else is asked for
    hub.pull("user/name", "pinned", root=tmp_path / "runs", revision=COMMIT)
    assert server.asked[-1].startswith(f"HEAD /user/name/resolve/{COMMIT}/") or "pinned" in os.listdir(
        tmp_path / "runs"
    )


@pytest.mark.parametrize(
    ("source", "revision", "error", "message"),
    [
        ("user/none", None, FileNotFoundError, "cannot pull user/none: no such repository"),
        ("user/name", "v9", FileNotFoundError, "cannot pull user/name at v9: it has no such branch"),
        ("user/empty", None, FileNotFoundError, "it has no theta.safetensors; nothing else is ever read"),
        ("user/foreign", None, ValueError, "theta.safetensors"),
    ],
    ids=["repository", "revision", "theta", "format"],
)
def test_what_a_hub_does_not_have(
    source: str, revision: str | None, error: type[Exception], message: str, run: Path, tmp_path: Path, server: Hub
) -> None:
    server.files |= {"user/name": {"theta.safetensors": file_of(run).read_bytes()}, "user/empty": {"theta.pt": b""}}
    server.files["user/foreign"] = {"theta.safetensors": b"<html>"}
    with pytest.raises(error, match=message):
        hub.pull(source, "x", root=tmp_path / "runs", revision=revision)
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_cannot_be_reached(
    run: Path, tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        point_client(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of the client
        taking = ("pull", "user/name", "--as", "x", "--runs", str(tmp_path / "runs"))
        for arguments in (taking, ("push", str(run), "--to", "user/name")):
            assert "the hub cannot be reached" in refusal(capsys, *arguments)
    assert not (tmp_path / "runs").exists()
