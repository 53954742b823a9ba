/* A step of the LSTM forwards, a block of coordinates at a time. Include vectors.h, blocks.h and lstm_net.h before.
 *
 * Of what is not the products of matrices, most is the gates' exponentials and divisions. With E = exp(2 x) - 1,
 * tanh(x) = E / (2 + E), and sigmoid(x) = 1 / (1 + exp(-x)): over common denominators two divisions are left of five. The
 * exponents are bounded so that a product of three exponentials is a finite number: a sigmoid is never below 1e-12,
 * doubles' never below 1e-86. The factors -1 and 2, and 1 / ln 2 where powers of 2 are taken, are in the weights already.
 */
#define PER_LN2 (FAST_EXP2 ? (REAL)1.4426950408889634074 : (REAL)1)
#define OF_STEP ((const REAL[4]){-PER_LN2, -PER_LN2, -PER_LN2, 2 * PER_LN2})

/* exp(x) - 1 and exp(x), powers of 2 where those are fast. */
INLINE vec bounded_expm1(vec x) {
    if (FAST_EXP2) return exp2m1(at_most(spread(40), x));
    return expm1_(clamp(x, spread(sizeof(REAL) == 4 ? 27 : 200)));
}
INLINE vec bounded_exp(vec x) {
    return FAST_EXP2 ? exp2_(at_most(spread(40), x)) : 1 + bounded_expm1(x);
}

/* A cell's new h from what its gates are before they are squashed; c becomes the new one. */
INLINE vec squashed(vec i, vec f, vec o, vec g, vec *c) {
    vec eg = bounded_expm1(g), ei = bounded_exp(i), ef = bounded_exp(f), sum = 2 + eg, both = sum + sum * ei;
    *c = (*c * both + (eg + eg * ef)) / (both + both * ef);
    vec ec = bounded_expm1(2 * PER_LN2 * *c), top = 2 + ec;
    return ec / (top + top * bounded_exp(o));
}

/* A block through a layer: signal [K][BLOCK] holds inputs and h; the rows of h, c and the new ones, which may be the same
 * memory, lie `stride` apart; next [H][BLOCK] gets the new h too. */
static void advance(const Layer *layer, int hidden, const REAL *signal, long stride, const REAL *h, const REAL *c,
                    REAL *new_h, REAL *new_c, REAL *next) {
    for (int j = 0; j < hidden; j++, h += stride, c += stride, new_h += stride, new_c += stride, next += BLOCK) {
        vec acc[4][VECS];
        for (int v = 0; v < VECS; v++) { /* of the next block: more rows than the processor's own prefetching follows */
            __builtin_prefetch(h + BLOCK + v * LANES, 1);
            __builtin_prefetch(c + BLOCK + v * LANES, 1);
        }
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) acc[g][v] = spread(layer->bias[j * 4 + g]);
        four_rows(layer->gates + (size_t)j * layer->num_k * 4, layer->num_k, signal, acc);
        for (int v = 0; v < VECS; v++) {
            vec now = load_any(c + v * LANES), out = squashed(acc[0][v], acc[1][v], acc[2][v], acc[3][v], &now);
            store_any(new_c + v * LANES, now);
            store_any(new_h + v * LANES, out);
            store(next + v * LANES, out);
        }
    }
}

static void copy_rows(REAL *to, const REAL *from, int rows, long stride) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) store(to + r * BLOCK + v * LANES, load_any(from + r * stride + v * LANES));
}

/* The BLOCK coordinates from `start` through all layers, and their read-out. Rows of x and the states lie `stride` apart;
 * scratch is twice [the largest K][BLOCK]. */
static void step(const Net *net, REAL *const *scratch, long stride, long start, const REAL *x, const REAL *const *state,
                 REAL *const *new_state, REAL *out) {
    REAL *signal = scratch[0], *next = scratch[1];
    copy_rows(signal, x + start, net->num_inputs, stride);
    for (int l = 0; l < net->num_layers; l++) {
        const Layer *layer = net->layers + l;
        const REAL *h = state[2 * l] + start, *c = state[2 * l + 1] + start;
        copy_rows(signal + layer->num_inputs * BLOCK, h, net->hidden, stride);
        advance(layer, net->hidden, signal, stride, h, c, new_state[2 * l] + start, new_state[2 * l + 1] + start, next);
        REAL *read = signal;
        signal = next;
        next = read;
    }
    for (int v = 0; v < VECS; v++) {
        vec sum = spread(*net->readout_bias);
        for (int j = 0; j < net->hidden; j++) sum += net->readout[j] * load(signal + j * BLOCK + v * LANES);
        store_any(out + v * LANES, sum);
    }
}
