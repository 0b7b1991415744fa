/* The backward products, C (M, N) = scale * A B (+ C): dx = dy W and dW += dy^T x. Rank-1 updates
 * over packed panels: vectors run along the output, so each element adds up its terms in order.
 *
 * A unit is what one lane multiplies at once: one float, two bfloat16 or four bytes, neighbours in
 * the reduction. A is packed before, as units of MR rows, or as bytes in runs (tmpl_linear_bytes.h),
 * or is read where it lies; panels of B are packed here, as units of NR columns. */

INLINE int units_of(enum glm_dtype kind, int K)
{
    return (K + glm_per_unit(kind) - 1) / glm_per_unit(kind);
}

#ifdef MADD_LANE
/* acc + lane m of a's units times the units b */
INLINE vf add_lane(enum glm_dtype kind, vf acc, vf b, vf a, int m)
{
    (void)kind;
#ifdef DOT_BF16_LANE
    if (kind == GLM_BF16)
        return DOT_BF16_LANE(acc, b, a, m);
#endif
    return MADD_LANE(acc, b, a, m);
}
#endif

/* tile (MR, NR; ldt) (+)= sum over `units` of a (units, MR) times b (units, NR) */
INLINE void unit_tile(float *tile, size_t ldt, const float *a, const char *b, int units, int add,
                      enum glm_dtype kind)
{
    vf acc[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            acc[m][v] = add ? load(tile + m * ldt + v * VL) : (vf){0};
#pragma GCC unroll 2
    for (int k = 0; k < units; k++, a += MR, b += NV * VB) {
        vf bv[NV];
        for (int v = 0; v < NV; v++)
            bv[v] = load((const float *)(b + v * VB));
#ifdef MADD_LANE
        const vf lanes = load(a);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++)
            for (int v = 0; v < NV; v++)
                acc[m][v] = add_lane(kind, acc[m][v], bv[v], lanes, m);
#else
        for (int m = 0; m < MR; m++) {
            const vf av = splat_unit(a + m);
            for (int v = 0; v < NV; v++)
                acc[m][v] = multiply_add(kind, GLM_F32, acc[m][v], av, bv[v]);
        }
#endif
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            store(tile + m * ldt + v * VL, acc[m][v]);
}

/* The same of floats in a tile of which (height, width) is there. A is packed (lda 0), or its rows
 * lie lda floats apart; V: vectors that hold the width. */
INLINE void float_tile(float *tile, size_t ldt, const float *a, size_t lda, const char *b,
                       int units, int add, int height, int width, int V, int packed)
{
    vf acc[MR][NV];
#pragma GCC unroll 12
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const float *at = tile + m * ldt + v * VL;
            const int left = width - v * VL;
            acc[m][v] = (vf){0};
            if (add && m < height && left > 0)
                acc[m][v] = left >= VL ? load(at) : load_part(at, left);
        }
    for (int k = 0; k < units; k++, a += packed ? MR : 1, b += NV * VB) {
        vf bv[NV];
        for (int v = 0; v < V; v++)
            bv[v] = load((const float *)(b + v * VB));
        const float *row = a;
#pragma GCC unroll 12
        for (int m = 0; m < MR; m++) {
            const vf av = splat(packed ? a[m] : row[m % 3 * lda]);
            for (int v = 0; v < V; v++)
                acc[m][v] = MADD(av, bv[v], acc[m][v]);
            row += m % 3 == 2 ? 3 * lda : 0; /* few addresses: registers are few */
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V && m < height; v++) {
            float *at = tile + m * ldt + v * VL;
            const int left = width - v * VL;
            if (left >= VL)
                store(at, acc[m][v]);
            else if (left > 0)
                store_part(at, acc[m][v], left);
        }
}

static void any_tile(float *tile, size_t ldt, const float *a, size_t lda, const char *b, int units,
                     int add, int height, int width)
{
    if (lda && width > VL)
        float_tile(tile, ldt, a, lda, b, units, add, height, width, NV, 0);
    else if (lda)
        float_tile(tile, ldt, a, lda, b, units, add, height, width, 1, 0);
    else if (width > VL)
        float_tile(tile, ldt, a, lda, b, units, add, height, width, NV, 1);
    else
        float_tile(tile, ldt, a, lda, b, units, add, height, width, 1, 1);
}

/* VL rows (or columns) of B or W in natural order, as floats */
INLINE void load_natural(vf *v, const char *p, enum glm_dtype dtype, int n)
{
    if (n < 2 * VL)
        load_last(v, p, GLM_F32, dtype, n);
    else
        load_chunk(v, p, GLM_F32, dtype);
    if (dtype == GLM_I4) {
        const vf even = v[0], odd = v[1];
        v[0] = LOW(even, odd);
        v[1] = HIGH(even, odd);
    }
}

/* NR columns of four rows of integers as units of bytes; of `used` rows and `width` columns. */
INLINE void pack_quads(char *to, const char *p, size_t stride, enum glm_dtype dtype, int used,
                       int width)
{
    typedef int8_t vb __attribute__((vector_size(VL), aligned(VL)));
    char rows[4][NR] __attribute__((aligned(32))) = {{0}};
    for (int i = 0; i < used; i++)
        if (width == NR) /* a vector, not a call */
            memcpy(rows[i], p + i * stride, glm_bytes(dtype, NR));
        else
            memcpy(rows[i], p + i * stride, glm_bytes(dtype, (size_t)width));
    for (int i = 0; dtype == GLM_I4 && i < used; i++)
        for (int n = NR - 2 * VL; n >= 0; n -= 2 * VL) { /* what lies first is overwritten last */
            const vb both = *(vb *)(rows[i] + n / 2), even = both >> 4, odd = both << 4 >> 4;
            *(vb *)(rows[i] + n) = LOW(even, odd);
            *(vb *)(rows[i] + n + VL) = HIGH(even, odd);
        }
    vf v[NV] __attribute__((aligned(64)));
    QUADS(v, rows[0]);
    for (int i = 0; i < NV; i++)
        store((float *)(to + i * VB), BYTES_OF_W(v[i]));
}

/* Units of A for MR rows from row m0 on: (units, MR); rows and terms past the end are 0. am, ak:
 * strides of a(m, k); one of them is 1. */
static void pack_a_task(const void *arg, int task, char *scratch)
{
    const struct pack_args *p = arg;
    const int rows = p->N - task * MR < MR ? p->N - task * MR : MR, units = units_of(p->kind, p->K);
    const float *from = p->x + (size_t)task * MR * p->am;
    float *to = (float *)p->to + (size_t)task * MR * units;
    (void)scratch;
#ifdef DOT_BF16
    if (p->kind == GLM_BF16 && p->ak == 1) {
        for (int k = 0; k < p->K; k += 2 * VL) {
            const int n = p->K - k < 2 * VL ? p->K - k : 2 * VL;
            vf x[VL] = {{0}}, f[2] = {{0}};
            if (p->factor)
                load_natural(f, (const char *)(p->factor + k), GLM_F16, n);
            for (int r = 0; r < rows; r++) {
                vf v[2];
                load_natural(v, (const char *)(from + r * p->am + k), GLM_F32, n);
                if (p->factor) {
                    v[0] *= f[0];
                    v[1] *= f[1];
                }
                x[r] = TO_BF16(v[0] * splat(p->scale), v[1] * splat(p->scale));
            }
            transpose(x);
            for (int i = 0; i < VL && k / 2 + i < units; i++)
                store_part(to + (size_t)(k / 2 + i) * MR, x[i], MR);
        }
        return;
    }
    if (p->kind == GLM_BF16) {
        for (int u = 0; u < units; u++) {
            const float *at = from + (size_t)2 * u * p->ak;
            const vf first = load_part(at, rows);
            const vf second = 2 * u + 1 < p->K ? load_part(at + p->ak, rows) : (vf){0};
            const vf both = TO_BF16(first * splat(p->scale), second * splat(p->scale));
            store_part(to + (size_t)u * MR, HALVES_TO_PAIRS(both), MR);
        }
        return;
    }
#endif
    if (p->am == 1 && !p->factor) {
        for (int k = 0; k < p->K; k++) {
            const float *at = from + k * p->ak;
            const vf v = rows == MR ? load_part(at, MR) : load_part(at, rows);
            store_part(to + (size_t)k * MR, v * splat(p->scale), MR);
        }
        return;
    }
    for (int k = 0; k < p->K; k += VL) {
        const int n = p->K - k < VL ? p->K - k : VL;
        float factor[VL] = {0};
        vf x[VL] = {{0}};
        if (p->factor)
            load_row(factor, p->factor + k, GLM_F16, n);
        for (int r = 0; r < rows; r++) {
            const float *at = from + r * p->am + k;
            x[r] = (n == VL ? load(at) : load_part(at, n)) * splat(p->scale);
            if (p->factor)
                x[r] *= load(factor);
        }
        transpose(x);
        for (int i = 0; i < n; i++)
            store_part(to + (size_t)(k + i) * MR, x[i], MR);
    }
}

/* Rows k0 .. k0 + K - 1 of B, columns n0 .. n0 + cols - 1, as panels of NR columns: units one after
 * the other; what is past the end is 0. Scales of rows are A's business. */
INLINE void pack_b(char *bp, const struct glm_mat *b, enum glm_dtype kind, enum glm_dtype dtype,
                   int grouped, int k0, int K, int n0, int cols)
{
    const size_t stride = glm_bytes(dtype, (size_t)b->cols);
    const int per = glm_per_unit(kind), units = units_of(kind, K);
    for (int u = 0; u < units; u++) {
        const int k = k0 + u * per, used = K - u * per < per ? K - u * per : per;
        const char *row = (const char *)b->data + (size_t)k * stride;
        for (int n = 0; n < cols; n += NR) {
            const int width = cols - n < NR ? cols - n : NR;
            const char *p = row + glm_bytes(dtype, (size_t)(n0 + n));
            char *to = bp + ((size_t)n / NR * GEMM_UNITS + u) * NV * VB;
            __builtin_prefetch(p + 8 * stride);
            if (kind == GLM_I8) {
                pack_quads(to, p, stride, dtype, used, width);
                continue;
            }
            for (int at = 0; at < NR; at += 2 * VL, to += 2 * VB) {
                vf v[2][2] = {{{0}}};
                for (int i = 0; i < used && at < width; i++) {
                    load_natural(v[i], p + i * stride + glm_bytes(dtype, (size_t)at), dtype,
                                 width - at);
                    if (grouped) {
                        const size_t first = (size_t)(k + i) * glm_scale_cols(b);
                        const float scale =
                            half_to_float(b->scale[first + (n0 + n + at) / b->group]);
                        v[i][0] *= splat(scale);
                        v[i][1] *= splat(scale);
                    }
                }
#ifdef DOT_BF16
                if (kind == GLM_BF16) {
                    const vf first = TO_BF16(v[0][0], v[0][1]), second = TO_BF16(v[1][0], v[1][1]);
                    store((float *)to, PAIRS_LOW(first, second));
                    store((float *)(to + VB), PAIRS_HIGH(first, second));
                    continue;
                }
#endif
                store((float *)to, v[0][0]);
                store((float *)(to + VB), v[0][1]);
            }
        }
    }
}

/* rows x cols of C at c from packed A and B */
INLINE void gemm_tile(float *c, size_t ldc, const struct gemm_args *g, enum glm_dtype kind,
                      enum glm_dtype dtype, int grouped, int m0, int rows, int n0, int cols,
                      char *bp, float *edge)
{
    const int K = g->b->rows, per = glm_per_unit(kind), units = units_of(kind, K);
    const int n_runs = glm_byte_runs(K);
    const int together = kind == GLM_I8 ? BR : MR;
    const int tiles = (rows + together - 1) / together * ((cols + NR - 1) / NR);
    if (kind == GLM_I8)
        START_TILES();
    for (int u = 0; u < units; u += GEMM_UNITS) {
        const int in_block = units - u < GEMM_UNITS ? units - u : GEMM_UNITS;
        const int left = K - u * per, add = u || g->accumulate;
        pack_b(bp, g->b, kind, dtype, grouped, u * per,
               left < GEMM_UNITS * per ? left : GEMM_UNITS * per, n0, cols);
        const int after = left - GEMM_UNITS * per;
        struct ahead ahead =
            start_ahead(g->b, dtype, u * per + GEMM_UNITS * per,
                        after < GEMM_UNITS * per ? after : GEMM_UNITS * per, n0, cols, tiles);
        for (int m = 0; m < rows; m += together) {
            const float *ap = g->a + ((size_t)(m0 + m) * units + (size_t)u * MR);
            const struct x_run *run = NULL;
            const char *xp = NULL, *xp_after = NULL;
            if (kind == GLM_I8) {
                const int b = u / GEMM_UNITS;
                run = g->runs + (size_t)(m0 + m) * n_runs + b;
                xp = byte_rows(g->a, m0 + m, b, n_runs);
                xp_after = m + BR < rows ? byte_rows(g->a, m0 + m + BR, b, n_runs)
                                         : byte_rows(g->a, m0, b + 1 < n_runs ? b + 1 : 0, n_runs);
            }
            const int height = rows - m < together ? rows - m : together;
            const size_t lda = g->lying && height == MR ? (size_t)K : 0;
            if (lda)
                ap = g->lying + (size_t)(m0 + m) * lda + u;
            else if (g->lying)
                ap = g->a;
            for (int n = 0; n < cols; n += NR) {
                float *at = c + m * ldc + n;
                const char *panel = bp + (size_t)n / NR * GEMM_UNITS * NV * VB;
                const int width = cols - n < NR ? cols - n : NR;
                if (kind == GLM_F32 && (lda || height < MR || width < NR)) {
                    any_tile(at, ldc, ap, lda, panel, in_block, add, height, width);
                    continue;
                }
                fetch_ahead(&ahead);
                const float *next = n + NR < cols ? at + NR : c + (m + together) * ldc;
                for (int r = 0; r < together && (n + NR < cols || m + together < rows); r++)
                    for (int i = 0; i < NV; i++) /* the tile that is added to next */
                        __builtin_prefetch(next + r * ldc + i * VL, 1, 3);
                const int whole = height == together && width == NR;
                float *to = whole ? at : edge;
                for (int r = 0; !whole && r < height; r++)
                    memcpy(edge + r * NR, at + r * ldc, (size_t)width * 4);
                if (kind == GLM_I8)
                    byte_tile(to, whole ? ldc : NR, xp, panel, in_block, add, GLM_I8, run,
                              (size_t)n_runs, xp_after + n / NR * AHEAD * in_block);
                else
                    unit_tile(to, whole ? ldc : NR, ap, panel, in_block, add, kind);
                for (int r = 0; !whole && r < height; r++)
                    memcpy(at + r * ldc, edge + r * NR, (size_t)width * 4);
            }
            for (int r = 0; kind == GLM_I8 && r < height; r++) {
                const struct x_run *of = run + (size_t)r * n_runs;
                for (int j = 0; j < of->count; j++) {
                    const char *q =
                        (const char *)g->b->data +
                        ((size_t)u * per + of->column[j]) * glm_bytes(dtype, (size_t)g->b->cols);
                    for (int n = 0; n < cols; n++)
                        c[(m + r) * ldc + n] += of->value[j] * load_one(q, dtype, (size_t)(n0 + n));
                }
            }
        }
    }
    if (kind == GLM_I8)
        END_TILES();
}

/* Columns of a task: of bytes, whose panels are four times as long, fewer, so that a panel and the
 * next one lie in the second cache. */
static int gemm_cols(enum glm_dtype kind) { return kind == GLM_I8 ? GEMM_COLS / 2 : GEMM_COLS; }

INLINE void gemm(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg, int task,
                 char *scratch)
{
    const struct gemm_args *a = arg;
    const int N = a->b->cols;
    const int together = gemm_cols(kind), n_tiles = (N + together - 1) / together;
    const int m0 = task / n_tiles * a->rows, n0 = task % n_tiles * together;
    const int rows = a->M - m0 < a->rows ? a->M - m0 : a->rows,
              cols = N - n0 < together ? N - n0 : together;
    float *c = a->c + (size_t)m0 * N + n0;
    char *bp = scratch + BR * NR * 4;
    gemm_tile(c, (size_t)N, a, kind, dtype, grouped, m0, rows, n0, cols, bp, (float *)scratch);
}

TASKS(KINDS, gemm)
