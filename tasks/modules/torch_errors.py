"""Known errors of torch that come from how a module is run here, with what to do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ONE_BY_ONE = "pass Execution(chunk_size=1), which runs tasks one by one"
_KNOWN = (
    (
        r"Batching rule not implemented for aten::(lstm|gru|rnn)",
        f"torch has no rule to run recurrent layers of several tasks together (vmap); {_ONE_BY_ONE}, or write the cell "
        "as matrix products",
    ),
    (
        r"Batching rule not implemented|batching rule .* not (yet )?implemented",
        f"torch has no rule to run this operation for several tasks together (vmap); {_ONE_BY_ONE}",
    ),
    (
        r"data-dependent control flow|\.item\(\) on a Tensor|output shape depends on|dynamic shape",
        "with tasks run together (vmap), forward may neither branch on the values of tensors nor call item(); write it "
        f"with torch.where and fixed shapes, or {_ONE_BY_ONE}",
    ),
    (
        r"vmap: \w+.* is not possible because there exists a Tensor|doesn't match the broadcast shape",
        "with tasks run together (vmap), forward may not write into a tensor that is the same for all of them, such as "
        f"one it has made by torch.zeros; use torch.stack, torch.cat or new_zeros of an input, or {_ONE_BY_ONE}",
    ),
    (
        r"derivative for '?(aten::)?_?(scaled_dot_product|efficient_|flash_|cudnn_)\w*attention\w*'? is not",
        "fused attention has no second derivative; call attention inside "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), in forward or around the whole run, or "
        "take no second derivatives: tape=Tape.FIRST_ORDER",
    ),
    (
        r"derivative for '?(aten::)?_(cudnn|miopen|thnn)\w*_?(rnn|lstm|gru)\w*'? is not|double backwards? .*RNN",
        "fused recurrent layers have no second derivative; write the cell as matrix products, call the layer inside "
        "torch.backends.cudnn.flags(enabled=False), or take no second derivatives: tape=Tape.FIRST_ORDER",
    ),
    (
        r"derivative for '?(aten::)?\w+'? is not implemented",
        "torch cannot differentiate this operation as often as asked; write it with elementary operations, or take no "
        "second derivatives: tape=Tape.FIRST_ORDER",
    ),
    (
        r"must have the same dtype|expected scalar type|should be the same|expected m1 and m2 to have the same dtype",
        "inputs, parameters and constants differ in dtype; let data return inputs of the parameters' dtype (numpy "
        "arrays are float64 by default), cast inside forward around a layer of another precision, or pass "
        "Execution(dtype=...), which casts parameters and batches",
    ),
    (
        r"Found dtype (Long|Int|Short|Char|Byte|Bool) but expected|can't be cast to the desired output type",
        "the targets are whole numbers where loss_fn needs floating-point ones; let data return targets.float()",
    ),
    (
        r"expected target dtype to be Long",
        "the targets are classes, and loss_fn takes them as int64; let data return targets.long()",
    ),
)  # fmt: skip


def advice(error: RuntimeError) -> str | None:
    """Return what to do about an error, and the error in torch's words; None where it is not a known one."""
    known = next((words for pattern, words in _KNOWN if re.search(pattern, str(error))), None)
    return None if known is None else f"{known} (torch: {str(error).strip().splitlines()[0]})"


class ExplainedError(RuntimeError):
    """An error of torch with what to do about it."""


def explained(fn: Callable[P, R]) -> Callable[P, R]:
    """Let ``fn`` say what to do where torch raises a known error; all others pass as they are."""

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fn(*args, **kwargs)
        except RuntimeError as error:
            words = advice(error)
            if words is None or isinstance(error, ExplainedError):
                raise
            raise ExplainedError(words) from error

    return wrapped
