"""W&B: a real offline run read back from its file, and every way in which W&B can fail without stopping a training."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_meta
from learnedopt.training.json_tracker import JsonLinesTracker, read_metrics
from learnedopt.training.tracker import Tracker, Trackers
from learnedopt.training.wandb_files import last_step, remove_unneeded
from learnedopt.training.wandb_tracker import WandbTracker
from learnedopt.training.wandb_variables import resolve_mode

ROOT = Path(__file__).resolve().parent.parent


def train(tracker: Tracker, first: int, last: int) -> None:
    """Log the meta-steps ``first`` to ``last`` as a training would."""
    for step in range(first, last + 1):
        tracker.log({"meta_loss": 1 / step, "inner_loss": [1.0, 1 / step]}, step)


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this package reported; wandb's own log lines are left out."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("learnedopt")]


def records(path: Path) -> list[Any]:
    """Return the records of a ``.wandb`` file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # generated when it is imported, so type checkers do not see what is inside
    data, found, part, at = path.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a header does not cross blocks
            at += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def run_file(folder: Path) -> Path:
    """Return the one ``.wandb`` file of a run's folder."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


def history(found: list[Any]) -> list[dict[str, Any]]:
    """Return the logged rows, W&B's own columns left out; nested keys joined by dots."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def settings(found: list[Any]) -> dict[str, Any]:
    """Return the configuration that the records end with."""
    updates = [record.run.config.update for record in found if record.HasField("run")]
    updates += [record.config.update for record in found if record.HasField("config")]
    return {
        item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for u in updates for item in u
    }


def service_of(pid: int) -> int:
    """Return the process id of the wandb-core child of process ``pid``."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().partition("(")[2].rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if name == "wandb-core" and int(fields.split()[1]) == pid:
            return int(stat.parent.name)
    raise AssertionError(f"process {pid} has no wandb-core child")


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give W&B an empty home folder and none of its variables; return the home folder."""
    for variable in [*filter(lambda name: name.startswith("WANDB_"), os.environ), "RANK", "XDG_DATA_HOME"]:
        monkeypatch.delenv(variable, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    yield home
    assert not [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_ERROR_REPORTING"]


@pytest.mark.parametrize(
    ("flag", "variable", "expected"),
    [
        (None, None, "offline"),
        (None, "", "offline"),
        (None, "online", "online"),
        (None, "dryrun", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "disabled", "online"),
    ],
)
def test_the_flag_comes_before_the_variable_before_offline(
    flag: str | None, variable: str | None, expected: str
) -> None:
    said = {} if variable is None else {"WANDB_MODE": variable}
    assert resolve_mode(flag, said) == expected
    # A trial's server is to hear of it: of what was started by an agent only the default differs.
    swept = "online" if not (flag or variable) else expected
    assert resolve_mode(flag, {**said, "WANDB_SWEEP_ID": "sweep"}) == swept


def test_wandb_tracker_refuses_what_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mode='of' is not"):
        resolve_mode("of", {})
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(ValueError, match="WANDB_MODE='shared' is not"):
        WandbTracker()
    with pytest.raises(ValueError, match="timeout"):
        WandbTracker("offline", timeout=0)


@pytest.mark.usefixtures("wandb_home")
def test_disabled_or_not_first_rank_touches_nothing(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from learnedopt.training.wandb_tracker import WandbTracker
for mode, rank in ("disabled", "0"), ("offline", "1"):
    os.environ["RANK"] = rank
    tracker = WandbTracker(mode, dir=Path(sys.argv[1]))
    tracker.start({})
    tracker.log({"meta_loss": 1.0}, 1)
    tracker.figure("loss", Path("nowhere.png"))
    tracker.artifact("theta", [Path("nowhere")], {})
    tracker.finish()
    assert not tracker.active and "wandb" not in sys.modules
"""
    call = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run").exists()


def test_an_offline_run_can_be_read_back(tmp_path: Path, wandb_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    Image.new("RGB", (4, 3), "red").save(tmp_path / "loss.png")
    (tmp_path / "theta.safetensors").write_bytes(b"theta")
    curve = [1 / (k + 1) for k in range(4000)]  # a row longer than a block
    tracker = WandbTracker(project="proj", group="lstm-mnist", job_type="train", name="first", dir=run)
    tracker.start({"recipe": "lstm-mnist", "rule": {"hidden": [20, 20], "clip": math.inf}, "out": tmp_path})
    assert tracker.active and re.fullmatch(r"[0-9a-f]{8}", tracker.run_id)
    for step in range(1, 7):
        tracker.log({"meta_loss": 1 / step, "grad_norm": math.nan, "inner_loss": [float(step), *curve]}, step)
    tracker.log({"validation": 0.25, "inner_loss": []}, 6)
    tracker.figure("loss", tmp_path / "loss.png")
    tracker.artifact("lstm mnist", [tmp_path / "theta.safetensors"], {"rule": "lstm", "rate": math.nan})
    child = os.fork()
    if child == 0:
        tracker.log({"meta_loss": 99.0}, 99)
        os._exit(len(reports(caplog)))
    assert os.waitpid(child, 0)[1] == 0
    tracker.finish(exit_code=143)
    assert not tracker.active
    tracker.log({"meta_loss": 98.0}, 98)
    tracker.finish()
    with pytest.raises(AssertionError, match="no wandb-core child"):
        service_of(os.getpid())

    found = records(run_file(run))
    kinds = {record.WhichOneof("record_type") for record in found}
    (opened,) = [record.run for record in found if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert (opened.run_id, opened.project, opened.run_group) == (tracker.run_id, "proj", "lstm-mnist")
    assert (opened.job_type, opened.display_name) == ("train", "first")
    assert config.items() >= {"recipe": "lstm-mnist", "out": str(tmp_path)}.items()
    assert config["rule"] == {"hidden": [20, 20], "clip": "Infinity"}

    rows = history(found)
    steps = [row for row in rows if "meta_loss" in row]
    assert [(row["meta_step"], row["meta_loss"]) for row in steps] == [(step, 1 / step) for step in range(1, 7)]
    assert all(math.isnan(row["grad_norm"]) for row in steps)
    assert all(row["inner_loss"] == [row["meta_step"], *curve] for row in steps)
    assert [row["meta_step"] for row in rows if "validation" in row] == [6]
    assert ("*", "meta_step") in {(r.metric.glob_name, r.metric.step_metric) for r in found if r.HasField("metric")}

    (image,) = [row for row in rows if "loss.path" in row]
    assert image["meta_step"] == 6
    media = run_file(run).parent / "files"
    assert (media / image["loss.path"]).read_bytes() == (tmp_path / "loss.png").read_bytes()
    charts = [row for row in rows if "inner_loss_curves_table.path" in row]
    assert [row["meta_step"] for row in charts] == [1, 2, 4, 6]
    table = json.loads((media / charts[-1]["inner_loss_curves_table.path"]).read_text("utf-8"))["data"]
    assert [value for at, name, value in table if at == 0] == [1.0, 2.0, 4.0, 6.0]
    assert {name for _, name, _ in table} == {f"meta-step {step}" for step in (1, 2, 4, 6)}
    assert [(at, value) for at, name, value in table if name == "meta-step 6" and at > 0][:2] == [
        (17, curve[16]),
        (34, curve[33]),
    ]

    (theta,) = [r.artifact for r in found if r.HasField("artifact") and r.artifact.type == "model"]
    assert theta.name == "lstm-mnist"
    assert json.loads(theta.metadata) == {"rule": "lstm", "rate": "NaN"}
    (entry,) = theta.manifest.contents
    assert entry.path == "theta.safetensors" and Path(entry.local_path).read_bytes() == b"theta"
    assert Path(entry.local_path).is_relative_to(run) and not list(wandb_home.rglob("staging"))
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [143]
    assert {"header", "history", "files"} <= kinds and not reports(caplog)


TINY_PARTICLES = [
    "num_meta_steps=3", "num_tasks=2", "validation.num_tasks=2", "validation.num_steps=2", "validation.every=3",
    "estimator.num_steps=2", "estimator.num_pairs=2",
]  # fmt: skip


@pytest.mark.usefixtures("wandb_home")
@pytest.mark.parametrize("estimator", ["EvolutionStrategies", "PersistentES"])
def test_a_run_of_particles_tells_their_variance_and_cost(estimator: str, tmp_path: Path) -> None:
    sets = [*TINY_PARTICLES, f"estimator={estimator}", "estimator.horizon=4"]
    words = [word for assignment in sets for word in ("--set", assignment)]
    assert train_meta.main(["pes-quadratic", "--runs", str(tmp_path), "--wandb", "offline", *words]) == 0
    folder = tmp_path / "pes-quadratic"
    logged = [row for row in history(records(run_file(folder))) if "meta_loss" in row]
    kept = [row for row in read_metrics(folder / "metrics.jsonl") if "meta_loss" in row]
    for row, other, step in zip(logged, kept, (1, 2, 3), strict=True):
        assert row["meta_step"] == other["step"] == step
        assert all(row[name] == other[name] for name in ("gradient_variance", "inner_steps", "not_finite"))
        # Two pairs on two tasks, two steps each; windows of an episode run one more particle, at theta itself.
        assert row["inner_steps"] == 2 * 2 * (5 if estimator == "EvolutionStrategies" else 4)
        assert row["gradient_variance"] > 0 and row["not_finite"] == 0 and len(row["inner_loss"]) == 2


@pytest.mark.usefixtures("wandb_home")
def test_the_fragments_of_a_resumed_run_are_one_run_and_leave_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "theta.safetensors").write_bytes(b"theta")
    for first in (1, 3):  # the second repeats a step
        tracker = WandbTracker("offline", dir=tmp_path, run_id="kept")
        tracker.start({"seed": 0})
        train(tracker, first, first + 2)
        tracker.artifact("theta", [tmp_path / "theta.safetensors"], {})
        tracker.finish()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    both = [records(path) for path in files]
    assert [record.run.run_id for found in both for record in found if record.HasField("run")] == ["kept"] * 2
    assert [[row["meta_step"] for row in history(found) if "meta_loss" in row] for found in both] == [
        [1, 2, 3],
        [3, 4, 5],
    ]
    steps = [record.history.step.num for found in both for record in found if record.HasField("history")]
    assert steps == [*range(len(steps))]  # not one anew
    assert last_step(files[0]) == steps[-1] - len(history(both[1]))
    # Of the copies that wait for an upload all are there that one of them names, and no other.
    entries = [e for found in both for r in found if r.HasField("artifact") for e in r.artifact.manifest.contents]
    kept = {str(path) for path in tmp_path.rglob("staging/*")}
    assert kept == {entry.local_path for entry in entries} and len(kept) == 7
    assert not reports(caplog)


@pytest.mark.usefixtures("wandb_home")
def test_copies_stay_until_the_file_that_names_them_is_whole(tmp_path: Path) -> None:
    tracker = WandbTracker("offline", dir=tmp_path, run_id="cut")
    tracker.start({})
    train(tracker, 1, 1)
    tracker.finish()
    path = run_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # its last record, which says that it has ended
    copies = [tmp_path / "staging" / name for name in ("one", "other")]
    copies[0].parent.mkdir()
    for copy in copies:
        copy.touch()
    remove_unneeded(copies[0].parent, [], path, patience=0.1)
    remove_unneeded(copies[0].parent, [], tmp_path / "not-yet.wandb", patience=0.1)
    assert all(copy.exists() for copy in copies)
    path.write_bytes(whole)
    remove_unneeded(copies[0].parent, [], path)
    assert not any(copy.exists() for copy in copies)


@pytest.mark.usefixtures("wandb_home")
def test_an_evaluation_tells_what_it_used_and_draws_the_others_beside_it(tmp_path: Path) -> None:
    (tmp_path / "theta.safetensors").write_bytes(b"theta")
    trained = WandbTracker("offline", dir=tmp_path / "trained")
    trained.start({})
    trained.artifact("lstm", [tmp_path / "theta.safetensors"], {"rule": "lstm"})
    trained.finish()
    (theta,) = [r.artifact for r in records(run_file(tmp_path / "trained")) if r.HasField("artifact")]

    tracker = WandbTracker("offline", dir=tmp_path / "evaluated")
    tracker.start({"num_steps": 3})
    tracker.use("mine", "lstm", [tmp_path / "theta.safetensors"], {"run_id": trained.run_id})
    tracker.use("its", "other", [tmp_path / "theta.safetensors"], {})
    tracker.lines("losses", {"lstm": [3.0, 1.0, 0.5], "adam": [3.0, 2.0, math.inf]}, "inner step")
    tracker.finish()
    found = records(run_file(tmp_path / "evaluated"))
    config = settings(found)
    assert config["used/mine"] == {"run_id": trained.run_id, "artifact": theta.name, "digest": theta.digest}
    assert config["used/its"] == {"artifact": "other", "digest": theta.digest}
    (chart,) = [row for row in history(found) if "losses_table.path" in row]
    media = run_file(tmp_path / "evaluated").parent / "files"
    rows = json.loads((media / chart["losses_table.path"]).read_text("utf-8"))["data"]
    assert rows[:3] == [[0, "lstm", 3.0], [1, "lstm", 1.0], [2, "lstm", 0.5]]
    assert [name for _, name, _ in rows[3:]] == ["adam"] * 3


@pytest.mark.usefixtures("wandb_home")
def test_training_outlives_a_killed_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, record = WandbTracker("offline", dir=tmp_path), JsonLinesTracker(tmp_path / "metrics.jsonl")
    trackers = Trackers([tracker, record])
    trackers.start({})
    train(trackers, 1, 3)
    os.kill(service_of(os.getpid()), signal.SIGKILL)
    train(trackers, 4, 2000)
    trackers.figure("loss", tmp_path / "nowhere.png")
    trackers.finish()
    assert [row["step"] for row in read_metrics(record.path)] == list(range(1, 2001))
    assert not tracker.active
    (report,) = reports(caplog)
    assert re.match(r"W&B failed while logging meta-step \d+: (ConnectionReset|BrokenPipe)Error", report)

    again = WandbTracker("offline", dir=tmp_path / "again")  # the dead service is not in the way of the next run
    again.start({})
    train(again, 1, 2)
    again.finish()
    assert [row["meta_step"] for row in history(records(run_file(tmp_path / "again"))) if "meta_loss" in row] == [1, 2]
    assert len(reports(caplog)) == 1


@pytest.mark.usefixtures("wandb_home")
def test_training_and_its_exit_outlive_a_service_that_hangs(tmp_path: Path) -> None:
    code = """
import logging, os, signal, sys
from pathlib import Path
from learnedopt.training.wandb_files import last_step, remove_unneeded
from learnedopt.training.wandb_tracker import WandbTracker
from tests.test_wandb_tracker import service_of, train
logging.basicConfig(format="reported: %(message)s")
tracker = WandbTracker("offline", dir=Path(sys.argv[1]))
tracker.start({})
tracker._timeout = 0.3
service = service_of(os.getpid())
print("service", service, flush=True)
os.kill(service, signal.SIGSTOP)
for step in range(1, 200):  # until the socket is full
    tracker.log({"inner_loss": [0.0] * 10000}, step)
tracker.finish()
print("trained")
"""
    out, err = tmp_path / "out", tmp_path / "err"  # not pipes: the stopped service would keep them open
    with open(out, "w") as stdout, open(err, "w") as stderr:
        try:
            call = [sys.executable, "-c", code, str(tmp_path)]
            done = subprocess.run(call, cwd=ROOT, stdout=stdout, stderr=stderr, timeout=60)
        finally:
            if named := re.match(r"service (\d+)", out.read_text("utf-8")):
                os.kill(int(named[1]), signal.SIGKILL)
    assert done.returncode == 0, err.read_text("utf-8")
    assert out.read_text("utf-8").splitlines()[-1] == "trained"
    assert err.read_text("utf-8").count("reported:") == 1
    assert "no answer within 0.3 seconds" in err.read_text("utf-8")


@pytest.mark.usefixtures("wandb_home")
def test_rows_are_on_disk_soon_and_survive_a_kill(tmp_path: Path) -> None:
    import wandb

    if "x_transaction_log_flush_interval" not in wandb.Settings.model_fields:
        pytest.skip(f"W&B {wandb.__version__} cannot be told to write sooner: a kill loses what it has not written")
    code = """
import sys, time
from pathlib import Path
from learnedopt.training.wandb_tracker import WandbTracker
tracker = WandbTracker("offline", dir=Path(sys.argv[1]))
tracker.start({})
tracker.log({"meta_loss": 0.5}, 1)
print("logged", flush=True)
time.sleep(60)
"""
    call = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None and training.stdout.readline() == "logged\n"
        give_up = time.monotonic() + 10  # W&B's own interval is 15 s
        while not history(records(run_file(tmp_path))) and time.monotonic() < give_up:
            time.sleep(0.05)
        training.kill()
    assert [row["meta_loss"] for row in history(records(run_file(tmp_path)))] == [0.5]


def raises(*args: object, **options: object) -> None:
    raise RuntimeError("the upload broke")


def failing_finish(tracker: WandbTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.start({})
    monkeypatch.setattr(tracker._run, "finish", raises)


def failing_folder(tracker: WandbTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.dir.parent.mkdir(parents=True)
    tracker.dir.write_text("a file is in the way")
    tracker.start({})


def silent_fallback(tracker: WandbTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    # What W&B takes for a folder that cannot be written, and when it goes elsewhere, differs between its versions.
    init, elsewhere = wandb.init, str(tracker.dir.parent.parent)
    monkeypatch.setattr(wandb, "init", lambda **asked: init(**{**asked, "dir": elsewhere}))
    tracker.start({})


def no_account(tracker: WandbTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.mode = "online"
    tracker.start({})


def no_network(tracker: WandbTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    tracker.mode, tracker._timeout = "online", 12.0  # seconds; W&B itself gets half
    tracker.start({})
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.delenv("WANDB_API_KEY")


@pytest.mark.usefixtures("wandb_home")
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (failing_finish, "while finishing: RuntimeError: the upload broke"),
        (failing_folder, "while starting: .*exists"),
        (silent_fallback, "while starting: OSError: .* cannot be written, W&B went to "),
        (no_account, "while starting: UsageError: (No API key|api_key not configured)"),
        (no_network, r"while starting: CommError: .*(127\.0\.0\.1:9|timed out after 6\.0 sec)"),
    ],
)
def test_a_failure_of_wandb_is_reported_once(
    fail: Callable[[WandbTracker, pytest.MonkeyPatch], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = WandbTracker("offline", dir=tmp_path / "runs" / "one")
    fail(tracker, monkeypatch)
    train(tracker, 1, 3)
    tracker.artifact("theta", [Path(__file__)], {})
    tracker.finish()
    assert not tracker.active
    report, *repeated = reports(caplog)
    assert re.search(message, report, re.DOTALL) and ".." not in report
    assert len(repeated) == (tracker.mode == "online")  # where nothing is uploaded, the end of the run says so too


@pytest.mark.usefixtures("wandb_home")
def test_a_bad_artifact_ends_wandb_but_not_what_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbTracker("offline", dir=tmp_path)
    tracker.start({})
    train(tracker, 1, 2)
    tracker.artifact("theta", [tmp_path / "nowhere.safetensors"], {})
    train(tracker, 3, 4)
    tracker.finish()
    (report,) = reports(caplog)
    assert "while logging the artifact theta: ValueError: " in report
    found = records(run_file(tmp_path))
    assert [row["meta_step"] for row in history(found) if "meta_loss" in row] == [1, 2]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
