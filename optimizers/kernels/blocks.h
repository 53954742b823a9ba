/* Layers of small networks on a block of coordinates, a SIMD lane of which is one. Include vectors.h before. */
#define VECS 4
#define BLOCK (VECS * LANES)

/* Four rows of a product: sum over k of w[k][0..3] * x[k][:], on top of what acc holds. */
INLINE void four_rows(const REAL *w, int num_k, const REAL *x, vec acc[4][VECS]) {
    for (int k = 0; k < num_k; k++, w += 4, x += BLOCK) {
        vec along[VECS];
        for (int v = 0; v < VECS; v++) {
            along[v] = load(x + v * LANES);
            KEEP(along[v]);
        }
        for (int g = 0; g < 4; g++)
            for (int v = 0; v < VECS; v++) acc[g][v] += w[g] * along[v];
    }
}

/* Between rows of BLOCK numbers and rows that lie `stride` apart; zeros past `count`. */
static void take(REAL *to, const REAL *from, int rows, long stride, int count) {
    for (int r = 0; r < rows; r++) {
        memcpy(to + r * BLOCK, from + r * stride, count * sizeof(REAL));
        if (count < BLOCK) memset(to + r * BLOCK + count, 0, (BLOCK - count) * sizeof(REAL));
    }
}

static void put(REAL *to, const REAL *from, int rows, long stride, int count) {
    for (int r = 0; r < rows; r++) memcpy(to + r * stride, from + r * BLOCK, count * sizeof(REAL));
}
