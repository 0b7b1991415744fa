/* Over flat arrays: AdamW, the sum of squares, the first row that is not finite. */
#include "launch.cuh"

GLM_BLOCK_REDUCTION(block_sum, double, warp_sum, 0)
GLM_BLOCK_REDUCTION(block_min, int, warp_min, 0x7fffffff)

struct adamw_of {
    float lr, b1, b2, c1, c2, eps, decay, by1, by2, gscale;
};

GLM_KERNEL(256) k_adamw(float *p, const float *grad, float *m, float *v, size_t n, adamw_of a)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 w = load4(p, i, n), m1 = load4(m, i, n), v1 = load4(v, i, n);
    const f4 g4 = load4(grad, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float g = a.gscale * g4.v[j];
        m1.v[j] = a.b1 * m1.v[j] + a.c1 * g;
        v1.v[j] = a.b2 * v1.v[j] + a.c2 * g * g;
        const float decayed = w.v[j] - a.decay * w.v[j];
        w.v[j] = decayed - a.lr * (m1.v[j] * a.by1) / (sqrtf(v1.v[j] * a.by2) + a.eps);
    }
    store4(p, i, n, w);
    store4(m, i, n, m1);
    store4(v, i, n, v1);
}

/* Blocks take runs of fixed size in turn: the order of the sum depends on n alone. */
GLM_KERNEL(256) k_sum_squares(double *partial, const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = flat4(); i < n; i += 4 * (size_t)gridDim.x * blockDim.x) {
        const f4 a = load4(x, i, n);
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum += (double)a.v[j] * (double)a.v[j];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sum;
}

GLM_KERNEL(256) k_sum_partials(double *total, const double *partial, int n)
{
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *total = sum;
}

/* Block b looks at its share of the rows and leaves its first bad one, or the largest int. */
GLM_KERNEL(256) k_first_nonfinite(int *found, const float *x, int N, int C, int rows)
{
    const int begin = blockIdx.x * rows, end = min(begin + rows, N);
    int first = 0x7fffffff;
    for (int n = begin; n < end; n++)
        for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
            const f4 a = load4(x + (size_t)n * C, c, C);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if ((__float_as_int(a.v[j]) & 0x7f800000) == 0x7f800000 && n < first)
                    first = n;
        }
    first = block_min(first);
    if (threadIdx.x == 0)
        found[blockIdx.x] = first;
}

#ifdef GLM_HOST
#include <math.h>

extern "C" void glm_cuda_adamw(void *cx, void *p, const void *grad, void *m, void *v, size_t n,
                               double lr, double b1, double b2, double eps, double wd, int t,
                               double gscale)
{
    struct cuda *cuda = cuda_of(cx);
    const adamw_of a = {(float)lr,
                        (float)b1,
                        (float)b2,
                        (float)(1 - b1),
                        (float)(1 - b2),
                        (float)eps,
                        (float)(lr * wd),
                        (float)(1 / (1 - pow(b1, t))),
                        (float)(1 / (1 - pow(b2, t))),
                        (float)gscale};
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "adamw", k_adamw, ceil_div(n, 1024), 256, 0, (float *)p,
                   (const float *)grad, (float *)m, (float *)v, n, a);
}

extern "C" void glm_cuda_sum_squares(void *cx, double *out, const void *x, size_t n)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t runs = ceil_div(n, 4096), blocks = runs < PARTIALS ? runs : PARTIALS;
    if (!glm_cuda_begin(cuda))
        return;
    GLM_LAUNCH(cuda, "sum_squares", k_sum_squares, blocks, 256, 0, cuda->small->partial,
               (const float *)x, n);
    GLM_LAUNCH(cuda, "sum_squares", k_sum_partials, 1, 256, 0, out,
               (const double *)cuda->small->partial, (int)blocks);
}

extern "C" void glm_cuda_first_nonfinite(void *cx, int *row, const void *x, int N, int C)
{
    struct cuda *cuda = cuda_of(cx);
    int found[128];
    const int rows = (int)ceil_div((size_t)N, 128), blocks = rows ? (N + rows - 1) / rows : 0;
    *row = -1;
    for (int i = 0; i < blocks; i++)
        found[i] = 0x7fffffff;
    if (!blocks || !glm_cuda_begin(cuda))
        return;
    GLM_LAUNCH(cuda, "first_nonfinite", k_first_nonfinite, blocks, C > 512 ? 256 : 64, 0,
               cuda->small->found, (const float *)x, N, C, rows);
    if (glm_cuda_fetch(cuda, found, cuda->small->found, (size_t)blocks * sizeof *found,
                       "first_nonfinite"))
        for (int i = 0; i < blocks && *row < 0; i++)
            *row = found[i] == 0x7fffffff ? -1 : found[i];
}
#endif
