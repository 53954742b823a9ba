"""A meta-training for ``torchrun``: ``rank_script.py STATE THETA``; rank 1 dies once, after two meta-steps."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from rank_processes import KINDS, NUM_META_STEPS, At, trainer_of

from learnedopt.training.launch import process_group


def die() -> None:
    """End this process, as no handler can see, the first time that it is started."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        trainer = trainer_of("pes", "float64", checkpoint=Path(sys.argv[1]), checkpoint_every=1)
        trainer.estimator = At(KINDS["pes"].estimator, 3, die)
        result = trainer.run(NUM_META_STEPS)
        if trainer.ranks.leads:
            torch.save(torch.cat([v.flatten() for v in result.theta.values()]), sys.argv[2])
    # The trainer is still there. A thread of the group that it kept could abort the process at the end of Python.
    assert trainer.ranks.group is not None and trainer.ranks.group() is None
