/* linear_forward over W of 8 or 4 bits with x in 16-bit integers, "words": at the memory's speed
 * where there are no products of bfloat16, and 3e-5 (relative RMS) from float32. And, of kind GLM_I8,
 * over groups of 4 bits with x in bytes, which are 127 at most where words are 32767.
 *
 * A row of x is cut into runs of 256 columns, or of 32 where W has group scales, and a run has the
 * scale max |x| / 32767. The sum of a run times a row of W is exact in 32 bits: 256 * 128 * 32767 <
 * 2^31; so it may be made in any order, and few rows, which read W where it lies, have the bits of
 * many, which pack it, with any length of vector. An output is the sum over runs, in order, of
 * float(sum) * scale, times the scale of W's row. Over groups it is the sum over blocks of 1,024
 * columns, in order, of (s0 + s1) + (s2 + s3), where s[i] sums float(sum) * (scale of x * scale of
 * W) of the groups i, i + 4, .. of the block. No product is added without being rounded.
 *
 * A chunk of 8 * VL columns is four vectors of words. Those of 4-bit columns are 4i + 1, 4i + 3, 4i
 * and 4i + 2, so that half a mask each takes them out of 16 bits of W; x is packed to match. Of
 * bytes it is two, even columns and odd ones. 32 bits of either are a unit: two columns or four. */

/* DOT_I16(acc, a, b) adds products of pairs of words to int32 lanes, exactly; BYTES_TO_WORDS(p): 2 *
 * VL signed bytes; GROUP_SUMS(a, b, c, d): sums of each four lanes of a, then of b .. */
#ifndef DOT_I16
INLINE vf dot_i16(vf acc, vf a, vf b)
{
    const vi x = (vi)a, y = (vi)b;
    return (vf)((vi)acc + ((vi)((vu)x << 16) >> 16) * ((vi)((vu)y << 16) >> 16) +
                (x >> 16) * (y >> 16));
}
#define DOT_I16 dot_i16
#endif
#ifndef BYTES_TO_WORDS
typedef int8_t v_bytes __attribute__((vector_size(2 * VL), aligned(1)));
#define BYTES_TO_WORDS(p) ((vf) __builtin_convertvector(*(const v_bytes *)(p), vs))
#endif
#ifndef GROUP_SUMS
#define GROUP_SUMS(a, b, c, d) ((vi)SUM4_INT(a, b, c, d))
#endif
/* ADD_NIBBLES(acc, w, x) adds quads of bytes, w of 0 to 15, from NIBBLES_FROM(start) on, and is made
 * eight times at most before NIBBLE_SUMS(acc, start) is their sums as int32 and `start`, in each
 * lane: 16 bits hold two of a quad's terms, 8 * 2 * 15 * 127. */
#ifndef ADD_NIBBLES
#define NIBBLES_FROM(start) ((vf)((vi){0} + (start)))
#define ADD_NIBBLES DOT_I8
#define NIBBLE_SUMS(acc, start) (acc)
#endif
/* ADD_BOTH(w, x, w2, x2): those of two vectors, from 0 on; NIBBLE_GROUPS: GROUP_SUMS of four such */
#ifndef ADD_BOTH
#define ADD_BOTH(w, x, w2, x2)                            \
    ({                                                    \
        const vf first_ = ADD_NIBBLES((vf){0}, (w), (x)); \
        ADD_NIBBLES(first_, (w2), (x2));                  \
    })
#endif
#ifndef NIBBLE_GROUPS
#define NIBBLE_GROUPS(a, b, c, d) \
    GROUP_SUMS(NIBBLE_SUMS(a, 0), NIBBLE_SUMS(b, 0), NIBBLE_SUMS(c, 0), NIBBLE_SUMS(d, 0))
#endif

typedef int16_t vs __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint16_t vus __attribute__((vector_size(4 * VL), aligned(4)));
typedef int32_t v4i __attribute__((vector_size(16), aligned(4)));

enum {
    WORD_RUN = 256,
    WORD_GROUP = 32,
    WORD_BLOCK = 1024, /* columns whose groups are summed, and which are packed, together */
    BLOCK_GROUPS = WORD_BLOCK / WORD_GROUP,
    CHUNK = 8 * VL,
    WORD_ROWS = 4,                /* rows of x, at most, that are multiplied where W lies, .. */
    WORD_COLS = VL == 16 ? 4 : 2, /* .. and rows of W then, which has no groups; .. */
    WORD_TURN = REGISTERS == 32 ? 4 : 3,  /* .. more rows of x by so many, with four of W */
    SLICE = MR % 3 ? MR / 2 : MR / 3,     /* rows of a lower tile */
    WORD_PANEL = WORD_BLOCK / 2 * 4 * NR, /* bytes of a packed panel of NR rows of W */
};

/* Runs of a row, of groups as many as whole vectors hold. */
INLINE int word_runs(int K, int grouped)
{
    return grouped ? (K + WORD_BLOCK / 2 - 1) / (WORD_BLOCK / 2) * (BLOCK_GROUPS / 2)
                   : (K + WORD_RUN - 1) / WORD_RUN;
}

/* Where the scale and `less` of a run of row r of R rows lie. */
INLINE size_t run_at(int r, int R, int run, int runs, int grouped)
{
    return grouped ? (size_t)r * (size_t)runs + (size_t)run : (size_t)run * (size_t)R + (size_t)r;
}

/* More rows of x are worth packing W. */
INLINE int most_in_place(int grouped) { return grouped ? 8 : 16; }

/* Vectors of a chunk of x. */
INLINE int per_chunk(enum glm_dtype kind) { return kind == GLM_I8 ? 2 : 4; }

/* Units of a group. */
INLINE int per_group(enum glm_dtype kind) { return kind == GLM_I8 ? 8 : 16; }

/* Chunks of a packed row of x, of groups as many as word_runs has room for. */
INLINE int word_chunks(int K, int grouped)
{
    return grouped ? word_runs(K, 1) * WORD_GROUP / CHUNK : (K + CHUNK - 1) / CHUNK;
}

/* n <= run columns at x as integers up to `largest`, then zeros, and what makes up for masked 4-bit
 * columns, which are 8 too large; a run that is not finite gets the scale NaN. */
INLINE void words_of(int16_t *q, float *scale, int32_t *less, const float *x, int n, int run,
                     float largest)
{
    typedef int16_t vh __attribute__((vector_size(2 * VL), aligned(2)));
    vf top = {0}, bad = {0};
    vi total = {0};
    float most = 0;
    for (int k = 0; k < n; k += VL) {
        const vf v = n - k < VL ? load_part(x + k, n - k) : load(x + k);
        const vf size = (vf)((vi)v & 0x7fffffff);
        top = select_lanes(size > top, size, top);
        bad += v - v;
    }
    for (int i = 0; i < VL; i++)
        most = top[i] > most ? top[i] : most;
    const int finite = lane_sum(bad) == 0;
    const float inverse = largest / most;
    const vf factor = splat(finite && inverse < INFINITY ? inverse : 0);
    for (int k = 0; k < run; k += VL) {
        vi whole = {0};
        if (k < n && finite) {
            const vf v = n - k < VL ? load_part(x + k, n - k) : load(x + k);
            const vf shift = splat(12582912.0f);
            whole = __builtin_convertvector(v * factor + shift - shift, vi);
        }
        total += whole;
        *(vh *)(q + k) = __builtin_convertvector(whole, vh);
    }
    *scale = finite ? most / largest : NAN;
    *less = 0;
    for (int i = 0; i < VL; i++)
        *less -= 8 * total[i];
}

/* A chunk of natural columns in the order of 4-bit ones. */
INLINE void words_as_nibbles(int16_t *q)
{
    static const int first[4] = {1, 3, 0, 2};
    int16_t natural[CHUNK];
    memcpy(natural, q, sizeof natural);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 2 * VL; i++)
            q[j * 2 * VL + i] = natural[4 * i + first[j]];
}

/* A chunk as bytes: the even columns, then the odd ones. */
INLINE void bytes_as_nibbles(int16_t *q)
{
    int8_t *to = (int8_t *)q;
    int16_t natural[CHUNK];
    memcpy(natural, q, sizeof natural);
    for (int i = 0; i < CHUNK / 2; i++) {
        to[i] = (int8_t)natural[2 * i];
        to[CHUNK / 2 + i] = (int8_t)natural[2 * i + 1];
    }
}

/* Unit i of vector j of a chunk in a packed row: a group's units are neighbours. */
INLINE int place_of_unit(int j, int i, enum glm_dtype kind, enum glm_dtype dtype)
{
    return dtype == GLM_I4 ? i / 4 * per_group(kind) + j * 4 + i % 4 : j * VL + i;
}

/* R rows of x a task: vector by vector, R of them, or unit by unit where they meet packed W. */
static void pack_words_task(const void *arg, int task, char *scratch)
{
    const struct pack_args *p = arg;
    const int first = p->groups ? first_of_group(p->N, p->groups, task) : task * p->R;
    const int R = p->groups ? first_of_group(p->N, p->groups, task + 1) - first : p->R;
    const int rows = p->N - first < R ? p->N - first : R;
    const int grouped = p->grouped, run = grouped ? WORD_GROUP : WORD_RUN;
    const int runs = word_runs(p->K, grouped), chunks = word_chunks(p->K, grouped);
    const int vectors = per_chunk(p->kind);
    int32_t *to = (int32_t *)p->to + (size_t)first * chunks * vectors * VL;
    float *scale = p->word_scale + (size_t)first * runs;
    int32_t *less = p->word_less + (size_t)first * runs;
    (void)scratch;
    for (int r = 0; r < R; r++)
        for (int k0 = 0, n = 0; k0 < p->K; k0 += WORD_BLOCK) {
            int16_t q[WORD_BLOCK] __attribute__((aligned(64))) = {0};
            const int left = p->K - k0, K = left < WORD_BLOCK ? left : WORD_BLOCK;
            const float *x = p->x + (size_t)(first + r) * p->K + k0;
            for (int k = 0; k < WORD_BLOCK && n < runs; k += run, n++) {
                const size_t at = run_at(r, R, n, runs, grouped);
                const int there = r >= rows || K < k ? 0 : K - k < run ? K - k : run;
                words_of(q + k, scale + at, less + at, x + k, there, run,
                         p->kind == GLM_I8 ? 127.0f : 32767.0f);
            }
            for (int c = 0; c < WORD_BLOCK / CHUNK && k0 / CHUNK + c < chunks; c++) {
                const size_t vector = (size_t)(k0 / CHUNK + c) * vectors;
                int16_t *from = q + c * CHUNK;
                if (p->kind == GLM_I8)
                    bytes_as_nibbles(from);
                else if (p->dtype == GLM_I4)
                    words_as_nibbles(from);
                for (int j = 0; j < vectors; j++, from += 2 * VL)
                    if (!p->pairs)
                        memcpy(to + ((vector + j) * R + r) * VL, from, 4 * VL);
                    else
                        for (int i = 0; i < VL; i++)
                            memcpy(to + (vector * VL + place_of_unit(j, i, p->kind, p->dtype)) * R +
                                       r,
                                   from + 2 * i, 4);
            }
        }
}

/* Vector j of the chunk of W at p. */
INLINE vf words_of_w(const char *p, int j, enum glm_dtype dtype)
{
    if (dtype == GLM_I8)
        return BYTES_TO_WORDS(p + j * 2 * VL);
    const vus raw = (vus)load_bytes(p);
    return (vf)((vs)(j == 0 ? raw << 12 : j == 1 ? raw << 4 : j == 2 ? raw << 8 : raw) >> 12);
}

/* Vector j of the chunk of W at p as bytes, 8 too large. */
INLINE vf nibbles_of_w(const char *p, int j)
{
    const vu both = (vu)load_bytes(p) ^ 0x88888888u;
    return (vf)((j ? both : both >> 4) & 0x0f0f0f0fu);
}

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

/* The scales of VL groups of a row of W from column k on, of which n columns are there. */
INLINE vf scales_of_groups(const struct glm_mat *w, const uint16_t *row, int k, int n)
{
    float s[VL] = {0};
    if (w->group == WORD_GROUP && n >= WORD_GROUP * VL)
        return HALF_TO_FLOAT(row + k / WORD_GROUP);
    for (int g = 0; g < VL && g * WORD_GROUP < n; g++)
        s[g] = half_to_float(row[(k + g * WORD_GROUP) / w->group]);
    return load(s);
}

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

/* clang-format off */
#define WORD_KINDS(each, name)                                                            \
    each(name, F32, I8, 0) each(name, F32, I4, 0) each(name, F32, I4, 1) each(name, I8, I4, 1)
/* clang-format on */
TASKS(WORD_KINDS, few_words)

/* NR rows of W from row o on, of which `rows` are there, columns k0 .. k0 + K - 1: (units, NR). */
INLINE void pack_w_words(char *to, const struct glm_mat *w, enum glm_dtype kind,
                         enum glm_dtype dtype, int o, int rows, int k0, int K)
{
    const int vectors = per_chunk(kind);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *first = (const char *)w->data + (size_t)o * stride;
    for (int k = 0; k < K; k += CHUNK)
        for (int v = 0; v < NV; v++) {
            char end[VL][8 * VL] __attribute__((aligned(64)));
            const char *p[VL];
            const int left = K - k < CHUNK ? K - k : CHUNK;
            for (int r = 0; r < VL; r++) {
                p[r] = first + (size_t)(v * VL + r) * stride + glm_bytes(dtype, (size_t)(k0 + k));
                if (glm_bytes(dtype, (size_t)k) % 64 == 0) /* a line once */
                    __builtin_prefetch(p[r] + NR * stride, 0, 2);
                if (v * VL + r < rows && left == CHUNK)
                    continue;
                memset(end[r], 0, sizeof end[r]);
                if (v * VL + r < rows)
                    memcpy(end[r], p[r], glm_bytes(dtype, (size_t)left));
                p[r] = end[r];
            }
            for (int j = 0; j < vectors; j++) {
                vf x[VL];
                for (int r = 0; r < VL; r++)
                    x[r] = kind == GLM_I8 ? nibbles_of_w(p[r], j) : words_of_w(p[r], j, dtype);
                transpose(x);
                for (int i = 0; i < VL; i++) {
                    const int unit = k / CHUNK * vectors * VL + place_of_unit(j, i, kind, dtype);
                    store((float *)(to + ((size_t)unit * NV + (size_t)v) * VB), x[i]);
                }
            }
        }
}

/* to (BLOCK_GROUPS, NR): VL columns of it, the scales of VL rows of W, of which `rows` are there, in the
 * block of K columns from k0 on; zeros where there are none. Those of the rows after are fetched. */
INLINE void turn_scales(float *to, const struct glm_mat *w, int o, int rows, int k0, int K)
{
    const size_t scales = glm_scale_cols(w);
    const uint16_t *row = w->scale + (size_t)o * scales;
    for (int r = 0; r < VL && r < rows; r++)
        __builtin_prefetch(row + (VL + r) * scales + k0 / w->group, 0, 2);
    for (int g = 0; g < BLOCK_GROUPS; g += VL) {
        vf s[VL];
        for (int r = 0; r < VL; r++)
            s[r] = r < rows ? scales_of_groups(w, row + r * scales, k0 + g * WORD_GROUP,
                                               K - g * WORD_GROUP)
                            : (vf){0};
        transpose(s);
        for (int i = 0; i < VL; i++)
            store(to + (g + i) * NR, s[i]);
    }
}

/* Of a tile in registers, which the compiler leaves there where the loops are unrolled: M rows, MR or
 * one or two slices. */
#define EACH_SUM                                         \
    _Pragma("GCC unroll 12") for (int m = 0; m < M; m++) \
        _Pragma("GCC unroll 2") for (int v = 0; v < NV; v++)

/* acc (M, NV) = sum over `units` of those of x (units, MR) times those of w (units, NR), and of
 * bytes the less[m * runs] */
INLINE void dot_words(vf (*acc)[NV], int M, const float *x, const char *w, int units,
                      enum glm_dtype kind, const int32_t *less, int runs)
{
    EACH_SUM acc[m][v] = kind == GLM_I8 ? NIBBLES_FROM(less[m * runs]) : (vf){0};
    for (int k = 0; k < units; k++, x += MR, w += NV * VB) {
        vf wv[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++)
            wv[v] = load((const float *)(w + v * VB));
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            const vf xv = splat_unit(x + m);
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++)
                acc[m][v] = kind == GLM_I8 ? ADD_NIBBLES(acc[m][v], wv[v], xv)
                                           : DOT_I16(acc[m][v], wv[v], xv);
        }
    }
}

/* tile (M, NR; ldt) += the products of `units` pairs; scale: of the first run of x */
INLINE void word_tile(float *tile, size_t ldt, int M, const float *x, const char *w, int units,
                      const float *scale)
{
    for (int k = 0; k < units; k += WORD_RUN / 2, scale += MR) {
        vf acc[MR][NV];
        dot_words(acc, M, x + (size_t)k * MR, w + (size_t)k * NV * VB,
                  units - k < WORD_RUN / 2 ? units - k : WORD_RUN / 2, GLM_F32, NULL, 0);
        EACH_SUM
        {
            float *at = tile + m * ldt + v * VL;
            store(at, load(at) + INT_TO_FLOAT((vi)acc[m][v]) * splat(scale[m]));
        }
    }
}

/* The same with the scales of W's groups, (groups, NR); `runs` from one row's scale and less to the
 * next's */
INLINE void word_group_tile(float *tile, size_t ldt, int M, const float *x, const char *w,
                            int units, const float *scale, const int32_t *less, int runs,
                            const float *of_w, enum glm_dtype kind)
{
    const int each = per_group(kind);
    vf part[4][MR][NV];
    for (int i = 0; i < 4; i++)
        EACH_SUM part[i][m][v] = (vf){0};
    for (int g = 0; g * each < units; g++) {
        vf acc[MR][NV];
        dot_words(acc, M, x + (size_t)g * each * MR, w + (size_t)g * each * NV * VB, each, kind,
                  less + g, runs);
        EACH_SUM
        {
            const vi s =
                (vi)(kind == GLM_I8 ? NIBBLE_SUMS(acc[m][v], less[m * runs + g]) : acc[m][v]);
            part[g % 4][m][v] +=
                INT_TO_FLOAT(s) * (splat(scale[m * runs + g]) * load(of_w + g * NR + v * VL));
        }
    }
    EACH_SUM
    {
        float *at = tile + m * ldt + v * VL;
        store(at, load(at) + ((part[0][m][v] + part[1][m][v]) + (part[2][m][v] + part[3][m][v])));
    }
}

/* tile (rows, ldt) of many rows: blocks of W are packed a panel at a time, x is packed already */
INLINE void words_packed(const struct nt_args *a, const struct nt_tile *t, enum glm_dtype kind,
                         enum glm_dtype dtype, int grouped)
{
    const int n0 = t->n0, rows = t->rows, o0 = t->o0, cols = t->cols;
    const size_t ldt = t->ldt;
    float *tile = t->tile;
    char *wp = t->wp;
    const int K = a->w->cols, runs = word_runs(K, grouped), panels = (cols + NR - 1) / NR;
    const int tiles = (rows + MR - 1) / MR * panels;
    const int in_chunk = per_chunk(kind) * VL;
    const size_t in_row = (size_t)word_chunks(K, grouped) * in_chunk;
    float *of_w = (float *)(wp + (size_t)NT_COLS / NR * WORD_PANEL), edge[MR * NR] = {0};
    for (int n = 0; n < rows; n++)
        memset(tile + n * ldt, 0, (size_t)cols * 4);
    for (int k0 = 0; k0 < K; k0 += WORD_BLOCK) {
        const int in_block = K - k0 < WORD_BLOCK ? K - k0 : WORD_BLOCK, next = K - k0 - WORD_BLOCK;
        const int units = word_chunks(in_block, 0) * in_chunk;
        for (int o = 0; o < cols; o += NR)
            pack_w_words(wp + (size_t)o / NR * WORD_PANEL, a->w, kind, dtype, o0 + o, cols - o, k0,
                         in_block);
        for (int o = 0; grouped && o < panels * NR; o += VL)
            turn_scales(of_w + (size_t)o / NR * NR * BLOCK_GROUPS + o % NR, a->w, o0 + o, cols - o,
                        k0, in_block);
        struct ahead ahead = start_ahead(a->w, dtype, o0, cols, k0 + WORD_BLOCK,
                                         next < WORD_BLOCK ? next & ~1 : WORD_BLOCK, tiles);
        for (int n = 0; n < rows; n += MR) {
            const size_t group = (size_t)(n0 + n) * runs;
            const float *x = (const float *)a->x + (size_t)(n0 + n) * in_row +
                             (size_t)k0 / CHUNK * in_chunk * MR;
            const size_t run = group + (grouped ? k0 / WORD_GROUP : k0 / WORD_RUN * MR);
            const int height = rows - n < MR ? rows - n : MR;
            for (int o = 0; o < cols; o += NR) {
                const int width = cols - o < NR ? cols - o : NR;
                const char *w = wp + (size_t)o / NR * WORD_PANEL;
                float *at = tile + n * ldt + o, *to = at;
                size_t ld = ldt;
                fetch_ahead(&ahead);
                if (height < MR || width < NR) {
                    for (int r = 0; r < height; r++)
                        memcpy(edge + r * NR, at + r * ldt, (size_t)width * 4);
                    to = edge;
                    ld = NR;
                }
#define TILE(M)                                                                                    \
    do {                                                                                           \
        if (grouped)                                                                               \
            word_group_tile(to, ld, M, x, w, units, a->word_scale + run, a->word_less + run, runs, \
                            of_w + (size_t)o * BLOCK_GROUPS, kind);                                \
        else                                                                                       \
            word_tile(to, ld, M, x, w, units, a->word_scale + run);                                \
    } while (0)
                if (height <= SLICE)
                    TILE(SLICE);
                else if (height <= 2 * SLICE)
                    TILE(2 * SLICE);
                else
                    TILE(MR);
#undef TILE
                for (int r = 0; to == edge && r < height; r++)
                    memcpy(at + r * ldt, edge + r * NR, (size_t)width * 4);
            }
        }
    }
}

INLINE void many_words(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg,
                       int task, char *scratch)
{
    const struct nt_args *a = arg;
    const struct nt_tile t = tile_of_task(a, task, scratch);
    words_packed(a, &t, kind, dtype, grouped);
    finish(a, &t, 0, t.rows);
}

TASKS(WORD_KINDS, many_words)
