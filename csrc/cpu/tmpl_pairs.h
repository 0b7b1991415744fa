/* Products of pairs of rows: where a set has MULTIPLY_PAIRS(kind, acc, x, w), x and w hold half a
 * vector of each of two rows, and acc adds up the 2 x 2 products of these. HAS_PAIRS(kind): in which
 * kinds; PAIRS_IN_PLACE(kind): where W lies in place, too, since sums of floats have one order. */
#ifdef MULTIPLY_PAIRS

/* Sums of two rows of x (and two, and two ..) as the four by four of others: acc[2 p + q / 2] and its
 * neighbour are of rows 2 p, 2 p + 1 of x and of columns 4 (q / 2) .. */
INLINE v4 first_row_of(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
INLINE v4 second_row_of(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }

/* s[.][r]: as dot_panel, of eight rows of w, whose last four lie `next` bytes on */
INLINE void dot_pairs(v4 (*s)[XR], const char *x, const char *w, size_t next, int vectors,
                      enum glm_dtype kind)
{
    vf acc[XR / 2][4];
    (void)kind;
    for (int p = 0; p < XR / 2; p++)
        for (int q = 0; q < 4; q++)
            acc[p][q] = (vf){0};
    for (int k = 0; k < vectors; k++, x += XR * VB, w += 4 * VB)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vf xv[XR / 2];
            for (int p = 0; p < XR / 2; p++)
                xv[p] = load((const float *)(x + (2 * p + half) * VB));
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                const vf wv = load((const float *)(w + q / 2 * next + (q % 2 * 2 + half) * VB));
                for (int p = 0; p < XR / 2; p++)
                    acc[p][q] = MULTIPLY_PAIRS(kind, acc[p][q], xv[p], wv);
            }
        }
    for (int p = 0; p < XR / 2; p++)
        for (int q = 0; q < 4; q += 2) {
            s[q / 2][2 * p] = first_row_of(acc[p][q], acc[p][q + 1]);
            s[q / 2][2 * p + 1] = second_row_of(acc[p][q], acc[p][q + 1]);
        }
}

/* Vectors of two rows become the first halves of both, the second halves of both. */
INLINE void join_pair(vf *a, vf *b, int chunk)
{
    for (int j = 0; j < chunk; j++) {
        const vf first = __builtin_shufflevector(a[j], b[j], 0, 1, 4, 5);
        b[j] = __builtin_shufflevector(a[j], b[j], 2, 3, 6, 7);
        a[j] = first;
    }
}

/* As add_chunk, of columns c and c + 1: acc[r / 2 * (C / 2) + c / 2]. first, second: joined. */
INLINE void add_pair(vf *acc, int R, int C, int c, const char *x, const vf *first, const vf *second,
                     const float *scale, const float *next_scale, int g, enum glm_dtype kind,
                     int chunk)
{
    (void)kind;
#pragma GCC unroll 4
    for (int p = 0; p < (R + 1) / 2; p++) {
        vf *to = acc + p * (C / 2) + c / 2, sum = scale ? (vf){0} : *to;
#pragma GCC unroll 4
        for (int j = 0; j < chunk; j++) {
            vf low, high;
            if (R == 1) { /* beside itself */
                const vf both = load((const float *)(x + j * VB));
                low = __builtin_shufflevector(both, both, 0, 1, 0, 1);
                high = __builtin_shufflevector(both, both, 2, 3, 2, 3);
            } else {
                low = load((const float *)(x + (j * R + 2 * p) * VB));
                high = load((const float *)(x + (j * R + 2 * p + 1) * VB));
            }
            sum = MULTIPLY_PAIRS(kind, sum, low, first[j]);
            sum = MULTIPLY_PAIRS(kind, sum, high, second[j]);
        }
        if (scale) {
            const vf lanes = {scale[g], next_scale[g], scale[g], next_scale[g]};
            sum = MADD(lanes, sum, *to);
        }
        *to = sum;
    }
}

/* As sum_lanes. */
INLINE void sum_pairs(v4 *s, const vf *acc, int R, int C)
{
#pragma GCC unroll 4
    for (int p = 0; p < (R + 1) / 2; p++)
#pragma GCC unroll 4
        for (int q = 0; q < C / 2; q += 2) {
            const vf a = acc[p * (C / 2) + q], b = acc[p * (C / 2) + q + 1];
            s[2 * p * C / 4 + q / 2] = first_row_of(a, b);
            if (R > 1)
                s[(2 * p + 1) * C / 4 + q / 2] = second_row_of(a, b);
        }
}
#endif

/* add_chunk where C rows of W are met one after the other: v[0] and v[1] hold an even and an odd one.
 * Where pairs are multiplied, that is done with the odd ones. They are kept as they are multiplied. */
INLINE void add_row_chunk(vf *acc, int R, int C, int c, const char *x, vf (*v)[4],
                          float (*scale)[RUN_GROUPS], int g, enum glm_dtype kind,
                          enum glm_dtype dtype, vf **kept)
{
    const int chunk = chunk_of(kind, dtype);
#ifdef MULTIPLY_PAIRS
    if (pairs_in_place(kind)) {
        if (c % 2 == 0)
            return;
        join_pair(v[0], v[1], chunk);
        for (int i = 0; kept && i < 2 * chunk; i++)
            *(*kept)++ = v[i / chunk][i % chunk];
        add_pair(acc, R, C, c - 1, x, v[0], v[1], scale ? scale[c - 1] : NULL,
                 scale ? scale[c] : NULL, g, kind, chunk);
        return;
    }
#endif
    for (int i = 0; kept && i < chunk; i++)
        *(*kept)++ = v[c % 2][i];
    add_chunk(acc, R, C, c, x, v[c % 2], scale ? scale[c] : NULL, g, kind, dtype);
}

/* The same of such a chunk that was kept. */
INLINE void add_kept_chunk(vf *acc, int R, int C, int c, const char *x, const vf *v,
                           float (*scale)[RUN_GROUPS], int g, enum glm_dtype kind,
                           enum glm_dtype dtype)
{
#ifdef MULTIPLY_PAIRS
    const int chunk = chunk_of(kind, dtype);
    if (pairs_in_place(kind)) {
        if (c % 2)
            add_pair(acc, R, C, c - 1, x, v - chunk, v, scale ? scale[c - 1] : NULL,
                     scale ? scale[c] : NULL, g, kind, chunk);
        return;
    }
#endif
    add_chunk(acc, R, C, c, x, v, scale ? scale[c] : NULL, g, kind, dtype);
}

INLINE void sum_rows(v4 *s, vf *acc, int R, int C, enum glm_dtype kind)
{
#ifdef MULTIPLY_PAIRS
    if (pairs_in_place(kind)) {
        sum_pairs(s, acc, R, C);
        return;
    }
#endif
    sum_lanes(s, acc, R * C, kind);
}
