/* Products of up to 8 rows, with an adapter's second product. */
#include "few.cuh"

FEW_KERNELS(few, f32, GLM_F32, false, 4, 2, 1)
FEW_KERNELS(few, f16, GLM_F16, false, 4, 2, 1)
FEW_KERNELS(few, bf16, GLM_BF16, false, 4, 2, 1)
FEW_KERNELS(few, i8, GLM_I8, false, 4, 2, 1)
FEW_KERNELS(few, i4, GLM_I4, false, 4, 2, 1)

#ifdef GLM_HOST
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
        few_rows a = {(float *)qkv, (const float *)inp, (const float *)bias};
        a.N = N, a.scale = 1;
        a.turn.table = (const float *)table, a.turn.position = position, a.turn.slot = slot;
        a.turn.k = (float *)cache.k, a.turn.v = (float *)cache.v;
        a.turn.NH = heads.NH, a.turn.KVH = heads.KVH, a.turn.HD = heads.HD;
        a.turn.rotary_dim = rotary_dim;
        glm_cuda_few(cuda, "linear_rope_append", a, weight);
    }
}
#endif
