/* Rows of the embedding matrix, and their gradient: a row's first reader adds up all readers in
 * order, so that no two blocks write one row. */
#include "launch.cuh"

GLM_KERNEL(256)
k_embedding_forward(float *out, const void *weight, int dtype, const int *ids, int C)
{
    const size_t n = blockIdx.x;
    const char *row = static_cast<const char *>(weight) + stored_bytes(dtype, (size_t)ids[n] * C);
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x)
        store4(out + n * C, c, C, load4_stored(row, dtype, c, C));
}

GLM_BLOCK_REDUCTION(block_min, int, warp_min, 0x7fffffff)

GLM_KERNEL(128)
k_embedding_backward(float *dweight, const float *dout, const int *ids, int N, int C)
{
    const int n = blockIdx.x, id = ids[n];
    int first = n;
    for (int j = threadIdx.x; j <= n; j += blockDim.x)
        first = ids[j] == id ? min(j, first) : first;
    if (block_min(first) < n)
        return;
    float *to = dweight + (size_t)id * C;
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        f4 sum = load4(to, c, C);
        for (int j = n; j < N; j++)
            if (ids[j] == id) {
                const f4 x = load4(dout + (size_t)j * C, c, C);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum.v[i] += x.v[i];
            }
        store4(to, c, C, sum);
    }
}

#ifdef GLM_HOST
extern "C" void glm_cuda_embedding_forward(void *cx, void *out, const struct glm_mat *weight,
                                           const int32_t *ids, int N)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "embedding_forward", k_embedding_forward, N, 256, 0, (float *)out,
                   weight->data, (int)weight->dtype, ids, weight->cols);
}

extern "C" void glm_cuda_embedding_backward(void *cx, void *dweight, const void *dout,
                                            const int32_t *ids, int N, int C)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "embedding_backward", k_embedding_backward, N, 128, 0, (float *)dweight,
                   (const float *)dout, ids, N, C);
}
#endif
