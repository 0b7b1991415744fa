/* Products of up to 8 rows, with an adapter's second product. */
#include "few.cuh"

FEW_KERNELS(few, f32, GLM_F32, false, 4, 2, 1)
FEW_KERNELS(few, f16, GLM_F16, false, 4, 2, 1)
FEW_KERNELS(few, bf16, GLM_BF16, false, 4, 2, 1)
FEW_KERNELS(few, i8, GLM_I8, false, 4, 2, 1)
FEW_KERNELS(few, i4, GLM_I4, false, 4, 2, 1)

struct turned_rows {
    few_rows few;
    turned_heads turn;
    norm_of_rows norm;
};

#define TURNED_KERNELS(name, dtype)                                                      \
    GLM_TILE_KERNEL(256, 2)                                                              \
    k_turned_##name##_1(turned_rows a) { few_body<dtype, 1, 4, false>(a.few, &a.turn); } \
    GLM_TILE_KERNEL(256, 2)                                                              \
    k_turned_##name##_2(turned_rows a) { few_body<dtype, 2, 2, false>(a.few, &a.turn); } \
    GLM_TILE_KERNEL(256, 2)                                                              \
    k_turned_##name##_4(turned_rows a) { few_body<dtype, 4, 2, false>(a.few, &a.turn); }

TURNED_KERNELS(f32, GLM_F32)
TURNED_KERNELS(f16, GLM_F16)
TURNED_KERNELS(bf16, GLM_BF16)

#define TURNED_NORM_KERNELS(name, dtype)                       \
    GLM_TILE_KERNEL(256, 2)                                    \
    k_turned_norm_##name##_1(turned_rows a)                    \
    {                                                          \
        few_body<dtype, 1, 4, false>(a.few, &a.turn, &a.norm); \
    }                                                          \
    GLM_TILE_KERNEL(256, 2)                                    \
    k_turned_norm_##name##_2(turned_rows a)                    \
    {                                                          \
        few_body<dtype, 2, 2, false>(a.few, &a.turn, &a.norm); \
    }                                                          \
    GLM_TILE_KERNEL(256, 2)                                    \
    k_turned_norm_##name##_4(turned_rows a)                    \
    {                                                          \
        few_body<dtype, 4, 2, false>(a.few, &a.turn, &a.norm); \
    }

TURNED_NORM_KERNELS(f32, GLM_F32)
TURNED_NORM_KERNELS(f16, GLM_F16)
TURNED_NORM_KERNELS(bf16, GLM_BF16)

#ifdef GLM_HOST
#define TURNED_ROW(name) {k_turned_##name##_1, k_turned_##name##_2, k_turned_##name##_4}
static void (*const TURNED[3][3])(turned_rows) = {TURNED_ROW(f32), TURNED_ROW(f16),
                                                  TURNED_ROW(bf16)};
#define TURNED_NORM_ROW(name) \
    {k_turned_norm_##name##_1, k_turned_norm_##name##_2, k_turned_norm_##name##_4}
static void (*const TURNED_NORM[3][3])(turned_rows) = {TURNED_NORM_ROW(f32), TURNED_NORM_ROW(f16),
                                                       TURNED_NORM_ROW(bf16)};
static const few_kernel TABLE[5][4] = FEW_TABLE(few);

void glm_cuda_few(struct cuda *cuda, const char *op, few_rows a, const struct glm_mat *W)
{
    if (glm_few_quantized(cuda->compute, W)) {
        glm_cuda_few_quantized(cuda, op, a, W, 0);
        return;
    }
    const few_kernel k_few = few_of(TABLE, W, a.N);
    const size_t of_block = 8 * (a.N == 1 ? 4 : a.N <= 4 ? 2 : 1);
    a.w = matrix_of(W);
    GLM_LAUNCH_AFTER(cuda, op, k_few, ceil_div((size_t)W->rows, of_block), 256, 0, a);
}

/* norm.weight NULL: without */
static void turn_few(struct cuda *cuda, const char *op, struct glm_kv cache, void *qkv,
                     const void *inp, norm_of_rows norm, const struct glm_mat *weight,
                     const void *bias, const void *table, const int32_t *position,
                     const int32_t *slot, int N, struct glm_heads heads, int rotary_dim)
{
    const size_t of_block = 8 * (N == 1 ? 4 : 2);
    turned_rows a = {{(float *)qkv, (const float *)inp, (const float *)bias}};
    a.few.N = N, a.few.scale = 1, a.few.w = matrix_of(weight);
    a.turn.table = (const float *)table, a.turn.position = position, a.turn.slot = slot;
    a.turn.k = (float *)cache.k, a.turn.v = (float *)cache.v;
    a.turn.NH = heads.NH, a.turn.KVH = heads.KVH, a.turn.HD = heads.HD;
    a.turn.rotary_dim = rotary_dim;
    a.norm = norm;
    void (*const k_turned)(turned_rows) =
        (norm.weight ? TURNED_NORM : TURNED)[weight->dtype][N <= 2 ? N - 1 : 2];
    GLM_LAUNCH_AFTER(cuda, op, k_turned, ceil_div((size_t)weight->rows, of_block), 256, 0, a);
}

extern "C" void glm_cuda_linear_rope_append(void *cx, struct glm_kv cache, void *qkv,
                                            const void *inp, const struct glm_mat *weight,
                                            const void *bias, const void *table,
                                            const int32_t *position, const int32_t *slot, int N,
                                            struct glm_heads heads, int rotary_dim)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_few_turns(cuda->compute, weight, N, heads)) {
        glm_cuda_linear_forward(cx, qkv, inp, weight, bias, N, 1, 0);
        glm_cuda_rope_append(cx, cache, qkv, table, position, slot, N, heads, rotary_dim);
    } else if (N && glm_cuda_begin(cuda)) {
        const norm_of_rows none = norm_of_rows();
        turn_few(cuda, "linear_rope_append", cache, qkv, inp, none, weight, bias, table, position,
                 slot, N, heads, rotary_dim);
    }
}

extern "C" void glm_cuda_rmsnorm_rope_append(void *cx, struct glm_kv cache, void *qkv, void *ln,
                                             void *rstd, const void *inp, const void *norm,
                                             const struct glm_mat *weight, const void *bias,
                                             const void *table, const int32_t *position,
                                             const int32_t *slot, int N, struct glm_heads heads,
                                             int rotary_dim, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_few_turns(cuda->compute, weight, N, heads)) {
        glm_cuda_rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
        glm_cuda_linear_rope_append(cx, cache, qkv, ln, weight, bias, table, position, slot, N,
                                    heads, rotary_dim);
    } else if (N && glm_cuda_begin(cuda)) {
        const norm_of_rows of = {(const float *)norm, (float)eps};
        turn_few(cuda, "rmsnorm_rope_append", cache, qkv, inp, of, weight, bias, table, position,
                 slot, N, heads, rotary_dim);
    }
}
#endif
