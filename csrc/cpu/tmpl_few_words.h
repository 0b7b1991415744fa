/* Few rows of x as words, or as bytes over groups, by W where it lies (tmpl_words.h says what the
 * sums are): up to four rows at once, more of them in turns while four rows of W are near. */

/* The chunk of 4-bit columns at p times that of one row of x, as they are masked: 8 too large, added to
 * acc[0] and acc[apart], and 16 times as large, too, added to high[0] and high[apart]. */
INLINE void add_masked_words(vf *acc, vf *high, int apart, const char *p, const char *x)
{
    const vus v = (vus)load_bytes(p) ^ 0x8888, u = v >> 8;
    acc[0] = DOT_I16(acc[0], (vf)(v & 15), load((const float *)x));
    high[0] = DOT_I16(high[0], (vf)(v & 240), load((const float *)(x + 2 * VB)));
    acc[apart] = DOT_I16(acc[apart], (vf)(u & 15), load((const float *)(x + VB)));
    high[apart] = DOT_I16(high[apart], (vf)(u & 240), load((const float *)(x + 3 * VB)));
}

/* acc[r] += the chunk at p times those of R rows of x */
INLINE void add_words(vf *acc, int R, const char *p, const char *x, enum glm_dtype dtype)
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const vf w = words_of_w(p, j, dtype);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            acc[r] = DOT_I16(acc[r], w, load((const float *)(x + (j * R + r) * VB)));
    }
}

/* Lanes whose sum is that of a run, `chunks` long, of one row of packed x times one row of W at p:
 * four sums that do not wait for each other. `from` is fetched into the cache. */
INLINE vf word_lanes(const char *x, const char *p, const char *from, int chunks,
                     enum glm_dtype dtype)
{
    vf acc[4] = {{0}};
#pragma GCC unroll 4
    for (int i = 0; i < chunks; i++, x += 4 * VB) {
        const size_t at = glm_bytes(dtype, (size_t)i * CHUNK);
        if (at % 64 == 0) /* a line once */
            for (size_t line = 0; line < glm_bytes(dtype, CHUNK); line += 64)
                FETCH_ONCE(from + at + line);
        if (dtype == GLM_I4)
            add_masked_words(acc, acc + 2, 1, p + at, x);
        else
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                acc[j] = DOT_I16(acc[j], words_of_w(p + at, j, dtype),
                                 load((const float *)(x + j * VB)));
    }
    const vi first = (vi)acc[0] + (vi)acc[1], last = (vi)acc[2] + (vi)acc[3];
    return (vf)(first + (dtype == GLM_I4 ? last >> 4 : last));
}

/* One row of packed x times one row of W, before the scale of W: W is read from its first byte to its
 * last, as in one_row of tmpl_few.h. */
INLINE float word_row(const char *x, const float *scale, const int32_t *less, const char *row,
                      int K, enum glm_dtype dtype)
{
    const size_t of_w = glm_bytes(dtype, WORD_RUN), of_x = WORD_RUN / CHUNK * 4 * VB;
    float sum = 0;
    int k = 0;
    for (; K - k >= 4 * WORD_RUN; k += 4 * WORD_RUN, scale += 4, less += 4) {
        vf lanes[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++, row += of_w, x += of_x)
            lanes[r] = word_lanes(x, row, row + FETCHED, WORD_RUN / CHUNK, dtype);
        v4i s = (v4i)SUM4_INT(lanes[0], lanes[1], lanes[2], lanes[3]);
        if (dtype == GLM_I4)
            s += *(const v4i *)less;
        const v4 y = __builtin_convertvector(s, v4) * *(const v4 *)scale;
        for (int r = 0; r < 4; r++)
            sum += y[r];
    }
    for (; k < K; k += WORD_RUN, row += of_w, x += of_x, scale++, less++) {
        char end[WORD_RUN] __attribute__((aligned(64))) = {0};
        const int left = K - k < WORD_RUN ? K - k : WORD_RUN;
        memcpy(end, row, glm_bytes(dtype, (size_t)left));
        const vf none = {0};
        const vf lanes = word_lanes(x, end, row, word_chunks(left, 0), dtype);
        const v4i s = (v4i)SUM4_INT(lanes, none, none, none);
        sum += (float)(s[0] + (dtype == GLM_I4 ? *less : 0)) * *scale;
    }
    return sum;
}

/* sums[c * 4 + r] = row r of R (2 to 4) of packed x times row c of C of W, before the scale of W. */
INLINE void word_rows(float *sums, int R, int C, const char *x, const float *scale,
                      const char *const *row, int K, enum glm_dtype dtype, size_t ahead)
{
    const vf none = {0};
    v4 y[4] = {{0}};
    for (int k0 = 0, run = 0; k0 < K; k0 += WORD_RUN, run++) {
        char end[4][WORD_RUN] __attribute__((aligned(64)));
        const char *p[4], *from[4];
        vf acc[16];
        const int left = K - k0, chunks = left < WORD_RUN ? word_chunks(left, 0) : WORD_RUN / CHUNK;
        for (int c = 0; c < C; c++) {
            p[c] = row[c] + glm_bytes(dtype, (size_t)k0);
            from[c] = p[c] + ahead;
        }
        if (left < WORD_RUN)
            for (int c = 0; c < C; c++) {
                memset(end[c], 0, WORD_RUN);
                p[c] = memcpy(end[c], p[c], glm_bytes(dtype, (size_t)left));
            }
#pragma GCC unroll 16
        for (int i = 0; i < R * C; i++)
            acc[i] = (vf){0};
        for (int i = 0; i < chunks; i++, x += 4 * R * VB)
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const size_t at = glm_bytes(dtype, (size_t)i * CHUNK);
                if (at % 64 == 0) /* a line once */
                    for (size_t line = 0; line < glm_bytes(dtype, CHUNK); line += 64)
                        __builtin_prefetch(from[c] + at + line, 0, 2);
                add_words(acc + c * R, R, p[c] + at, x, dtype);
            }
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const v4i s = (v4i)SUM4_INT(acc[c * R], acc[c * R + 1], R > 2 ? acc[c * R + 2] : none,
                                        R > 3 ? acc[c * R + 3] : none);
            y[c] += __builtin_convertvector(s, v4) * *(const v4 *)(scale + run * R); /* of R */
        }
    }
    memcpy(sums, y, (size_t)C * sizeof *y);
}

/* Four rows of W from row o on, columns k0 .. k0 + K - 1, as words: vector by vector, four of them.
 * Where W ends its last row repeats. */
INLINE void pack_four_as_words(char *to, const struct glm_mat *w, enum glm_dtype dtype, int o,
                               int k0, int K)
{
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *row[4];
    for (int c = 0; c < 4; c++)
        row[c] = (const char *)w->data + (size_t)(o + c < w->rows ? o + c : w->rows - 1) * stride +
                 glm_bytes(dtype, (size_t)k0);
    for (int k = 0; k < K; k += CHUNK, to += 16 * VB)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            char end[8 * VL] __attribute__((aligned(64)));
            const char *p = row[c] + glm_bytes(dtype, (size_t)k);
            if (glm_bytes(dtype, (size_t)k) % 64 == 0)
                __builtin_prefetch(p + 4 * stride);
            if (K - k < CHUNK) {
                memset(end, 0, sizeof end);
                p = memcpy(end, p, glm_bytes(dtype, (size_t)(K - k)));
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                store((float *)(to + (j * 4 + c) * VB), words_of_w(p, j, dtype));
        }
}

/* (R, 4; IN_PLACE_COLS) at `to` (+)= R rows of packed x times four of W in `panel`, `chunks` of them,
 * before the scale of W */
INLINE void add_word_rows(float *to, int R, const char *x, const char *panel, int chunks,
                          const float *scale, int add)
{
    v4 y[WORD_TURN];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
        y[r] = add ? *(v4 *)(to + r * IN_PLACE_COLS) : (v4){0};
    for (int i = 0; i < chunks; i += WORD_RUN / CHUNK, scale += R) {
        const int rest = chunks - i, in_run = rest < WORD_RUN / CHUNK ? rest : WORD_RUN / CHUNK;
        vf acc[WORD_TURN][4], xv[WORD_TURN];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                acc[r][c] = (vf){0};
        for (int v = 0; v < 4 * in_run; v++, x += R * VB, panel += 4 * VB) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                xv[r] = load((const float *)(x + r * VB));
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                const vf wv = load((const float *)(panel + c * VB));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    acc[r][c] = DOT_I16(acc[r][c], wv, xv[r]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const v4i s = (v4i)SUM4_INT(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
            y[r] += __builtin_convertvector(s, v4) * (scale[r] - (v4){0});
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
        *(v4 *)(to + r * IN_PLACE_COLS) = y[r];
}

/* tile (a->N, IN_PLACE_COLS) of several rows: a block of four rows of W becomes words once, and all
 * groups of rows of x find it in the nearest cache. */
INLINE void words_by_fours(float *tile, const struct nt_args *a, enum glm_dtype dtype, int o0,
                           int cols)
{
    const int K = a->w->cols, runs = word_runs(K, 0), G = a->groups;
    const size_t in_row = (size_t)word_chunks(K, 0) * 4 * VB;
    vf panel[WORD_BLOCK / CHUNK * 16];
    for (int o = 0; o < cols; o += 4)
        for (int k0 = 0; k0 < K; k0 += WORD_BLOCK) {
            const int in_block = K - k0 < WORD_BLOCK ? K - k0 : WORD_BLOCK;
            const int chunks = word_chunks(in_block, 0);
            struct ahead ahead = start_ahead(a->w, dtype, o0 + o + 4, 4, k0, in_block & ~1, G);
            pack_four_as_words((char *)panel, a->w, dtype, o0 + o, k0, in_block);
            for (int g = 0; g < G; g++) {
                const int n = first_of_group(a->N, G, g), R = first_of_group(a->N, G, g + 1) - n;
                const char *x = a->x + (size_t)n * in_row + (size_t)(k0 / CHUNK * 4 * R) * VB;
                const float *scale = a->word_scale + (size_t)n * runs + k0 / WORD_RUN * R;
                float *to = tile + n * IN_PLACE_COLS + o;
                fetch_ahead(&ahead);
                if (R == WORD_TURN)
                    add_word_rows(to, WORD_TURN, x, (char *)panel, chunks, scale, k0 > 0);
                else if (WORD_TURN == 4 && R == 3)
                    add_word_rows(to, WORD_TURN - 1, x, (char *)panel, chunks, scale, k0 > 0);
                else
                    add_word_rows(to, 2, x, (char *)panel, chunks, scale, k0 > 0);
            }
        }
}

#if VL == 4
#define QUARTER(v, q) (v)
#else
#define QUARTER(v, q) \
    ((v4)__builtin_shufflevector(v, v, 4 * (q), 4 * (q) + 1, 4 * (q) + 2, 4 * (q) + 3))
#endif

/* Lanes whose sums, four by four, are those of the groups of four chunks of W: t[i] of chunk i. */
INLINE void group_lanes(vf *t, int R, int r, const char *p, const char *x)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, p += VB, x += 4 * R * VB) {
        vf acc[4] = {{0}}, high = {0};
        if (R == 1)
            add_masked_words(acc, &high, 0, p, x);
        else
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                acc[0] = DOT_I16(acc[0], words_of_w(p, j, GLM_I4),
                                 load((const float *)(x + (j * R + r) * VB)));
        t[i] = (vf)((vi)acc[0] + ((vi)high >> 4));
    }
}

/* y[r] += the products of four chunks of W at p, as many groups as a vector has lanes; of_w: their
 * scales; scale, less: of x, `runs` from one row to the next; `from` is fetched into the cache. */
INLINE void add_groups(v4 *y, int R, const char *p, const char *from, const char *x,
                       const float *scale, const int32_t *less, int runs, vf of_w,
                       enum glm_dtype kind)
{
    vf even[4], odd[4]; /* as bytes */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        if (i * VB % 64 == 0) /* a line once */
            FETCH_ONCE(from + i * VB);
        even[i] = nibbles_of_w(p + i * VB, 0);
        odd[i] = nibbles_of_w(p + i * VB, 1);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        vf t[4];
#pragma GCC unroll 4
        for (int i = 0; kind == GLM_I8 && i < 4; i++)
            t[i] = ADD_BOTH(even[i], load((const float *)(x + (2 * i * R + r) * VB)), odd[i],
                            load((const float *)(x + ((2 * i + 1) * R + r) * VB)));
        if (kind != GLM_I8)
            group_lanes(t, R, r, p, x);
        vi s = kind == GLM_I8 ? NIBBLE_GROUPS(t[0], t[1], t[2], t[3])
                              : GROUP_SUMS(t[0], t[1], t[2], t[3]);
        if (R == 1 || kind == GLM_I8)
            s += (vi)load((const float *)(less + (size_t)r * (size_t)runs));
        const vf v = INT_TO_FLOAT(s) * (load(scale + (size_t)r * (size_t)runs) * of_w);
        y[r] += QUARTER(v, 0);
#if VL > 4
        y[r] += QUARTER(v, 1);
#endif
#if VL > 8
        y[r] += QUARTER(v, 2);
        y[r] += QUARTER(v, 3);
#endif
    }
}

/* sums[r] = row r of R of packed x times row o of W, which has group scales. */
INLINE void word_groups(float *sums, int R, const char *x, const float *scale, const int32_t *less,
                        const struct glm_mat *w, int o, enum glm_dtype kind)
{
    enum { COLUMNS = 4 * CHUNK };
    const int K = w->cols, runs = word_runs(K, 1);
    const char *p = (const char *)w->data + (size_t)o * glm_bytes(GLM_I4, (size_t)K);
    const uint16_t *of_w = w->scale + (size_t)o * glm_scale_cols(w);
    v4 y[4] = {{0}};
    for (int r = 0; r < R; r++)
        sums[r] = 0;
    for (int k = 0; k < K; k += COLUMNS, p += 4 * VB, x += 4 * per_chunk(kind) * R * VB) {
        const vf s = scales_of_groups(w, of_w, k, K - k);
        char end[4 * VB] __attribute__((aligned(64)));
        const int whole = K - k >= COLUMNS;
        if (!whole) /* x has zeros there */
            COPY_PART(end, p, (size_t)(K - k) / 2);
        add_groups(y, R, whole ? p : end, p + FETCHED, x, scale, less, runs, s, kind);
        scale += VL, less += VL;
        if ((k + COLUMNS) % WORD_BLOCK && k + COLUMNS < K)
            continue;
        for (int r = 0; r < R; r++) {
            sums[r] += (y[r][0] + y[r][1]) + (y[r][2] + y[r][3]);
            y[r] = (v4){0};
        }
    }
}

/* tile (a->N, IN_PLACE_COLS) of few rows, R at a time: all of them, or WORD_ROWS over groups. */
INLINE void words_in_place(float *tile, const struct nt_args *a, enum glm_dtype kind,
                           enum glm_dtype dtype, int grouped, int R, int o0, int cols)
{
    const struct glm_mat *w = a->w;
    const int K = w->cols, C = grouped || R == 1 ? 1 : WORD_COLS, runs = word_runs(K, grouped);
    const size_t stride = glm_bytes(dtype, (size_t)K);
    for (int o = 0; o < cols; o += C) {
        const char *row[4];
        for (int c = 0; c < C; c++) /* where W ends its last row repeats */
            row[c] = (const char *)w->data +
                     (size_t)(o0 + o + c < w->rows ? o0 + o + c : w->rows - 1) * stride;
        for (int n = 0; n < a->N; n += R) {
            const char *x = a->x + (size_t)n * word_chunks(K, grouped) * per_chunk(kind) * VB;
            const float *scale = a->word_scale + (size_t)n * runs;
            const int32_t *less = a->word_less + (size_t)n * runs;
            float sums[4 * WORD_ROWS];
            if (grouped)
                word_groups(sums, R, x, scale, less, w, o0 + o, kind);
            else if (R == 1)
                sums[0] = word_row(x, scale, less, row[0], K, dtype);
            else
                word_rows(sums, R, C, x, scale, row, K, dtype, dtype == GLM_I4 ? 1024 : C * stride);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++)
                    tile[(n + r) * IN_PLACE_COLS + o + c] = sums[c * WORD_ROWS + r];
        }
    }
}

INLINE void few_words(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg,
                      int task, char *scratch)
{
    const struct nt_args *a = arg;
    const struct nt_tile t = tile_in_scratch(a, task, scratch);
    if (a->R == 1)
        words_in_place(t.tile, a, kind, dtype, grouped, 1, t.o0, t.cols);
    else if (grouped)
        words_in_place(t.tile, a, kind, dtype, 1, WORD_ROWS, t.o0, t.cols);
    else if (a->N > WORD_ROWS)
        words_by_fours(t.tile, a, dtype, t.o0, t.cols);
    else if (a->N == 2)
        words_in_place(t.tile, a, kind, dtype, 0, 2, t.o0, t.cols);
    else if (a->N == 3)
        words_in_place(t.tile, a, kind, dtype, 0, 3, t.o0, t.cols);
    else
        words_in_place(t.tile, a, kind, dtype, 0, 4, t.o0, t.cols);
    finish(a, &t, 0, t.rows);
}

TASKS(WORD_KINDS, few_words)
