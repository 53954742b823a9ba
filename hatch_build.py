"""The wheel's build hook: with LEARNEDOPT_PREBUILT=1 the C sources are compiled into it, for Linux on x86-64."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "learnedopt/optimizers/kernels"
PLATFORM = "linux-x86_64"


class Prebuilt(BuildHookInterface[Any]):
    """Adds the libraries and the platform's tag; does nothing unless asked to."""

    _folder: tempfile.TemporaryDirectory[str] | None = None  # until the wheel is written

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile into a temporary folder, and have the files of it packed."""
        if os.environ.get("LEARNEDOPT_PREBUILT") != "1" or version == "editable":
            return
        if sysconfig.get_platform() != PLATFORM:
            raise RuntimeError(
                f"LEARNEDOPT_PREBUILT=1 makes wheels for {PLATFORM} alone, and this is {sysconfig.get_platform()}; "
                "without it the wheel is for all platforms, and the steps are compiled at first use"
            )
        libraries = _module(Path(self.root) / KERNELS / "prebuilt_libraries.py")
        self._folder = tempfile.TemporaryDirectory(prefix="learnedopt-")
        folder = Path(self._folder.name)
        libraries.build(Path(self.root) / KERNELS, folder, os.environ.get("CC", "cc"))
        for path in folder.iterdir():
            build_data["force_include"][str(path)] = f"{KERNELS}/{libraries.FOLDER}/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{PLATFORM.replace('-', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
