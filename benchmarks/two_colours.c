/* One rollout of every agent on the two-colours grid: what two_colours_agent._play does in NumPy, agent by agent.
 * REAL is the type of the networks. Rows of weights whose unit is off are skipped. */

#define SIZE 5
#define CELLS (SIZE * SIZE)
#define ACTIONS 4
#define FEATURES (3 * 2 * SIZE)

static long moved(long cell, long action) {
    long row = cell / SIZE, column = cell % SIZE;
    if (action == 0) row -= row > 0;
    if (action == 1) row += row < SIZE - 1;
    if (action == 2) column -= column > 0;
    if (action == 3) column += column < SIZE - 1;
    return row * SIZE + column;
}

static long free_cell(long one, long other, double uniform) {
    long found = (long)(uniform * (CELLS - 2));
    found += found >= (one < other ? one : other);
    return found + (found >= (one < other ? other : one));
}

static void add_row(REAL *restrict sum, const REAL *restrict row, REAL factor, long n) {
    for (long j = 0; j < n; j++) sum[j] += factor * row[j];
}

/* cells (agents, length + 1, 3) with the first filled in; actions, rewards (agents, length); gumbel (length, agents,
 * ACTIONS); uniform (length, agents); parameters hold weight and bias of three layers; units is room for 2 * hidden. */
void play(long agents, long length, long hidden, long num_steps, long swap_every, const REAL *const *parameters,
          const double *gumbel, const double *uniform, REAL *units, long *cells, long *actions, double *rewards) {
    REAL *first = units, *second = units + hidden;
    for (long a = 0; a < agents; a++) {
        const REAL *w0 = parameters[0] + a * FEATURES * hidden, *b0 = parameters[1] + a * hidden;
        const REAL *w1 = parameters[2] + a * hidden * hidden, *b1 = parameters[3] + a * hidden;
        const REAL *w2 = parameters[4] + a * hidden * ACTIONS, *b2 = parameters[5] + a * ACTIONS;
        for (long t = 0; t < length; t++) {
            long *now = cells + (a * (length + 1) + t) * 3, *next = now + 3, best = 0;
            REAL logits[ACTIONS];
            for (long j = 0; j < hidden; j++) first[j] = b0[j], second[j] = b1[j];
            for (long k = 0; k < 3; k++) {
                add_row(first, w0 + (2 * k * SIZE + now[k] / SIZE) * hidden, 1, hidden);
                add_row(first, w0 + ((2 * k + 1) * SIZE + now[k] % SIZE) * hidden, 1, hidden);
            }
            for (long i = 0; i < hidden; i++)
                if (first[i] > 0) add_row(second, w1 + i * hidden, first[i], hidden);
            for (long c = 0; c < ACTIONS; c++) logits[c] = b2[c];
            for (long i = 0; i < hidden; i++)
                if (second[i] > 0) add_row(logits, w2 + i * ACTIONS, second[i], ACTIONS);
            const double *noise = gumbel + (t * agents + a) * ACTIONS;
            for (long c = 1; c < ACTIONS; c++)
                if (logits[c] + noise[c] > logits[best] + noise[best]) best = c;
            actions[a * length + t] = best;
            next[0] = moved(now[0], best), next[1] = now[1], next[2] = now[2];
            double sign = ((num_steps + t) / swap_every) % 2 ? -1 : 1, reward = -0.04;
            for (long k = 1; k < 3; k++)
                if (next[k] == next[0]) {
                    reward = k == 1 ? sign : -sign;
                    next[k] = free_cell(next[0], now[3 - k], uniform[t * agents + a]);
                    break; /* two objects are never on one cell */
                }
            rewards[a * length + t] = reward;
        }
    }
}
