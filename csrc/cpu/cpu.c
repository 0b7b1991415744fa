/* The CPU's op table: cuts each op into tasks and hands them to the pool. The arithmetic is in
 * tmpl_*.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { PARTIALS = 1024, FINDERS = 64, ELEMENTS = 1 << 14 };

struct cpu {
    struct glm_backend be;
    struct glm_pool *pool;
    const struct glm_cpu_kernels *k;
    double partial[PARTIALS];
    int found[FINDERS];
};

static int ceil_div(size_t n, size_t by) { return (int)((n + by - 1) / by); }

/* Rows for one task, so that a task has some work to do. */
static int rows_for(size_t width)
{
    return width >= ELEMENTS ? 1 : (int)(ELEMENTS / (width ? width : 1));
}

static void run_rows(struct cpu *cpu, glm_task fn, struct row_args *a, size_t width)
{
    a->rows = rows_for(width);
    glm_pool_run(cpu->pool, ceil_div((size_t)a->N, (size_t)a->rows), fn, a);
}

static void run_flat(struct cpu *cpu, glm_task fn, struct flat_args *a)
{
    a->piece = a->n / ELEMENTS > 1 << 20 ? a->n >> 20 : ELEMENTS;
    glm_pool_run(cpu->pool, ceil_div(a->n, a->piece), fn, a);
}

/* ---- embedding, gather, cache: copies */

struct embedding_args {
    struct cpu *cpu;
    float *out;
    const struct glm_mat *weight;
    const int32_t *ids;
    int N, rows;
};

static void embedding_task(const void *arg, int task, char *scratch)
{
    const struct embedding_args *e = arg;
    const int C = e->weight->cols;
    (void)scratch;
    for (int n = task * e->rows; n < e->N && n < (task + 1) * e->rows; n++)
        e->cpu->k->load_row(e->out + (size_t)n * C,
                            (const char *)e->weight->data +
                                glm_bytes(e->weight->dtype, (size_t)e->ids[n] * C),
                            e->weight->dtype, C);
}

static void embedding_forward(void *cx, void *out, const struct glm_mat *weight, const int32_t *ids,
                              int N)
{
    struct cpu *cpu = cx;
    const struct embedding_args e = {cpu, out, weight, ids, N, rows_for((size_t)weight->cols)};
    glm_pool_run(cpu->pool, ceil_div((size_t)N, (size_t)e.rows), embedding_task, &e);
}

static void embedding_backward(void *cx, void *dweight, const void *dout, const int32_t *ids, int N,
                               int C)
{
    (void)cx;
    for (int n = 0; n < N; n++) { /* in order: ids repeat */
        float *to = (float *)dweight + (size_t)ids[n] * C;
        const float *from = (const float *)dout + (size_t)n * C;
        for (int i = 0; i < C; i++)
            to[i] += from[i];
    }
}

static void gather_forward(void *cx, void *out, const void *inp, const int32_t *rows, int M, int C)
{
    (void)cx;
    for (int m = 0; m < M; m++)
        memcpy((float *)out + (size_t)m * C, (const float *)inp + (size_t)rows[m] * C,
               (size_t)C * 4);
}

static void gather_backward(void *cx, void *dinp, const void *dout, const int32_t *rows, int M,
                            int C)
{
    (void)cx;
    for (int m = 0; m < M; m++) {
        float *to = (float *)dinp + (size_t)rows[m] * C;
        const float *from = (const float *)dout + (size_t)m * C;
        for (int i = 0; i < C; i++)
            to[i] += from[i];
    }
}

static void kv_append(void *cx, struct glm_kv cache, const void *qkv, const int32_t *slot, int N,
                      struct glm_heads heads)
{
    const size_t KV = (size_t)heads.KVH * heads.HD, q = (size_t)heads.NH * heads.HD;
    (void)cx;
    for (int n = 0; n < N; n++) {
        const float *row = (const float *)qkv + (size_t)n * (q + 2 * KV);
        memcpy((float *)cache.k + slot[n] * KV, row + q, KV * 4);
        memcpy((float *)cache.v + slot[n] * KV, row + q + KV, KV * 4);
    }
}

/* The kept fraction of element i of row n, scaled: 0 or 1 / (1 - p). */
static float mask_at(const struct glm_dropout *d, int n, int i)
{
    uint32_t word[4] = {(uint32_t)i / 4, (uint32_t)d->position[n], (uint32_t)d->stream[n], d->site};
    glm_philox(word, (uint32_t)d->seed, (uint32_t)(d->seed >> 32) ^ d->step);
    return word[i % 4] < (uint64_t)(d->p * 4294967296.0) ? 0 : (float)(1.0 / (1.0 - d->p));
}

static void prefix_forward(void *cx, void *out, const void *inp, int P, int J, int KV, int copies,
                           const struct glm_dropout *dropout)
{
    (void)cx;
    for (int j = 0; j < J; j++)
        for (int b = 0; b < copies; b++)
            for (int p = 0; p < P; p++) {
                const int n = b * P + p;
                float *to = (float *)out + ((size_t)j * copies * P + n) * KV;
                const float *from = (const float *)inp + ((size_t)p * J + j) * KV;
                for (int i = 0; i < KV; i++)
                    to[i] = dropout ? from[i] * mask_at(dropout, n, j * KV + i) : from[i];
            }
}

static void prefix_backward(void *cx, void *dinp, const void *dout, int P, int J, int KV,
                            int copies, const struct glm_dropout *dropout)
{
    (void)cx;
    for (int j = 0; j < J; j++)
        for (int b = 0; b < copies; b++)
            for (int p = 0; p < P; p++) {
                const int n = b * P + p;
                float *to = (float *)dinp + ((size_t)p * J + j) * KV;
                const float *from = (const float *)dout + ((size_t)j * copies * P + n) * KV;
                for (int i = 0; i < KV; i++)
                    to[i] += dropout ? from[i] * mask_at(dropout, n, j * KV + i) : from[i];
            }
}

/* ---- linear */

/* Rows of a tile, at most `most`: W is packed once for each, so many; but tasks enough for all
 * threads to end together. What is computed does not depend on it. */
static int tile_rows(const struct cpu *cpu, int N, int most, int columns)
{
    int tiles = ceil_div((size_t)N, (size_t)most);
    while (tiles * columns < 6 * glm_pool_threads(cpu->pool) && N > 8 * L1_ROWS * tiles)
        tiles++;
    return tiles ? ceil_div((size_t)ceil_div((size_t)N, (size_t)tiles), L1_ROWS) * L1_ROWS : 1;
}

static void linear_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                           const void *bias, int N, double scale, int accumulate)
{
    struct cpu *cpu = cx;
    const int columns = ceil_div((size_t)weight->rows, NT_COLS);
    const struct nt_args a = {
        out, inp, bias, weight, N, accumulate, tile_rows(cpu, N, NT_ROWS, columns), (float)scale};
    if (N)
        glm_pool_run(cpu->pool, ceil_div((size_t)N, (size_t)a.rows) * columns, cpu->k->nt, &a);
}

static void run_gemm(struct cpu *cpu, struct gemm_args *g)
{
    const int columns = ceil_div((size_t)g->b->cols, GEMM_COLS);
    g->rows = tile_rows(cpu, g->M, GEMM_ROWS, columns);
    if (g->M)
        glm_pool_run(cpu->pool, ceil_div((size_t)g->M, (size_t)g->rows) * columns, cpu->k->gemm, g);
}

static void linear_backward_input(void *cx, void *dinp, const void *dout,
                                  const struct glm_mat *weight, int N, double scale, int accumulate)
{
    struct gemm_args g = {
        .c = dinp,
        .a = dout,
        .am = (size_t)weight->rows,
        .ak = 1,
        .b = weight,
        .M = N,
        .accumulate = accumulate,
        .scale = (float)scale,
    };
    run_gemm(cx, &g);
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
        struct gemm_args g = {
            .c = dweight,
            .a = dout,
            .am = 1,
            .ak = (size_t)O,
            .b = &b,
            .M = O,
            .accumulate = 1,
            .scale = (float)scale,
        };
        run_gemm(cpu, &g);
    }
    if (dbias) {
        const struct row_args a = {.out = dbias, .a = dout, .N = N, .C = O};
        glm_pool_run(cpu->pool, ceil_div((size_t)O, 64), column_sum_task, &a);
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
        glm_pool_run(cpu->pool, ceil_div((size_t)C, 64), cpu->k->rmsnorm_dweight, &a);
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
    glm_pool_run(cpu->pool, ceil_div((size_t)N, (size_t)r.rows), cpu->k->rope, &r);
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
        tasks += att_blocks(&segments[i]) * heads.KVH;
    glm_pool_run(cpu->pool, tasks, cpu->k->attention_forward, &a);
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
    glm_pool_run(cpu->pool, dcache.k ? heads.KVH : n_segments * heads.KVH,
                 cpu->k->attention_backward, &a);
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
        glm_pool_run(cpu->pool, pieces, cpu->k->sum_squares, &f);
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
    glm_pool_run(cpu->pool, tasks, cpu->k->nonfinite, &a);
    *row = -1;
    for (int i = 0; i < tasks && *row < 0; i++)
        *row = cpu->found[i];
}

static void argmax(void *cx, int32_t *id, const void *x, int M, int V)
{
    (void)cx;
    for (int m = 0; m < M; m++) {
        const float *row = (const float *)x + (size_t)m * V;
        int best = 0, finite = 1;
        for (int v = 0; v < V; v++) {
            finite &= isfinite(row[v]) != 0;
            best = row[v] > row[best] ? v : best;
        }
        id[m] = finite ? best : -1;
    }
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
    glm_pool_run(cpu->pool, ceil_div((size_t)O, (size_t)a.rows), cpu->k->merge, &a);
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
    glm_pool_run(cpu->pool, ceil_div((size_t)rows, (size_t)a.rows_a_task), cpu->k->quantize, &a);
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
#define ENTRY(op) .op = op,
    GLM_OPS(ENTRY)
#undef ENTRY
};

/* ---- memory and life */

/* Large blocks lie on huge pages where the system has them: fewer faults when they are first
 * written, fewer misses of address translation when they are walked. */
static void *cpu_alloc(struct glm_backend *be, size_t bytes)
{
    const size_t huge = (size_t)1 << 21, align = bytes < 4 * huge ? 64 : huge;
    be->allocated++;
    void *p =
        bytes > SIZE_MAX / 2 ? NULL : aligned_alloc(align, (bytes + 63 + align) / align * align);
#ifdef MADV_HUGEPAGE
    if (p && align == huge)
        madvise(p, bytes / huge * huge, MADV_HUGEPAGE); /* advice: refused is no error */
#endif
    return p;
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

const char *glm_cpu_variants(void)
{
    return runs_avx512() ? "avx512,avx2,generic" : runs_avx2() ? "avx2,generic" : "generic";
}

glm_status glm_cpu_create(struct glm_backend **out, const char *isa, struct glm_error *err)
{
    const struct glm_cpu_kernels *k = NULL;
    const char *name = NULL;
    const int best = !*isa;
#if defined(__x86_64__)
    if (!k && runs_avx512() && (best || strcmp(isa, "avx512") == 0)) {
        k = &glm_cpu_kernels_avx512;
        name = "cpu:avx512";
    }
    if (!k && runs_avx2() && (best || strcmp(isa, "avx2") == 0)) {
        k = &glm_cpu_kernels_avx2;
        name = "cpu:avx2";
    }
#endif
    if (!k && (best || strcmp(isa, "generic") == 0)) {
        k = &glm_cpu_kernels_generic;
        name = "cpu:generic";
    }
    if (!k)
        return glm_fail(err, GLM_EVALUE, "backend 'cpu:%s': this processor runs %s", isa,
                        glm_cpu_variants());
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu)
        cpu->pool = glm_pool_create();
    if (!cpu || !cpu->pool) {
        free(cpu);
        return glm_fail(err, GLM_EMEMORY, "cpu backend: %zu bytes could not be taken",
                        sizeof *cpu + GLM_SCRATCH);
    }
    cpu->k = k;
    cpu->be = (struct glm_backend){
        .name = name,
        .ops = &cpu_ops,
        .cx = cpu,
        .real_size = 4,
        .real = GLM_F32,
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
