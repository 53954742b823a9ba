/* The coordinatewise LSTM optimizer: one step forwards, and the adjoint of a window of steps.
 *
 * Coordinates are independent, so they are taken BLOCK at a time through all layers and all steps while everything
 * that one block needs stays in the cache; a SIMD lane is a coordinate. Compiled once with REAL=float, once with
 * REAL=double; the compiler's vector extensions fit whatever the machine has.
 *
 * Shapes: N coordinates, S steps, I inputs, H units, L layers; x (S, I, N), states (H, N) each, in the order h1, c1,
 * h2, c2, ...; weight of a layer (4H, K) with K = inputs of that layer + H, gates in the order input, forget, output,
 * candidate; theta is weight, bias of each layer, then those of the read-out. Every array is contiguous. A call does
 * coordinates from `first` to `last`, so that threads may share the work; both functions return 0, or 1 where memory
 * is short.
 */
#include "vectors.h"
#include "blocks.h"
#include "lstm_net.h"
#include "lstm_step.h"

#define TILE 5

/* signal [K][BLOCK] holds inputs and h; act gets i, f, o, g, tanh c' as [5][H][BLOCK]. */
static void cell(const Layer *layer, int hidden, const REAL *signal, const REAL *c, REAL *act, REAL *new_h,
                 REAL *new_c) {
    const int plane = hidden * BLOCK;
    for (int j = 0; j < hidden; j++) {
        vec acc[4][VECS];
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) acc[g][v] = spread(layer->bias[j * 4 + g]);
        four_rows(layer->gates + (size_t)j * layer->num_k * 4, layer->num_k, signal, acc);
        for (int v = 0; v < VECS; v++) {
            int at = j * BLOCK + v * LANES;
            vec i = sigmoid(acc[0][v]), f = sigmoid(acc[1][v]), o = sigmoid(acc[2][v]), g = tanh_(acc[3][v]);
            vec next = f * load(c + at) + i * g, squashed = tanh_(next);
            store(act + at, i);
            store(act + plane + at, f);
            store(act + 2 * plane + at, o);
            store(act + 3 * plane + at, g);
            store(act + 4 * plane + at, squashed);
            store(new_c + at, next);
            store(new_h + at, o * squashed);
        }
    }
}

#ifdef __clang__
INLINE void transpose_tile(const REAL *from, int from_stride, REAL *to, int to_stride) {
    for (int r = 0; r < LANES; r++)
        for (int lane = 0; lane < LANES; lane++) to[lane * to_stride + r] = from[r * from_stride + lane];
}
#else
INLINE void transpose_tile(const REAL *from, int from_stride, REAL *to, int to_stride) {
    vec rows[LANES], next[LANES];
    for (int r = 0; r < LANES; r++) rows[r] = load(from + r * from_stride);
    /* Each round swaps the off-diagonal halves of ever smaller squares. */
    for (int half = LANES / 2; half; half /= 2) {
        for (int r = 0; r < LANES; r++) {
            if (r & half) continue;
            ivec low, high;
            for (int k = 0; k < LANES; k++) {
                low[k] = k & half ? LANES + (k ^ half) : k;
                high[k] = k & half ? LANES + k : k | half;
            }
            next[r] = __builtin_shuffle(rows[r], rows[r | half], low);
            next[r | half] = __builtin_shuffle(rows[r], rows[r | half], high);
        }
        for (int r = 0; r < LANES; r++) rows[r] = next[r];
    }
    for (int r = 0; r < LANES; r++) store(to + r * to_stride, rows[r]);
}
#endif

/* grad[k][r] += sum over the block's lanes of signal[k][lane] * turned[lane][r], for 4 k and count vectors of r. */
INLINE void outer_tile(int count, const REAL *signal, const REAL *turned, int rows, REAL *grad) {
    vec acc[4][TILE];
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < count; v++) acc[k][v] = load(grad + k * rows + v * LANES);
    for (int lane = 0; lane < BLOCK; lane++)
        for (int v = 0; v < count; v++) {
            vec d = load(turned + (size_t)lane * rows + v * LANES);
            KEEP(d);
            for (int k = 0; k < 4; k++) acc[k][v] += signal[k * BLOCK + lane] * d;
        }
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < count; v++) store(grad + k * rows + v * LANES, acc[k][v]);
}

/* Adjoint of cell. signal [padded_k][BLOCK] has ones in row K. dh and dc belong to the new h and c; dc becomes that
 * of the old c. d [rows][BLOCK] and turned [BLOCK][rows] are scratch. d_signal [padded_k][BLOCK]. */
static void cell_adjoint(Layer *layer, int hidden, const REAL *signal, const REAL *c, const REAL *act, const REAL *dh,
                         REAL *dc, REAL *d, REAL *turned, REAL *d_signal) {
    const int plane = hidden * BLOCK, rows = layer->rows;
    for (int at = 0; at < plane; at += LANES) {
        vec i = load(act + at), f = load(act + plane + at), o = load(act + 2 * plane + at);
        vec g = load(act + 3 * plane + at), squashed = load(act + 4 * plane + at), up = load(dh + at);
        vec total = load(dc + at) + up * o * (1 - squashed * squashed);
        store(d + at, total * g * (i * (1 - i)));
        store(d + plane + at, total * load(c + at) * (f * (1 - f)));
        store(d + 2 * plane + at, up * squashed * (o * (1 - o)));
        store(d + 3 * plane + at, total * i * (1 - g * g));
        store(dc + at, total * f);
    }
    for (int k = 0; k < layer->num_k; k += 4) {
        vec acc[4][VECS];
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) acc[g][v] = spread(0);
        four_rows(layer->across + (size_t)k * 4 * hidden, 4 * hidden, d, acc);
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) store(d_signal + (k + g) * BLOCK + v * LANES, acc[g][v]);
    }
    for (int r = 0; r < rows; r += LANES)
        for (int lane = 0; lane < BLOCK; lane += LANES)
            transpose_tile(d + (size_t)r * BLOCK + lane, BLOCK, turned + (size_t)lane * rows + r, rows);
    for (int k = 0; k < layer->padded_k; k += 4)
        for (int r = 0; r < rows; r += TILE * LANES) {
            int count = (rows - r) / LANES;
            const REAL *from = signal + k * BLOCK, *at = turned + r;
            REAL *to = layer->grad + (size_t)k * rows + r;
            switch (count) {
                case 1: outer_tile(1, from, at, rows, to); break;
                case 2: outer_tile(2, from, at, rows, to); break;
                case 3: outer_tile(3, from, at, rows, to); break;
                case 4: outer_tile(4, from, at, rows, to); break;
                default: outer_tile(TILE, from, at, rows, to);
            }
        }
}

/* One step: out (N) and new states, which may be the old ones' memory, from x (I, N) and states. */
int forward(long first, long last, long n, int num_inputs, int hidden, int num_layers, const REAL *const *theta,
            const REAL *x, const REAL *const *state, REAL *const *new_state, REAL *out) {
    Net net;
    const int num_states = 2 * num_layers, widest = (num_inputs > hidden ? num_inputs : hidden) + hidden;
    REAL *work = NULL;
    int failed = !pack(&net, num_inputs, hidden, num_layers, theta, OF_STEP, 0);
    if (!failed) failed = !(work = aligned((size_t)(2 * widest + num_states * hidden + num_inputs + 1) * BLOCK));
    if (!failed) {
        REAL *scratch[2] = {work, work + widest * BLOCK};
        long start = first;
        for (; start + BLOCK <= last; start += BLOCK) step(&net, scratch, n, start, x, state, new_state, out + start);
        if (start < last) { /* the rest of a block, in memory of its own */
            int count = last - start;
            REAL *rest[num_states], *rest_x = work + 2 * widest * BLOCK, *rest_out = rest_x + num_inputs * BLOCK;
            take(rest_x, x + start, num_inputs, n, count);
            for (int i = 0; i < num_states; i++) {
                rest[i] = rest_out + (1 + (size_t)i * hidden) * BLOCK;
                take(rest[i], state[i] + start, hidden, n, count);
            }
            step(&net, scratch, BLOCK, 0, rest_x, (const REAL *const *)rest, rest, rest_out);
            for (int i = 0; i < num_states; i++) put(new_state[i] + start, rest[i], hidden, n, count);
            memcpy(out + start, rest_out, count * sizeof(REAL));
        }
    }
    free(work);
    release(&net);
    return failed;
}

/* The adjoint of S steps from `state`: d_out (S, N) are the cotangents of the outputs, d_end those of the last states
 * (or NULL); adds to d_theta, writes d_start (the first states') and d_x (S, I, N) where they are not NULL.
 * A block's forward pass is run again here, so nothing of it has to be kept for all coordinates at once. */
int adjoint(long first, long last, long n, int num_steps, int num_inputs, int hidden, int num_layers,
            const REAL *const *theta, const REAL *x, const REAL *const *state, const REAL *d_out,
            const REAL *const *d_end, REAL *const *d_theta, REAL *const *d_start, REAL *d_x) {
    Net net;
    REAL *work = NULL;
    const size_t plane = (size_t)hidden * BLOCK;
    int failed = !pack(&net, num_inputs, hidden, num_layers, theta, (const REAL[4]){1, 1, 1, 1}, 1);
    size_t per_step = 0, widest = 0, rows = ROUND_UP(4 * hidden, LANES);
    if (!failed) {
        for (int l = 0; l < num_layers; l++) {
            size_t width = net.layers[l].padded_k;
            per_step += width * BLOCK + 7 * plane; /* signal; act, new c, and new h */
            widest = width > widest ? width : widest;
        }
        failed = !(work = aligned(num_steps * per_step + num_layers * 3 * plane +
                                  (widest + 2 * rows + hidden + 1 + 2) * (size_t)BLOCK));
    }
    if (!failed) {
        REAL *tape = work, *c0 = tape + num_steps * per_step;
        REAL *dh = c0 + num_layers * plane, *dc = dh + num_layers * plane;
        REAL *d_signal = dc + num_layers * plane, *d = d_signal + widest * BLOCK, *turned = d + rows * BLOCK;
        REAL *d_readout = turned + rows * BLOCK, *up = d_readout + (hidden + 1) * BLOCK;
        for (long start = first; start < last; start += BLOCK) {
            int count = last - start < BLOCK ? last - start : BLOCK;
            for (int s = 0; s < num_steps; s++) {
                REAL *signal = tape + s * per_step;
                const REAL *below = NULL;
                for (int l = 0; l < num_layers; l++) {
                    Layer *layer = net.layers + l;
                    REAL *act = signal + (size_t)layer->padded_k * BLOCK;
                    REAL *new_c = act + 5 * plane, *new_h = new_c + plane;
                    REAL *h = signal + layer->num_inputs * BLOCK;
                    if (l)
                        memcpy(signal, below, plane * sizeof(REAL));
                    else
                        take(signal, x + (size_t)s * num_inputs * n + start, num_inputs, n, count);
                    const REAL *c = new_c - per_step;
                    if (s) {
                        memcpy(h, new_h - per_step, plane * sizeof(REAL));
                    } else {
                        take(h, state[2 * l] + start, hidden, n, count);
                        take(c0 + l * plane, state[2 * l + 1] + start, hidden, n, count);
                        c = c0 + l * plane;
                    }
                    for (int lane = 0; lane < BLOCK; lane++) signal[layer->num_k * BLOCK + lane] = 1;
                    cell(layer, hidden, signal, c, act, new_h, new_c);
                    below = new_h;
                    signal = new_h + plane;
                }
            }
            memset(dh, 0, 2 * num_layers * plane * sizeof(REAL));
            if (d_end)
                for (int l = 0; l < num_layers; l++) {
                    take(dh + l * plane, d_end[2 * l] + start, hidden, n, count);
                    take(dc + l * plane, d_end[2 * l + 1] + start, hidden, n, count);
                }
            for (int s = num_steps - 1; s >= 0; s--) {
                REAL *end = tape + (s + 1) * per_step;
                take(up, d_out + (size_t)s * n + start, 1, n, count);
                const REAL *top = end - plane;
                for (int v = 0; v < VECS; v++) {
                    vec u = load(up + v * LANES);
                    REAL *sums = d_readout + v * LANES;
                    store(sums + hidden * BLOCK, load(sums + hidden * BLOCK) + u);
                    for (int j = 0; j < hidden; j++) {
                        REAL *to = dh + (num_layers - 1) * plane + j * BLOCK + v * LANES;
                        store(to, load(to) + net.readout[j] * u);
                        store(sums + j * BLOCK, load(sums + j * BLOCK) + u * load(top + j * BLOCK + v * LANES));
                    }
                }
                for (int l = num_layers - 1; l >= 0; l--) {
                    Layer *layer = net.layers + l;
                    REAL *signal = end - (size_t)layer->padded_k * BLOCK - 7 * plane;
                    const REAL *act = signal + (size_t)layer->padded_k * BLOCK;
                    const REAL *c = s ? act + 5 * plane - per_step : c0 + l * plane;
                    cell_adjoint(layer, hidden, signal, c, act, dh + l * plane, dc + l * plane, d, turned, d_signal);
                    memcpy(dh + l * plane, d_signal + layer->num_inputs * BLOCK, plane * sizeof(REAL));
                    if (l)
                        for (size_t at = 0; at < plane; at += LANES) {
                            REAL *to = dh + (l - 1) * plane + at;
                            store(to, load(to) + load(d_signal + at));
                        }
                    else if (d_x)
                        put(d_x + (size_t)s * num_inputs * n + start, d_signal, num_inputs, n, count);
                    end = signal;
                }
            }
            if (d_start)
                for (int l = 0; l < num_layers; l++) {
                    put(d_start[2 * l] + start, dh + l * plane, hidden, n, count);
                    put(d_start[2 * l + 1] + start, dc + l * plane, hidden, n, count);
                }
        }
        for (int l = 0; l < num_layers; l++) {
            Layer *layer = net.layers + l;
            for (int r = 0; r < 4 * hidden; r++) {
                for (int k = 0; k < layer->num_k; k++)
                    d_theta[2 * l][(size_t)r * layer->num_k + k] += layer->grad[(size_t)k * layer->rows + r];
                d_theta[2 * l + 1][r] += layer->grad[(size_t)layer->num_k * layer->rows + r];
            }
        }
        for (int j = 0; j <= hidden; j++) {
            REAL sum = 0;
            for (int lane = 0; lane < BLOCK; lane++) sum += d_readout[j * BLOCK + lane];
            *(j < hidden ? d_theta[2 * num_layers] + j : d_theta[2 * num_layers + 1]) += sum;
        }
    }
    free(work);
    release(&net);
    return failed;
}
