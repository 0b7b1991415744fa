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
    const int first = first_packed(p, task), R = first_packed(p, task + 1) - first;
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

/* clang-format off */
#define WORD_KINDS(each, name)                                                            \
    each(name, F32, I8, 0) each(name, F32, I4, 0) each(name, F32, I4, 1) each(name, I8, I4, 1)
/* clang-format on */

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
