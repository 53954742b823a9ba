"""Build the wheel, install it into an empty environment, and check there what a user gets.

Then the same with the wheel that brings compiled steps along, where no compiler is found.

Usage: python .ci/check_wheel.py [torch requirement [folder that keeps the archives]]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_IMPORT_SECONDS = 0.3  # what `import learnedopt` may cost on top of `import torch`

INSIDE = """
import importlib.metadata, importlib.util, pathlib, sys, time
import torch
start = time.perf_counter()
import learnedopt
seconds = time.perf_counter() - start
assert pathlib.Path(learnedopt.__file__).is_relative_to(sys.prefix), learnedopt.__file__
assert learnedopt.__version__ == importlib.metadata.version("learnedopt"), learnedopt.__version__
for name in ("optimizers", "tasks", "train_meta"):
    assert importlib.util.find_spec(name) is None, f"top-level {name} is importable"
assert learnedopt.optimizers.names() and learnedopt.tasks.names()
for path in sorted(pathlib.Path(learnedopt.__file__).parent.glob("pretrained/*.safetensors")):
    learnedopt.load(path.stem)
print(seconds)
"""

WITHOUT_COMPILER = """
import os, pathlib, shutil
import torch
import learnedopt
from learnedopt.optimizers.kernels import native
assert not any(map(shutil.which, ("cc", "gcc", "clang"))), "there is a compiler"
sources = sorted(pathlib.Path(native.__file__).parent.glob("*.c"))
libraries = [native.library(source, *names) for source in sources for names in native.NAMES.values()]
assert len(libraries) > 6 and None not in libraries, dict(zip(sources, libraries))
assert not os.path.exists(os.environ["LEARNEDOPT_CACHE"]), "something was compiled here"
net = torch.nn.Linear(20, 10)
optimizer = learnedopt.LearnedOptimizer(net.parameters(), "general", num_steps=5)
net(torch.ones(4, 20)).square().sum().backward()
optimizer.step()
assert all(p.isfinite().all() for p in net.parameters())
print(len(libraries))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command and return what it printed; a failing one ends the check with its output."""
    environment = {**os.environ, **variables}
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """Check that the wheel holds the package with its data, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"learnedopt"}, f"top-level entries: {tops}"
    sources = [path for folder in ("learnedopt", "optimizers", "tasks") for path in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in {".py", ".typed", ".safetensors", ".json"}:
            name = path.relative_to(ROOT).as_posix()
            packed = name if name.startswith("learnedopt/") else f"learnedopt/{name}"
            assert packed in names, f"{name} is not in the wheel"


def check_prebuilt(empty: Path, python: Path) -> None:
    """Install the wheel with compiled steps in place of the other, and load all of them without a compiler."""
    command = (sys.executable, "-m", "build", "--wheel", "--outdir", empty / "prebuilt", ROOT)
    run(*command, cwd=empty, LEARNEDOPT_PREBUILT="1")
    (wheel,) = (empty / "prebuilt").glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl"), wheel.name
    check_contents(wheel)
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel, cwd=empty)
    nowhere = str(empty / "nowhere")
    variables = {"PATH": nowhere, "CC": "", "LEARNEDOPT_CACHE": nowhere}
    count = run(python, "-W", "error", "-c", WITHOUT_COMPILER, cwd=empty, **variables).strip()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {count} compiled steps load without a compiler")


def main() -> None:
    """Build, look inside, install, import."""
    torch = sys.argv[1] if len(sys.argv) > 1 else "torch"
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", empty / "dist", ROOT, cwd=empty)  # the wheel out of the sdist
        (wheel,) = (empty / "dist").glob("*.whl")
        check_contents(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, holds the package learnedopt alone")

        run(sys.executable, "-m", "venv", empty / "venv", cwd=empty)
        python = empty / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
        run(*pip, torch, cwd=empty)  # first and alone, so that the chosen build is kept
        run(*pip, wheel, cwd=empty)
        run(python.with_name("learnedopt"), "--help", cwd=empty)
        run(python.with_name("learnedopt"), "train", "--list", cwd=empty)
        run(python, "-c", INSIDE, cwd=empty)  # compiles the byte code
        seconds = min(float(run(python, "-c", INSIDE, cwd=empty)) for _ in range(5))
        assert seconds < MAX_IMPORT_SECONDS, f"import learnedopt takes {seconds:.2f} s more than import torch"
        print(f"installed into an empty environment; import learnedopt takes {seconds:.3f} s more than import torch")
        check_prebuilt(empty, python)
        if len(sys.argv) > 2:
            shutil.copytree(empty / "dist", sys.argv[2], dirs_exist_ok=True)


if __name__ == "__main__":
    main()
