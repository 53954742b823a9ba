/* Newton-Schulz orthogonalisation of small matrices, for which a library's products cost more in calls than in
 * arithmetic. See bases/newton_schulz.py for what it is.
 *
 * All that multiplies X, its smaller side in rows, is a polynomial in A = X X^T, so that only A and the last product
 * have the longer side in them:
 *
 *     A = X X^T / |X|^2,    num_steps times: P = a + b A + c A^2, Q <- P Q, A <- P A P,    X <- Q X / rms(Q X)
 *
 * with |Q X|^2 = trace A. A is in doubles for floats too: Q multiplies the smallest singular values by up to 3.4 a
 * step, and so the rounding of A, in which they are squared, by up to 12. Compiled once with REAL=float, once with
 * REAL=double.
 */
#include <math.h>

#include "vectors.h"
#include "blocks.h"

#define WIDE 8 /* doubles in a vector */

typedef double wide __attribute__((vector_size(64)));

INLINE double total_wide(wide x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

/* The largest absolute value; NaN is passed over. */
static REAL largest_of(const REAL *x, long n) {
    vec most[4] = {{0}};
    REAL largest = 0;
    long i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int v = 0; v < 4; v++) {
            const vec at = load_any(x + i + v * LANES);
            const ivec negative = at < 0, size = (negative & (ivec)-at) | (~negative & (ivec)at);
            const ivec more = most[v] < (vec)size;
            most[v] = (vec)((more & size) | (~more & (ivec)most[v]));
        }
    for (; i < n; i++) largest = largest < fabs(x[i]) ? fabs(x[i]) : largest;
    for (int v = 0; v < 4; v++)
        for (int k = 0; k < LANES; k++) largest = largest < most[v][k] ? most[v][k] : largest;
    return largest;
}

/* Matrices of one shape, one after the other. */
typedef struct {
    REAL *data;
    long count, rows, columns;
} Group;

/* What is made for a group: X in panels [panel][size][BLOCK] of its columns, or of its rows if it is tall, zeros where
 * there are none; the same in doubles; Q, [size / 4][side][4]; symmetric matrices [size][stride]. */
typedef struct {
    int side, size, stride, tall; /* the smaller side; that, rounded up; more, lest rows fall into one set of a cache */
    long length, num_panels;
    REAL *panels, *turned;
    double *doubles, *a, *p, *q, *other;
} Work;

static double *doubles(size_t count) { return (double *)aligned(count * (sizeof(double) / sizeof(REAL))); }

static int reserve(Work *work, const Group *of) {
    const int tall = of->rows > of->columns, side = tall ? of->columns : of->rows, size = ROUND_UP(side, 8);
    const long length = tall ? of->rows : of->columns, num_panels = ROUND_UP(length, BLOCK) / BLOCK;
    *work = (Work){.side = side, .size = size, .stride = size + WIDE, .tall = tall};
    work->length = length, work->num_panels = num_panels;
    work->panels = aligned((size_t)size * num_panels * BLOCK);
    work->turned = aligned((size_t)size * side);
    work->doubles = sizeof(REAL) == 4 ? doubles((size_t)size * num_panels * BLOCK) : (double *)work->panels;
    const int square = size * work->stride;
    work->a = doubles((size_t)4 * square);
    work->p = work->a + square, work->q = work->p + square, work->other = work->q + square;
    return work->panels && work->turned && work->doubles && work->a;
}

static void release(Work *work) {
    if (sizeof(REAL) == 4) free(work->doubles);
    free(work->panels);
    free(work->turned);
    free(work->a);
}

/* X, times `scale`, into the panels; their rows past X stay 0. */
static void spread_out(const Work *work, const REAL *x, REAL scale) {
    REAL *panel = work->panels;
    for (long from = 0; from < work->length; from += BLOCK, panel += work->size * BLOCK) {
        const int count = work->length - from < BLOCK ? work->length - from : BLOCK;
        if (!work->tall)
            take(panel, x + from, work->side, work->length, count);
        else
            for (int r = 0; r < work->side; r++)
                for (int j = 0; j < BLOCK; j++) panel[r * BLOCK + j] = j < count ? x[(from + j) * work->side + r] : 0;
        double *wide_panel = work->doubles + (panel - work->panels);
        for (int i = 0; i < work->side * BLOCK; i++) {
            panel[i] *= scale;
            wide_panel[i] = panel[i];
        }
    }
}

/* A = X X^T. */
static void gram(const Work *work) {
    const int size = work->size, stride = work->stride;
    memset(work->a, 0, (size_t)4 * size * stride * sizeof(double)); /* a NaN of the last matrix between the rows, too */
    for (int i = 0; i < size; i += 4)
        for (int j = 0; j <= i; j += 4) {
            wide acc[4][4] = {{{0}}};
            for (long panel = 0; panel < work->num_panels; panel++) {
                const double *own = work->doubles + panel * size * BLOCK, *x = own + i * BLOCK, *y = own + j * BLOCK;
                for (int k = 0; k < BLOCK; k += WIDE)
                    for (int r = 0; r < 4; r++)
                        for (int s = 0; s < 4; s++)
                            acc[r][s] += *(const wide *)(x + r * BLOCK + k) * *(const wide *)(y + s * BLOCK + k);
            }
            for (int r = 0; r < 4; r++)
                for (int s = 0; s < 4; s++)
                    work->a[(i + r) * stride + j + s] = work->a[(j + s) * stride + i + r] = total_wide(acc[r][s]);
        }
}

/* x y of symmetric matrices that commute, so that it is symmetric as well: one half is the other. */
static void product(double *restrict to, const double *x, const double *y, int size, int stride) {
    for (int i = 0; i < size; i += 8)
        for (int j = 0; j <= i; j += WIDE) {
            wide acc[8] = {{0}};
            for (int k = 0; k < size; k++) {
                const wide row = *(const wide *)(y + k * stride + j);
                for (int r = 0; r < 8; r++) acc[r] += x[k * stride + i + r] * row;
            }
            for (int r = 0; r < 8; r++) *(wide *)(to + (i + r) * stride + j) = acc[r];
            for (int s = 0; s < WIDE; s++)
                for (int r = 0; r < 8; r++) to[(j + s) * stride + i + r] = to[(i + r) * stride + j + s];
        }
}

static double inner(const double *x, const double *y, int n) {
    wide acc = {0};
    for (int i = 0; i < n; i += WIDE) acc += *(const wide *)(x + i) * *(const wide *)(y + i);
    return total_wide(acc);
}

/* Q such that Q X has the root mean square 1, from the Gram matrix of X, whatever its norm. */
static void iterate(const Work *work, int num_steps, const double *coefficients) {
    double *a = work->a, *p = work->p, *q = work->q, *other = work->other, *swap;
    const int size = work->size, stride = work->stride, all = size * stride;
    double square = 0, last = 0;
    for (int i = 0; i < size; i++) square += a[i * stride + i];
    for (int i = 0; i < all; i++) a[i] /= square;
    for (int i = 0; i < size; i++) q[i * stride + i] = 1;
    for (int step = 0; step < num_steps; step++) {
        product(p, a, a, size, stride);
        for (int i = 0; i < all; i++) p[i] = coefficients[1] * a[i] + coefficients[2] * p[i];
        for (int i = 0; i < size; i++) p[i * stride + i] += coefficients[0];
        if (step)
            product(other, p, q, size, stride);
        else
            memcpy(other, p, all * sizeof(double));
        swap = q, q = other, other = swap;
        product(other, p, a, size, stride);
        if (step + 1 == num_steps)
            last = inner(other, p, all); /* the trace of the next A */
        else
            product(a, p, other, size, stride);
    }
    if (!num_steps) last = 1;
    const double scale = sqrt(work->side * work->length / (square * last));
    for (int r = 0; r < size; r++)
        for (int k = 0; k < work->side; k++)
            work->turned[(r / 4 * work->side + k) * 4 + r % 4] = q[r * stride + k] * scale;
}

/* X <- Q X, of the panels. */
static void turn(const Work *work, REAL *x) {
    REAL rows[4 * BLOCK] __attribute__((aligned(64)));
    const REAL *panel = work->panels;
    for (long from = 0; from < work->length; from += BLOCK, panel += work->size * BLOCK) {
        const int count = work->length - from < BLOCK ? work->length - from : BLOCK;
        for (int i = 0; i < work->side; i += 4) {
            const int num_rows = work->side - i < 4 ? work->side - i : 4;
            vec acc[4][VECS] = {{{0}}};
            four_rows(work->turned + i * work->side, work->side, panel, acc);
            for (int g = 0; g < 4; g++)
                for (int v = 0; v < VECS; v++) store(rows + g * BLOCK + v * LANES, acc[g][v]);
            if (!work->tall)
                put(x + i * work->length + from, rows, num_rows, work->length, count);
            else
                for (int j = 0; j < count; j++)
                    for (int r = 0; r < num_rows; r++) x[(from + j) * work->side + i + r] = rows[r * BLOCK + j];
        }
    }
}

static void one(const Work *work, REAL *x, int num_steps, const double *coefficients) {
    const long numel = work->side * work->length;
    REAL largest = largest_of(x, numel), sum = 0;
    for (long i = 0; largest == 0 && i < numel; i++) sum += x[i];
    if (largest == 0 && sum == 0) return; /* zeros stay; NaN is everywhere afterwards */
    int exponent; /* a power of 2 rounds nothing; its bound is for subnormal numbers */
    frexp(largest, &exponent);
    const int bound = sizeof(REAL) == 4 ? -120 : -1000;
    spread_out(work, x, ldexp(1, -(exponent > bound ? exponent : bound)));
    gram(work);
    iterate(work, num_steps, coefficients);
    turn(work, x);
}

/* Orthogonalises those from `first` to `last` of all groups' matrices where they are; returns 0, or 1 where memory is
 * short. */
int orthogonalise(long first, long last, const Group *groups, int num_groups, int num_steps,
                  const double *coefficients) {
    int failed = 0;
    for (long g = 0, start = 0; !failed && g < num_groups; start += groups[g++].count) {
        const Group *of = groups + g;
        const long from = first > start ? first : start, to = last < start + of->count ? last : start + of->count;
        if (from >= to) continue;
        Work work;
        failed = !reserve(&work, of);
        for (long unit = from; !failed && unit < to; unit++)
            one(&work, of->data + (unit - start) * of->rows * of->columns, num_steps, coefficients);
        release(&work);
    }
    return failed;
}
