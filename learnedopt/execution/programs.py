"""Functions of tensors, recorded once and compiled by torch; checked against what they were recorded from."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree as pytree

from learnedopt.core import tree
from learnedopt.core.inner import InnerLoop
from learnedopt.execution import compile_times
from learnedopt.execution.compiler_cache import keep_compiler_cache_private

logger: logging.Logger = logging.getLogger("learnedopt")


class CompileWarning(UserWarning):
    """What was to be compiled runs uncompiled, for the reason that the message gives."""


def inspected(tensors: tree.Tree) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Return the leaves, and all that a program takes for granted about them."""
    flat, spec = pytree.tree_flatten(tensors)
    # As text: in older torch a structure has no hash.
    return flat, (repr(spec), *((x.shape, x.stride(), x.dtype, x.device) for x in flat))


def build_once(loop: InnerLoop, name: str, build: Callable[[], Any]) -> Any:
    """Return the program, or None and a warning where it cannot be built; say before about how long that takes."""
    began = time.perf_counter()
    try:
        kind = compile_times.kind_of(loop, name)
        compile_times.logger.info("Compiling %s, %s.", name, compile_times.expected(kind))
        program = build()
        compile_times.remember(kind, time.perf_counter() - began)
    except Exception as error:  # a compiler may fail in any way; what is wrong with the run itself, eager has raised
        logger.debug("compiling failed", exc_info=True)
        lines = str(error).strip().splitlines()
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        say_why_not(loop, f"{type(error).__name__}: {reason}", name)
        program = None
    seconds = time.perf_counter() - began
    loop.cache.put("compile seconds", loop.cache.pop("compile seconds", 0.0) + seconds)
    if program is not None:
        compile_times.logger.info("Compiled %s in %.1f s.", name, seconds)
    return program


def say_why_not(loop: InnerLoop, reason: str, what: str = "the meta-gradient") -> None:
    """Warn, once a loop and reason, that ``Execution(compile=...)`` is not followed."""
    if ("warned", reason) not in loop.cache:
        loop.cache.put(("warned", reason), True)
        message = f"Execution(compile={loop.execution.compile!r}): {what} is computed uncompiled, because {reason}"
        warnings.warn(message, CompileWarning, stacklevel=2)


def seconds_spent(loop: InnerLoop) -> float:
    """Return the seconds that compiling has taken since this was last asked."""
    return loop.cache.pop("compile seconds", 0.0)


def compiled(record: Callable[..., list[Tensor]], example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Record a function of tensors that returns tensors, and compile the record."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # Each input is a tensor of its own, even where a family returns one tensor as several batches: it need not always.
    # Stand-ins have no memory, so that code which bypasses torch's operations raises in place of recording nonsense.
    graph = make_fx(record, _WITHOUT_FACTORS, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *[x.detach().clone() for x in example]
    )
    return backend(graph, [x.detach() for x in example])  # the strides that it will be called with


def backend(record: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compile a record for inputs like these.

    Not by ``torch.compile``, which traces the record once more and looks at every input in every call.
    """
    keep_compiler_cache_private()
    import torch._inductor

    # On a CPU the many small kernels are called from C++ too: it is faster, and sooner ready when found on disk.
    options: dict[str, Any] | None = {"cpp_wrapper": True} if all(x.device.type == "cpu" for x in example) else None
    with torch.no_grad():
        return torch._inductor.compile(record, example, options)  # type: ignore[return-value, arg-type]


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a + alpha * b


def _sub(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a - alpha * b


def _add_in_place(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a.add_(alpha * b)


def _sub_in_place(a: Any, b: Any, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else a.sub_(alpha * b)


def _addmm(a: Any, b: Any, c: Any, beta: float = 1, alpha: float = 1) -> Any:
    if alpha == beta == 1:
        return NotImplemented
    product = alpha * (b @ c)
    return product + beta * a if beta else product  # 0 switches ``a`` off, whatever is in it


# Factors are recorded as products of their own: where torch 2.13's compiler fuses sums with matrix products, it drops
# them (pytorch/pytorch#167313).
_WITHOUT_FACTORS = {
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.sub.Tensor: _sub,
    torch.ops.aten.add_.Tensor: _add_in_place,
    torch.ops.aten.sub_.Tensor: _sub_in_place,
    torch.ops.aten.addmm.default: _addmm,
}


def require_close(results: dict[str, tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]) -> None:
    """Raise ArithmeticError where a program computes something else than what it was recorded from."""
    for name, (found, right) in results.items():
        pairs = [(a.detach(), b.detach()) for a, b in zip(found, right, strict=True) if a is not None and b is not None]
        if [x is None for x in found] != [x is None for x in right]:
            raise ArithmeticError(f"the compiled {name} lacks what the uncompiled has")
        difference = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
        size = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
        precision = max((torch.finfo(b.dtype).eps for _, b in pairs), default=0.0) ** 0.5
        # Where the uncompiled is not finite, nothing can be said.
        if math.isfinite(size) and not difference <= precision * size:
            raise ArithmeticError(
                f"the compiled {name} differs by {difference:.1e} from the uncompiled, which has norm {size:.1e}"
            )
