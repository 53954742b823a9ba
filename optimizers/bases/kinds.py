"""What kind of a net's tensors each is, out of names and shapes alone."""

from __future__ import annotations

import enum
import functools
import logging
import re
from typing import NamedTuple, TypeAlias

from learnedopt.core.tree import Params

logger: logging.Logger = logging.getLogger("learnedopt")

_Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
_EMBEDDING = re.compile(r"(?:^|[^a-z])(?:embed|position|wte(?![a-z])|wpe(?![a-z]))")
_GAIN = {"weight", "gain", "scale", "gamma"}
_BIAS = {"bias", "beta", "shift", "offset", "b"}


class Kind(enum.Enum):
    """What a tensor does in a net."""

    FIRST = enum.auto()
    """The first of several matrices: what has two dimensions or more, a convolution's weights for one."""
    MIDDLE = enum.auto()
    """A matrix between the first and the last."""
    LAST = enum.auto()
    """The last matrix, or the only one."""
    EMBEDDING = enum.auto()
    """A table of vectors, by its name; it is not counted among the other matrices."""
    HIDDEN_BIAS = enum.auto()
    """A bias, or a vector or scalar that nothing tells more about."""
    LAST_BIAS = enum.auto()
    """A bias of the last matrix."""
    GAIN = enum.auto()
    """A norm's factors."""


class TensorKind(NamedTuple):
    """A tensor's kind and place."""

    kind: Kind
    fan_in: int
    """Inputs of an output: all but the first dimension together, (out, in, height, width) for one; 1 for a vector."""
    fan_out: int
    """The first dimension; 1 for a scalar."""
    depth: float
    """From 0 to 1 over the matrices in order, without embeddings; 0 for a single one and for embeddings.

    A vector has that of its matrix, see ``kinds_of``; 0 without one.
    """


def kinds_of(params: Params) -> dict[str, TensorKind]:
    """Tell the kinds of ONE task's tensors apart, in the order that the net uses them in; also under vmap.

    Names are those of ``torch.nn.Module.named_parameters()``, whose parts stand between dots or slashes:

    * matrices (two dimensions or more) are EMBEDDING where a word of the name begins with "embed" or "position", or is
      "wte" or "wpe", but for those of four dimensions or more, such as the convolution of "patch_embeddings"; the
      others FIRST, MIDDLE and LAST in order;
    * vectors are GAIN where a word of the last part is weight, gain, scale or gamma, and biases where one is bias,
      beta, shift, offset or b, as all scalars are. A bias's matrix is the last one before it in its own module; in a
      module without any, the last one before it. It is a LAST_BIAS if its matrix is the LAST one, of its own module;
    * vectors of other names, such as "0", are biases right after a matrix with as many outputs; else HIDDEN_BIAS, as
      is everything in a net without matrices. That is logged, once for each net.
    """
    return dict(_kinds(tuple((name, tuple(p.shape)) for name, p in params.items())))


@functools.lru_cache(maxsize=1024)
def _kinds(shapes: _Shapes) -> dict[str, TensorKind]:
    matrices = [i for i, (_, shape) in enumerate(shapes) if len(shape) >= 2]
    layers = [i for i in matrices if len(shapes[i][1]) > 3 or not _EMBEDDING.search(shapes[i][0].lower())]
    depths = {i: place / max(len(layers) - 1, 1) for place, i in enumerate(layers)}
    kinds: dict[str, TensorKind] = {}
    untold: list[str] = []
    for i, (name, shape) in enumerate(shapes):
        if len(shape) >= 2:
            found = _matrix_kind(i, layers)
            depth = depths.get(i, 0.0)
        else:
            known = _vector_kind(i, shapes) if matrices else None
            if known is None:
                untold.append(name)
            owner, own = _owner(i, shapes, matrices)
            last = known is Kind.HIDDEN_BIAS and own and bool(layers) and owner == layers[-1]
            found = Kind.LAST_BIAS if last else known or Kind.HIDDEN_BIAS
            depth = depths.get(owner, 0.0)
        fan_out = shape[0] if shape else 1
        fan_in = functools.reduce(lambda a, b: a * b, shape[1:], 1)
        kinds[name] = TensorKind(found, fan_in, fan_out, depth)
    if untold:
        logger.warning(
            "what %s are cannot be told from names and shapes, so they are moved as biases of hidden layers; for a "
            "torch module pass model.named_parameters(), or end a norm's names in weight and bias",
            ", ".join(untold),
        )
    return kinds


def _matrix_kind(i: int, layers: list[int]) -> Kind:
    if i not in layers:
        return Kind.EMBEDDING
    if i == layers[-1]:
        return Kind.LAST
    return Kind.FIRST if i == layers[0] else Kind.MIDDLE


def _vector_kind(i: int, shapes: _Shapes) -> Kind | None:
    """Return GAIN, HIDDEN_BIAS for any bias, or None for what cannot be told."""
    name, shape = shapes[i]
    words = set(re.findall("[a-z]+", re.split("[./]", name.lower())[-1]))
    if words & _BIAS or not shape:
        return Kind.HIDDEN_BIAS
    if words & _GAIN:
        return Kind.GAIN
    before = shapes[i - 1][1] if i else ()
    return Kind.HIDDEN_BIAS if len(before) >= 2 and before[0] == shape[0] else None


def _owner(i: int, shapes: _Shapes, matrices: list[int]) -> tuple[int, bool]:
    """Return a vector's matrix, -1 for none, and whether both are of one module."""

    def module(j: int) -> list[str]:
        return re.split("[./]", shapes[j][0])[:-1]

    own = [j for j in matrices if module(j) == module(i)]
    before = [j for j in own or matrices if j < i]
    if before:
        return before[-1], bool(own)
    return (own[0], True) if own else (-1, False)
