"""What torch's compiler has built is loaded only from a folder of the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from problems import TanhMLP, generic_theta, sample, template

from learnedopt import Execution, FinalLoss, InnerLoop, Unrolled, optimizers
from learnedopt.execution.compiler_cache import VARIABLE, keep_compiler_cache_private
from learnedopt.execution.programs import CompileWarning


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder; no folder of torch's compiler is named."""
    monkeypatch.setenv("LEARNEDOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "")
    return tmp_path / "cache"


def test_by_default_it_is_a_folder_of_the_users_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_compiler_cache_private()
    assert os.environ[VARIABLE] == str(cache / "inductor")
    assert (cache / "inductor").stat().st_mode & 0o777 == 0o700
    keep_compiler_cache_private()
    assert os.environ[VARIABLE] == str(cache / "inductor")


def test_torchs_own_default_is_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv(VARIABLE, default_cache_dir())  # as torch does itself
    keep_compiler_cache_private()
    assert os.environ[VARIABLE] == str(cache / "inductor")


def test_a_folder_that_the_user_names_is_taken(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("elsewhere", "link", "made"):
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        keep_compiler_cache_private()
        assert os.environ[VARIABLE] == str(tmp_path / name)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700 and not cache.exists()


@pytest.mark.usefixtures("float64")
def test_nothing_is_compiled_into_a_folder_that_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o777)
    monkeypatch.setenv(VARIABLE, str(place))
    family, rule = TanhMLP(), optimizers.example("sgd", template(TanhMLP()))
    loop = InnerLoop(family, rule, Execution(1, compile=True))
    with pytest.warns(CompileWarning, match=rf"{VARIABLE} names .* {place} may be written by others \(mode 0777\)"):
        estimate = Unrolled(2).estimate(loop, generic_theta(rule), FinalLoss(), loop.start(sample(family)))
    assert all(x.isfinite().all() for x in estimate.grads.values()) and not list(place.iterdir())


def test_where_that_cannot_be_a_temporary_folder_serves_and_goes_with_the_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LEARNEDOPT_CACHE", "/proc/nowhere")
    code = (
        "import os\n"
        f"from learnedopt.execution.compiler_cache import keep_compiler_cache_private\n"
        "keep_compiler_cache_private()\n"
        "keep_compiler_cache_private()\n"
        f"print(os.environ[{VARIABLE!r}], oct(os.stat(os.environ[{VARIABLE!r}]).st_mode))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    place, mode = run.stdout.split()
    assert Path(place).parent == Path(tempfile.gettempdir()) and mode == "0o40700"
    assert not Path(place).exists()
    assert run.stderr.count("for this process alone") == 1
