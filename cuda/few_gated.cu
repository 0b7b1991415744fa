/* The product of up to 8 rows with gates and values, and swiglu of it; of up to 4 also of their norm. */
#include "few.cuh"

FEW_KERNELS(gated, f32, GLM_F32, true, 4, 2, 2)
FEW_KERNELS(gated, f16, GLM_F16, true, 4, 2, 2)
FEW_KERNELS(gated, bf16, GLM_BF16, true, 4, 2, 2)
FEW_KERNELS(gated, i8, GLM_I8, true, 4, 2, 2)
FEW_KERNELS(gated, i4, GLM_I4, true, 4, 2, 2)

struct normed_rows {
    few_rows few;
    norm_of_rows norm;
};

#define NORMED_KERNELS(name, dtype)                                                           \
    GLM_TILE_KERNEL(256, 2)                                                                   \
    k_normed_##name##_1(normed_rows a) { few_body<dtype, 1, 4, true>(a.few, NULL, &a.norm); } \
    GLM_TILE_KERNEL(256, 2)                                                                   \
    k_normed_##name##_2(normed_rows a) { few_body<dtype, 2, 2, true>(a.few, NULL, &a.norm); } \
    GLM_TILE_KERNEL(256, 2)                                                                   \
    k_normed_##name##_4(normed_rows a) { few_body<dtype, 4, 2, true>(a.few, NULL, &a.norm); }

NORMED_KERNELS(f32, GLM_F32)
NORMED_KERNELS(f16, GLM_F16)
NORMED_KERNELS(bf16, GLM_BF16)

#ifdef GLM_HOST
#define NORMED_ROW(name) {k_normed_##name##_1, k_normed_##name##_2, k_normed_##name##_4}
static void (*const NORMED[3][3])(normed_rows) = {NORMED_ROW(f32), NORMED_ROW(f16),
                                                  NORMED_ROW(bf16)};
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

extern "C" void glm_cuda_rmsnorm_swiglu_forward(void *cx, void *out, void *h, void *ln, void *rstd,
                                                const void *inp, const void *norm,
                                                const struct glm_mat *weight, const void *bias,
                                                int N, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_few_norms(cuda->compute, weight, N)) {
        glm_cuda_rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
        glm_cuda_linear_swiglu_forward(cx, out, h, ln, weight, bias, N);
    } else if (N && glm_cuda_begin(cuda)) {
        normed_rows a = {{(float *)out, (const float *)inp, (const float *)bias}};
        a.few.N = N, a.few.scale = 1, a.few.w = matrix_of(weight);
        a.norm.weight = (const float *)norm, a.norm.eps = (float)eps;
        void (*const k_normed)(normed_rows) = NORMED[weight->dtype][N <= 2 ? N - 1 : 2];
        const size_t of_block = 8 * (N == 1 ? 2 : 1), F = (size_t)weight->rows / 2;
        GLM_LAUNCH_AFTER(cuda, "rmsnorm_swiglu_forward", k_normed, ceil_div(F, of_block), 256, 0,
                         a);
    }
}
#endif
