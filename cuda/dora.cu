/* DoRA: norms of adapted rows of weights, and outputs by their magnitudes. */
#include "few.cuh"

/* rnorm = 1 / |W + scale * B A|, a warp for each row */
GLM_KERNEL(256)
k_dora_norm(float *rnorm, stored_matrix w, const float *B, const float *A, int R, float scale)
{
    const int lane = threadIdx.x & 31, I = w.cols;
    const size_t o = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    if (o >= (size_t)w.rows)
        return;
    const void *row = static_cast<const char *>(w.data) + o * stored_bytes(w.dtype, (size_t)I);
    float squares = 0;
    for (int i = lane; i < I; i += 32) {
        float sum = 0, x = load1(row, w.dtype, (size_t)i);
        for (int r = 0; r < R; r++)
            sum += B[o * R + r] * A[(size_t)r * I + i];
        if (w.scale)
            x *= scale_at(w, o, i);
        x += scale * sum;
        squares += x * x;
    }
    squares = warp_sum(squares);
    if (!lane)
        rnorm[o] = 1.0f / sqrtf(squares);
}

/* to = magnitude * rnorm * from (+ bias); to may be from: a thread has read what it writes */
GLM_KERNEL(256)
k_dora(float *to, const float *from, const float *magnitude, const float *rnorm, const float *bias,
       int O, int blocks)
{
    const size_t n = blockIdx.x / blocks;
    const int o = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (o >= O)
        return;
    f4 x = load4(from + n * O, o, O), b;
    const f4 m = load4(magnitude, o, O), r = load4(rnorm, o, O);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] *= m.v[j] * r.v[j];
    if (bias) {
        b = load4(bias, o, O);
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.v[j] += b.v[j];
    }
    store4(to + n * O, o, O, x);
}

/* dmagnitude += rnorm * column sums of dout * inp: as k_column_sum */
GLM_KERNEL(256)
k_dora_dmagnitude(float *dmagnitude, const float *dout, const float *inp, const float *rnorm, int N,
                  int O)
{
    __shared__ float part[8][32];
    const int lane = threadIdx.x & 31, group = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
    float sum = 0;
    for (int n = group; n < N && c < O; n += 8)
        sum += dout[(size_t)n * O + c] * inp[(size_t)n * O + c];
    part[group][lane] = sum;
    __syncthreads();
    if (group || c >= O)
        return;
    sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum += part[i][lane];
    dmagnitude[c] += rnorm[c] * sum;
}

#ifdef GLM_HOST
extern "C" void glm_cuda_dora_norm(void *cx, void *rnorm, const struct glm_mat *weight,
                                   const void *B, const void *A, int R, double scale)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "dora_norm", k_dora_norm, ceil_div((size_t)weight->rows, 8), 256, 0,
                   (float *)rnorm, matrix_of(weight), (const float *)B, (const float *)A, R,
                   (float)scale);
}

extern "C" void glm_cuda_dora_forward(void *cx, void *out, const void *inp, const void *magnitude,
                                      const void *rnorm, const void *bias, int N, int O)
{
    struct cuda *cuda = cuda_of(cx);
    const int blocks = (int)ceil_div((size_t)O, 1024);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "dora_forward", k_dora, (size_t)N * blocks, 256, 0, (float *)out,
                   (const float *)inp, (const float *)magnitude, (const float *)rnorm,
                   (const float *)bias, O, blocks);
}

extern "C" void glm_cuda_dora_backward(void *cx, void *dinp, void *dmagnitude, const void *dout,
                                       const void *inp, const void *magnitude, const void *rnorm,
                                       int N, int O)
{
    struct cuda *cuda = cuda_of(cx);
    const int blocks = (int)ceil_div((size_t)O, 1024);
    if (!N || !glm_cuda_begin(cuda))
        return;
    if (dmagnitude) /* first: dinp may be inp */
        GLM_LAUNCH(cuda, "dora_backward", k_dora_dmagnitude, ceil_div((size_t)O, 32), 256, 0,
                   (float *)dmagnitude, (const float *)dout, (const float *)inp,
                   (const float *)rnorm, N, O);
    GLM_LAUNCH(cuda, "dora_backward", k_dora, (size_t)N * blocks, 256, 0, (float *)dinp,
               (const float *)dout, (const float *)magnitude, (const float *)rnorm,
               (const float *)NULL, O, blocks);
}
#endif
