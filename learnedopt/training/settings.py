"""What is asked of a trainer's options, before anything is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from learnedopt.core.counts import require_count
from learnedopt.core.estimator import GradientEstimator
from learnedopt.training.failures import require_share
from learnedopt.training.validation import Validation, require_seed

if TYPE_CHECKING:
    from learnedopt.training.trainer import MetaTrainer


def require_settings(trainer: MetaTrainer) -> None:
    """Raise TypeError or ValueError where an option of a trainer is out of its range."""
    estimator, validation = cast("object", trainer.estimator), cast("object", trainer.validation)
    if not isinstance(estimator, GradientEstimator):
        got = f"the class {estimator.__name__}" if isinstance(estimator, type) else repr(estimator)
        raise TypeError(f"estimator={got} is no GradientEstimator; pass an instance, such as Unrolled(10)")
    if validation is not None and not isinstance(validation, Validation):
        raise TypeError(f"validation={validation!r} is no Validation; pass Validation(loop, objective, ...)")
    for name in ("num_tasks", "checkpoint_every", "max_skips_in_a_row"):
        require_count(name, getattr(trainer, name), least=1)
    if trainer.micro_batch is not None:
        require_count("micro_batch", trainer.micro_batch, least=1)
    require_share("max_failed_share", trainer.max_failed_share)
    require_seed(trainer.seed)
    if trainer.max_grad_norm is not None and not trainer.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={trainer.max_grad_norm!r} must be positive; None leaves gradients as they are")
