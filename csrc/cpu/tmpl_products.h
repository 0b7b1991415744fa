/* The ops over products: the arithmetic is chosen, one operand packed, then tasks make tiles of the
 * output. */

/* Matrices that are thinner than this in float32 are adapters: their products stay in float. */
enum { THIN = 256 };

static enum glm_dtype kind_of(const struct cpu *cpu, enum glm_dtype dtype, int group, int rows,
                              int cols)
{
    const int thin = rows < cols ? rows : cols;
    if (cpu->compute == GLM_F32 || dtype == GLM_F64 || (dtype == GLM_F32 && thin <= THIN))
        return GLM_F32;
    if (cpu->compute == GLM_I8 && (dtype == GLM_I8 || dtype == GLM_I4) && !group)
        return GLM_I8;
#ifdef DOT_BF16
    return GLM_BF16;
#else
    return GLM_F32;
#endif
}

/* Rows of a tile, at most `most`: the other operand is packed once for each, so many; but tasks
 * enough for all threads to end together. What is computed does not depend on it. */
static int tile_rows(const struct cpu *cpu, int N, int most, int columns)
{
    const int threads = glm_pool_threads(cpu->pool);
    int tiles = ceil_div((size_t)N, (size_t)most);
    while (tiles * columns < 6 * threads && N > 8 * GROUP * tiles)
        tiles++;
    if (tiles * columns < 6 * threads) /* a few of equal size: as many for each thread */
        while (tiles * columns % threads && N > 4 * GROUP * tiles)
            tiles++;
    return tiles ? ceil_div((size_t)ceil_div((size_t)N, (size_t)tiles), GROUP) * GROUP : 1;
}

/* Rows, a multiple of `together`, that are packed at a time when each takes `bytes`: the runs lie
 * behind the vectors. */
static int packed_rows(struct pack_args *p, struct cpu *cpu, size_t bytes, int N, int together)
{
    const int runs = p->kind == GLM_I8 ? glm_byte_runs(p->K) : 0;
    const size_t each = bytes + (size_t)runs * sizeof(struct x_run);
    const size_t most = PACKED / each / (size_t)together * (size_t)together;
    const size_t needed = (size_t)ceil_div((size_t)N, (size_t)together) * (size_t)together;
    const size_t rows = most < needed ? most : needed;
    p->to = cpu->packed;
    p->runs = (struct x_run *)(cpu->packed + rows * bytes);
    return (int)rows;
}

INLINE void many(enum glm_dtype kind, enum glm_dtype dtype, int grouped, const void *arg, int task,
                 char *scratch)
{
    const struct nt_args *a = arg;
    const struct nt_tile t = tile_of_task(a, task, scratch);
    if (kind == GLM_I8 && a->R == BR)
        tile_bytes(a, &t, dtype);
    else
        tile_packed(a, &t, kind, dtype, grouped);
}

TASKS(KINDS, many)

static void in_place(struct cpu *cpu, struct nt_args *a, struct pack_args *p, int N)
{
    const size_t bytes = (size_t)vectors_of(p->kind, p->dtype, p->K) * VB;
    p->R = rows_in_place(p->kind, p->dtype, N);
    p->N = a->N = N;
    a->groups = ceil_div((size_t)N, (size_t)p->R);
    p->groups = by_fours(N) ? a->groups : 0;
    packed_rows(p, cpu, bytes, N, p->R);
    run(cpu, a->groups, (size_t)N * (size_t)p->K, pack_x_task, p);
    a->x = p->to;
    a->runs = p->runs;
    a->R = p->R;
    glm_pool_run(cpu->pool, ceil_div((size_t)a->w->rows, (size_t)IN_PLACE_COLS),
                 products_ns((size_t)a->w->rows * a->w->cols * (N + 1)),
                 by_fours(N) ? fours_task(p->kind, a->w) : few_task(p->kind, a->w), a);
}

static void words_forward(struct cpu *cpu, struct nt_args *a, struct pack_args *p, int N)
{
    const int K = p->K, O = a->w->rows, few = N <= most_in_place(p->grouped);
    const size_t bytes = (size_t)word_chunks(K, p->grouped) * per_chunk(p->kind) * VB,
                 runs = (size_t)word_runs(K, p->grouped);
    const int turns = few && !p->grouped && N > WORD_ROWS;
    const int in_place = p->grouped && N > 1 ? WORD_ROWS : N;
    const int R = turns ? WORD_TURN : few ? in_place : MR;
    const int columns = ceil_div((size_t)O, NT_COLS);
    const float *x = p->x;
    float *out = a->out;
    int most = (int)(PACKED / (bytes + 8 * runs)) / R * R;
    if (most > (N + R - 1) / R * R)
        most = (N + R - 1) / R * R;
    p->to = cpu->packed;
    p->word_scale = (float *)(cpu->packed + (size_t)most * bytes);
    p->word_less = (int32_t *)(p->word_scale + (size_t)most * runs);
    p->R = a->R = R;
    p->pairs = !few;
    a->groups = ceil_div((size_t)N, (size_t)R);
    p->groups = turns ? a->groups : 0;
    a->x = p->to;
    a->word_scale = p->word_scale;
    a->word_less = p->word_less;
    for (int n = 0; n < N; n += most) {
        p->N = a->N = N - n < most ? N - n : most;
        p->x = x + (size_t)n * K;
        a->out = out + (size_t)n * a->ldo;
        run(cpu, ceil_div((size_t)a->N, (size_t)R), (size_t)a->N * K, pack_words_task, p);
        if (few) {
            glm_pool_run(cpu->pool, ceil_div((size_t)O, IN_PLACE_COLS),
                         products_ns((size_t)O * K * (a->N + 1)), few_words_task(p->kind, a->w), a);
            continue;
        }
        a->rows = tile_rows(cpu, a->N, a->accumulate ? NT_ROWS_ADDED : NT_ROWS, columns);
        glm_pool_run(cpu->pool, ceil_div((size_t)a->N, (size_t)a->rows) * columns,
                     products_ns((size_t)a->N * O * K), many_words_task(p->kind, a->w), a);
    }
}

/* Rows of a task: few tasks, each of which turns over its part of W. */
static void short_forward(struct cpu *cpu, struct nt_args *a, const float *x, int N)
{
    const int columns = ceil_div((size_t)a->w->rows, SHORT_TASK);
    const int least = ceil_div((size_t)N, NT_ROWS), threads = glm_pool_threads(cpu->pool);
    const int most = ceil_div((size_t)N, 8 * GROUP);
    const int tiles = threads < least ? least : threads < most ? threads : most;
    a->x = (const char *)x;
    a->N = N;
    a->rows = ceil_div((size_t)ceil_div((size_t)N, (size_t)tiles), GROUP) * GROUP;
    glm_pool_run(cpu->pool, ceil_div((size_t)N, (size_t)a->rows) * columns,
                 products_ns((size_t)N * a->w->rows * a->w->cols), short_task, a);
}

static void linear_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                           const void *bias, int N, double scale, int accumulate)
{
    struct cpu *cpu = cx;
    const int O = weight->rows, I = weight->cols;
    const enum glm_dtype kind = kind_of(cpu, weight->dtype, weight->group, O, I);
    struct pack_args p = {.x = inp, .K = I, .kind = kind, .dtype = weight->dtype};
    struct nt_args a = {.out = out,
                        .ldo = (size_t)O,
                        .ldc = 1,
                        .bias = bias,
                        .w = weight,
                        .kind = kind,
                        .accumulate = accumulate,
                        .scale = (float)scale};
    if (!N)
        return;
    const int bytes_by_group = cpu->compute == GLM_I8 && weight->group;
    if (bytes_by_group || (cpu->words && kind == GLM_F32 && glm_is_quantized(weight->dtype))) {
        p.kind = bytes_by_group ? GLM_I8 : kind;
        p.grouped = weight->group != 0;
        words_forward(cpu, &a, &p, N);
        return;
    }
    /* where sums are so short that adding up their lanes takes most of the time, rows are not few */
    const int few = is_short(weight, kind) && I <= 32 ? 1 : IN_PLACE_ROWS;
    if (N == 1 && is_short(weight, kind)) {
        a.x = inp;
        glm_pool_run(cpu->pool, ceil_div((size_t)O, (size_t)IN_PLACE_COLS),
                     products_ns((size_t)O * I * 2), one_short_row_task, &a);
        return;
    }
    if (N <= few) {
        in_place(cpu, &a, &p, N);
        return;
    }
    if (O <= IN_PLACE_ROWS && weight->dtype == GLM_F32 && !bias) { /* x is the large one */
        const struct glm_mat x = {.data = inp, .dtype = GLM_F32, .rows = N, .cols = I};
        a.w = &x;
        a.ldo = 1;
        a.ldc = (size_t)O;
        p.x = weight->data;
        in_place(cpu, &a, &p, O);
        return;
    }
    if (is_short(weight, kind)) {
        short_forward(cpu, &a, inp, N);
        return;
    }
    const int columnwise = by_column(kind, p.dtype, N);
    const size_t bytes = columnwise ? (size_t)glm_byte_runs(I) * SHORT_RUN_BYTES
                                    : (size_t)vectors_of(kind, p.dtype, I) * VB;
    p.R = a.R = columnwise ? BR : XR;
    p.am = (size_t)I;
    const int rows = packed_rows(&p, cpu, bytes, N, p.R);
    const int columns = ceil_div((size_t)O, NT_COLS);
    a.x = p.to;
    a.runs = p.runs;
    for (int n = 0; n < N; n += rows) {
        p.N = a.N = N - n < rows ? N - n : rows;
        p.x = (const float *)inp + (size_t)n * I;
        a.out = (float *)out + (size_t)n * O;
        a.rows = tile_rows(cpu, a.N, accumulate ? NT_ROWS_ADDED : NT_ROWS, columns);
        run(cpu, ceil_div((size_t)a.N, (size_t)p.R), (size_t)a.N * I,
            columnwise ? pack_bytes_task : pack_x_task, &p);
        glm_pool_run(cpu->pool, ceil_div((size_t)a.N, (size_t)a.rows) * columns,
                     products_ns((size_t)a.N * O * I), many_task(kind, weight), &a);
    }
}

/* Whether A's rows are multiplied as they lie: packing them takes longer than it saves where B is
 * narrow, and a tile's rows must not meet in the cache. Of NEON's products lanes of packed vectors
 * are operands. */
INLINE int lies_well(const struct glm_mat *b, enum glm_dtype kind, size_t ak)
{
#ifdef MADD_LANE
    (void)b, (void)kind, (void)ak;
    return 0;
#else
    return kind == GLM_F32 && ak == 1 && (b->group || !b->scale) && b->cols <= GEMM_COLS &&
           b->rows <= GEMM_UNITS;
#endif
}

/* c (M, b's columns) = scale * A B (+ c),  a(m, k) = x[m * am + k * ak] */
static void run_gemm(struct cpu *cpu, float *c, const float *x, size_t am, size_t ak,
                     const struct glm_mat *b, enum glm_dtype kind, int M, double scale,
                     int accumulate)
{
    if (!M || !b->rows) /* a sum of nothing; only accumulated products have no terms */
        return;
    const int per = glm_per_unit(kind), block = GEMM_UNITS * per;
    const size_t together = (size_t)(M < GEMM_ROWS ? M : GEMM_ROWS), unit_bytes = 4;
    const int blocks = (int)(PACKED / (together + BR) / (GEMM_UNITS * unit_bytes));
    const int terms = (kind == GLM_I8 && blocks > 1 ? blocks - 1 : blocks) * block;
    const int columns = ceil_div((size_t)b->cols, (size_t)gemm_cols(kind));
    const int lies = lies_well(b, kind, ak) && scale == 1;
    for (int k0 = 0; k0 < b->rows; k0 += terms) { /* so many that all rows of A find room */
        struct glm_mat part = *b;
        part.rows = b->rows - k0 < terms ? b->rows - k0 : terms;
        part.data = (const char *)b->data + (size_t)k0 * glm_bytes(b->dtype, (size_t)b->cols);
        part.scale = b->scale ? b->scale + (size_t)k0 * glm_scale_cols(b) : NULL;
        struct pack_args p = {.K = part.rows,
                              .R = kind == GLM_I8 ? BR : MR,
                              .kind = kind,
                              .am = am,
                              .ak = ak,
                              .factor = b->group ? NULL : part.scale,
                              .scale = (float)scale};
        const size_t units = (size_t)(kind == GLM_I8 ? glm_byte_runs(p.K) * GEMM_UNITS
                                                     : ceil_div((size_t)p.K, (size_t)per));
        const int rows = packed_rows(&p, cpu, units * unit_bytes, M, p.R);
        for (int m = 0; m < M; m += rows) {
            p.N = M - m < rows ? M - m : rows;
            p.x = x + (size_t)m * am + (size_t)k0 * ak;
            const struct gemm_args g = {.c = c + (size_t)m * b->cols,
                                        .a = (const float *)p.to,
                                        .lying = lies ? p.x : NULL,
                                        .runs = p.runs,
                                        .b = &part,
                                        .kind = kind,
                                        .M = p.N,
                                        .accumulate = accumulate || k0,
                                        .rows = tile_rows(cpu, p.N, GEMM_ROWS, columns)};
            if (lies && p.N % MR) {
                struct pack_args last = p;
                last.N = p.N % MR;
                last.x += (size_t)(p.N - last.N) * am;
                pack_a_task(&last, 0, NULL);
            } else if (!lies) {
                run(cpu, ceil_div((size_t)p.N, (size_t)p.R), (size_t)p.N * p.K,
                    kind == GLM_I8 ? pack_bytes_task : pack_a_task, &p);
            }
            glm_pool_run(cpu->pool, ceil_div((size_t)p.N, (size_t)g.rows) * columns,
                         products_ns((size_t)p.N * p.K * b->cols), gemm_task(kind, b), &g);
        }
    }
}

static void adapted_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                            const void *bias, const void *xa, const struct glm_mat *B, int N,
                            double scale)
{
    linear_forward(cx, out, inp, weight, bias, N, 1, 0);
    linear_forward(cx, out, xa, B, NULL, N, scale, 1);
}

static void linear_backward_input(void *cx, void *dinp, const void *dout,
                                  const struct glm_mat *weight, int N, double scale, int accumulate)
{
    const enum glm_dtype kind =
        kind_of(cx, weight->dtype, weight->group, weight->rows, weight->cols);
    run_gemm(cx, dinp, dout, (size_t)weight->rows, 1, weight, kind, N, scale, accumulate);
}

struct column_sum_args {
    float *out; /* (C) += scale * sum over rows of x (N, C) */
    const float *x;
    int N, C;
    float scale;
};

/* a task is a run of columns */
static void column_sum_task(const void *arg, int task, char *scratch)
{
    const struct column_sum_args *a = arg;
    const int begin = task * 64, end = begin + 64 < a->C ? begin + 64 : a->C;
    float *sum = (float *)scratch;
    for (int i = begin; i < end; i++)
        sum[i - begin] = 0;
    for (int n = 0; n < a->N; n++)
        for (int i = begin; i < end; i++)
            sum[i - begin] += a->x[(size_t)n * a->C + i];
    for (int i = begin; i < end; i++)
        a->out[i] += a->scale * sum[i - begin];
}

static void linear_backward_weight(void *cx, void *dweight, void *dbias, const void *dout,
                                   const void *inp, int N, int O, int I, double scale)
{
    struct cpu *cpu = cx;
    if (dweight) {
        const struct glm_mat b = {.data = inp, .dtype = GLM_F32, .rows = N, .cols = I};
        run_gemm(cpu, dweight, dout, 1, (size_t)O, &b, kind_of(cpu, GLM_F32, 0, O, I), O, scale, 1);
    }
    if (dbias) {
        const struct column_sum_args a = {dbias, dout, N, O, (float)scale};
        run(cpu, ceil_div((size_t)O, 64), (size_t)N * O, column_sum_task, &a);
    }
}

static void linear_swiglu_forward(void *cx, void *out, void *h, const void *inp,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    linear_forward(cx, h, inp, weight, bias, N, 1, 0);
    swiglu_forward(cx, out, h, N, weight->rows / 2);
}

static void rmsnorm_swiglu_forward(void *cx, void *out, void *h, void *ln, void *rstd,
                                   const void *inp, const void *norm, const struct glm_mat *weight,
                                   const void *bias, int N, double eps)
{
    rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
    linear_swiglu_forward(cx, out, h, ln, weight, bias, N);
}

static void linear_rope_append(void *cx, struct glm_kv cache, void *qkv, const void *inp,
                               const struct glm_mat *weight, const void *bias, const void *table,
                               const int32_t *position, const int32_t *slot, int N,
                               struct glm_heads heads, int rotary_dim)
{
    linear_forward(cx, qkv, inp, weight, bias, N, 1, 0);
    rope_append(cx, cache, qkv, table, position, slot, N, heads, rotary_dim);
}

static void rmsnorm_rope_append(void *cx, struct glm_kv cache, void *qkv, void *ln, void *rstd,
                                const void *inp, const void *norm, const struct glm_mat *weight,
                                const void *bias, const void *table, const int32_t *position,
                                const int32_t *slot, int N, struct glm_heads heads, int rotary_dim,
                                double eps)
{
    rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
    linear_rope_append(cx, cache, qkv, ln, weight, bias, table, position, slot, N, heads,
                       rotary_dim);
}

static void swiglu_linear_forward(void *cx, void *out, void *act, const void *h,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    swiglu_forward(cx, act, h, N, weight->cols);
    linear_forward(cx, out, act, weight, bias, N, 1, 0);
}
static void swiglu_linear_backward(void *cx, void *dinp, const void *dact, void *h,
                                   const struct glm_mat *weight, int N)
{
    swiglu_backward(cx, h, dact, h, N, weight->rows / 2);
    linear_backward_input(cx, dinp, h, weight, N, 1, 0);
}

static void swiglu_mlp_forward(void *cx, void *out, void *rstd, void *sum, void *work, void *h,
                               const void *b, const void *weight, const struct glm_mat *up,
                               const struct glm_mat *down, const void *bias, int N, double eps)
{
    add_rmsnorm_forward(cx, work, rstd, sum, sum, b, weight, N, up->cols, eps);
    linear_forward(cx, h, work, up, NULL, N, 1, 0);
    if (out)
        swiglu_linear_forward(cx, out, work, h, down, bias, N);
}
static void swiglu_mlp_backward(void *cx, void *dinp, void *h, const void *dout,
                                const struct glm_mat *up, const struct glm_mat *down, int N)
{
    linear_backward_input(cx, dinp, dout, down, N, 1, 0);
    swiglu_linear_backward(cx, dinp, dinp, h, up, N);
}
