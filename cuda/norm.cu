/* RMSNorm and LayerNorm: a block a row; the gradients of weight and bias: a block for 32 columns,
 * rows in a fixed order. */
#include "launch.cuh"

GLM_BLOCK_REDUCTION(block_sum, float, warp_sum, 0)
GLM_BLOCK_REDUCTION(second_sum, float, warp_sum, 0)

/* Elements c .. c + 3 of row a + b, which go to sum; b NULL: of a. */
static __device__ __forceinline__ f4 sum_of(float *sum, const float *a, const float *b, int c,
                                            int C)
{
    f4 x = load4(a, c, C);
    if (b) {
        const f4 y = load4(b, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.v[j] += y.v[j];
        store4(sum, c, C, x);
    }
    return x;
}

static __device__ __forceinline__ float square(const f4 x)
{
    return x.v[0] * x.v[0] + x.v[1] * x.v[1] + x.v[2] * x.v[2] + x.v[3] * x.v[3];
}

static __device__ __forceinline__ float total(const f4 x)
{
    return x.v[0] + x.v[1] + x.v[2] + x.v[3];
}

/* type: of out; in 16 bits C is a multiple of 4. */
static __device__ __forceinline__ void put_norm(void *out, int type, const f4 x, float r,
                                                const f4 w, int c, int C)
{
    f4 y;
#pragma unroll
    for (int j = 0; j < 4; j++)
        y.v[j] = x.v[j] * r * w.v[j];
    if (type == GLM_F32)
        store4(static_cast<float *>(out), c, C, y);
    else
        store4_narrow(static_cast<unsigned short *>(out) + c, type, y);
}

/* out = rmsnorm of a row of a + b, which goes to sum; b NULL: of a. A thread keeps its first words
 * of a row and of the weight, all that there are up to a width of 4,096; what it has beyond them it
 * reads back. */
static __device__ __forceinline__ void norm_of(void *out, int type, float *rstd, float *sum,
                                               const float *a, const float *b, const float *weight,
                                               int C, float eps)
{
    const int KEPT = 2, at = 4 * threadIdx.x, step = 4 * blockDim.x;
    const size_t row = (size_t)blockIdx.x * C;
    f4 x[KEPT], w[KEPT];
    float squares = 0;
    out = static_cast<char *>(out) + stored_bytes(type, row), sum += row, a += row;
    b = b ? b + row : NULL;
    let_next_begin();
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            w[k] = load4(weight, at + k * step, C);
    after_previous();
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            x[k] = sum_of(sum, a, b, at + k * step, C);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            squares += square(x[k]);
    for (int c = at + KEPT * step; c < C; c += step)
        squares += square(sum_of(sum, a, b, c, C));
    const float r = 1.0f / sqrtf(block_sum(squares) / (float)C + eps);
    if (threadIdx.x == 0)
        rstd[blockIdx.x] = r;
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            put_norm(out, type, x[k], r, w[k], at + k * step, C);
    for (int c = at + KEPT * step; c < C; c += step)
        put_norm(out, type, load4(b ? sum : a, c, C), r, load4(weight, c, C), c, C);
}

GLM_KERNEL(512)
k_rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int C, float eps)
{
    norm_of(out, GLM_F32, rstd, NULL, inp, NULL, weight, C, eps);
}

GLM_KERNEL(512)
k_add_rmsnorm_forward(float *out, float *rstd, float *sum, const float *a, const float *b,
                      const float *weight, int C, float eps)
{
    norm_of(out, GLM_F32, rstd, sum, a, b, weight, C, eps);
}

/* The same with out in 16 bits, a being sum; b NULL: without it */
GLM_KERNEL(512)
k_add_rmsnorm_narrow(void *out, int type, float *rstd, float *sum, const float *b,
                     const float *weight, int C, float eps)
{
    norm_of(out, type, rstd, sum, sum, b, weight, C, eps);
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

/* Elements c .. c + 3 of a row less its mean: zero from C on. */
static __device__ __forceinline__ f4 centred(f4 x, float mean, int c, int C)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] = c + j < C ? x.v[j] - mean : 0.0f;
    return x;
}

static __device__ __forceinline__ void put_layernorm(float *out, const f4 x, float r, const f4 w,
                                                     const f4 b, int c, int C)
{
    f4 y;
#pragma unroll
    for (int j = 0; j < 4; j++)
        y.v[j] = x.v[j] * r * w.v[j] + b.v[j];
    store4(out, c, C, y);
}

/* As norm_of, a thread keeps its first words of a row, of the weight and of the bias. */
GLM_KERNEL(512)
k_layernorm_forward(float *out, float *mean, float *rstd, const float *inp, const float *weight,
                    const float *bias, int C, float eps)
{
    const int KEPT = 2, at = 4 * threadIdx.x, step = 4 * blockDim.x;
    const size_t row = (size_t)blockIdx.x * C;
    f4 x[KEPT], w[KEPT], b[KEPT];
    float sum = 0, squares = 0;
    out += row, inp += row;
    let_next_begin();
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            w[k] = load4(weight, at + k * step, C), b[k] = load4(bias, at + k * step, C);
    after_previous();
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        x[k] = load4_or_zero(inp, at + k * step, C);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        sum += total(x[k]);
    for (int c = at + KEPT * step; c < C; c += step)
        sum += total(load4(inp, c, C));
    const float m = block_sum(sum) / (float)C;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        x[k] = centred(x[k], m, at + k * step, C);
        squares += square(x[k]);
    }
    for (int c = at + KEPT * step; c < C; c += step)
        squares += square(centred(load4(inp, c, C), m, c, C));
    const float r = 1.0f / sqrtf(second_sum(squares) / (float)C + eps);
    if (threadIdx.x == 0)
        mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if (at + k * step < C)
            put_layernorm(out, x[k], r, w[k], b[k], at + k * step, C);
    for (int c = at + KEPT * step; c < C; c += step)
        put_layernorm(out, centred(load4(inp, c, C), m, c, C), r, load4(weight, c, C),
                      load4(bias, c, C), c, C);
}

GLM_KERNEL(256)
k_layernorm_backward(float *dinp, const float *dout, const float *inp, const float *weight,
                     const float *mean, const float *rstd, int C)
{
    const size_t row = (size_t)blockIdx.x * C;
    const float m = mean[blockIdx.x], r = rstd[blockIdx.x];
    float sum = 0, through = 0; /* of g, of g xhat */
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        const f4 x = load4(inp + row, c, C), d = load4(dout + row, c, C), w = load4(weight, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++) { /* past the end dout is 0 */
            sum += d.v[j] * w.v[j];
            through += d.v[j] * w.v[j] * ((x.v[j] - m) * r);
        }
    }
    const float level = block_sum(sum) / (float)C, pull = second_sum(through) / (float)C;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        const f4 x = load4(inp + row, c, C), d = load4(dout + row, c, C), w = load4(weight, c, C);
        f4 dx = load4(dinp + row, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            dx.v[j] += r * (d.v[j] * w.v[j] - level - (x.v[j] - m) * r * pull);
        store4(dinp + row, c, C, dx);
    }
}

/* As k_rmsnorm_dweight; dweight or dbias may be NULL. */
GLM_KERNEL(256)
k_layernorm_gradients(float *dweight, float *dbias, const float *dout, const float *inp,
                      const float *mean, const float *rstd, int N, int C)
{
    __shared__ float part[8][32], part_bias[8][32];
    const int lane = threadIdx.x & 31, group = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    float sum = 0, sum_bias = 0;
    for (int n = group; n < N && c < C; n += 8) {
        const float d = dout[(size_t)n * C + c];
        sum += d * ((inp[(size_t)n * C + c] - mean[n]) * rstd[n]);
        sum_bias += d;
    }
    part[group][lane] = sum;
    part_bias[group][lane] = sum_bias;
    __syncthreads();
    if (group || c >= C)
        return;
    sum = sum_bias = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum += part[i][lane];
        sum_bias += part_bias[i][lane];
    }
    if (dweight)
        dweight[c] += sum;
    if (dbias)
        dbias[c] += sum_bias;
}

#ifdef GLM_HOST
/* As many warps as a row feeds. */
static int threads_for(int C) { return C > 512 ? 256 : C > 128 ? 128 : 32; }
static int forward_threads(int C) { return C > 2048 ? 512 : threads_for(C); }

extern "C" void glm_cuda_rmsnorm_forward(void *cx, void *out, void *rstd, const void *inp,
                                         const void *weight, int N, int C, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "rmsnorm_forward", k_rmsnorm_forward, N, forward_threads(C), 0,
                         (float *)out, (float *)rstd, (const float *)inp, (const float *)weight, C,
                         (float)eps);
}

extern "C" void glm_cuda_add_rmsnorm_forward(void *cx, void *out, void *rstd, void *sum,
                                             const void *a, const void *b, const void *weight,
                                             int N, int C, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "add_rmsnorm_forward", k_add_rmsnorm_forward, N, forward_threads(C),
                         0, (float *)out, (float *)rstd, (float *)sum, (const float *)a,
                         (const float *)b, (const float *)weight, C, (float)eps);
}

void glm_cuda_add_rmsnorm_narrow(struct cuda *cuda, const char *op, void *out, enum glm_dtype type,
                                 void *rstd, void *sum, const void *b, const void *weight, int N,
                                 int C, double eps)
{
    GLM_LAUNCH_AFTER(cuda, op, k_add_rmsnorm_narrow, N, forward_threads(C), 0, out, (int)type,
                     (float *)rstd, (float *)sum, (const float *)b, (const float *)weight, C,
                     (float)eps);
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

extern "C" void glm_cuda_layernorm_forward(void *cx, void *out, void *mean, void *rstd,
                                           const void *inp, const void *weight, const void *bias,
                                           int N, int C, double eps)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "layernorm_forward", k_layernorm_forward, N, forward_threads(C), 0,
                         (float *)out, (float *)mean, (float *)rstd, (const float *)inp,
                         (const float *)weight, (const float *)bias, C, (float)eps);
}

extern "C" void glm_cuda_layernorm_backward(void *cx, void *dinp, void *dweight, void *dbias,
                                            const void *dout, const void *inp, const void *weight,
                                            const void *mean, const void *rstd, int N, int C)
{
    struct cuda *cuda = cuda_of(cx);
    if (!glm_cuda_begin(cuda))
        return;
    GLM_LAUNCH(cuda, "layernorm_backward", k_layernorm_backward, N, threads_for(C), 0,
               (float *)dinp, (const float *)dout, (const float *)inp, (const float *)weight,
               (const float *)mean, (const float *)rstd, C);
    if (dweight || dbias)
        GLM_LAUNCH(cuda, "layernorm_backward", k_layernorm_gradients, ceil_div(C, 32), 256, 0,
                   (float *)dweight, (float *)dbias, (const float *)dout, (const float *)inp,
                   (const float *)mean, (const float *)rstd, N, C);
}
#endif
