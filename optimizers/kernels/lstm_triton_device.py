"""What runs on the GPU for the LSTM's step and its adjoint, in Triton's language; see ``lstm_triton``."""

# Triton's loops and calls are no Python, which a type checker takes them for.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
    raise ImportError(f"triton {triton.__version__} has no products of float64 tiles")

_PIECE = tl.constexpr(16)  # terms of a sum that are multiplied at once, the fewest that tl.dot takes

# Tiles are (UNITS, BLOCK): units from HIDDEN on are padding, never stored, and read as zeros.


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|); near 0, where that loses digits, t / (t + 2) with t = expm1(2x)."""
    t = 2 * x
    if x.dtype == tl.float32:
        p = t / 5040 + 1 / 720
    else:
        p = t / 6227020800 + 1 / 479001600
        p = p * t + 1 / 39916800
        p = p * t + 1 / 3628800
        p = p * t + 1 / 362880
        p = p * t + 1 / 40320
        p = p * t + 1 / 5040
        p = p * t + 1 / 720
    p = p * t + 1 / 120
    p = p * t + 1 / 24
    p = p * t + 1 / 6
    p = (p * t + 0.5) * t * t + t
    e = tl.exp(-tl.abs(t))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(t) < 0.35, p / (p + 2), tl.where(x < 0, -far, far))


@triton.jit
def _rows(at, row_stride, coords, inside, first, NUM_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """Load rows first .. first + ROWS of at (NUM_ROWS, coordinates); zeros from NUM_ROWS on."""
    rows = first + tl.arange(0, ROWS)
    mask = (rows < NUM_ROWS)[:, None] & inside[None, :]
    return tl.load(at + rows[:, None] * row_stride + coords[None, :], mask=mask, other=0.0)


@triton.jit
def _piece(at, row_stride, column_stride, first, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Load columns first .. first + _PIECE of a matrix; zeros outside of it."""
    rows, columns = tl.arange(0, ROWS), first + tl.arange(0, _PIECE)
    mask = (rows < NUM_ROWS)[:, None] & (columns < NUM_COLUMNS)[None, :]
    return tl.load(at + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def _column(at, row_stride, NUM_ROWS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    return tl.load(at + rows * row_stride, mask=rows < NUM_ROWS, other=0.0)[:, None]


@triton.jit
def _add_gates(
    i, f, o, g, weight, width, signal, stride, coords, inside,
    HIDDEN: tl.constexpr, TERMS: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of weight (4 HIDDEN, TERMS), rows ``width`` apart, and signal (TERMS, coordinates)."""
    gate = HIDDEN * width
    if TERMS < _PIECE:
        for k in range(TERMS):
            line = tl.load(signal + k * stride + coords, mask=inside, other=0.0)[None, :]
            i += _column(weight + k, width, HIDDEN, UNITS) * line
            f += _column(weight + k + gate, width, HIDDEN, UNITS) * line
            o += _column(weight + k + 2 * gate, width, HIDDEN, UNITS) * line
            g += _column(weight + k + 3 * gate, width, HIDDEN, UNITS) * line
    else:
        for k in range(0, TERMS, _PIECE):
            lines = _rows(signal, stride, coords, inside, k, TERMS, _PIECE)
            w = _piece(weight, width, 1, k, HIDDEN, TERMS, UNITS)
            i = tl.dot(w, lines, i, input_precision=PRECISION, out_dtype=i.dtype)
            w = _piece(weight + gate, width, 1, k, HIDDEN, TERMS, UNITS)
            f = tl.dot(w, lines, f, input_precision=PRECISION, out_dtype=f.dtype)
            w = _piece(weight + 2 * gate, width, 1, k, HIDDEN, TERMS, UNITS)
            o = tl.dot(w, lines, o, input_precision=PRECISION, out_dtype=o.dtype)
            w = _piece(weight + 3 * gate, width, 1, k, HIDDEN, TERMS, UNITS)
            g = tl.dot(w, lines, g, input_precision=PRECISION, out_dtype=g.dtype)
    return i, f, o, g


@triton.jit
def _gates(
    weight, bias, signal, signal_stride, h, h_stride, coords, inside,
    HIDDEN: tl.constexpr, TERMS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a layer's gates i, f, o and candidate g from its inputs (TERMS, coordinates) and its old h."""
    zeros = tl.zeros((UNITS, BLOCK), dtype=weight.dtype.element_ty)
    i, f = zeros + _column(bias, 1, HIDDEN, UNITS), zeros + _column(bias + HIDDEN, 1, HIDDEN, UNITS)
    o, g = zeros + _column(bias + 2 * HIDDEN, 1, HIDDEN, UNITS), zeros + _column(bias + 3 * HIDDEN, 1, HIDDEN, UNITS)
    i, f, o, g = _add_gates(
        i, f, o, g, weight, TERMS + HIDDEN, signal, signal_stride, coords, inside, HIDDEN, TERMS, UNITS, PRECISION
    )
    i, f, o, g = _add_gates(
        i, f, o, g, weight + TERMS, TERMS + HIDDEN, h, h_stride, coords, inside, HIDDEN, HIDDEN, UNITS, PRECISION
    )
    return tl.sigmoid(i), tl.sigmoid(f), tl.sigmoid(o), _tanh(g)


@triton.jit
def _step_kernel(
    theta, x, states, new_states, out, n,
    NUM_INPUTS: tl.constexpr, HIDDEN: tl.constexpr, LAYERS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    stride = tl.cast(n, tl.int64)
    coords = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, units = coords < n, tl.arange(0, UNITS)
    tile, mask = units[:, None] * stride + coords[None, :], (units < HIDDEN)[:, None] & inside[None, :]
    h = tl.zeros((UNITS, BLOCK), dtype=x.dtype.element_ty)
    for layer in tl.static_range(LAYERS):
        weight, bias, old = theta[2 * layer], theta[2 * layer + 1], states[2 * layer]
        if layer == 0:
            i, f, o, g = _gates(
                weight, bias, x, stride, old, stride, coords, inside, HIDDEN, NUM_INPUTS, UNITS, BLOCK, PRECISION
            )
        else:
            i, f, o, g = _gates(
                weight, bias, new_states[2 * layer - 2], stride, old, stride, coords, inside, HIDDEN, HIDDEN, UNITS,
                BLOCK, PRECISION,
            )  # fmt: skip
        c = f * tl.load(states[2 * layer + 1] + tile, mask=mask, other=0.0) + i * g
        h = o * _tanh(c)
        tl.debug_barrier()  # the new states may lie over the old: all threads have read these
        tl.store(new_states[2 * layer] + tile, h, mask=mask)
        tl.store(new_states[2 * layer + 1] + tile, c, mask=mask)
        tl.debug_barrier()  # the next layer reads them
    read = tl.sum(h * _column(theta[2 * LAYERS], 1, HIDDEN, UNITS), axis=0) + tl.load(theta[2 * LAYERS + 1])
    tl.store(out + coords, read, mask=inside)


@triton.jit
def _add_product(
    acc, matrix, row_stride, column_stride, lines, stride, coords, inside,
    NUM_ROWS: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of matrix (NUM_ROWS, TERMS) and lines (TERMS, coordinates)."""
    if TERMS < _PIECE:
        for k in range(TERMS):
            line = tl.load(lines + k * stride + coords, mask=inside, other=0.0)[None, :]
            acc += _column(matrix + k * column_stride, row_stride, NUM_ROWS, ROWS) * line
    else:
        for k in range(0, TERMS, _PIECE):
            w = _piece(matrix, row_stride, column_stride, k, NUM_ROWS, TERMS, ROWS)
            piece = _rows(lines, stride, coords, inside, k, TERMS, _PIECE)
            acc = tl.dot(w, piece, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _window_kernel(
    theta, x, d_out, h, c, gates, d_h, d_c, d_x, n, m, num_steps,
    NUM_INPUTS: tl.constexpr, HIDDEN: tl.constexpr, LAYERS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill h and c (LAYERS, HIDDEN, num_steps + 1, m), whose first step is given, and gates (LAYERS, 4 HIDDEN,
    num_steps, m); then go back, and write the gates' cotangents over them. Rows of x, d_out and d_* are n apart."""
    far, wide = tl.cast(n, tl.int64), tl.cast(m, tl.int64)
    state_stride, gate_stride = (num_steps + 1) * wide, num_steps * wide
    coords = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, units = coords < m, tl.arange(0, UNITS)
    mask = (units < HIDDEN)[:, None] & inside[None, :]
    state_tile = units[:, None] * state_stride + coords[None, :]
    gate_tile, gate = units[:, None] * gate_stride + coords[None, :], HIDDEN * gate_stride
    far_tile = units[:, None] * far + coords[None, :]

    for step in range(num_steps):
        for layer in tl.static_range(LAYERS):
            own = layer * HIDDEN * state_stride + step * wide
            if layer == 0:
                i, f, o, g = _gates(
                    theta[0], theta[1], x + step * NUM_INPUTS * far, far, h + own, state_stride, coords, inside, HIDDEN,
                    NUM_INPUTS, UNITS, BLOCK, PRECISION,
                )  # fmt: skip
            else:
                i, f, o, g = _gates(
                    theta[2 * layer], theta[2 * layer + 1], h + own - HIDDEN * state_stride + wide, state_stride,
                    h + own, state_stride, coords, inside, HIDDEN, HIDDEN, UNITS, BLOCK, PRECISION,
                )  # fmt: skip
            new_c = f * tl.load(c + own + state_tile, mask=mask, other=0.0) + i * g
            kept = gates + 4 * layer * gate + step * wide + gate_tile
            tl.store(kept, i, mask=mask)
            tl.store(kept + gate, f, mask=mask)
            tl.store(kept + 2 * gate, o, mask=mask)
            tl.store(kept + 3 * gate, g, mask=mask)
            tl.store(c + own + wide + state_tile, new_c, mask=mask)
            tl.store(h + own + wide + state_tile, o * _tanh(new_c), mask=mask)
            tl.debug_barrier()  # the next layer and step read them

    for back in range(num_steps):
        step = num_steps - 1 - back
        up = tl.load(d_out + step * far + coords, mask=inside, other=0.0)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            own = layer * HIDDEN * state_stride + step * wide
            kept = gates + 4 * layer * gate + step * wide
            at_h, at_c = d_h + layer * HIDDEN * far + far_tile, d_c + layer * HIDDEN * far + far_tile
            dh = tl.load(at_h, mask=mask, other=0.0)
            if layer == LAYERS - 1:
                dh += _column(theta[2 * LAYERS], 1, HIDDEN, UNITS) * up[None, :]
            i = tl.load(kept + gate_tile, mask=mask, other=0.0)
            f = tl.load(kept + gate + gate_tile, mask=mask, other=0.0)
            o = tl.load(kept + 2 * gate + gate_tile, mask=mask, other=0.0)
            g = tl.load(kept + 3 * gate + gate_tile, mask=mask, other=0.0)
            squashed = _tanh(tl.load(c + own + wide + state_tile, mask=mask, other=0.0))
            total = tl.load(at_c, mask=mask, other=0.0) + dh * o * (1 - squashed * squashed)
            d_f = total * tl.load(c + own + state_tile, mask=mask, other=0.0) * f * (1 - f)
            tl.debug_barrier()  # all threads have read what is written over now
            tl.store(kept + gate_tile, total * g * i * (1 - i), mask=mask)
            tl.store(kept + gate + gate_tile, d_f, mask=mask)
            tl.store(kept + 2 * gate + gate_tile, dh * squashed * o * (1 - o), mask=mask)
            tl.store(kept + 3 * gate + gate_tile, total * i * (1 - g * g), mask=mask)
            tl.store(at_c, total * f, mask=mask)
            tl.debug_barrier()
            weight = theta[2 * layer]
            terms = NUM_INPUTS if layer == 0 else HIDDEN
            zeros = tl.zeros((UNITS, BLOCK), dtype=x.dtype.element_ty)
            d_old = _add_product(
                zeros, weight + terms, 1, terms + HIDDEN, kept, gate_stride, coords, inside, HIDDEN, 4 * HIDDEN, UNITS,
                PRECISION,
            )  # fmt: skip
            tl.store(at_h, d_old, mask=mask)
            if layer > 0:
                at_h -= HIDDEN * far
                d_signal = tl.load(at_h, mask=mask, other=0.0) + zeros
                d_signal = _add_product(
                    d_signal, weight, 1, terms + HIDDEN, kept, gate_stride, coords, inside, HIDDEN, 4 * HIDDEN, UNITS,
                    PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(at_h, d_signal, mask=mask)
            elif d_x is not None:
                d_signal = _add_product(
                    zeros, weight, 1, terms + HIDDEN, kept, gate_stride, coords, inside, NUM_INPUTS, 4 * HIDDEN, UNITS,
                    PRECISION,
                )  # fmt: skip
                rows = (units < NUM_INPUTS)[:, None] & inside[None, :]
                tl.store(d_x + step * NUM_INPUTS * far + far_tile, d_signal, mask=rows)
            tl.debug_barrier()
