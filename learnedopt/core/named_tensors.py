"""The tensors of theta as what moves them is handed them: a list, as torch has it, that knows their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class NamedTensors(list[Tensor]):
    """A list of tensors, which any ``torch.optim.Optimizer`` takes, with their ``names`` in the same order.

    A part of the list is a plain list, without names. Where meta-parameters have scales, the tensors are theta's over
    them: see ``UpdateRule.theta_scale``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors.values())
        self.names: list[str] = [*tensors]


def names_of(params: Sequence[Tensor], who: str) -> list[str]:
    """Return the names of tensors that ``who`` needs to tell apart.

    Raises:
        TypeError: they have none.
    """
    if not isinstance(params, NamedTensors):
        raise TypeError(
            f"{who} tells the tensors of theta apart by name, and got a {type(params).__name__} without names; pass on "
            "the list that MetaTrainer hands to meta_optimizer as it is, or NamedTensors(theta)"
        )
    return params.names
