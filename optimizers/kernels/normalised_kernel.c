/* The step of the normalised rules, for all tensors of many lanes, in two passes over memory.
 *
 * `begin` finds the numbers of a lane, `sums` what the formulas need of whole tensors, `numbers` makes a few numbers a
 * tensor out of them, and a factor for each row and each column of a matrix, and `move` takes the step. What is
 * particular to a rule are constants, of lanes and of tensors, that do not change from step to step. With the gradient
 * g, the parameters y, their average x, a network's d and s where there is one, and a direction o where one is given for
 * the tensor:
 *
 *     z  = (y - blend x) / (1 - blend)
 *     m1 <- keep_1 m1 + (1 - keep_1) g,    m2, v likewise, v of g^2
 *     u  = (mix_0 g + mix_1 scale_1 m1 + mix_2 scale_2 m2) (scale_v v + floor)^power factor row column
 *     z <- z - rate (u + decay z + along o + d e^s),    x <- x + share (z - x),    y = z + blend (x - z)
 *
 * A tensor is cut into pieces, of whole rows if it is a matrix, which does not depend on the number of threads. Units
 * are the pieces of all lanes, lane after lane; a call does those from `first` to `last`, so that threads may share the
 * work. `data` has the tensors, see Kinds, then `hidden`, `cell`, what is written of them, and the network's weights, as
 * lanes.h says; within a lane every one is contiguous. Compiled once with REAL=float, once with REAL=double.
 */
#include <math.h>

#include "vectors.h"
#include "blocks.h"
#include "lanes.h"

#define CHUNK 1024 /* coordinates whose v `sums` keeps at a time */

/* The numbers of a lane, and those of a tensor. */
enum { KEEP_1, KEEP_2, KEEP_V, SCALE_1, SCALE_2, SCALE_V, MIX_0, MIX_1, MIX_2, ALONG_0, ALONG_1, ALONG_2, SHARE, BLEND,
       LANE_NUMBERS };
enum { FLOOR, POWER, FACTOR, DECAY, RATE, ALONG, LOG_MEAN, ENTRY, TENSOR_NUMBERS };
/* What `data` has of each tensor; all tensors of a kind stand together. */
enum Kinds { GRAD, PARAM, FIRST, SECOND, SQUARE, AVERAGE, DIRECTION, NEW_PARAM, NEW_FIRST, NEW_SECOND, NEW_SQUARE,
             NEW_AVERAGE, KINDS };
enum Nets { NO_NET, MLP, LSTM };
#define ROWS 8 /* features of a coordinate */

typedef struct {
    long num_pieces, num_coordinates; /* of a lane */
    int num_tensors;
    const long *pieces; /* of each: its tensor, its first coordinate, its last one, where its sums of columns begin */
    const long *shapes; /* of each tensor: whether it is a matrix, columns, where its rows, columns, coordinates begin */
} Cut;
typedef struct {
    long tensor, first, last, sums_at, matrix, columns, row_at, column_at, start;
} Piece;

static Piece piece(const Cut *cut, long number) {
    const long *own = cut->pieces + 4 * number, *shape = cut->shapes + 5 * own[0];
    return (Piece){own[0], own[1], own[2], own[3], shape[0], shape[1], shape[2], shape[3], shape[4]};
}

static void tensors(const Lanes *lanes, long lane, int num_tensors, long tensor, REAL **found) {
    for (int kind = 0; kind < KINDS; kind++) found[kind] = of_lane(lanes, lane, kind * num_tensors + tensor);
}

static REAL sum(const REAL *x, long n) {
    vec acc[4] = {{0}};
    long i = 0;
    REAL rest = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int v = 0; v < 4; v++) acc[v] += load_any(x + i + v * LANES);
    for (; i < n; i++) rest += x[i];
    return total((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest;
}

/* Walks a piece of a matrix row by row: the part of row `r`, from column `c` on, `n` long, that lies at `from` + i. */
#define EACH_ROW(piece, from, count)                                                                              \
    for (long i = 0, r = (from) / (piece)->columns, c = (from) % (piece)->columns, n; i < (count); i += n, r++, c = 0) \
        if ((n = (piece)->columns - c < (count) - i ? (piece)->columns - c : (count) - i))

/* Of each unit: the sum of the new v, and of z^2 if wanted, in `found` (lanes, pieces, 2). To what `rows` (lanes, all rows) and
 * `columns` (lanes, the columns of all pieces) have of matrices, the sums of the new v are added; NULL: not wanted. Where `data` has a direction, along_0 g + along_1 scale_1 m1 + along_2 scale_2 m2 is written over it. */
void sums(long first, long last, const Cut *cut, const Lanes *lanes, const REAL *lane_numbers, REAL *found, REAL *rows,
          REAL *columns, long num_rows, long num_columns, int with_iterates) {
    REAL square[CHUNK], iterate[CHUNK];
    for (long unit = first; unit < last; unit++) {
        const long lane = unit / cut->num_pieces;
        const Piece own = piece(cut, unit % cut->num_pieces);
        const REAL *of = lane_numbers + lane * LANE_NUMBERS;
        const REAL keep = of[KEEP_V], take_ = 1 - keep, blend = of[BLEND], inverse = 1 / (1 - blend);
        const REAL keep_1 = of[KEEP_1], keep_2 = of[KEEP_2], on_g = of[ALONG_0];
        const REAL on_1 = of[ALONG_1] * of[SCALE_1], on_2 = of[ALONG_2] * of[SCALE_2];
        REAL *x[KINDS];
        tensors(lanes, lane, cut->num_tensors, own.tensor, x);
        double totals[2] = {0, 0};
        for (long from = own.first; from < own.last; from += CHUNK) {
            const long count = own.last - from < CHUNK ? own.last - from : CHUNK;
            const REAL *g = x[GRAD] + from, *v = x[SQUARE] + from, *y = x[PARAM] + from, *mean = x[AVERAGE] + from;
            for (long i = 0; i < count; i++) square[i] = keep * v[i] + take_ * g[i] * g[i];
            totals[0] += sum(square, count);
            for (long i = 0; with_iterates && i < count; i++) {
                const REAL z = (y[i] - blend * mean[i]) * inverse;
                iterate[i] = z * z;
            }
            if (with_iterates) totals[1] += sum(iterate, count);
            if (x[DIRECTION]) {
                const REAL *m1 = x[FIRST] + from, *m2 = x[SECOND] + from;
                REAL *restrict to = x[DIRECTION] + from;
                for (long i = 0; i < count; i++)
                    to[i] = on_g * g[i] + on_1 * (keep_1 * m1[i] + (1 - keep_1) * g[i]) +
                            on_2 * (keep_2 * m2[i] + (1 - keep_2) * g[i]);
            }
            if (!rows || !own.matrix) continue;
            REAL *to_rows = rows + lane * num_rows + own.row_at;
            REAL *to_columns = columns + lane * num_columns + own.sums_at;
            EACH_ROW(&own, from, count) {
                REAL *restrict to = to_columns + c;
                for (long j = 0; j < n; j++) to[j] += square[i + j];
                to_rows[r] += sum(square + i, n);
            }
        }
        found[2 * unit] = totals[0];
        found[2 * unit + 1] = totals[1];
    }
}

#include "frame_numbers.h"

/* A lane's network; its clocks are a part of the bias already. */
typedef struct {
    enum Nets kind;
    int units, num_k;   /* inputs of the first layer: features, then the LSTM's h */
    REAL *weight;       /* [rows / 4][num_k][4]: of the LSTM the four gates of a unit side by side */
    REAL *bias;         /* [rows] */
    const REAL *readout, *readout_bias;
    REAL *signal, *cell, *shown; /* [num_k][BLOCK], c and h */
} Net;

static int reserve(Net *net, enum Nets kind, int units) {
    const int rows = kind == LSTM ? 4 * units : ROUND_UP(units, 4);
    *net = (Net){.kind = kind, .units = units, .num_k = kind == LSTM ? ROWS + units : ROWS};
    if (kind == NO_NET) return 1;
    net->weight = aligned((size_t)rows * net->num_k);
    net->bias = aligned(rows);
    net->signal = aligned((size_t)net->num_k * BLOCK);
    net->cell = aligned((size_t)units * BLOCK);
    net->shown = aligned((size_t)rows * BLOCK);
    return net->weight && net->bias && net->signal && net->cell && net->shown;
}

static void release(Net *net) {
    free(net->weight);
    free(net->bias);
    free(net->signal);
    free(net->cell);
    free(net->shown);
}

/* From weights of the features (rows, inputs), of h (rows, units) for an LSTM, bias, read-out (2, units) and its bias. */
static void pack(Net *net, const Lanes *lanes, long lane, int at, int inputs) {
    const int cell = net->kind == LSTM, rows = cell ? 4 * net->units : net->units;
    const REAL *weight = of_lane(lanes, lane, at), *recurrent = cell ? of_lane(lanes, lane, at + 1) : NULL;
    const REAL *bias = of_lane(lanes, lane, at + 1 + cell);
    net->readout = of_lane(lanes, lane, at + 2 + cell);
    net->readout_bias = of_lane(lanes, lane, at + 3 + cell);
    for (int r = 0; r < rows; r++) {
        const int to = cell ? r % net->units * 4 + r / net->units : r;
        REAL *own = net->weight + (long)(to / 4) * net->num_k * 4 + to % 4;
        for (int k = 0; k < ROWS; k++) own[4 * k] = weight[r * inputs + k];
        for (int k = ROWS; k < net->num_k; k++) own[4 * k] = recurrent[r * net->units + k - ROWS];
        net->bias[to] = bias[r];
    }
}

/* What the network shows its read-out of the block whose features are in net->signal. */
static void units(Net *net) {
    const int rows = net->kind == LSTM ? 4 * net->units : net->units;
    for (int j = 0; j < rows; j += 4) {
        vec acc[4][VECS];
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) acc[g][v] = spread(net->bias[j + g]);
        four_rows(net->weight + (long)j * net->num_k, net->num_k, net->signal, acc);
        for (int v = 0; v < VECS; v++) {
            if (net->kind == MLP) {
                for (int g = 0; g < 4; g++) store(net->shown + (j + g) * BLOCK + v * LANES, tanh_(acc[g][v]));
                continue;
            }
            const int at = j / 4 * BLOCK + v * LANES; /* gates: input, forget, candidate, output */
            vec next = sigmoid(acc[1][v]) * load(net->cell + at) + sigmoid(acc[0][v]) * tanh_(acc[2][v]);
            store(net->cell + at, next);
            store(net->shown + at, sigmoid(acc[3][v]) * tanh_(next));
        }
    }
}

/* d e^s of a vector of coordinates. */
INLINE vec read_out(const Net *net, int v) {
    vec d = spread(net->readout_bias[0]), s = spread(net->readout_bias[1]);
    for (int j = 0; j < net->units; j++) {
        vec shown = load(net->shown + j * BLOCK + v * LANES);
        d += net->readout[j] * shown;
        s += net->readout[net->units + j] * shown;
    }
    return d * exp_(s);
}

/* The step of a block of coordinates; x has each kind's, `factor` those of rows and columns, NULL for none. */
INLINE void block(const REAL *of, const REAL *own, REAL *const *x, const REAL *factor, Net *net, const int with_net) {
    const REAL keep_1 = of[KEEP_1], keep_2 = of[KEEP_2], keep_v = of[KEEP_V], blend = of[BLEND];
    const REAL on_1 = of[MIX_1] * of[SCALE_1], on_2 = of[MIX_2] * of[SCALE_2], inverse = 1 / (1 - blend);
    const vec five = spread(5);
    vec iterate[VECS], bracket[VECS], alive[VECS];
    for (int v = 0; v < VECS; v++) {
        const int at = v * LANES;
        const vec g = load_any(x[GRAD] + at);
        const vec z = (load_any(x[PARAM] + at) - blend * load_any(x[AVERAGE] + at)) * inverse;
        const vec m1 = keep_1 * load_any(x[FIRST] + at) + (1 - keep_1) * g;
        const vec m2 = keep_2 * load_any(x[SECOND] + at) + (1 - keep_2) * g;
        const vec square = keep_v * load_any(x[SQUARE] + at) + (1 - keep_v) * g * g;
        const vec size = log2_(of[SCALE_V] * square + own[FLOOR]);
        store_any(x[NEW_FIRST] + at, m1);
        store_any(x[NEW_SECOND] + at, m2);
        store_any(x[NEW_SQUARE] + at, square);
        vec u = (of[MIX_0] * g + on_1 * m1 + on_2 * m2) * power_of_2(own[POWER] * size) * own[FACTOR];
        if (factor) u *= load(factor + at);
        if (x[DIRECTION]) u += own[ALONG] * load_any(x[DIRECTION] + at);
        iterate[v] = z;
        bracket[v] = u + own[DECAY] * z;
        if (!with_net) continue;
        const vec over[2] = {power_of_2(size * (REAL)-0.5), spread(exp2(own[LOG_MEAN] * -0.5))};
        const vec seen[3] = {g, of[SCALE_1] * m1, of[SCALE_2] * m2};
        alive[v] = (vec)((square > 0) & (ivec)spread(1));
        for (int k = 0; k < 6; k++) store(net->signal + k * BLOCK + at, clamp(seen[k % 3] * over[k / 3], five));
        vec ratio = (size - own[LOG_MEAN]) * (REAL)(0.69314718055994530942 / 4);
        store(net->signal + 6 * BLOCK + at, clamp(ratio, five));
        store(net->signal + 7 * BLOCK + at, clamp(z * own[ENTRY], five));
    }
    if (with_net) units(net);
    for (int v = 0; v < VECS; v++) {
        const int at = v * LANES;
        vec u = bracket[v], z = iterate[v];
        if (with_net) u += alive[v] * read_out(net, v);
        z -= own[RATE] * u;
        vec average = load_any(x[AVERAGE] + at);
        average += of[SHARE] * (z - average);
        store_any(x[NEW_AVERAGE] + at, average);
        store_any(x[NEW_PARAM] + at, z + blend * (average - z));
    }
}

/* Takes the steps; returns 0, or 1 where memory is short. `rows` (lanes, all rows) and `columns` (lanes, all columns)
 * have the factors of matrices, NULL for none; weights begin at data[weights_at], (rows, inputs) the first. */
int move(long first, long last, const Cut *cut, const Lanes *lanes, const REAL *lane_numbers,
         const REAL *tensor_numbers, const REAL *rows, const REAL *columns, long num_rows, long num_columns, int kind,
         int num_units, int inputs) {
    const int states = KINDS * cut->num_tensors;
    const long n = cut->num_coordinates;
    REAL *padded = aligned(KINDS * BLOCK), *factor = aligned(BLOCK);
    long packed = -1;
    Net net;
    const int failed = !reserve(&net, kind, num_units) || !padded || !factor;
    for (long unit = first; !failed && unit < last; unit++) {
        const long lane = unit / cut->num_pieces;
        const Piece own = piece(cut, unit % cut->num_pieces);
        const REAL *of = lane_numbers + lane * LANE_NUMBERS;
        const REAL *numbers = tensor_numbers + (lane * cut->num_tensors + own.tensor) * TENSOR_NUMBERS;
        REAL *x[KINDS], *state[4] = {0}, *at[KINDS];
        tensors(lanes, lane, cut->num_tensors, own.tensor, x);
        for (int k = 0; kind == LSTM && k < 4; k++) state[k] = of_lane(lanes, lane, states + k) + own.start;
        if (kind && lane != packed) pack(&net, lanes, lane, states + 4, inputs);
        packed = lane;
        for (long from = own.first; from < own.last; from += BLOCK) {
            const int count = own.last - from < BLOCK ? own.last - from : BLOCK;
            for (int k = 0; k < KINDS; k++) at[k] = x[k] ? x[k] + from : NULL;
            for (int k = 0; count < BLOCK && k < KINDS; k++) {
                if (!x[k]) continue;
                if (k < NEW_PARAM) take(padded + k * BLOCK, at[k], 1, 0, count);
                at[k] = padded + k * BLOCK;
            }
            if (rows && own.matrix) {
                const REAL *of_rows = rows + lane * num_rows + own.row_at;
                const REAL *of_columns = columns + lane * num_columns + own.column_at;
                EACH_ROW(&own, from, count)
                    for (long j = 0; j < n; j++) factor[i + j] = of_rows[r] * of_columns[c + j];
            }
            if (kind == LSTM) {
                take(net.signal + ROWS * BLOCK, state[0] + from, num_units, n, count);
                take(net.cell, state[1] + from, num_units, n, count);
            }
            const REAL *factors = rows && own.matrix ? factor : NULL;
            if (kind)
                block(of, numbers, at, factors, &net, 1);
            else
                block(of, numbers, at, factors, NULL, 0);
            if (kind == LSTM) {
                put(state[2] + from, net.shown, num_units, n, count);
                put(state[3] + from, net.cell, num_units, n, count);
            }
            for (int k = NEW_PARAM; count < BLOCK && k < KINDS; k++) memcpy(x[k] + from, at[k], count * sizeof(REAL));
        }
    }
    release(&net);
    free(padded);
    free(factor);
    return failed;
}
