/* One step of the rule small-mlp, for all tensors of many lanes; a lane is one particle with weights of its own.
 *
 * Two passes over a tensor. The first finds the mean squares of its features: gradient, parameter, and the averages as
 * they will be. The second computes the averages again, from memory that is by then in the cache, writes them, and runs
 * the network on BLOCK coordinates at a time. The features' norms are folded into the first layer's weights, the clocks
 * into its bias. The second pass is bound by arithmetic, so the first one's memory for the next lane is fetched
 * meanwhile: with all lanes' memories larger than the cache, that saves a quarter of the time. Compiled once with
 * REAL=float, once with REAL=double.
 *
 * `data` has the tensors, as lanes.h says; within a lane every one is contiguous. In this order: step (), weight (units,
 * inputs) and bias (units,) of each layer, all gradients, all parameters, all averages (num_decays, *shape); then what
 * is written: new step, parameters, averages.
 * `constants` has step_scale, exp_scale, eps, the decays, the clocks' scales. A call does the lanes from `first` to
 * `last`, so that threads may share the work, and returns 0, or 1 where memory is short.
 */
#include <math.h>

#include "vectors.h"
#include "lanes.h"

#define VECS 8
#define BLOCK (VECS * LANES)
#define CHUNK 4096 /* coordinates whose squares are summed before the sum joins a double */

typedef struct {
    int num_decays, num_layers, num_clocks;
    const int *widths; /* inputs, clocks included, then the units of each layer */
    REAL step_scale, exp_scale, eps;
    const REAL *decays, *scales;
} Rule;

/* One tensor of one lane. */
typedef struct {
    const REAL *grad, *param, *averages;
    REAL *new_param, *new_averages;
} Tensor;

/* What a thread computes in. Units go in pairs, [pairs][inputs][2]; an odd one's partner has zero weights. */
typedef struct {
    REAL **weights, **biases; /* of each layer; the first one's without the features' norms */
    REAL *normed;             /* the first layer's weights for one tensor */
    REAL *signal, *other;     /* [rows][BLOCK] */
} Work;

/* The sum of squares of x or, with `averaged`, of keep * x + (1 - keep) * grad. */
INLINE double squares(const REAL *x, const REAL *grad, REAL keep, long n, const int averaged) {
    double sum = 0;
    const REAL take = 1 - keep;
    for (long start = 0; start < n; start += CHUNK) {
        long end = n - start < CHUNK ? n : start + CHUNK, i = start;
        vec acc[4] = {{0}};
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int v = 0; v < 4; v++) {
                vec now = load_any(x + i + v * LANES);
                if (averaged) now = keep * now + take * load_any(grad + i + v * LANES);
                acc[v] += now * now;
            }
        REAL rest = 0;
        for (; i < end; i++) {
            REAL now = averaged ? keep * x[i] + take * grad[i] : x[i];
            rest += now * now;
        }
        sum += total((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest;
    }
    return sum;
}

static double squares_of(const REAL *x, long n) { return squares(x, x, 0, n, 0); }
static double squares_of_average(const REAL *x, const REAL *grad, REAL keep, long n) {
    return squares(x, grad, keep, n, 1);
}

/* to[units][BLOCK] = weight * from[inputs][BLOCK] + bias, and its positive part where `positive`. */
static void layer(const REAL *weight, const REAL *bias, int inputs, int units, const REAL *from, REAL *to, int positive) {
    for (int j = 0; j < units; j += 2, weight += 2 * inputs) {
        vec acc[2][VECS];
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < VECS; v++) acc[r][v] = spread(bias[j + r]);
        for (int k = 0; k < inputs; k++)
            for (int v = 0; v < VECS; v++) {
                vec along = load(from + k * BLOCK + v * LANES);
                KEEP(along);
                for (int r = 0; r < 2; r++) acc[r][v] += weight[2 * k + r] * along;
            }
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < VECS; v++) {
                vec x = acc[r][v];
                if (positive) x = (vec)((ivec)x & ~(ivec)(x <= 0)); /* NaN stays NaN */
                store(to + (j + r) * BLOCK + v * LANES, x);
            }
    }
}

static void pairs(const REAL *weight, int inputs, int used, int units, REAL *to) {
    for (int j = 0; j < units; j++)
        for (int k = 0; k < used; k++) to[(long)(j / 2) * 2 * used + 2 * k + j % 2] = weight[(long)j * inputs + k];
}

/* Packs a lane's weights; the clocks, which are the same for all coordinates, join the first layer's bias. */
static void pack(const Rule *rule, Work *work, REAL step, const REAL *const *theta) {
    for (int l = 0; l < rule->num_layers; l++) {
        const int inputs = rule->widths[l], units = rule->widths[l + 1], used = l ? inputs : inputs - rule->num_clocks;
        pairs(theta[2 * l], inputs, used, units, work->weights[l]);
        memcpy(work->biases[l], theta[2 * l + 1], units * sizeof(REAL));
    }
    const int inputs = rule->widths[0], features = inputs - rule->num_clocks;
    for (int c = 0; c < rule->num_clocks; c++) {
        REAL clock = tanh(step / rule->scales[c] - 1);
        for (int j = 0; j < rule->widths[1]; j++) work->biases[0][j] += theta[0][j * inputs + features + c] * clock;
    }
}

/* Asks for a block of what `next` reads, and for the block after this one of what is written. */
INLINE void fetch(int num_decays, long n, const Tensor *now, const Tensor *next, long at) {
    for (int v = 0; v < VECS; v++) {
        const long i = at + v * LANES;
        __builtin_prefetch(now->new_param + i + BLOCK, 1);
        for (int d = 0; d < num_decays; d++) __builtin_prefetch(now->new_averages + d * n + i + BLOCK, 1);
        if (!next) continue;
        __builtin_prefetch(next->grad + i, 0, 2);
        __builtin_prefetch(next->param + i, 0, 2);
        for (int d = 0; d < num_decays; d++) __builtin_prefetch(next->averages + d * n + i, 0, 2);
    }
}

/* The second pass over `count` coordinates from `at` on, at most BLOCK, and exactly that many where `whole`. */
INLINE void block(const Rule *rule, Work *work, long n, const Tensor *x, long at, int count, const int whole) {
    REAL *signal = work->signal;
    const REAL *param = x->param + at, *grad = x->grad + at;
    if (!whole) {
        memset(signal, 0, 2 * BLOCK * sizeof(REAL));
        memcpy(signal, grad, count * sizeof(REAL));
        memcpy(signal + BLOCK, param, count * sizeof(REAL));
    }
    for (int v = 0; whole && v < VECS; v++) {
        store(signal + v * LANES, load_any(grad + v * LANES));
        store(signal + BLOCK + v * LANES, load_any(param + v * LANES));
    }
    for (int d = 0; d < rule->num_decays; d++) {
        const REAL keep = rule->decays[d], take = 1 - keep, *old = x->averages + d * n + at;
        REAL *row = signal + (2 + d) * BLOCK, *new = x->new_averages + d * n + at;
        if (!whole) {
            memset(row, 0, BLOCK * sizeof(REAL));
            memcpy(row, old, count * sizeof(REAL));
        }
        for (int v = 0; v < VECS; v++) {
            vec before = whole ? load_any(old + v * LANES) : load(row + v * LANES);
            vec now = keep * before + take * load(signal + v * LANES);
            store(row + v * LANES, now);
            if (whole) store_any(new + v * LANES, now);
        }
        if (!whole) memcpy(new, row, count * sizeof(REAL));
    }
    REAL *from = signal, *to = work->other, *last = NULL;
    for (int l = 0; l < rule->num_layers; l++) {
        const int inputs = l ? rule->widths[l] : rule->widths[0] - rule->num_clocks;
        layer(l ? work->weights[l] : work->normed, work->biases[l], inputs, rule->widths[l + 1], from, to,
              l + 1 < rule->num_layers);
        last = to, to = from, from = last;
    }
    for (int v = 0; v < VECS; v++) {
        vec direction = load(last + v * LANES), magnitude = load(last + BLOCK + v * LANES);
        store(last + v * LANES, -rule->step_scale * direction * exp_(rule->exp_scale * magnitude));
    }
    REAL *new = x->new_param + at;
    for (int v = 0; whole && v < VECS; v++)
        store_any(new + v * LANES, load_any(param + v * LANES) + load(last + v * LANES));
    for (int i = 0; !whole && i < count; i++) new[i] = param[i] + last[i];
}

/* Both passes over a tensor; `next` is the same one of the next lane, or NULL. */
static void tensor(const Rule *rule, Work *work, long n, const Tensor *x, const Tensor *next) {
    const int features = rule->widths[0] - rule->num_clocks, units = rule->widths[1];
    for (int k = 0; k < features; k++) {
        double sum = k > 1 ? squares_of_average(x->averages + (k - 2) * n, x->grad, rule->decays[k - 2], n)
                           : squares_of(k ? x->param : x->grad, n);
        REAL factor = 1 / sqrt(sum / n + rule->eps);
        for (int j = 0; j < ROUND_UP(units, 2); j++) {
            long at = (long)(j / 2) * 2 * features + 2 * k + j % 2;
            work->normed[at] = work->weights[0][at] * factor;
        }
    }
    long i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        fetch(rule->num_decays, n, x, next, i);
        block(rule, work, n, x, i, BLOCK, 1);
    }
    if (i < n) block(rule, work, n, x, i, n - i, 0);
}

static void release(const Rule *rule, Work *work) {
    for (int l = 0; l < rule->num_layers; l++) {
        if (work->weights) free(work->weights[l]);
        if (work->biases) free(work->biases[l]);
    }
    free(work->weights);
    free(work->biases);
    free(work->normed);
    free(work->signal);
    free(work->other);
}

static int reserve(const Rule *rule, Work *work) {
    int widest = rule->widths[0];
    *work = (Work){.weights = calloc(rule->num_layers, sizeof(REAL *)), .biases = calloc(rule->num_layers, sizeof(REAL *))};
    if (!work->weights || !work->biases) return 0;
    for (int l = 0; l < rule->num_layers; l++) {
        const int units = ROUND_UP(rule->widths[l + 1], 2);
        widest = units > widest ? units : widest;
        work->weights[l] = aligned((size_t)units * rule->widths[l]);
        work->biases[l] = aligned(units);
        if (!work->weights[l] || !work->biases[l]) return 0;
    }
    work->normed = aligned((size_t)ROUND_UP(rule->widths[1], 2) * rule->widths[0]);
    work->signal = aligned((size_t)widest * BLOCK);
    work->other = aligned((size_t)widest * BLOCK);
    return work->normed && work->signal && work->other;
}

int step(long first, long last, int num_dims, const long *sizes, REAL *const *data, const long *strides,
         int num_tensors, const long *numels, int num_decays, int num_layers, const int *widths, int num_clocks,
         const REAL *constants) {
    const Rule rule = {num_decays,   num_layers,   num_clocks,    widths,       constants[0],
                       constants[1], constants[2], constants + 3, constants + 3 + num_decays};
    const int grads = 1 + 2 * num_layers, new = grads + 3 * num_tensors;
    const REAL **theta = malloc(2 * num_layers * sizeof(REAL *));
    Work work;
    int failed = !reserve(&rule, &work) || !theta;
const Lanes lanes = {num_dims, sizes, data, strides};
#define OF(lane, which) of_lane(&lanes, lane, which)
    for (long lane = first; !failed && lane < last; lane++) {
        const REAL count = *OF(lane, 0);
        for (int i = 0; i < 2 * num_layers; i++) theta[i] = OF(lane, 1 + i);
        pack(&rule, &work, count, theta);
        *OF(lane, new) = count + 1;
        for (int i = 0; i < num_tensors; i++) {
            Tensor both[2];
            for (int ahead = 0; ahead < 2 && lane + ahead < last; ahead++)
                both[ahead] = (Tensor){OF(lane + ahead, grads + i), OF(lane + ahead, grads + num_tensors + i),
                                       OF(lane + ahead, grads + 2 * num_tensors + i), OF(lane + ahead, new + 1 + i),
                                       OF(lane + ahead, new + 1 + num_tensors + i)};
            tensor(&rule, &work, numels[i], both, lane + 1 < last ? both + 1 : NULL);
        }
    }
    free(theta);
    release(&rule, &work);
    return failed;
}
