/* A backend that computes nothing and counts: what a call would allocate, move and multiply. The
 * model runs on it as on any other, so its figures are those of the real code.
 *
 * "plan" has the cpu's costs. "plan:cuda.." has those of the CUDA library. Most ops are one launch
 * where their extent (ops.h) is not 0; those that cost something else are written out, a line for
 * every launch in cuda/[op].cu. A test compares them with the library on the emulator.
 *
 * Memory is address space that nobody fills; uploads of index arrays and vectors are kept, since
 * attention's cost lies in its segments. What is downloaded is zero. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../cuda/decode.h"
#include "../cuda/products.h"
#include "backend.h"

#pragma GCC diagnostic ignored "-Wunused-parameter" /* an op's arguments are its specification */

enum { KEPT_UPLOAD = 4 << 20, RECORDINGS = 4 };
enum { SCRATCH_WEIGHT, SCRATCH_A, SCRATCH_B, SCRATCHES };

struct region {
    void *p;
    size_t bytes;
    struct region *next;
};

struct plan {
    struct glm_backend be;
    struct region *regions;
    struct glm_counts counts;
    int cuda; /* counts as the CUDA library does */
    enum glm_dtype compute;
    size_t scratch[SCRATCHES];
    struct glm_key last, recorded[RECORDINGS]; /* as in cuda/device.c */
    int next_recording, capturing;
    char name[32];
};

static struct plan *plan_of(struct glm_backend *be) { return be->cx; }

/* one call of an op, `flops` multiplications and additions in products */
#define COUNT(op, products_)                                  \
    do {                                                      \
        struct glm_counts *c_ = &((struct plan *)cx)->counts; \
        c_->calls[GLM_OP_##op]++;                             \
        c_->flops += (products_);                             \
    } while (0)

/* so many launches of a CUDA device, where there is anything to do */
static void launch(void *cx, int some, int launches)
{
    struct plan *plan = cx;
    if (plan->cuda && some && !plan->capturing)
        plan->counts.launches += (uint64_t)launches;
}

static void live(struct plan *plan, size_t more)
{
    plan->counts.live += more;
    if (plan->counts.peak < plan->counts.live)
        plan->counts.peak = plan->counts.live;
}

static void scratch(struct plan *plan, int which, size_t bytes)
{
    if (!plan->cuda || bytes <= plan->scratch[which])
        return;
    plan->counts.syncs += plan->scratch[which] != 0;
    plan->counts.live -= plan->scratch[which];
    plan->counts.scratch += bytes - plan->scratch[which];
    live(plan, bytes);
    plan->scratch[which] = bytes;
}

/* ---- products as cuda/linear.cu makes them */

/* An operand of n elements is converted; `gradient`: a factor is found first. */
static void operand(struct plan *plan, int which, size_t n, enum glm_dtype type, int gradient)
{
    if (type == GLM_F32)
        return;
    launch(plan, gradient && type == GLM_F16, 2);
    scratch(plan, which, glm_bytes(type, n));
    launch(plan, 1, 1);
}

/* Products with so many rows of W at a time, which are widened where they have another type. */
static void count_pieces(struct plan *plan, const struct glm_mat *W, enum glm_dtype type, int rows)
{
    const int pieces = (W->rows + rows - 1) / rows;
    if (W->dtype != type) {
        scratch(plan, SCRATCH_WEIGHT, glm_bytes(type, (size_t)rows * W->cols));
        launch(plan, 1, pieces);
    }
    plan->counts.products += plan->capturing ? 0 : (uint64_t)pieces;
}

static void count_forward(struct plan *plan, const struct glm_mat *W, int bias, int N)
{
    const enum glm_dtype type = glm_product_type(plan->compute, W->dtype, W->rows, W->cols);
    const int rows = glm_forward_rows(GLM_PIECE, W, type);
    if (!N || !plan->cuda)
        return;
    if (N <= glm_few_rows(plan->compute, W)) {
        if (N > GLM_FEW)
            operand(plan, SCRATCH_A, (size_t)N * W->cols, plan->compute, 0);
        launch(plan, 1, 1);
        return;
    }
    if (glm_is_adapter(W->dtype, W->rows, W->cols)) {
        launch(plan, 1, 1);
        return;
    }
    const int tokens = glm_piece_rows(GLM_PIECE, N, type == GLM_F32 ? 0 : (size_t)W->cols);
    launch(plan, bias, 1);
    for (int n = 0; n < N; n += tokens) {
        const int some = N - n < tokens ? N - n : tokens;
        operand(plan, SCRATCH_A, (size_t)some * W->cols, type, 0);
        count_pieces(plan, W, type, rows);
    }
}

static void count_backward_input(struct plan *plan, const struct glm_mat *W, int N)
{
    const enum glm_dtype type = glm_product_type(plan->compute, W->dtype, W->rows, W->cols);
    const int rows = glm_backward_rows(GLM_PIECE, W, type, N), pieces = (W->rows + rows - 1) / rows;
    if (!N || !plan->cuda)
        return;
    if (glm_is_adapter(W->dtype, W->rows, W->cols)) {
        launch(plan, 1, 1);
        return;
    }
    launch(plan, type == GLM_F16, 2);
    if (type != GLM_F32) {
        scratch(plan, SCRATCH_A, glm_bytes(type, (size_t)N * rows));
        launch(plan, 1, pieces);
    }
    if (W->dtype != type) {
        scratch(plan, SCRATCH_WEIGHT, glm_bytes(type, (size_t)rows * W->cols));
        launch(plan, 1, pieces);
    }
    plan->counts.products += (uint64_t)pieces;
}

static void count_backward_weight(struct plan *plan, int dweight, int dbias, int N, int O, int I)
{
    const enum glm_dtype type = glm_product_type(plan->compute, GLM_F32, O, I);
    if (!N || !plan->cuda)
        return;
    if (dweight && glm_is_adapter(GLM_F32, O, I)) {
        scratch(plan, SCRATCH_B, sizeof(float) * (size_t)glm_thin_parts(N) * O * I);
        launch(plan, 1, 2);
    } else if (dweight) {
        operand(plan, SCRATCH_A, (size_t)N * O, type, 1);
        operand(plan, SCRATCH_B, (size_t)N * I, type, 0);
        plan->counts.products++;
    }
    launch(plan, dbias, 1);
}

/* Of an adapter in 16 bits all that its matrix with so many columns on one side does, backward; and
 * whether that makes a gradient of what it multiplied in parts, too */
static void count_adapter(struct plan *plan, int wide, int R, int N, int thin)
{
    launch(plan, N, 1);
    scratch(plan, SCRATCH_B,
            glm_adapter_parts(wide, R, N) + (thin ? glm_adapter_parts_u(wide, R, N) : 0));
}

/* ---- ops */

static double linear_flops(int N, int O, int I) { return 2.0 * N * O * I; }

/* pairs of query and key that a batch has in one head */
static double visible_pairs(const struct glm_segment *segments, int n)
{
    double pairs = 0;
    for (const struct glm_segment *s = segments; s < segments + n; s++) {
        const double own = s->count, before = (double)s->shared_count + s->past_count;
        pairs += own * before + own * (own + 1) / 2 + (double)s->context * (s->context - 1) / 2;
    }
    return pairs;
}

/* An op that is one launch. */
#define OP(op, extent, ...)                           \
    static void launch_of_##op(void *cx, __VA_ARGS__) \
    {                                                 \
        COUNT(op, 0);                                 \
        launch(cx, (extent) > 0, 1);                  \
    }
#include "ops.h"

/* Those that are something else. */
static void rmsnorm_backward(void *cx, void *dinp, void *dweight, const void *dout, const void *inp,
                             const void *weight, const void *rstd, int N, int C)
{
    COUNT(rmsnorm_backward, 0);
    launch(cx, N, 1);
    launch(cx, dweight != NULL, 1);
}
static void layernorm_backward(void *cx, void *dinp, void *dweight, void *dbias, const void *dout,
                               const void *inp, const void *weight, const void *mean,
                               const void *rstd, int N, int C)
{
    COUNT(layernorm_backward, 0);
    launch(cx, N, 1);
    launch(cx, dweight || dbias, 1);
}
static void linear_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                           const void *bias, int N, double scale, int accumulate)
{
    COUNT(linear_forward, linear_flops(N, weight->rows, weight->cols));
    count_forward(cx, weight, bias != NULL, N);
}
static void count_adapted(struct plan *plan, const struct glm_mat *weight, int bias,
                          const struct glm_mat *B, int N)
{
    const int few = N <= glm_few_rows(plan->compute, weight);
    const int first = !few && glm_is_adapter(B->dtype, B->rows, B->cols);
    count_forward(plan, weight, !first && bias, N);
    if (!few)
        count_forward(plan, B, 0, N);
}
static void adapted_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                            const void *bias, const void *xa, const struct glm_mat *B, int N,
                            double scale)
{
    COUNT(adapted_forward, linear_flops(N, weight->rows, weight->cols + B->cols));
    count_adapted(cx, weight, bias != NULL, B, N);
}
static void linear_swiglu_forward(void *cx, void *out, void *h, const void *inp,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    COUNT(linear_swiglu_forward, linear_flops(N, weight->rows, weight->cols));
    count_forward(cx, weight, bias != NULL, N);
    launch(cx, N > glm_few_rows(((struct plan *)cx)->compute, weight), 1);
}
static void rmsnorm_swiglu_forward(void *cx, void *out, void *h, void *ln, void *rstd,
                                   const void *inp, const void *norm, const struct glm_mat *weight,
                                   const void *bias, int N, double eps)
{
    const enum glm_dtype compute = ((struct plan *)cx)->compute;
    COUNT(rmsnorm_swiglu_forward, linear_flops(N, weight->rows, weight->cols));
    launch(cx, N && !glm_few_norms(compute, weight, N), 1);
    count_forward(cx, weight, bias != NULL, N);
    launch(cx, N > glm_few_rows(compute, weight), 1);
}
static void count_activated(struct plan *plan, const struct glm_mat *W, int bias, int N)
{
    const enum glm_dtype type = glm_product_type(plan->compute, W->dtype, W->rows, W->cols);
    launch(plan, N, 1);
    if (N <= glm_few_rows(plan->compute, W) || !glm_swiglu_narrows(type, W->cols)) {
        count_forward(plan, W, bias, N);
    } else if (plan->cuda) {
        launch(plan, bias, 1);
        count_pieces(plan, W, type, glm_forward_rows(GLM_PIECE, W, type));
    }
}
static void swiglu_linear_forward(void *cx, void *out, void *act, const void *h,
                                  const struct glm_mat *W, const void *bias, int N)
{
    COUNT(swiglu_linear_forward, linear_flops(N, W->rows, W->cols));
    count_activated(cx, W, bias != NULL, N);
}
/* The gradient of the activation, and the product that it is an operand of; in place: of h in 16
 * bits */
static void count_activated_backward(struct plan *plan, const struct glm_mat *W, int N,
                                     int in_place)
{
    const enum glm_dtype type = glm_product_type(plan->compute, W->dtype, W->rows, W->cols);
    launch(plan, N, 1);
    if (!in_place && !glm_swiglu_backward_narrows(type, W->rows / 2)) {
        count_backward_input(plan, W, N);
    } else if (N && plan->cuda) {
        launch(plan, type == GLM_F16, 2);
        count_pieces(plan, W, type, glm_forward_rows(GLM_PIECE, W, type));
    }
}
static void swiglu_linear_backward(void *cx, void *dinp, const void *dact, void *h,
                                   const struct glm_mat *W, int N)
{
    COUNT(swiglu_linear_backward, linear_flops(N, W->rows, W->cols));
    count_activated_backward(cx, W, N, 0);
}
static void swiglu_mlp_forward(void *cx, void *out, void *rstd, void *sum, void *work, void *h,
                               const void *b, const void *weight, const struct glm_mat *up,
                               const struct glm_mat *down, const void *bias, int N, double eps)
{
    struct plan *plan = cx;
    const enum glm_dtype type = glm_mlp_type(plan->compute, up, down, N);
    COUNT(swiglu_mlp_forward, linear_flops(N, up->rows, up->cols) +
                                  (out ? linear_flops(N, down->rows, down->cols) : 0));
    launch(plan, N, 1);
    if (type == GLM_F32)
        count_forward(plan, up, 0, N);
    else if (plan->cuda)
        count_pieces(plan, up, type, glm_forward_rows(GLM_PIECE, up, type));
    if (out)
        count_activated(plan, down, bias != NULL, N);
}
static void swiglu_mlp_backward(void *cx, void *dinp, void *h, const void *dout,
                                const struct glm_mat *up, const struct glm_mat *down, int N)
{
    struct plan *plan = cx;
    COUNT(swiglu_mlp_backward,
          linear_flops(N, up->rows, up->cols) + linear_flops(N, down->rows, down->cols));
    count_backward_input(plan, down, N);
    count_activated_backward(plan, up, N, glm_mlp_type(plan->compute, up, down, N) != GLM_F32);
}
static void linear_rope_append(void *cx, struct glm_kv cache, void *qkv, const void *inp,
                               const struct glm_mat *weight, const void *bias, const void *table,
                               const int32_t *position, const int32_t *slot, int N,
                               struct glm_heads heads, int rotary_dim)
{
    COUNT(linear_rope_append, linear_flops(N, weight->rows, weight->cols));
    count_forward(cx, weight, bias != NULL, N);
    launch(cx, N && !glm_few_turns(((struct plan *)cx)->compute, weight, N, heads), 1);
}
static void rmsnorm_rope_append(void *cx, struct glm_kv cache, void *qkv, void *ln, void *rstd,
                                const void *inp, const void *norm, const struct glm_mat *weight,
                                const void *bias, const void *table, const int32_t *position,
                                const int32_t *slot, int N, struct glm_heads heads, int rotary_dim,
                                double eps)
{
    const int turns = glm_few_turns(((struct plan *)cx)->compute, weight, N, heads);
    COUNT(rmsnorm_rope_append, linear_flops(N, weight->rows, weight->cols));
    launch(cx, N && !turns, 2);
    count_forward(cx, weight, bias != NULL, N);
}
static void linear_backward_input(void *cx, void *dinp, const void *dout,
                                  const struct glm_mat *weight, int N, double scale, int accumulate)
{
    COUNT(linear_backward_input, linear_flops(N, weight->rows, weight->cols));
    count_backward_input(cx, weight, N);
}
static void linear_backward_weight(void *cx, void *dweight, void *dbias, const void *dout,
                                   const void *inp, int N, int O, int I, double scale)
{
    COUNT(linear_backward_weight, dweight ? linear_flops(N, O, I) : 0);
    count_backward_weight(cx, dweight != NULL, dbias != NULL, N, O, I);
}
/* Products of attention itself, of so many terms a pair and head element */
static double attention_flops(int terms, const struct glm_segment *segments, int n_segments,
                              struct glm_heads heads)
{
    return terms * visible_pairs(segments, n_segments) * heads.NH * heads.HD;
}
static void count_tiles(struct plan *plan, int n_segments, struct glm_heads heads)
{
    const int narrow = plan->compute != GLM_F32 && heads.HD <= 128;
    launch(plan, n_segments, 1 + narrow);
    if (n_segments && narrow)
        scratch(plan, SCRATCH_A, glm_pairs_bytes(heads.tokens + heads.rows, heads.KVH, heads.HD));
}
static void count_attention(struct plan *plan, int n_segments, struct glm_heads heads)
{
    const struct glm_decode decode = glm_decode_of(heads, n_segments);
    scratch(plan, SCRATCH_A, decode.scratch);
    launch(plan, n_segments && heads.shortest <= GLM_DECODE_TOKENS, decode.runs > 1 ? 2 : 1);
    if (!heads.longest || heads.longest > GLM_DECODE_TOKENS)
        count_tiles(plan, n_segments, heads);
}
static void attention_forward(void *cx, void *out, void *lse, const void *qkv, struct glm_kv cache,
                              const struct glm_segment *segments, int n_segments,
                              struct glm_heads heads)
{
    COUNT(attention_forward, attention_flops(4, segments, n_segments, heads));
    count_attention(cx, n_segments, heads);
}
static void count_attention_backward(struct plan *plan, int n_segments, struct glm_heads heads)
{
    const int narrow = glm_backward_narrows(plan->compute, heads);
    if (!n_segments)
        return;
    if (narrow)
        scratch(plan, SCRATCH_A, glm_backward_scratch(heads));
    launch(plan, narrow && plan->compute == GLM_F16, 2); /* the factor */
    launch(plan, 1, 3); /* delta, keys and values, queries; in 16 bits: operands, gradients, sums */
}
static void attention_backward(void *cx, void *dqkv, struct glm_kv dcache, const void *dout,
                               const void *out, const void *lse, const void *qkv,
                               struct glm_kv cache, const struct glm_segment *segments,
                               int n_segments, struct glm_heads heads)
{
    COUNT(attention_backward, attention_flops(10, segments, n_segments, heads));
    count_attention_backward(cx, n_segments, heads);
}
static void self_attention_forward(void *cx, void *out, void *att, void *lse, void *qkv, void *xa,
                                   const void *ln, const struct glm_self_attention *of, int N)
{
    struct plan *plan = cx;
    const struct glm_mat *W = of->qkv, *dense = of->dense;
    const enum glm_dtype type = glm_self_attention_type(plan->compute, of, N);
    const int R = of->A ? of->A->rows : 0, drops = R && of->dropout.p > 0 && type == GLM_F32;
    COUNT(self_attention_forward, linear_flops(N, W->rows + R, W->cols) +
                                      linear_flops(N, W->rows, R) +
                                      linear_flops(N, dense->rows, dense->cols) +
                                      attention_flops(4, of->segments, of->n_segments, of->heads));
    launch(plan, N && drops, 1);
    if (of->A)
        count_forward(plan, of->A, 0, N);
    if (type == GLM_F32) {
        if (of->A)
            count_adapted(plan, W, of->qkv_bias != NULL, of->B, N);
        else
            count_forward(plan, W, of->qkv_bias != NULL, N);
        launch(plan, N, 1); /* the rotation */
        count_attention(plan, of->n_segments, of->heads);
        count_forward(plan, dense, of->dense_bias != NULL, N);
    } else if (plan->cuda) {
        count_pieces(plan, W, type, glm_forward_rows(GLM_PIECE, W, type));
        launch(plan, N, 1);
        count_tiles(plan, of->n_segments, of->heads);
        launch(plan, of->dense_bias != NULL, 1);
        count_pieces(plan, dense, type, glm_forward_rows(GLM_PIECE, dense, type));
    }
}
static void self_attention_backward(void *cx, void *dinp, void *dA, void *dB, void *work,
                                    void *dqkv, void *u, void *rstd, const void *dout,
                                    const void *att, const void *lse, const void *qkv,
                                    const void *xa, const void *x,
                                    const struct glm_self_attention *of, int N)
{
    struct plan *plan = cx;
    const struct glm_mat *W = of->qkv, *dense = of->dense;
    const enum glm_dtype type = glm_self_attention_type(plan->compute, of, N);
    const int R = of->A ? of->A->rows : 0, drops = R && of->dropout.p > 0 && type == GLM_F32;
    COUNT(self_attention_backward,
          linear_flops(N, dense->rows, dense->cols) + (dB ? linear_flops(N, W->rows, R) : 0) +
              (dinp || dA ? linear_flops(N, W->rows, R) : 0) +
              (dA ? linear_flops(N, R, W->cols) : 0) +
              (dinp ? linear_flops(N, W->rows + R, W->cols) : 0) +
              attention_flops(10, of->segments, of->n_segments, of->heads));
    count_backward_input(plan, dense, N);
    count_attention_backward(plan, of->n_segments, of->heads);
    launch(plan, N, 1); /* the rotation */
    if (type != GLM_F32 && plan->cuda) {
        if (of->A && (dinp || dA || dB))
            count_adapter(plan, W->rows, R, N, 1);
        if (of->A && (dinp || dA))
            count_adapter(plan, W->cols, R, N, 0);
        if (dinp && type == GLM_BF16)
            count_pieces(plan, W, type, glm_forward_rows(GLM_PIECE, W, type));
        else if (dinp)
            count_backward_input(plan, W, N);
        return;
    }
    launch(plan, N && dA, 1);
    count_backward_weight(plan, dB != NULL, 0, N, W->rows, R);
    if (of->A && (dinp || dA))
        count_backward_input(plan, of->B, N);
    launch(plan, N && dA && drops, 1);
    count_backward_weight(plan, dA != NULL, 0, N, R, W->cols);
    if (!dinp)
        return;
    count_backward_input(plan, W, N);
    if (of->A)
        count_backward_input(plan, of->A, N);
    launch(plan, N && drops, 1);
}
static void sum_squares(void *cx, double *out, const void *x, size_t n)
{
    COUNT(sum_squares, 0);
    launch(cx, n > 0, 1);
    launch(cx, 1, 1);
    *out = 0;
}
static void first_nonfinite(void *cx, int *row, const void *x, int N, int C)
{
    struct plan *plan = cx;
    const int rows = (N + 127) / 128;
    COUNT(first_nonfinite, 0);
    launch(cx, N, 1);
    if (plan->cuda && N) {
        plan->counts.downloads++;
        plan->counts.downloaded += (size_t)((N + rows - 1) / rows) * sizeof(int);
        plan->counts.syncs++;
    }
    *row = -1;
}
static void dora_norm(void *cx, void *rnorm, const struct glm_mat *weight, const void *B,
                      const void *A, int R, double scale)
{
    COUNT(dora_norm, linear_flops(weight->rows, weight->cols, R));
    launch(cx, weight->rows, 1);
}
static void dora_backward(void *cx, void *dinp, void *dmagnitude, const void *dout, const void *inp,
                          const void *magnitude, const void *rnorm, int N, int O)
{
    COUNT(dora_backward, 0);
    launch(cx, N, dmagnitude ? 2 : 1);
}
static void merge(void *cx, void *data, enum glm_dtype dtype, const void *B, const void *A,
                  const void *magnitude, const void *rnorm, int O, int I, int R, double scale)
{
    COUNT(merge, linear_flops(O, I, R));
    launch(cx, O, 1);
}

#pragma GCC diagnostic ignored "-Woverride-init" /* which is how these take the others' place */
static const struct glm_ops plan_ops = {
#define OP(op, extent, ...) .op = launch_of_##op,
#include "ops.h"
    .rmsnorm_backward = rmsnorm_backward,
    .layernorm_backward = layernorm_backward,
    .linear_forward = linear_forward,
    .adapted_forward = adapted_forward,
    .linear_swiglu_forward = linear_swiglu_forward,
    .rmsnorm_swiglu_forward = rmsnorm_swiglu_forward,
    .linear_rope_append = linear_rope_append,
    .rmsnorm_rope_append = rmsnorm_rope_append,
    .swiglu_linear_forward = swiglu_linear_forward,
    .swiglu_linear_backward = swiglu_linear_backward,
    .swiglu_mlp_forward = swiglu_mlp_forward,
    .swiglu_mlp_backward = swiglu_mlp_backward,
    .self_attention_forward = self_attention_forward,
    .self_attention_backward = self_attention_backward,
    .linear_backward_input = linear_backward_input,
    .linear_backward_weight = linear_backward_weight,
    .dora_norm = dora_norm,
    .dora_backward = dora_backward,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .sum_squares = sum_squares,
    .first_nonfinite = first_nonfinite,
    .merge = merge,
};

/* ---- memory and life */

static void *plan_alloc(struct glm_backend *be, size_t bytes)
{
    struct plan *plan = plan_of(be);
    struct region *r = bytes < SIZE_MAX / 2 ? malloc(sizeof *r) : NULL;
    if (!r)
        return NULL;
    r->bytes = (bytes + 4159) / 4096 * 4096;
    r->p = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
    if (r->p == MAP_FAILED) {
        free(r);
        return NULL;
    }
    r->next = plan->regions;
    plan->regions = r;
    be->allocated++;
    live(plan, bytes);
    r->bytes = bytes;
    return r->p;
}
static void plan_free(struct glm_backend *be, void *p)
{
    struct plan *plan = plan_of(be);
    for (struct region **at = &plan->regions; p && *at; at = &(*at)->next) {
        struct region *r = *at;
        if (r->p != p)
            continue;
        plan->counts.live -= r->bytes;
        memset(&plan->last, 0, sizeof plan->last);
        memset(plan->recorded, 0, sizeof plan->recorded);
        munmap(p, (r->bytes + 4159) / 4096 * 4096);
        *at = r->next;
        free(r);
        if (plan->regions)
            return;
        plan->counts.live -= plan->counts.scratch; /* the next model begins on a fresh device */
        plan->counts.scratch = 0;
        memset(plan->scratch, 0, sizeof plan->scratch);
        return;
    }
}
static void plan_upload(struct glm_backend *be, void *device, const void *host, size_t bytes)
{
    plan_of(be)->counts.uploads += bytes != 0;
    plan_of(be)->counts.uploaded += bytes;
    if (bytes && bytes <= KEPT_UPLOAD)
        memcpy(device, host, bytes);
}
static void plan_download(struct glm_backend *be, void *host, const void *device, size_t bytes)
{
    plan_of(be)->counts.downloads += bytes != 0;
    plan_of(be)->counts.downloaded += bytes;
    plan_of(be)->counts.syncs += bytes != 0;
    if (bytes)
        memset(host, 0, bytes);
}
static void plan_copy(struct glm_backend *be, void *to, const void *from, size_t bytes) {}
static void plan_zero(struct glm_backend *be, void *p, size_t bytes) {}
static void plan_set_threads(struct glm_backend *be, int threads) {}
static size_t plan_mlp_rows(struct glm_backend *be, const struct glm_mat *up,
                            const struct glm_mat *down, int N)
{
    return glm_mlp_rows(plan_of(be)->compute, up, down, N);
}
static size_t plan_self_attention_rows(struct glm_backend *be, const struct glm_self_attention *of,
                                       int N)
{
    return glm_self_attention_rows(plan_of(be)->compute, of, N);
}
static int plan_threads(struct glm_backend *be) { return 1; }
static void plan_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg) {}
static int plan_stopped(struct glm_backend *be) { return 0; }
static void plan_destroy(struct glm_backend *be)
{
    struct plan *plan = plan_of(be);
    while (plan->regions)
        plan_free(be, plan->regions->p);
    free(plan);
}

/* Recordings as cuda/device.c makes them: at the second call in a row of one key. */
static int plan_replay(struct glm_backend *be, const struct glm_key *key)
{
    struct plan *plan = plan_of(be);
    for (int i = 0; i < RECORDINGS; i++)
        if (memcmp(&plan->recorded[i], key, sizeof *key) == 0) {
            plan->counts.graphs++;
            return 1;
        }
    plan->capturing = memcmp(&plan->last, key, sizeof *key) == 0;
    plan->last = *key;
    return 0;
}
static void plan_recorded(struct glm_backend *be)
{
    struct plan *plan = plan_of(be);
    if (!plan->capturing)
        return;
    plan->capturing = 0;
    plan->counts.graphs++;
    plan->recorded[plan->next_recording] = plan->last;
    plan->next_recording = (plan->next_recording + 1) % RECORDINGS;
}
static void plan_take_counts(struct glm_backend *be, struct glm_counts *out)
{
    struct glm_counts *c = &plan_of(be)->counts;
    *out = *c;
    *c = (struct glm_counts){.live = c->live, .peak = c->live, .scratch = c->scratch};
}

glm_status glm_plan_create(struct glm_backend **out, const char *name, int cuda,
                           enum glm_dtype compute, struct glm_error *err)
{
    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return glm_fail(err, GLM_EMEMORY, "plan backend: %zu bytes could not be taken",
                        sizeof *plan);
    plan->cuda = cuda;
    plan->compute = compute;
    snprintf(plan->name, sizeof plan->name, "%s", name);
    plan->be = (struct glm_backend){
        .name = plan->name,
        .ops = &plan_ops,
        .cx = plan,
        .real_size = 4,
        .real = GLM_F32,
        .kept_h = cuda ? GLM_F32 : compute, /* as cpu/cpu.c */
        .alloc = plan_alloc,
        .free = plan_free,
        .upload = plan_upload,
        .download = plan_download,
        .copy = plan_copy,
        .zero = plan_zero,
        .set_threads = plan_set_threads,
        .threads = plan_threads,
        .set_poll = plan_set_poll,
        .stopped = plan_stopped,
        .destroy = plan_destroy,
        .take_counts = plan_take_counts,
    };
    if (cuda) {
        plan->be.device_memory = 1;
        plan->be.kept = compute;
        plan->be.mlp_rows = plan_mlp_rows;
        plan->be.self_attention_rows = plan_self_attention_rows;
        plan->be.replay = plan_replay;
        plan->be.recorded = plan_recorded;
        live(plan, GLM_CUDA_SMALL);
    }
    *out = &plan->be;
    return GLM_OK;
}
