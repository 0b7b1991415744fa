/* linear_forward over few rows of x, which reads W where it lies, at the memory's speed: R rows of x
 * at a time with C rows of W. Where W is read for one group of rows of x, the C rows lie `apart`, a C-th
 * of a task's rows, so that each is followed by the next one of its part: memory answers C streams
 * that go on a tenth to a quarter faster than C rows that lie together, where all streams end with
 * the rows. The sums are those of tmpl_linear.h. */

/* Row c of the C that are multiplied with row o. Where W ends its last row repeats. */
INLINE int row_at(const struct glm_mat *w, int o, int c, int apart)
{
    return o + c * apart < w->rows ? o + c * apart : w->rows - 1;
}

/* acc[r][c] += products of a chunk of row r of x with the chunk v of row c of W */
INLINE void add_chunk(vf *acc, int R, int C, int c, const char *x, const vf *v, const float *scale,
                      int g, enum glm_dtype kind, enum glm_dtype dtype)
{
    const int chunk = chunk_of(kind, dtype);
#ifdef DOT_BF16
    if (scale && kind == GLM_BF16) { /* the integers are exact, their sums times the scale */
        const vf lanes = SCALES_TO_LANES(scale + g);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vf sum = {0};
#pragma GCC unroll 4
            for (int j = 0; j < chunk; j++)
                sum = multiply_add(kind, dtype, sum, load((const float *)(x + (j * R + r) * VB)),
                                   v[j]);
            acc[r * C + c] = MADD(lanes, sum, acc[r * C + c]);
        }
        return;
    }
#endif
    vf w[4];
#if REGISTERS == 16 /* of x again with each row of W: kept, it would take the sums' registers */
    __asm__("" : "+r"(x));
#endif
    for (int j = 0; j < chunk; j++)
        w[j] = scale ? v[j] * splat(scale[g]) : v[j];
#pragma GCC unroll 4
    for (int j = 0; j < chunk; j++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            acc[r * C + c] = multiply_add(kind, dtype, acc[r * C + c],
                                          load((const float *)(x + (j * R + r) * VB)), w[j]);
}

/* What comes after the loop over a run: the sums of lanes, four by four. */
INLINE void sum_lanes(v4 *s, vf *acc, int n, enum glm_dtype kind)
{
#pragma GCC unroll 8
    for (int i = n; i < (n + 3) / 4 * 4; i++)
        acc[i] = (vf){0};
#pragma GCC unroll 8
    for (int i = 0; i < n; i += 4)
        s[i / 4] = sums_of(kind, acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
}

#ifdef MULTIPLY_PAIRS
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

/* s[r * C + c] = dot product of row r of packed x with row_at(c) of W where it lies, columns k0 ..
 * k0 + K - 1. What follows in W, every turns-th row's here, and the next rows' scales are fetched into
 * the cache. With `keep` the converted run is left in `kept`, (vectors, C). */
INLINE void dot_rows(v4 *s, int R, int C, const char *x, const struct glm_mat *w,
                     enum glm_dtype kind, enum glm_dtype dtype, int grouped, int o, int apart,
                     int k0, int K, int keep, vf *kept, int turns)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const size_t ahead = keep ? C * stride : FOLLOWING, scales = grouped ? glm_scale_cols(w) : 0;
    const char *row[8];
    float scale[8][RUN_GROUPS];
    vf acc[24 + 8], v[2][4];
    int k = 0;
    for (int c = 0; c < C; c++) {
        const int at = row_at(w, o, c, apart);
        row[c] = (const char *)w->data + (size_t)at * stride + glm_bytes(dtype, (size_t)k0);
        if (grouped) {
            const uint16_t *from = w->scale + (size_t)at * scales;
            run_scales(scale[c], from, w->group, k0, K);
            __builtin_prefetch(from + (keep ? C : 1) * scales + k0 / w->group, 0, 2);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < R * C; i++)
        acc[i] = (vf){0};
    for (; k + width <= K; k += width, x += chunk * R * VB) {
        const size_t at = glm_bytes(dtype, (size_t)k);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_chunk(v[c % 2], row[c] + at, kind, dtype);
            if (c % turns == 0 && at % 64 == 0) /* a line once */
                __builtin_prefetch(row[c] + at + ahead, 0, 2);
            add_row_chunk(acc, R, C, c, x, v, grouped ? scale : NULL, k / 32, kind, dtype,
                          keep ? &kept : NULL);
        }
    }
    if (k < K)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_last(v[c % 2], row[c] + glm_bytes(dtype, (size_t)k), kind, dtype, K - k);
            add_row_chunk(acc, R, C, c, x, v, grouped ? scale : NULL, k / 32, kind, dtype,
                          keep ? &kept : NULL);
        }
    sum_rows(s, acc, R, C, kind);
}

/* The same of the run that dot_rows kept, for the group of rows of x that has this turn. */
INLINE void dot_kept(v4 *s, int R, int C, const char *x, const struct glm_mat *w,
                     enum glm_dtype kind, enum glm_dtype dtype, int grouped, int o, int k0, int K,
                     const vf *kept, int turn, int turns)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *next =
        (const char *)w->data + (size_t)(o + C) * stride + glm_bytes(dtype, (size_t)k0);
    const size_t scales = grouped ? glm_scale_cols(w) : 0;
    float scale[8][RUN_GROUPS];
    vf acc[24 + 8];
    for (int c = 0; grouped && c < C; c++)
        run_scales(scale[c], w->scale + row_at(w, o, c, 1) * scales, w->group, k0, K);
#pragma GCC unroll 24
    for (int i = 0; i < R * C; i++)
        acc[i] = (vf){0};
    for (int k = 0; k < K; k += width, x += chunk * R * VB, kept += chunk * C) {
        for (int c = turn; c < C; c += turns)
            for (int i = 0; i * 64 < (int)glm_bytes(dtype, (size_t)width); i++)
                __builtin_prefetch(next + (size_t)c * stride + glm_bytes(dtype, (size_t)k) + i * 64,
                                   0, 2);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            add_kept_chunk(acc, R, C, c, x, kept + c * chunk, grouped ? scale : NULL, k / 32, kind,
                           dtype);
    }
    sum_rows(s, acc, R, C, kind);
}

/* What sums of bytes in a run become outputs by, four at a time: see run_value. */
struct byte_terms {
    v4 scale;
    int32_t less[4];
};

/* terms (groups, runs, R * C / 4): a run's are the same for every step */
INLINE void fill_terms(struct byte_terms *terms, const struct nt_args *a, enum glm_dtype dtype,
                       int R, int C, int groups, int n_runs)
{
    for (int g = 0; g < groups; g++)
        for (int b = 0; b < n_runs; b++, terms += R * C / 4)
            for (int i = 0; i < R * C; i++) {
                const int n = g * R + i / C < a->N ? g * R + i / C : a->N - 1;
                const struct x_run *run = a->runs + (size_t)n * n_runs + b;
                terms[i / 4].scale[i % 4] = run->scale;
                terms[i / 4].less[i % 4] = bias_of(dtype) * run->sum;
            }
}

INLINE void add_byte_sums(v4 *at, const v4 *s, const struct byte_terms *terms, int n)
{
    typedef int32_t i4 __attribute__((vector_size(16), aligned(4)));
#pragma GCC unroll 6
    for (int i = 0; i < n; i++)
        at[i] +=
            __builtin_convertvector((i4)s[i] - *(const i4 *)terms[i].less, v4) * terms[i].scale;
}

/* Outliers of R rows of x from row n on, in run b, times C rows of W, row_at(c) */
INLINE void add_few_outliers(float *sum, const struct nt_args *a, enum glm_dtype dtype, int R,
                             int C, int n, int o, int apart, int b, int n_runs)
{
    for (int r = 0; r < R && n + r < a->N; r++) {
        const struct x_run *run = a->runs + (size_t)(n + r) * n_runs + b;
        for (int c = 0; run->count && c < C; c++) {
            const char *q = (const char *)a->w->data +
                            row_at(a->w, o, c, apart) * glm_bytes(dtype, (size_t)a->w->cols) +
                            glm_bytes(dtype, (size_t)b * SHORT_RUN_BYTES);
            for (int j = 0; j < run->count; j++)
                sum[r * C + c] += run->value[j] * load_one(q, dtype, (size_t)run->column[j]);
        }
    }
}

/* One row of x by the rows of W one after the other: memory answers fastest where W is read from its
 * first byte to its last. So it is where the sums do not wait for each other: runs of a row that are
 * summed side by side, 0: C1 rows are. */
INLINE int runs_together(enum glm_dtype kind, enum glm_dtype dtype)
{
    const size_t of_w = glm_bytes(dtype, (size_t)per_vector(kind)); /* bytes that a vector takes */
    if (VL == 4 || pairs_in_place(kind) || of_w < (kind == GLM_F32 ? 32 : 16))
        return 0; /* VL of 4: not measured */
    return kind == GLM_BF16 && of_w == 16 ? 4 : 1;
}

/* Sums of n runs of K columns side by side, 4 at most, of one row of packed x times one row of W at
 * `row`. scale: of the groups of each run. W is fetched in its order whatever n is. */
INLINE v4 dot_runs(int n, const char *x, const char *row, float (*scale)[RUN_GROUPS], int K,
                   enum glm_dtype kind, enum glm_dtype dtype)
{
    const int chunk = chunk_of(kind, dtype), width = chunk * per_vector(kind);
    const size_t of_w = glm_bytes(dtype, (size_t)(run_of(kind, dtype) * per_vector(kind)));
    const size_t of_x = (size_t)run_of(kind, dtype) * VB;
    const size_t of_chunk = glm_bytes(dtype, (size_t)width);
    const char *next = row + FETCHED;
    vf acc[4] = {{0}}, v[4];
    int k = 0;
    for (; k + width <= K; k += width, x += chunk * VB, next += n * of_chunk) {
        const size_t at = glm_bytes(dtype, (size_t)k);
#pragma GCC unroll 4
        for (int r = 0; r < n; r++) {
            load_chunk(v, row + at + r * of_w, kind, dtype);
            if ((n * at + r * of_chunk) % 64 == 0) /* a line once */
                FETCH_ONCE(next + r * of_chunk);
            if (kind == GLM_I8 && n == 1) /* integers: sums that do not wait for each other */
                for (int j = 0; j < chunk; j++)
                    acc[j] =
                        multiply_add(kind, dtype, acc[j], load((const float *)(x + j * VB)), v[j]);
            else
                add_chunk(acc, 1, n, r, x + r * of_x, v, scale ? scale[r] : NULL, k / 32, kind,
                          dtype);
        }
    }
    if (kind == GLM_I8 && n == 1) {
        acc[0] = (vf)((vi)acc[0] + (vi)acc[1]);
        acc[1] = (vf){0};
    }
    if (k < K) { /* of the last run, which is alone */
        load_last(v, row + glm_bytes(dtype, (size_t)k), kind, dtype, K - k);
        add_chunk(acc, 1, n, 0, x, v, scale ? scale[0] : NULL, k / 32, kind, dtype);
    }
    return sums_of(kind, acc[0], acc[1], acc[2], acc[3]);
}

/* tile (IN_PLACE_COLS) of one row of x; together: see runs_together */
INLINE void one_row(float *tile, const struct nt_args *a, enum glm_dtype kind, enum glm_dtype dtype,
                    int grouped, int together, int o0, int cols)
{
    const int in_run = run_of(kind, dtype) * per_vector(kind), K = a->w->cols;
    const size_t of_w = glm_bytes(dtype, (size_t)in_run), of_x = (size_t)run_of(kind, dtype) * VB;
    const size_t stride = glm_bytes(dtype, (size_t)K);
    const size_t scales = grouped ? glm_scale_cols(a->w) : 0;
    for (int o = o0; o < o0 + cols; o++) {
        const char *row = (const char *)a->w->data + (size_t)o * stride;
        float sum = 0, scale[4][RUN_GROUPS];
        for (int k = 0, b = 0, n; k < K; k += n * in_run, b += n, row += n * of_w) {
            const int left = K - k, in_last = left < in_run ? left : in_run;
            const char *x = a->x + b * of_x;
            v4 s;
            n = left < together * in_run ? 1 : together;
            for (int r = 0; grouped && r < n; r++)
                run_scales(scale[r], a->w->scale + o * scales, a->w->group, k + r * in_run,
                           in_last);
            if (n > 1)
                s = dot_runs(together, x, row, grouped ? scale : NULL, in_run, kind, dtype);
            else
                s = dot_runs(1, x, row, grouped ? scale : NULL, in_last, kind, dtype);
            for (int r = 0; r < n; r++) {
                sum += run_value(s, a->runs + b + r, kind, dtype)[r];
                if (kind == GLM_I8)
                    add_few_outliers(&sum, a, dtype, 1, 1, 0, o, 1, b + r, 0);
            }
        }
        tile[o - o0] = sum;
    }
}

/* tile (a->N, IN_PLACE_COLS) of few rows, W read in place: R of them at a time with C rows of W,
 * which the next R find converted. The sums of such a step lie together until the end. */
INLINE void tile_in_place(float *tile, const struct nt_args *a, enum glm_dtype kind,
                          enum glm_dtype dtype, int grouped, int R, int C, int o0, int cols)
{
    const int I = a->w->cols, vectors = vectors_of(kind, dtype, I), S = (R * C + 3) / 4;
    const int in_full = run_of(kind, dtype), width = in_full * per_vector(kind);
    const int n_runs = (vectors + in_full - 1) / in_full;
    const int steps = (cols + C - 1) / C, groups = (a->N + R - 1) / R;
    const int apart = groups == 1 ? steps : 1;
    v4 *sums = (v4 *)(tile + IN_PLACE_ROWS * IN_PLACE_COLS);
    vf kept[NT_RUN_BYTES / VB * 8];
    memset(sums, 0, (size_t)(groups * steps * S) * sizeof *sums);
    struct byte_terms *terms = (struct byte_terms *)(sums + groups * steps * S);
    if (kind == GLM_I8)
        fill_terms(terms, a, dtype, R, C, groups, n_runs);
    for (int step = 0; step < steps; step++)
        for (int b = 0; b < n_runs; b++)
            for (int g = 0; g < groups; g++) {
                const int K = I - b * width < width ? I - b * width : width;
                const int o = o0 + (apart == 1 ? step * C : step);
                v4 s[8], *at = sums + (g * steps + step) * S;
                const char *x = a->x + ((size_t)g * vectors + (size_t)b * in_full) * R * VB;
                if (R == 1 || REGISTERS == 16 || groups == 1)
                    dot_rows(s, R, C, x, a->w, kind, dtype, grouped, o, apart, b * width, K, 0,
                             kept, 1);
                else if (g == 0)
                    dot_rows(s, R, C, x, a->w, kind, dtype, grouped, o, apart, b * width, K, 1,
                             kept, groups);
                else
                    dot_kept(s, R, C, x, a->w, kind, dtype, grouped, o, b * width, K, kept, g,
                             groups);
                for (int i = 0; i < S && kind != GLM_I8; i++)
                    at[i] += s[i];
                if (kind == GLM_I8) {
                    add_byte_sums(at, s, terms + (g * n_runs + b) * S, S);
                    add_few_outliers((float *)at, a, dtype, R, C, g * R, o, apart, b, n_runs);
                }
            }
    for (int g = 0; g < groups; g++)
        for (int step = 0; step < steps; step++)
            for (int r = 0; r < R; r++) {
                const float *from = (float *)(sums + (g * steps + step) * S) + r * C;
                float *to = tile + (g * R + r) * IN_PLACE_COLS;
                if (apart == 1)
                    memcpy(to + step * C, from, (size_t)C * 4);
                else
                    for (int c = 0; c < C; c++)
                        to[step + c * apart] = from[c];
            }
}

/* Whether N rows, more than R2, are cut into groups of XR and XR - 1, which meet W four rows at a time:
 * there are registers for no more. */
INLINE int by_fours(int N) { return REGISTERS == 16 && N > R2; }

/* s[r] = dot products of row r of R rows of packed x with four rows of packed w: see dot_panel */
INLINE void dot_group(v4 *s, int R, const char *x, const char *w, int vectors, enum glm_dtype kind,
                      enum glm_dtype dtype)
{
    vf acc[XR][4], xv[XR];
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
            acc[r][c] = (vf){0};
    for (int k = 0; k < vectors; k++, x += R * VB, w += 4 * VB) {
#pragma GCC unroll 3
        for (int r = 0; r < R; r++)
            xv[r] = load((const float *)(x + r * VB));
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            vf wv = load((const float *)(w + c * VB));
#if REGISTERS == 16 && defined(__x86_64__)
            __asm__("" : "+x"(wv)); /* once, not with each row of x */
#endif
#pragma GCC unroll 3
            for (int r = 0; r < R; r++)
                acc[r][c] = multiply_add(kind, dtype, acc[r][c], xv[r], wv);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
        s[r] = sums_of(kind, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* tile (a->N, IN_PLACE_COLS) by_fours: a run of four rows of W is converted once, and all groups of
 * rows of x find it in the nearest cache. */
INLINE void tile_by_fours(float *tile, const struct nt_args *a, enum glm_dtype kind,
                          enum glm_dtype dtype, int grouped, int o0, int cols)
{
    const int I = a->w->cols, vectors = vectors_of(kind, dtype, I);
    const int in_full = run_of(kind, dtype), width = in_full * per_vector(kind);
    const int n_runs = (vectors + in_full - 1) / in_full;
    vf panel[NT_RUN_BYTES / VB * 4];
    for (int o = 0; o < cols; o += 4)
        for (int b = 0; b < n_runs; b++) {
            const int K = I - b * width < width ? I - b * width : width;
            const int rest = vectors - b * in_full, in_run = rest < in_full ? rest : in_full;
            struct ahead ahead =
                start_ahead(a->w, dtype, o0 + o + 4, 4, b * width, K & ~1, a->groups);
            pack_w((char *)panel, a->w, kind, dtype, grouped, o0 + o, cols - o, b * width, K);
            for (int g = 0; g < a->groups; g++) {
                const int n = first_of_group(a->N, a->groups, g);
                const int R = first_of_group(a->N, a->groups, g + 1) - n;
                const char *x = a->x + ((size_t)n * vectors + (size_t)b * in_full * R) * VB;
                v4 s[XR];
                fetch_ahead(&ahead);
                if (R == XR)
                    dot_group(s, XR, x, (char *)panel, in_run, kind, dtype);
                else
                    dot_group(s, XR - 1, x, (char *)panel, in_run, kind, dtype);
                for (int r = n; r < n + R; r++) {
                    float *at = tile + r * IN_PLACE_COLS + o;
                    const v4 v = run_value(
                        s[r - n], kind == GLM_I8 ? a->runs + r * n_runs + b : NULL, kind, dtype);
                    *(v4 *)at = b ? *(v4 *)at + v : v;
                    if (kind == GLM_I8)
                        add_few_outliers(at, a, dtype, 1, 4, r, o0 + o, 1, b, n_runs);
                }
            }
        }
}

/* Rows of x at a time of N. Where a chunk is several vectors of each, registers hold those of two rows
 * only; up to R2 rows memory is waited for. */
INLINE int rows_in_place(enum glm_dtype kind, enum glm_dtype dtype, int N)
{
    const int many_vectors = VL == 16 && kind == GLM_BF16 && chunk_of(kind, dtype) > 1;
    return N == 1 ? R1 : many_vectors && N > R2 ? 2 : R2;
}

/* Of few rows, W read in place */
INLINE struct nt_tile tile_in_scratch(const struct nt_args *a, int task, char *scratch)
{
    const int o0 = task * IN_PLACE_COLS, left = a->w->rows - o0;
    struct nt_tile t = {.tile = (float *)scratch,
                        .ldt = IN_PLACE_COLS,
                        .rows = a->N,
                        .o0 = o0,
                        .cols = left < IN_PLACE_COLS ? left : IN_PLACE_COLS};
    row_scales(&t, a->w);
    return t;
}

INLINE void few(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg, int task,
                char *scratch)
{
    const struct nt_args *a = arg;
    const struct nt_tile t = tile_in_scratch(a, task, scratch);
    const int together = runs_together(kind, dtype);
    if (a->R == R1 && together)
        one_row(t.tile, a, kind, dtype, grouped, together, t.o0, t.cols);
    else if (a->R == R1)
        tile_in_place(t.tile, a, kind, dtype, grouped, R1, C1, t.o0, t.cols);
    else if (a->R == R2)
        tile_in_place(t.tile, a, kind, dtype, grouped, R2, C2, t.o0, t.cols);
    else if (rows_in_place(kind, dtype, R2 + 1) == 2)
        tile_in_place(t.tile, a, kind, dtype, grouped, 2, C2, t.o0, t.cols);
    finish(a, &t, 0, t.rows);
}

TASKS(KINDS, few)

INLINE void fours(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg, int task,
                  char *scratch)
{
    const struct nt_args *a = arg;
    const struct nt_tile t = tile_in_scratch(a, task, scratch);
    tile_by_fours(t.tile, a, kind, dtype, grouped, t.o0, t.cols);
    finish(a, &t, 0, t.rows);
}

TASKS(KINDS, fours)
