/* What stands between the two passes of normalised_kernel.c, which includes this after its numbers and its Cut. */
/* What they are made of: constants of a lane, and of a tensor. */
#define KNOTS 7
enum { OF_KEEP, OF_LOG_KEEP = 3, OF_MIX = 6, OF_ALONG = 9, OF_POWER = 12, OF_BLEND, OF_SCHEDULE,
       LANE_CONSTANTS = OF_SCHEDULE + KNOTS };
enum { OF_SELF, OF_RELATIVE, OF_LEAST, OF_EXPONENT, OF_OUTER, OF_ENTRIES, OF_RATE, OF_NUMBERS,
       TENSOR_CONSTANTS = OF_NUMBERS + 4 };
#define TINY 1e-20
#define ENTRY_FLOOR 1e-3

/* The numbers of lanes that have taken `steps` so far, for the n-th step: 1 - keep^n, in a form that loses no digits
 * where keep is close to 1, and (1 + power) / (n + power). */
void begin(long num_lanes, const REAL *constants, const REAL *steps, REAL *found) {
    for (long lane = 0; lane < num_lanes; lane++, constants += LANE_CONSTANTS, found += LANE_NUMBERS) {
        const double n = (double)steps[lane] + 1;
        for (int i = 0; i < 3; i++) {
            found[KEEP_1 + i] = constants[OF_KEEP + i];
            found[SCALE_1 + i] = -1 / expm1(n * constants[OF_LOG_KEEP + i]);
            found[MIX_0 + i] = constants[OF_MIX + i];
            found[ALONG_0 + i] = constants[OF_ALONG + i];
        }
        found[SHARE] = (1 + (double)constants[OF_POWER]) / (n + constants[OF_POWER]);
        found[BLEND] = constants[OF_BLEND];
    }
}

/* `values` at `knots`, linearly at `progress`. */
static double schedule(const REAL *values, const double *knots, double progress) {
    double found = values[0];
    for (int i = 0; i + 1 < KNOTS; i++) {
        const double ahead = (progress - knots[i]) / (knots[i + 1] - knots[i]);
        const double part = ahead < 0 ? 0 : ahead > 1 ? 1 : ahead; /* NaN stays */
        found += part * ((double)values[i + 1] - values[i]);
    }
    return found;
}

/* (scale x + floor)^exponent of n numbers, over x. */
static void powers(REAL *x, long n, double scale, double floor, double exponent) {
    for (long i = 0; i < n; i += LANES) {
        const int count = n - i < LANES ? n - i : LANES;
        vec at = spread(1);
        memcpy(&at, x + i, count * sizeof(REAL));
        at = power_of_2((REAL)exponent * log2_(at * (REAL)scale + (REAL)floor));
        memcpy(x + i, &at, count * sizeof(REAL));
    }
}

/* What stands between the two passes. With the sums over a tensor, m the mean of its corrected v, q that of z^2:
 *
 *     floor = relative m + least,    base = m + self m + 1e-20,    factor = weight base^exponent
 *     rate = exp(own + schedule(progress) + entries (ln(q + 1e-6) / 2 + 2.5))
 *
 * and of rows and columns, of whose v the mean is r, (r + floor)^outer. `found` has the sums of all pieces, `rows`
 * (lanes, all rows) and `sums` (lanes, the columns of all pieces) those that `sums` found, NULL for none; `rows` and
 * `columns` get the factors. */
void numbers(long num_lanes, const Cut *cut, const REAL *lane_constants, const double *knots, const REAL *progress,
             const REAL *constants, const REAL *lane_numbers, const REAL *found, REAL *tensor_numbers, REAL *rows,
             const REAL *sums, REAL *columns, long num_rows, long num_sums, long num_columns) {
    for (long lane = 0; lane < num_lanes; lane++) {
        const double rate = schedule(lane_constants + lane * LANE_CONSTANTS + OF_SCHEDULE, knots, progress[lane]);
        const double scale = lane_numbers[lane * LANE_NUMBERS + SCALE_V];
        REAL *to_columns = columns + lane * num_columns;
        if (rows) memset(to_columns, 0, num_columns * sizeof(REAL));
        long next = 0; /* the first piece of the tensor */
        for (long tensor = 0; tensor < cut->num_tensors; tensor++) {
            const REAL *of = constants + (lane * cut->num_tensors + tensor) * TENSOR_CONSTANTS;
            const long *shape = cut->shapes + 5 * tensor;
            const long end = tensor + 1 < cut->num_tensors ? shape[5 + 4] : cut->num_coordinates;
            const double numel = end - shape[4];
            double square = 0, iterate = 0;
            for (; next < cut->num_pieces && cut->pieces[4 * next] == tensor; next++) {
                const Piece own = piece(cut, next);
                square += found[2 * (lane * cut->num_pieces + next)];
                iterate += found[2 * (lane * cut->num_pieces + next) + 1];
                const REAL *from = sums + lane * num_sums + own.sums_at;
                for (long j = 0; rows && own.matrix && j < own.columns; j++) to_columns[own.column_at + j] += from[j];
            }
            const double mean = square * scale / numel, floor = of[OF_RELATIVE] * mean + of[OF_LEAST];
            const double base = mean + of[OF_SELF] * mean + TINY, entry = iterate / numel + ENTRY_FLOOR * ENTRY_FLOOR;
            REAL *to = tensor_numbers + (lane * cut->num_tensors + tensor) * TENSOR_NUMBERS;
            to[FLOOR] = floor;
            to[POWER] = of[OF_NUMBERS];
            to[FACTOR] = of[OF_NUMBERS + 1] * pow(base, of[OF_EXPONENT]);
            to[DECAY] = of[OF_NUMBERS + 2];
            to[RATE] = exp(of[OF_RATE] + rate + of[OF_ENTRIES] * (log(entry) / 2 + 2.5));
            to[ALONG] = of[OF_NUMBERS + 3];
            to[LOG_MEAN] = log2(base);
            to[ENTRY] = 1 / sqrt(entry);
            if (!rows || !shape[0] || numel == 0) continue;
            const long width = shape[1], height = numel / width;
            powers(rows + lane * num_rows + shape[2], height, scale / width, floor, of[OF_OUTER]);
            powers(to_columns + shape[3], width, scale / height, floor, of[OF_OUTER]);
        }
    }
}
