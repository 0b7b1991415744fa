/* The CPU's op table: cuts each op into tasks and hands them to the pool. The arithmetic is in
 * tmpl_*.h. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { PARTIALS = 1024, FINDERS = 64, ELEMENTS = 1 << 12 };
#define PACKED ((size_t)32 << 20) /* bytes of an operand that are packed at a time */

struct cpu {
    struct glm_backend be;
    struct glm_pool *pool;
    const struct glm_cpu_kernels *k;
    enum glm_dtype compute; /* of the large products */
    char *packed;           /* (PACKED), touched where it is used */
    char name[64];
    double partial[PARTIALS];
    int found[FINDERS];
};

static int ceil_div(size_t n, size_t by) { return (int)((n + by - 1) / by); }

/* About how long one thread takes, in ns: for so many elements, each as much work as an addition;
 * for so many multiplications. */
static size_t ns_of(size_t elements) { return elements / 4; }
static size_t products_ns(size_t n) { return n / 32; }

/* Runs fn over `tasks` parts of so many elements. */
static void run(struct cpu *cpu, int tasks, size_t elements, glm_task fn, const void *args)
{
    glm_pool_run(cpu->pool, tasks, ns_of(elements), fn, args);
}

/* Rows for one task, so that a task has some work to do. */
static int rows_for(size_t width)
{
    return width >= ELEMENTS ? 1 : (int)(ELEMENTS / (width ? width : 1));
}

static void run_rows(struct cpu *cpu, glm_task fn, struct row_args *a, size_t width)
{
    a->rows = rows_for(width);
    run(cpu, ceil_div((size_t)a->N, (size_t)a->rows), a->N * width, fn, a);
}

static void run_flat(struct cpu *cpu, glm_task fn, struct flat_args *a)
{
    a->piece = a->n / ELEMENTS > 1 << 20 ? a->n >> 20 : ELEMENTS;
    run(cpu, ceil_div(a->n, a->piece), a->n, fn, a);
}

/* ---- embedding, gather, cache: copies of rows */

struct copy_args {
    const struct glm_cpu_kernels *k;
    void *out, *out2;
    const void *inp;
    const struct glm_mat *weight;
    const int32_t *index;
    int N, C, rows; /* rows of a task */
    size_t stride;
};

static void run_copy(struct cpu *cpu, glm_task fn, struct copy_args *a)
{
    a->k = cpu->k;
    a->rows = rows_for((size_t)a->C);
    run(cpu, ceil_div((size_t)a->N, (size_t)a->rows), (size_t)a->N * a->C, fn, a);
}

static void embedding_task(const void *arg, int task, char *scratch)
{
    const struct copy_args *a = arg;
    const struct glm_mat *w = a->weight;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++)
        a->k->load_row((float *)a->out + (size_t)n * a->C,
                       (const char *)w->data + glm_bytes(w->dtype, (size_t)a->index[n] * a->C),
                       w->dtype, a->C);
}

static void embedding_forward(void *cx, void *out, const struct glm_mat *weight, const int32_t *ids,
                              int N)
{
    struct copy_args a = {.out = out, .weight = weight, .index = ids, .N = N, .C = weight->cols};
    run_copy(cx, embedding_task, &a);
}

/* ids repeat, so a task is a run of columns, and rows go in order */
static void embedding_backward_task(const void *arg, int task, char *scratch)
{
    const struct copy_args *a = arg;
    const int begin = task * PIECE, left = a->C - begin, count = left < PIECE ? left : PIECE;
    (void)scratch;
    for (int n = 0; n < a->N; n++)
        a->k->add_row((float *)a->out + (size_t)a->index[n] * a->C + begin,
                      (const float *)a->inp + (size_t)n * a->C + begin, count);
}

static void embedding_backward(void *cx, void *dweight, const void *dout, const int32_t *ids, int N,
                               int C)
{
    struct cpu *cpu = cx;
    const struct copy_args a = {
        .k = cpu->k, .out = dweight, .inp = dout, .index = ids, .N = N, .C = C};
    run(cpu, ceil_div((size_t)C, PIECE), (size_t)N * C, embedding_backward_task, &a);
}

static void gather_task(const void *arg, int task, char *scratch)
{
    const struct copy_args *a = arg;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++)
        memcpy((float *)a->out + (size_t)n * a->C, (const float *)a->inp + a->index[n] * a->stride,
               (size_t)a->C * 4);
}

static void gather_forward(void *cx, void *out, const void *inp, const int32_t *rows, int M, int C)
{
    struct copy_args a = {
        .out = out, .inp = inp, .index = rows, .N = M, .C = C, .stride = (size_t)C};
    run_copy(cx, gather_task, &a);
}

static void gather_backward_task(const void *arg, int task, char *scratch)
{
    const struct copy_args *a = arg;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++)
        a->k->add_row((float *)a->out + (size_t)a->index[n] * a->C,
                      (const float *)a->inp + (size_t)n * a->C, a->C);
}

static void gather_backward(void *cx, void *dinp, const void *dout, const int32_t *rows, int M,
                            int C)
{
    struct copy_args a = {.out = dinp, .inp = dout, .index = rows, .N = M, .C = C};
    run_copy(cx, gather_backward_task, &a); /* rows are distinct */
}

static void kv_append_task(const void *arg, int task, char *scratch)
{
    const struct copy_args *a = arg;
    const size_t KV = (size_t)a->C / 2;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *row = (const float *)a->inp + (size_t)n * a->stride;
        memcpy((float *)a->out + a->index[n] * KV, row, KV * 4);
        memcpy((float *)a->out2 + a->index[n] * KV, row + KV, KV * 4);
    }
}

static void kv_append(void *cx, struct glm_kv cache, const void *qkv, const int32_t *slot, int N,
                      struct glm_heads heads)
{
    const size_t KV = (size_t)heads.KVH * heads.HD, q = (size_t)heads.NH * heads.HD;
    struct copy_args a = {.out = cache.k,
                          .out2 = cache.v,
                          .inp = (const float *)qkv + q,
                          .index = slot,
                          .N = N,
                          .C = (int)(2 * KV),
                          .stride = q + 2 * KV};
    run_copy(cx, kv_append_task, &a);
}

static void prefix_forward(void *cx, void *out, const void *inp, int P, int J, int KV, int copies,
                           const struct glm_dropout *dropout)
{
    struct cpu *cpu = cx;
    const struct prefix_args a = {out, inp, P, J, KV, copies, rows_for((size_t)KV), dropout};
    const size_t rows = (size_t)J * copies * P;
    run(cpu, ceil_div(rows, (size_t)a.rows), rows * KV, cpu->k->prefix_forward, &a);
}

static void prefix_backward(void *cx, void *dinp, const void *dout, int P, int J, int KV,
                            int copies, const struct glm_dropout *dropout)
{
    struct cpu *cpu = cx;
    const struct prefix_args a = {dinp,   dout, P, J, KV, copies, rows_for((size_t)KV * copies),
                                  dropout};
    run(cpu, ceil_div((size_t)P * J, (size_t)a.rows), (size_t)P * J * KV * copies,
        cpu->k->prefix_backward, &a);
}

/* ---- linear: the arithmetic is chosen, one operand packed, then tasks make tiles of the output */

/* Matrices that are thinner than this in float32 are adapters: their products stay in float. */
enum { THIN = 256 };

static enum glm_dtype kind_of(const struct cpu *cpu, enum glm_dtype dtype, int group, int rows,
                              int cols)
{
    const int thin = rows < cols ? rows : cols;
    if (cpu->compute == GLM_F32 || dtype == GLM_F64 || (dtype == GLM_F32 && thin <= THIN))
        return GLM_F32;
    return cpu->compute == GLM_I8 && dtype == GLM_I8 && !group ? GLM_I8 : GLM_BF16;
}

/* Rows of a tile, at most `most`: the other operand is packed once for each, so many; but tasks
 * enough for all threads to end together. What is computed does not depend on it. */
static int tile_rows(const struct cpu *cpu, int N, int most, int columns)
{
    const int threads = glm_pool_threads(cpu->pool);
    int tiles = ceil_div((size_t)N, (size_t)most);
    while (tiles * columns < 6 * threads && N > 8 * ROW_GROUP * tiles)
        tiles++;
    if (tiles * columns < 6 * threads) /* a few of equal size: as many for each thread */
        while (tiles * columns % threads && N > 4 * ROW_GROUP * tiles)
            tiles++;
    return tiles ? ceil_div((size_t)ceil_div((size_t)N, (size_t)tiles), ROW_GROUP) * ROW_GROUP : 1;
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

static void in_place(struct cpu *cpu, struct nt_args *a, struct pack_args *p, int N)
{
    const struct glm_cpu_kernels *k = cpu->k;
    const size_t bytes =
        (size_t)k->packed_vectors(p->kind, p->dtype, p->K) * (size_t)k->vector_bytes;
    p->R = k->in_place_rows[N > 1];
    p->N = a->N = N;
    packed_rows(p, cpu, bytes, N, p->R);
    run(cpu, ceil_div((size_t)N, (size_t)p->R), (size_t)N * (size_t)p->K, k->pack_x, p);
    a->x = p->to;
    a->runs = p->runs;
    a->R = p->R;
    glm_pool_run(cpu->pool, ceil_div((size_t)a->w->rows, (size_t)k->in_place_cols),
                 products_ns((size_t)a->w->rows * a->w->cols * (N + 1)), k->nt_in_place, a);
}

static void linear_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                           const void *bias, int N, double scale, int accumulate)
{
    struct cpu *cpu = cx;
    const struct glm_cpu_kernels *k = cpu->k;
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
    if (N <= k->most_in_place) {
        if (N)
            in_place(cpu, &a, &p, N);
        return;
    }
    if (O <= k->most_in_place && weight->dtype == GLM_F32 && !bias) { /* x is the large one */
        const struct glm_mat x = {.data = inp, .dtype = GLM_F32, .rows = N, .cols = I};
        a.w = &x;
        a.ldo = 1;
        a.ldc = (size_t)O;
        p.x = weight->data;
        in_place(cpu, &a, &p, O);
        return;
    }
    const size_t bytes = (size_t)k->packed_vectors(kind, p.dtype, I) * (size_t)k->vector_bytes;
    const int rows = packed_rows(&p, cpu, bytes, N, k->x_rows);
    const int columns = ceil_div((size_t)O, NT_COLS);
    p.R = k->x_rows;
    a.x = p.to;
    a.runs = p.runs;
    for (int n = 0; n < N; n += rows) {
        p.N = a.N = N - n < rows ? N - n : rows;
        p.x = (const float *)inp + (size_t)n * I;
        a.out = (float *)out + (size_t)n * O;
        a.rows = tile_rows(cpu, a.N, accumulate ? NT_ROWS_ADDED : NT_ROWS, columns);
        run(cpu, ceil_div((size_t)a.N, (size_t)p.R), (size_t)a.N * I, k->pack_x, &p);
        glm_pool_run(cpu->pool, ceil_div((size_t)a.N, (size_t)a.rows) * columns,
                     products_ns((size_t)a.N * O * I), k->nt, &a);
    }
}

/* c (M, b's columns) = scale * A B (+ c),  a(m, k) = x[m * am + k * ak] */
static void run_gemm(struct cpu *cpu, float *c, const float *x, size_t am, size_t ak,
                     const struct glm_mat *b, enum glm_dtype kind, int M, double scale,
                     int accumulate)
{
    const struct glm_cpu_kernels *k = cpu->k;
    if (!M || !b->rows) /* a sum of nothing; only accumulated products have no terms */
        return;
    const int per = glm_per_unit(kind), block = GEMM_UNITS * per;
    const size_t together = (size_t)(M < GEMM_ROWS ? M : GEMM_ROWS), unit_bytes = 4;
    const int blocks = (int)(PACKED / (together + (size_t)k->a_rows) / (GEMM_UNITS * unit_bytes));
    const int terms = (kind == GLM_I8 && blocks > 1 ? blocks - 1 : blocks) * block;
    const int columns = ceil_div((size_t)b->cols, GEMM_COLS);
    for (int k0 = 0; k0 < b->rows; k0 += terms) { /* so many that all rows of A find room */
        struct glm_mat part = *b;
        part.rows = b->rows - k0 < terms ? b->rows - k0 : terms;
        part.data = (const char *)b->data + (size_t)k0 * glm_bytes(b->dtype, (size_t)b->cols);
        part.scale = b->scale ? b->scale + (size_t)k0 * glm_scale_cols(b) : NULL;
        struct pack_args p = {.K = part.rows,
                              .R = k->a_rows,
                              .kind = kind,
                              .am = am,
                              .ak = ak,
                              .factor = b->group ? NULL : part.scale,
                              .scale = (float)scale};
        const int rows = packed_rows(
            &p, cpu, (size_t)ceil_div((size_t)p.K, (size_t)per) * unit_bytes, M, k->a_rows);
        for (int m = 0; m < M; m += rows) {
            p.N = M - m < rows ? M - m : rows;
            p.x = x + (size_t)m * am + (size_t)k0 * ak;
            const struct gemm_args g = {.c = c + (size_t)m * b->cols,
                                        .a = (const float *)p.to,
                                        .runs = p.runs,
                                        .b = &part,
                                        .kind = kind,
                                        .M = p.N,
                                        .accumulate = accumulate || k0,
                                        .rows = tile_rows(cpu, p.N, GEMM_ROWS, columns)};
            run(cpu, ceil_div((size_t)p.N, (size_t)k->a_rows), (size_t)p.N * p.K, k->pack_a, &p);
            glm_pool_run(cpu->pool, ceil_div((size_t)p.N, (size_t)g.rows) * columns,
                         products_ns((size_t)p.N * p.K * b->cols), k->gemm, &g);
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

/* a task is a run of columns: out += sum over rows of a (N, C) */
static void column_sum_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int begin = task * 64, end = begin + 64 < a->C ? begin + 64 : a->C;
    float *sum = (float *)scratch;
    for (int i = begin; i < end; i++)
        sum[i - begin] = 0;
    for (int n = 0; n < a->N; n++)
        for (int i = begin; i < end; i++)
            sum[i - begin] += ((const float *)a->a)[(size_t)n * a->C + i];
    for (int i = begin; i < end; i++)
        ((float *)a->out)[i] += sum[i - begin];
}

static void linear_backward_weight(void *cx, void *dweight, void *dbias, const void *dout,
                                   const void *inp, int N, int O, int I, double scale)
{
    struct cpu *cpu = cx;
    if (dweight) {
        const struct glm_mat b = {.data = inp, .dtype = GLM_F32, .rows = N, .cols = I};
        const enum glm_dtype kind = kind_of(cpu, GLM_F32, 0, O, I);
        run_gemm(cpu, dweight, dout, 1, (size_t)O, &b, kind == GLM_I8 ? GLM_BF16 : kind, O, scale,
                 1);
    }
    if (dbias) {
        const struct row_args a = {.out = dbias, .a = dout, .N = N, .C = O};
        run(cpu, ceil_div((size_t)O, 64), (size_t)N * O, column_sum_task, &a);
    }
}

/* ---- norms, rotary, attention */

static void rmsnorm_forward(void *cx, void *out, void *rstd, const void *inp, const void *weight,
                            int N, int C, double eps)
{
    struct cpu *cpu = cx;
    struct row_args a = {
        .out = out, .extra = rstd, .a = inp, .b = weight, .N = N, .C = C, .eps = eps};
    run_rows(cpu, cpu->k->rmsnorm_forward, &a, (size_t)C);
}

static void add(void *cx, void *out, const void *a, const void *b, size_t n);

static void add_rmsnorm_forward(void *cx, void *out, void *rstd, void *sum, const void *a,
                                const void *b, const void *weight, int N, int C, double eps)
{
    add(cx, sum, a, b, (size_t)N * C);
    rmsnorm_forward(cx, out, rstd, sum, weight, N, C, eps);
}

static void rmsnorm_backward(void *cx, void *dinp, void *dweight, const void *dout, const void *inp,
                             const void *weight, const void *rstd, int N, int C)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = dinp, .a = dout, .b = inp, .c = weight, .d = rstd, .N = N, .C = C};
    run_rows(cpu, cpu->k->rmsnorm_backward, &a, (size_t)C);
    if (dweight) {
        a.out = dweight;
        run(cpu, ceil_div((size_t)C, 64), (size_t)N * C, cpu->k->rmsnorm_dweight, &a);
    }
}

static void rope(void *cx, void *x, const void *table, const int32_t *position, int N, int heads,
                 int HD, int stride, int rotary_dim, float sign)
{
    struct cpu *cpu = cx;
    const struct rope_args r = {x,      table,      position,
                                N,      heads,      HD,
                                stride, rotary_dim, rows_for((size_t)heads * rotary_dim * 2),
                                sign};
    run(cpu, ceil_div((size_t)N, (size_t)r.rows), (size_t)N * heads * rotary_dim * 2, cpu->k->rope,
        &r);
}

static void rope_forward(void *cx, void *x, const void *table, const int32_t *position, int N,
                         int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, x, table, position, N, heads, HD, stride, rotary_dim, 1);
}

static void rope_backward(void *cx, void *dx, const void *table, const int32_t *position, int N,
                          int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, dx, table, position, N, heads, HD, stride, rotary_dim, -1);
}

/* Of the queries of all segments with all keys that they may see, about. */
static size_t attention_ns(const struct glm_segment *segments, int n, struct glm_heads heads)
{
    size_t pairs = 0;
    for (int i = 0; i < n; i++) {
        const struct glm_segment *s = &segments[i];
        pairs += (size_t)s->count * heads.NH *
                 ((size_t)s->shared_count + s->past_count + s->count / 2 + 1);
    }
    return pairs + products_ns(pairs * 2 * heads.HD);
}

static void attention_forward(void *cx, void *out, void *lse, const void *qkv, struct glm_kv cache,
                              const struct glm_segment *segments, int n_segments,
                              struct glm_heads heads)
{
    struct cpu *cpu = cx;
    const struct att_args a = {.out = out,
                               .lse = lse,
                               .qkv = qkv,
                               .cache = cache,
                               .segments = segments,
                               .n_segments = n_segments,
                               .heads = heads};
    int tasks = 0;
    for (int i = 0; i < n_segments; i++)
        tasks += att_parts(&segments[i], heads) * heads.KVH;
    glm_pool_run(
        cpu->pool, tasks, attention_ns(segments, n_segments, heads),
        cpu->compute == GLM_F32 ? cpu->k->attention_forward : cpu->k->attention_forward_bf16, &a);
}

static void attention_backward(void *cx, void *dqkv, struct glm_kv dcache, const void *dout,
                               const void *out, const void *lse, const void *qkv,
                               struct glm_kv cache, const struct glm_segment *segments,
                               int n_segments, struct glm_heads heads)
{
    struct cpu *cpu = cx;
    const struct att_args a = {.out = (float *)out,
                               .lse = (float *)lse,
                               .dqkv = dqkv,
                               .dout = dout,
                               .qkv = qkv,
                               .cache = cache,
                               .dcache = dcache,
                               .segments = segments,
                               .n_segments = n_segments,
                               .heads = heads};
    glm_pool_run(
        cpu->pool, dcache.k ? heads.KVH : n_segments * heads.KVH,
        3 * attention_ns(segments, n_segments, heads),
        cpu->compute == GLM_F32 ? cpu->k->attention_backward : cpu->k->attention_backward_bf16, &a);
}

/* ---- activations, dropout, loss */

static void swiglu_forward(void *cx, void *out, const void *inp, int N, int F)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = out, .a = inp, .N = N, .C = F};
    run_rows(cpu, cpu->k->swiglu_forward, &a, (size_t)2 * F);
}

static void swiglu_backward(void *cx, void *dinp, const void *dout, const void *inp, int N, int F)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = dinp, .a = dout, .b = inp, .N = N, .C = F};
    run_rows(cpu, cpu->k->swiglu_backward, &a, (size_t)2 * F);
}

static void linear_swiglu_forward(void *cx, void *out, void *h, const void *inp,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    linear_forward(cx, h, inp, weight, bias, N, 1, 0);
    swiglu_forward(cx, out, h, N, weight->rows / 2);
}

static void tanh_forward(void *cx, void *out, const void *inp, size_t n)
{
    struct cpu *cpu = cx;
    struct flat_args a = {.p = {out}, .q = {inp}, .n = n};
    run_flat(cpu, cpu->k->tanh_forward, &a);
}

static void tanh_backward(void *cx, void *dinp, const void *dout, const void *out, size_t n)
{
    struct cpu *cpu = cx;
    struct flat_args a = {.p = {dinp}, .q = {dout, out}, .n = n};
    run_flat(cpu, cpu->k->tanh_backward, &a);
}

static void dropout_forward(void *cx, void *out, const void *inp, int N, int C,
                            const struct glm_dropout *dropout)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = out, .a = inp, .dropout = dropout, .N = N, .C = C};
    run_rows(cpu, cpu->k->dropout_forward, &a, (size_t)4 * C);
}

static void dropout_backward(void *cx, void *dinp, const void *dout, int N, int C,
                             const struct glm_dropout *dropout)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = dinp, .a = dout, .dropout = dropout, .N = N, .C = C};
    run_rows(cpu, cpu->k->dropout_backward, &a, (size_t)4 * C);
}

static void cross_entropy_forward(void *cx, void *loss, void *lse, const void *logits,
                                  const int32_t *target, int M, int V)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = loss, .extra = lse, .a = logits, .index = target, .N = M, .C = V};
    run_rows(cpu, cpu->k->cross_entropy_forward, &a, (size_t)4 * V);
}

static void cross_entropy_backward(void *cx, void *logits, const void *lse, const int32_t *target,
                                   int M, int V, double scale)
{
    struct cpu *cpu = cx;
    struct row_args a = {.out = logits, .a = lse, .index = target, .N = M, .C = V, .eps = scale};
    run_rows(cpu, cpu->k->cross_entropy_backward, &a, (size_t)4 * V);
}

/* ---- element by element */

static void add(void *cx, void *out, const void *a, const void *b, size_t n)
{
    struct cpu *cpu = cx;
    struct flat_args f = {.p = {out}, .q = {a, b}, .n = n};
    run_flat(cpu, cpu->k->add, &f);
}

static void sum_squares(void *cx, double *out, const void *x, size_t n)
{
    struct cpu *cpu = cx;
    *out = 0;
    for (size_t begin = 0; begin < n; begin += (size_t)PARTIALS * PIECE) {
        const size_t count =
            n - begin < (size_t)PARTIALS * PIECE ? n - begin : (size_t)PARTIALS * PIECE;
        const int pieces = ceil_div(count, PIECE);
        const struct flat_args f = {
            .p = {cpu->partial}, .q = {(const float *)x + begin}, .n = count};
        run(cpu, pieces, count, cpu->k->sum_squares, &f);
        for (int i = 0; i < pieces; i++)
            *out += cpu->partial[i];
    }
}

static void first_nonfinite(void *cx, int *row, const void *x, int N, int C)
{
    struct cpu *cpu = cx;
    struct row_args a = {
        .out = cpu->found, .a = x, .N = N, .C = C, .rows = ceil_div((size_t)N, FINDERS)};
    const int tasks = N ? ceil_div((size_t)N, (size_t)a.rows) : 0;
    run(cpu, tasks, (size_t)N * C, cpu->k->nonfinite, &a);
    *row = -1;
    for (int i = 0; i < tasks && *row < 0; i++)
        *row = cpu->found[i];
}

static void choose(void *cx, int32_t *id, void *x, int M, int V, const struct glm_choice *choices,
                   const int32_t *touched)
{
    struct cpu *cpu = cx;
    if (!choices) {
        struct row_args a = {.out = id, .a = x, .N = M, .C = V};
        run_rows(cpu, cpu->k->argmax, &a, (size_t)V);
        return;
    }
    const struct choose_args a = {id, x, V, choices, touched};
    glm_pool_run(cpu->pool, M, ns_of((size_t)8 * M * V), glm_choose_task, &a);
}

static void adamw(void *cx, void *p, const void *grad, void *m, void *v, size_t n, double lr,
                  double b1, double b2, double eps, double wd, int t, double gscale)
{
    struct cpu *cpu = cx;
    struct flat_args f = {
        .p = {p, m, v},
        .q = {grad},
        .n = n,
        .k = {lr, b1, b2, eps, lr * wd, 1 / (1 - pow(b1, t)), 1 / (1 - pow(b2, t)), gscale},
    };
    run_flat(cpu, cpu->k->adamw, &f);
}

static void merge(void *cx, void *data, enum glm_dtype dtype, const void *B, const void *A, int O,
                  int I, int R, double scale)
{
    struct cpu *cpu = cx;
    const struct merge_args a = {data, dtype, B, A, O, I, R, rows_for((size_t)I * R), (float)scale};
    glm_pool_run(cpu->pool, ceil_div((size_t)O, (size_t)a.rows), products_ns((size_t)O * I * R),
                 cpu->k->merge, &a);
}

static void convert(void *cx, void *out, enum glm_dtype out_dtype, const void *inp,
                    enum glm_dtype inp_dtype, size_t n)
{
    struct cpu *cpu = cx;
    struct flat_args f = {.p = {out}, .q = {inp}, .n = n, .from = inp_dtype, .to = out_dtype};
    run_flat(cpu, cpu->k->convert, &f);
}

static void quantize(void *cx, void *data, uint16_t *scale, enum glm_dtype dtype, int group,
                     const void *inp, enum glm_dtype inp_dtype, int rows, int cols)
{
    struct cpu *cpu = cx;
    const struct quantize_args a = {
        data, scale, inp, dtype, inp_dtype, group, rows, cols, rows_for((size_t)cols * 8)};
    run(cpu, ceil_div((size_t)rows, (size_t)a.rows_a_task), (size_t)rows * cols * 8,
        cpu->k->quantize, &a);
}

static void rope_append(void *cx, struct glm_kv cache, void *qkv, const void *table,
                        const int32_t *position, const int32_t *slot, int N, struct glm_heads heads,
                        int rotary_dim)
{
    rope_forward(cx, qkv, table, position, N, heads.NH + heads.KVH, heads.HD,
                 (heads.NH + 2 * heads.KVH) * heads.HD, rotary_dim);
    kv_append(cx, cache, qkv, slot, N, heads);
}

static const struct glm_ops cpu_ops = {
#define OP(op, extent, ...) .op = op,
#include "ops.h"
};

/* ---- memory and life */

/* Large blocks lie on huge pages where the system has them: fewer faults when they are first
 * written, fewer misses of address translation when they are walked. */
static void *cpu_alloc(struct glm_backend *be, size_t bytes)
{
    const size_t slack = 64, large = (size_t)8 << 20;
    be->allocated++;
    if (bytes > SIZE_MAX / 2)
        return NULL;
    return bytes < large ? aligned_alloc(64, (bytes + 63) / 64 * 64 + slack)
                         : glm_aligned(bytes + slack);
}
static void cpu_free(struct glm_backend *be, void *p)
{
    (void)be;
    free(p);
}
static void cpu_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    (void)be;
    if (bytes)
        memcpy(to, from, bytes);
}
static void cpu_zero(struct glm_backend *be, void *p, size_t bytes)
{
    (void)be;
    if (bytes)
        memset(p, 0, bytes);
}
static struct glm_pool *pool_of(struct glm_backend *be) { return ((struct cpu *)be->cx)->pool; }
static void cpu_set_threads(struct glm_backend *be, int threads)
{
    glm_pool_set_threads(pool_of(be), threads);
}
static int cpu_threads(struct glm_backend *be) { return glm_pool_threads(pool_of(be)); }
static void cpu_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg)
{
    glm_pool_set_poll(pool_of(be), poll, arg);
}
static int cpu_stopped(struct glm_backend *be) { return glm_pool_stopped(pool_of(be)); }
static void cpu_destroy(struct glm_backend *be)
{
    struct cpu *cpu = be->cx;
    glm_pool_destroy(cpu->pool);
    free(cpu->packed);
    free(cpu);
}

static int runs_avx2(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    const int f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C; /* clang's builtin lacks it */
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static int runs_avx512(void)
{
#if defined(__x86_64__)
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

static int runs_avx512bf16(void)
{
#if defined(__x86_64__)
    return runs_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
    return 0;
#endif
}

const char *glm_cpu_variants(void)
{
    return runs_avx512bf16() ? "avx512bf16,avx512,avx2,generic"
           : runs_avx512()   ? "avx512,avx2,generic"
           : runs_avx2()     ? "avx2,generic"
                             : "generic";
}

static const struct glm_cpu_kernels *kernels_of(const char *isa, size_t length)
{
#define IS(name) (length == strlen(name) && strncmp(isa, name, length) == 0)
#if defined(__x86_64__)
    if (IS("avx512bf16") && runs_avx512bf16())
        return &glm_cpu_kernels_avx512bf16;
    if (IS("avx512") && runs_avx512())
        return &glm_cpu_kernels_avx512;
    if (IS("avx2") && runs_avx2())
        return &glm_cpu_kernels_avx2;
#endif
    return IS("generic") ? &glm_cpu_kernels_generic : NULL;
#undef IS
}

glm_status glm_cpu_create(struct glm_backend **out, const char *name, struct glm_error *err)
{
    const char *isa = name[3] == ':' ? name + 4 : "", *type = strchr(name, '/');
    const size_t length = type ? (size_t)(type - isa) : strlen(isa);
    const struct glm_cpu_kernels *k = kernels_of(isa, length);
    if (!k)
        return glm_fail(err, GLM_EVALUE, "backend '%s': this processor runs %s", name,
                        glm_cpu_variants());
    const enum glm_dtype compute = !type || strcmp(type, "/float32") == 0 ? GLM_F32
                                   : strcmp(type, "/bfloat16") == 0       ? GLM_BF16
                                   : strcmp(type, "/int8") == 0           ? GLM_I8
                                                                          : GLM_F64;
    if (compute == GLM_F64)
        return glm_fail(err, GLM_EVALUE, "backend '%s': expected /float32, /bfloat16 or /int8",
                        name);
    if (compute != GLM_F32 && !k->fast)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': these kernels multiply in float32; bfloat16 and int8 need "
                        "avx512bf16, this processor runs %s",
                        name, glm_cpu_variants());
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu) {
        cpu->pool = glm_pool_create();
        cpu->packed = glm_aligned(PACKED);
    }
    if (!cpu || !cpu->pool || !cpu->packed) {
        if (cpu) {
            glm_pool_destroy(cpu->pool);
            free(cpu->packed);
        }
        free(cpu);
        return glm_fail(err, GLM_EMEMORY, "cpu backend: %zu bytes could not be taken",
                        sizeof *cpu + GLM_SCRATCH + PACKED);
    }
    cpu->k = k;
    cpu->compute = compute;
    snprintf(cpu->name, sizeof cpu->name, "%s", name);
    cpu->be = (struct glm_backend){
        .name = cpu->name,
        .ops = &cpu_ops,
        .cx = cpu,
        .real_size = 4,
        .real = GLM_F32,
        .kept_h = compute == GLM_F32 ? GLM_F32 : GLM_BF16,
        .alloc = cpu_alloc,
        .free = cpu_free,
        .upload = cpu_copy,
        .download = cpu_copy,
        .copy = cpu_copy,
        .zero = cpu_zero,
        .set_threads = cpu_set_threads,
        .threads = cpu_threads,
        .set_poll = cpu_set_poll,
        .stopped = cpu_stopped,
        .destroy = cpu_destroy,
    };
    *out = &cpu->be;
    return GLM_OK;
}
