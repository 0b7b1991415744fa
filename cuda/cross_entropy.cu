/* Cross entropy: a block a row. Forward reads the logits once; backward overwrites them. */
#include "launch.cuh"

GLM_BLOCK_REDUCTION(block_sum, float, warp_sum, 0)
GLM_BLOCK_REDUCTION(block_max, float, warp_max, -GLM_INFINITY)

/* NaN is never the maximum, but it is in the sum; -infinity is in neither. */
GLM_KERNEL(256)
k_cross_entropy_forward(float *loss, float *lse, const float *logits, const int *target, int V)
{
    const float *row = logits + (size_t)blockIdx.x * V;
    float most = -GLM_INFINITY, sum = 0;
    for (int v = 4 * threadIdx.x; v < V; v += 4 * blockDim.x) {
        const f4 x = load4(row, v, V);
        float top = most;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (v + j < V)
                top = fmaxf(top, x.v[j]);
        if (top > most) {
            sum *= expf(most - top);
            most = top;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (v + j < V && x.v[j] != -GLM_INFINITY)
                sum += expf(x.v[j] - most);
    }
    const float max = block_max(most);
    sum = block_sum(most == -GLM_INFINITY ? sum : sum * expf(most - max));
    if (threadIdx.x == 0) {
        const float total = max + logf(sum);
        lse[blockIdx.x] = total;
        loss[blockIdx.x] = total - row[target[blockIdx.x]];
    }
}

GLM_KERNEL(256)
k_cross_entropy_backward(float *logits, const float *lse, const int *target, int V, int blocks,
                         float scale)
{
    const size_t m = blockIdx.x / blocks;
    const int v = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (v >= V)
        return;
    const float total = lse[m];
    const int t = target[m];
    f4 x = load4(logits + m * V, v, V);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] = scale * (expf(x.v[j] - total) - (v + j == t ? 1.0f : 0.0f));
    store4(logits + m * V, v, V, x);
}

#ifdef GLM_HOST
extern "C" void glm_cuda_cross_entropy_forward(void *cx, void *loss, void *lse, const void *logits,
                                               const int32_t *target, int M, int V)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "cross_entropy_forward", k_cross_entropy_forward, M, V > 512 ? 256 : 64, 0,
                   (float *)loss, (float *)lse, (const float *)logits, target, V);
}

extern "C" void glm_cuda_cross_entropy_backward(void *cx, void *logits, const void *lse,
                                                const int32_t *target, int M, int V, double scale)
{
    struct cuda *cuda = cuda_of(cx);
    const int blocks = (int)ceil_div((size_t)V, 1024);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "cross_entropy_backward", k_cross_entropy_backward, (size_t)M * blocks,
                   256, 0, (float *)logits, (const float *)lse, target, V, blocks, (float)scale);
}
#endif
