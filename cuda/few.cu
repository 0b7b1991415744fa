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
#endif
