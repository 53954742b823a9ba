"""Where torch's compiler keeps what it has built, which it loads again: a folder of this user's own."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

from learnedopt.core.private_folder import cache_folder, open_private

logger: logging.Logger = logging.getLogger("learnedopt")

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiler_cache_private() -> None:
    """Name torch's compiler a folder that only this user can write into, for the whole process.

    That is ``inductor`` in the folder of ``cache_folder``, and a temporary one, with a warning in the log, where that
    cannot be. Torch itself would take ``torchinductor_USER`` in the shared temporary folder, whoever made it. Another
    folder that ``TORCHINDUCTOR_CACHE_DIR`` names is left as it is.

    Raises:
        PermissionError: the folder so named is another user's, or others may write into it.
    """
    if os.name != "posix":  # there the temporary folder is the user's own
        return
    named = os.environ.get(VARIABLE)
    if named and not _is_torchs(Path(named)):
        try:
            os.close(open_private(Path(named).resolve()))
        except PermissionError as error:
            raise PermissionError(
                f"{VARIABLE} names a folder with code that others could have written: {error}. Name one of your own, "
                "or unset it"
            ) from error
        return
    os.environ[VARIABLE] = str(_own())


def _is_torchs(folder: Path) -> bool:
    """Whether torch, which writes its default into the environment, is likely to have named it."""
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")


def _own() -> Path:
    try:
        folder = cache_folder().resolve() / "inductor"
        os.close(open_private(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        logger.warning("what torch compiles is kept for this process alone, in a temporary folder, because %s", error)
        folder = Path(tempfile.mkdtemp(prefix="learnedopt-"))
        atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process ends before the one that still uses it
        shutil.rmtree(folder)
