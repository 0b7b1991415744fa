/* Rows of the embedding matrix, and their gradient: a row's first reader adds up all readers in
 * order, so that no two blocks write one row. */
#include "launch.cuh"

GLM_KERNEL(256)
k_embedding_forward(float *out, const void *weight, int dtype, const int *ids, int C)
{
    const size_t n = blockIdx.x;
    const char *row = static_cast<const char *>(weight) + stored_bytes(dtype, (size_t)ids[n] * C);
    const bool vector = C % 8 == 0 && ((size_t)row & 15) == 0;
    if (dtype == GLM_F32) {
        const float *from = reinterpret_cast<const float *>(row);
        for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x)
            store4(out + n * C, c, C, load4(from, c, C));
        return;
    }
    if (vector && (dtype == GLM_F16 || dtype == GLM_BF16)) {
        for (int c = 8 * threadIdx.x; c < C; c += 8 * blockDim.x) {
            float v[8];
            f4 a, b;
            widen8(*reinterpret_cast<const uint4 *>(row + 2 * (size_t)c), dtype, v);
#pragma unroll
            for (int j = 0; j < 4; j++)
                a.v[j] = v[j], b.v[j] = v[4 + j];
            store4(out + n * C, c, C, a);
            store4(out + n * C, c + 4, C, b);
        }
        return;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        out[n * C + c] = load1(row, dtype, c);
}

GLM_BLOCK_REDUCTION(block_min, int, warp_min, 0x7fffffff)

GLM_KERNEL(128)
k_embedding_backward(float *dweight, const float *dout, const int *ids, int N, int C)
{
    const int n = blockIdx.x, id = ids[n];
    int first = n;
    for (int j = threadIdx.x; j < n; j += blockDim.x)
        first = ids[j] == id && j < first ? j : first;
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
