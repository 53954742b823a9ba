/* Newton-Schulz orthogonalisation of small matrices, whose smaller side is at most SMALL: where a library's products
 * cost more in calls than in arithmetic. See bases/newton_schulz.py for what it is.
 *
 * All that multiplies X, its smaller side in rows, is a polynomial in A = X X^T, so that only A and the last product have
 * the longer side in them:
 *
 *     A = X X^T / |X|^2,    num_steps times: P = a + b A + c A^2, Q <- P Q, A <- P A P,    X <- Q X / rms(Q X)
 *
 * with |Q X|^2 = trace A. A is in doubles for floats too: rounding of A counts as the square of what Q makes of the
 * smallest singular values. Compiled once with REAL=float, once with REAL=double.
 */
#include <math.h>

#include "vectors.h"
#include "blocks.h"

#define SMALL 64
#define WIDE 8 /* doubles in a vector */

typedef double wide __attribute__((vector_size(64)));
typedef REAL narrow __attribute__((vector_size(WIDE * sizeof(REAL))));
typedef double Square[SMALL * SMALL]; /* row after row, `size` apart */

INLINE wide load_wide(const REAL *at) { return __builtin_convertvector(*(const narrow *)at, wide); }
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
    for (int k = 0; k < 4 * LANES; k++) largest = largest < most[k / LANES][k % LANES] ? most[k / LANES][k % LANES] : largest;
    return largest;
}

/* Matrices of one shape, one after the other. */
typedef struct {
    REAL *data;
    long count, rows, columns;
} Group;

/* X in panels [panel][size][BLOCK] of its columns, zeros where there are none; or of its rows, if it is tall. */
static void spread_out(REAL *panels, const REAL *x, const Group *of, int side, int size, long length, REAL largest) {
    for (long from = 0; from < length; from += BLOCK, panels += (long)size * BLOCK) {
        const int count = length - from < BLOCK ? length - from : BLOCK;
        if (of->rows <= of->columns)
            take(panels, x + from, side, length, count);
        else
            for (int j = 0; j < BLOCK; j++)
                for (int r = 0; r < side; r++) panels[r * BLOCK + j] = j < count ? x[(from + j) * side + r] : 0;
        for (int i = 0; i < side * BLOCK; i++) panels[i] /= largest;
    }
}

static void gram(double *a, const REAL *panels, int size, long num_panels) {
    for (int i = 0; i < size; i += 4)
        for (int j = 0; j <= i; j += 4) {
            wide acc[4][4] = {{{0}}};
            for (long panel = 0; panel < num_panels; panel++) {
                const REAL *x = panels + (panel * size + i) * BLOCK, *y = panels + (panel * size + j) * BLOCK;
                for (int k = 0; k < BLOCK; k += WIDE) {
                    wide left[4], right[4];
                    for (int r = 0; r < 4; r++) left[r] = load_wide(x + r * BLOCK + k);
                    for (int r = 0; r < 4; r++) right[r] = load_wide(y + r * BLOCK + k);
                    for (int r = 0; r < 4; r++)
                        for (int s = 0; s < 4; s++) acc[r][s] += left[r] * right[s];
                }
            }
            for (int r = 0; r < 4; r++)
                for (int s = 0; s < 4; s++) a[(i + r) * size + j + s] = a[(j + s) * size + i + r] = total_wide(acc[r][s]);
        }
}

/* x y of symmetric x. */
static void product(double *restrict to, const double *x, const double *y, int size) {
    for (int i = 0; i < size; i += 8)
        for (int j = 0; j < size; j += WIDE) {
            wide acc[8] = {{0}};
            for (int k = 0; k < size; k++) {
                const wide row = *(const wide *)(y + k * size + j);
                for (int r = 0; r < 8; r++) acc[r] += x[k * size + i + r] * row;
            }
            for (int r = 0; r < 8; r++) *(wide *)(to + (i + r) * size + j) = acc[r];
        }
}

/* Q, over A, such that Q X has the root mean square 1 over `numel` entries; A is the Gram matrix, with no norm taken. */
static void iterate(double *a, int size, long numel, int num_steps, const double *coefficients) {
    Square p __attribute__((aligned(64))), q __attribute__((aligned(64))), other __attribute__((aligned(64)));
    const int all = size * size;
    double square = 0, last = 0;
    for (int i = 0; i < size; i++) square += a[i * size + i];
    for (int i = 0; i < all; i++) a[i] /= square;
    for (int i = 0; i < all; i++) q[i] = i % (size + 1) == 0;
    for (int step = 0; step < num_steps; step++) {
        product(p, a, a, size);
        for (int i = 0; i < all; i++) p[i] = coefficients[1] * a[i] + coefficients[2] * p[i];
        for (int i = 0; i < size; i++) p[i * size + i] += coefficients[0];
        product(other, p, q, size);
        memcpy(q, other, all * sizeof(double));
        product(other, p, a, size);
        product(a, p, other, size);
    }
    for (int i = 0; i < size; i++) last += a[i * size + i];
    for (int i = 0; i < all; i++) a[i] = q[i] * sqrt(numel / (square * last));
}

/* X <- Q X, of the panels. */
static void turn(REAL *x, const REAL *panels, const double *q, const Group *of, int side, int size, long length) {
    REAL weight[SMALL * SMALL], rows[4 * BLOCK] __attribute__((aligned(64)));
    for (int r = 0; r < size; r++)
        for (int k = 0; k < side; k++) weight[(r / 4 * side + k) * 4 + r % 4] = q[r * size + k];
    for (long from = 0; from < length; from += BLOCK, panels += (long)size * BLOCK) {
        const int count = length - from < BLOCK ? length - from : BLOCK;
        for (int i = 0; i < side; i += 4) {
            const int num_rows = side - i < 4 ? side - i : 4;
            vec acc[4][VECS] = {{{0}}};
            four_rows(weight + i * side, side, panels, acc);
            for (int g = 0; g < 4; g++)
                for (int v = 0; v < VECS; v++) store(rows + g * BLOCK + v * LANES, acc[g][v]);
            if (of->rows <= of->columns)
                put(x + i * length + from, rows, num_rows, length, count);
            else
                for (int r = 0; r < num_rows; r++)
                    for (int j = 0; j < count; j++) x[(from + j) * side + i + r] = rows[r * BLOCK + j];
        }
    }
}

/* Orthogonalises those from `first` to `last` of all groups' matrices where they are; returns 0, or 1 where memory is
 * short. The smaller side of each is from 1 to SMALL. */
int orthogonalise(long first, long last, const Group *groups, int num_groups, int num_steps, const double *coefficients) {
    Square a __attribute__((aligned(64)));
    long start = 0;
    for (int g = 0; g < num_groups; start += groups[g++].count) {
        const Group *of = groups + g;
        const int wide_one = of->rows <= of->columns, side = wide_one ? of->rows : of->columns;
        const int size = ROUND_UP(side, 8);
        const long length = wide_one ? of->columns : of->rows, numel = side * length;
        const long from = first > start ? first : start, to = last < start + of->count ? last : start + of->count;
        if (from >= to) continue;
        REAL *panels = aligned((size_t)size * ROUND_UP(length, BLOCK));
        if (!panels) return 1;
        for (long unit = from; unit < to; unit++) {
            REAL *x = of->data + (unit - start) * numel, largest = largest_of(x, numel);
            if (largest == 0) { /* zeros stay, NaN among them is everywhere afterwards */
                REAL sum = 0;
                for (long i = 0; i < numel; i++) sum += x[i];
                if (sum == 0) continue;
                largest = 1;
            }
            spread_out(panels, x, of, side, size, length, largest);
            gram(a, panels, size, ROUND_UP(length, BLOCK) / BLOCK);
            iterate(a, size, numel, num_steps, coefficients);
            turn(x, panels, a, of, side, size, length);
        }
        free(panels);
    }
    return 0;
}
