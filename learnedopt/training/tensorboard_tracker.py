"""TensorBoard as a view of a meta-training: ``tensorboard --logdir runs`` shows all runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnedopt.core.files import plain_json
from learnedopt.training.tracker import Metrics


def require_tensorboard() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401 # pyright: ignore[reportMissingTypeStubs, reportUnusedImport] - is it there?
    except ImportError as error:
        raise ValueError(
            f"TensorBoard is not installed here ({error}): pip install 'learnedopt[tensorboard]', or leave it out"
        ) from error


class TensorBoardTracker:
    """Writes a run as event files: numbers against the meta-step, of a curve its last one, words, figures, lines.

    A run that goes on hides from TensorBoard what it repeats.

    Args:
        folder: of the event files; each start adds one.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        self.folder: Path = Path(folder)
        self._writer: Any = None
        self._step = 0
        self._first: int | None = None  # the first step that a run which goes on tells again

    def start(self, config: dict[str, Any]) -> None:
        """Open a file, and write the configuration as text."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=self._first)
        self._writer.add_text("config", _code(config), self._step)

    def log(self, metrics: Metrics, step: int) -> None:
        """Write every number under its name, of a curve the last as ``<name>/last``, and words as text."""
        self._step = step
        for name, value in metrics.items():
            if isinstance(value, str):
                self._open().add_text(name, value, step)
            elif not isinstance(value, list):
                self._open().add_scalar(name, value, step)
            elif value:
                self._open().add_scalar(f"{name}/last", value[-1], step)

    def figure(self, name: str, path: Path) -> None:
        """Write the PNG file's picture."""
        import numpy
        from PIL import Image

        picture = Image.open(path)  # not "with ... as", whose type is not known on Python 3.10
        with picture:
            self._open().add_image(name, numpy.asarray(picture.convert("RGB")), self._step, dataformats="HWC")

    def artifact(self, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        """Write where the files are, and what describes them."""
        self._open().add_text(name, _code({"paths": paths, "metadata": metadata}), self._step)

    def lines(self, name: str, lines: Mapping[str, Sequence[float]], xname: str) -> None:
        """Write each line into a folder of its own, which TensorBoard draws together under ``name``."""
        for label, line in lines.items():
            for at, value in enumerate(line):
                self._open().add_scalars(name, {label.replace("/", "-"): value}, at)

    def rewind(self, step: int) -> None:
        """Let what was written of later steps be hidden, from the next ``start`` on."""
        self._step, self._first = max(step, 0), step + 1

    def finish(self, exit_code: int = 0) -> None:
        """Write how the run ended, and close the file."""
        if self._writer is not None:
            self._writer.add_text("exit code", str(exit_code), self._step)
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            raise ValueError(f"the event files in {self.folder} are not open: call start() first")
        return self._writer


def _code(value: Any) -> str:
    """Return JSON as Markdown shows it as it is."""
    return "\n".join(f"    {line}" for line in json.dumps(plain_json(value), indent=2).splitlines())
