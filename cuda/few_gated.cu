/* The product of up to 8 rows with gates and values, and swiglu of it. */
#include "few.cuh"

FEW_KERNELS(gated, f32, GLM_F32, true, 4, 2, 2)
FEW_KERNELS(gated, f16, GLM_F16, true, 4, 2, 2)
FEW_KERNELS(gated, bf16, GLM_BF16, true, 4, 2, 2)
FEW_KERNELS(gated, i8, GLM_I8, true, 4, 2, 2)
FEW_KERNELS(gated, i4, GLM_I4, true, 4, 2, 2)

#ifdef GLM_HOST
static const few_kernel TABLE[5][4] = FEW_TABLE(gated);

extern "C" void glm_cuda_linear_swiglu_forward(void *cx, void *out, void *h, const void *inp,
                                               const struct glm_mat *weight, const void *bias,
                                               int N)
{
    struct cuda *cuda = cuda_of(cx);
    if (!is_few(cuda, weight, N)) {
        glm_cuda_linear_forward(cx, h, inp, weight, bias, N, 1, 0);
        glm_cuda_swiglu_forward(cx, out, h, N, weight->rows / 2);
    } else if (N && glm_cuda_begin(cuda)) {
        few_rows a = {(float *)out, (const float *)inp, (const float *)bias};
        a.N = N, a.scale = 1;
        if (glm_few_quantized(cuda->compute, weight)) {
            glm_cuda_few_quantized(cuda, "linear_swiglu_forward", a, weight, 1);
            return;
        }
        a.w = matrix_of(weight);
        const few_kernel k_gated = few_of(TABLE, weight, N);
        const size_t of_block = 8 * (N == 1 ? 2 : 1), F = (size_t)weight->rows / 2;
        GLM_LAUNCH_AFTER(cuda, "linear_swiglu_forward", k_gated, ceil_div(F, of_block), 256, 0, a);
    }
}
#endif
