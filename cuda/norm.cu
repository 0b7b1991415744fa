/* RMSNorm: a block a row; the weight's gradient: a block for 32 columns, rows in a fixed order. */
#include "launch.cuh"

GLM_BLOCK_REDUCTION(block_sum, float, warp_sum, 0)

/* out = rmsnorm of a row of a + b, which goes to sum; b NULL: of a. A thread reads back what it
 * wrote. */
static __device__ __forceinline__ void norm_of(float *out, float *rstd, float *sum, const float *a,
                                               const float *b, const float *weight, int C,
                                               float eps)
{
    const size_t row = (size_t)blockIdx.x * C;
    float squares = 0;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        f4 x = load4(a + row, c, C);
        if (b) {
            const f4 y = load4(b + row, c, C);
#pragma unroll
            for (int j = 0; j < 4; j++)
                x.v[j] += y.v[j];
            store4(sum + row, c, C, x);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            squares += x.v[j] * x.v[j];
    }
    const float r = 1.0f / sqrtf(block_sum(squares) / (float)C + eps);
    if (threadIdx.x == 0)
        rstd[blockIdx.x] = r;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        f4 x = load4((b ? sum : a) + row, c, C);
        const f4 w = load4(weight, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.v[j] = x.v[j] * r * w.v[j];
        store4(out + row, c, C, x);
    }
}

GLM_KERNEL(256)
k_rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int C, float eps)
{
    norm_of(out, rstd, NULL, inp, NULL, weight, C, eps);
}

GLM_KERNEL(256)
k_add_rmsnorm_forward(float *out, float *rstd, float *sum, const float *a, const float *b,
                      const float *weight, int C, float eps)
{
    norm_of(out, rstd, sum, a, b, weight, C, eps);
}

GLM_KERNEL(256)
k_rmsnorm_backward(float *dinp, const float *dout, const float *inp, const float *weight,
                   const float *rstd, int C)
{
    const size_t row = (size_t)blockIdx.x * C;
    const float r = rstd[blockIdx.x];
    float mean = 0;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        const f4 x = load4(inp + row, c, C), d = load4(dout + row, c, C), w = load4(weight, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            mean += d.v[j] * w.v[j] * x.v[j];
    }
    const float pull = block_sum(mean) / (float)C * r * r * r;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        const f4 x = load4(inp + row, c, C), d = load4(dout + row, c, C), w = load4(weight, c, C);
        f4 dx = load4(dinp + row, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            dx.v[j] += r * (d.v[j] * w.v[j]) - x.v[j] * pull;
        store4(dinp + row, c, C, dx);
    }
}

/* 32 columns by 8 rows at a time */
GLM_KERNEL(256)
k_rmsnorm_dweight(float *dweight, const float *dout, const float *inp, const float *rstd, int N,
                  int C)
{
    __shared__ float part[8][32];
    const int lane = threadIdx.x & 31, group = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    float sum = 0;
    for (int n = group; n < N && c < C; n += 8)
        sum += dout[(size_t)n * C + c] * inp[(size_t)n * C + c] * rstd[n];
    part[group][lane] = sum;
    __syncthreads();
    if (group || c >= C)
        return;
    sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum += part[i][lane];
    dweight[c] += sum;
}

#ifdef GLM_HOST
/* As many warps as a row feeds. */
static int threads_for(int C) { return C > 512 ? 256 : C > 128 ? 128 : 32; }

extern "C" void glm_cuda_rmsnorm_forward(void *cx, void *out, void *rstd, const void *inp,
                                         const void *weight, int N, int C, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "rmsnorm_forward", k_rmsnorm_forward, N, threads_for(C), 0, (float *)out,
                   (float *)rstd, (const float *)inp, (const float *)weight, C, (float)eps);
}

extern "C" void glm_cuda_add_rmsnorm_forward(void *cx, void *out, void *rstd, void *sum,
                                             const void *a, const void *b, const void *weight,
                                             int N, int C, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "add_rmsnorm_forward", k_add_rmsnorm_forward, N, threads_for(C), 0,
                   (float *)out, (float *)rstd, (float *)sum, (const float *)a, (const float *)b,
                   (const float *)weight, C, (float)eps);
}

extern "C" void glm_cuda_rmsnorm_backward(void *cx, void *dinp, void *dweight, const void *dout,
                                          const void *inp, const void *weight, const void *rstd,
                                          int N, int C)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_cuda_begin(cuda))
        return;
    GLM_LAUNCH(cuda, "rmsnorm_backward", k_rmsnorm_backward, N, threads_for(C), 0, (float *)dinp,
               (const float *)dout, (const float *)inp, (const float *)weight, (const float *)rstd,
               C);
    if (dweight)
        GLM_LAUNCH(cuda, "rmsnorm_backward", k_rmsnorm_dweight, ceil_div(C, 32), 256, 0,
                   (float *)dweight, (const float *)dout, (const float *)inp, (const float *)rstd,
                   N, C);
}
#endif
