/* Rows that are copied: to and from the cache, those that someone reads, the P-Tuning
 * prefix, queries, keys and values side by side or by head. */
#include "launch.cuh"

/* keys and values of row n of qkv: one run of 2 * KV floats */
GLM_KERNEL(128)
k_kv_append(float *k, float *v, const float *qkv, const int *slot, int width, int KV)
{
    const float *from = qkv + (size_t)blockIdx.x * width + (width - 2 * KV);
    const size_t to = (size_t)slot[blockIdx.x] * KV;
    for (int i = 4 * threadIdx.x; i < KV; i += 4 * blockDim.x) {
        store4(k + to, i, KV, load4(from, i, KV));
        store4(v + to, i, KV, load4(from + KV, i, KV));
    }
}

GLM_KERNEL(128) k_gather_forward(float *out, const float *inp, const int *rows, int C)
{
    const size_t m = blockIdx.x, n = (size_t)rows[m];
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x)
        store4(out + m * C, c, C, load4(inp + n * C, c, C));
}

GLM_KERNEL(128) k_gather_backward(float *dinp, const float *dout, const int *rows, int C)
{
    const size_t m = blockIdx.x, n = (size_t)rows[m];
    for (int c = 4 * threadIdx.x; c < C; c += 4 * blockDim.x) {
        f4 x = load4(dinp + n * C, c, C);
        const f4 d = load4(dout + m * C, c, C);
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.v[j] += d.v[j];
        store4(dinp + n * C, c, C, x);
    }
}

static __device__ __forceinline__ void copy_row(float *to, const float *from, int n)
{
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x)
        store4(to, i, n, load4(from, i, n));
}

GLM_KERNEL(128)
k_qkv_forward(float *qkv, const float *q, const float *k, const float *v, int Q, int KV)
{
    const size_t n = blockIdx.x;
    float *row = qkv + n * (Q + 2 * KV);
    copy_row(row, q + n * Q, Q);
    copy_row(row + Q, k + n * KV, KV);
    copy_row(row + Q + KV, v + n * KV, KV);
}

GLM_KERNEL(128)
k_qkv_backward(float *dq, float *dk, float *dv, const float *dqkv, int Q, int KV)
{
    const size_t n = blockIdx.x;
    const float *row = dqkv + n * (Q + 2 * KV);
    copy_row(dq + n * Q, row, Q);
    copy_row(dk + n * KV, row + Q, KV);
    copy_row(dv + n * KV, row + Q + KV, KV);
}

/* Rows of [all q | all k | all v] from rows of [q | k | v] of one head after the other, or back. */
GLM_KERNEL(256)
k_qkv_by_head(float *to, const float *from, int N, int NH, int HD, int back)
{
    const int quads = (HD + 3) / 4, in_row = 3 * NH * quads;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / in_row;
    let_next_begin();
    after_previous();
    if (n >= (size_t)N)
        return;
    const int of_row = (int)(at % in_row), piece = of_row / quads, i = of_row % quads * 4;
    const size_t row = n * 3 * NH * HD, apart = row + (size_t)piece * HD,
                 by_head = row + (size_t)(piece % NH * 3 + piece / NH) * HD;
    store4(to + (back ? by_head : apart), i, HD, load4(from + (back ? apart : by_head), i, HD));
}

/* An element e of row n is word e % 4 of counter e / 4. */
static __device__ __forceinline__ float kept_at(const mask_of &mask, int n, unsigned e)
{
    const words w = mask_words(mask, n, e / 4);
    const unsigned j = e % 4;
    return keep(mask, j == 0 ? w.w[0] : j == 1 ? w.w[1] : j == 2 ? w.w[2] : w.w[3]);
}

GLM_KERNEL(256)
k_prefix_forward(float *out, const float *inp, int P, int J, int KV, int copies, int drops,
                 mask_of mask)
{
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t rows = (size_t)copies * P, i = at % KV, n = at / KV % rows, j = at / KV / rows;
    if (j >= (size_t)J)
        return;
    const float x = inp[(n % P * J + j) * KV + i];
    out[at] = drops ? x * kept_at(mask, (int)n, (unsigned)(j * KV + i)) : x;
}

GLM_KERNEL(256)
k_prefix_backward(float *dinp, const float *dout, int P, int J, int KV, int copies, int drops,
                  mask_of mask)
{
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t i = at % KV, j = at / KV % J, p = at / KV / J;
    if (p >= (size_t)P)
        return;
    float sum = dinp[at];
    for (int b = 0; b < copies; b++) {
        const size_t n = (size_t)b * P + p;
        const float dy = dout[(j * copies * P + n) * KV + i];
        sum += drops ? dy * kept_at(mask, (int)n, (unsigned)(j * KV + i)) : dy;
    }
    dinp[at] = sum;
}

#ifdef GLM_HOST
extern "C" void glm_cuda_kv_append(void *cx, struct glm_kv cache, const void *qkv,
                                   const int32_t *slot, int N, struct glm_heads heads)
{
    struct cuda *cuda = cuda_of(cx);
    const int KV = heads.KVH * heads.HD;
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "kv_append", k_kv_append, N, 128, 0, (float *)cache.k, (float *)cache.v,
                   (const float *)qkv, slot, heads.NH * heads.HD + 2 * KV, KV);
}

extern "C" void glm_cuda_qkv_forward(void *cx, void *qkv, const void *q, const void *k,
                                     const void *v, int N, struct glm_heads heads)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "qkv_forward", k_qkv_forward, N, 128, 0, (float *)qkv, (const float *)q,
                   (const float *)k, (const float *)v, heads.NH * heads.HD, heads.KVH * heads.HD);
}

extern "C" void glm_cuda_qkv_backward(void *cx, void *dq, void *dk, void *dv, const void *dqkv,
                                      int N, struct glm_heads heads)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "qkv_backward", k_qkv_backward, N, 128, 0, (float *)dq, (float *)dk,
                   (float *)dv, (const float *)dqkv, heads.NH * heads.HD, heads.KVH * heads.HD);
}

static void qkv_by_head(void *cx, void *to, const void *from, int N, struct glm_heads heads,
                        int back)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t threads = (size_t)N * 3 * heads.NH * ceil_div(heads.HD, 4);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "qkv_by_head", k_qkv_by_head, ceil_div(threads, 256), 256, 0,
                         (float *)to, (const float *)from, N, heads.NH, heads.HD, back);
}

extern "C" void glm_cuda_qkv_by_head_forward(void *cx, void *qkv, const void *inp, int N,
                                             struct glm_heads heads)
{
    qkv_by_head(cx, qkv, inp, N, heads, 0);
}

extern "C" void glm_cuda_qkv_by_head_backward(void *cx, void *dinp, const void *dqkv, int N,
                                              struct glm_heads heads)
{
    qkv_by_head(cx, dinp, dqkv, N, heads, 1);
}

extern "C" void glm_cuda_gather_forward(void *cx, void *out, const void *inp, const int32_t *rows,
                                        int M, int C)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "gather_forward", k_gather_forward, M, 128, 0, (float *)out,
                   (const float *)inp, rows, C);
}

extern "C" void glm_cuda_gather_backward(void *cx, void *dinp, const void *dout,
                                         const int32_t *rows, int M, int C)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "gather_backward", k_gather_backward, M, 128, 0, (float *)dinp,
                   (const float *)dout, rows, C);
}

extern "C" void glm_cuda_prefix_forward(void *cx, void *out, const void *inp, int P, int J, int KV,
                                        int copies, const struct glm_dropout *dropout)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t n = (size_t)P * J * KV * copies;
    const mask_of mask = dropout ? mask_from(dropout) : mask_of();
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "prefix_forward", k_prefix_forward, ceil_div(n, 256), 256, 0, (float *)out,
                   (const float *)inp, P, J, KV, copies, dropout != NULL, mask);
}

extern "C" void glm_cuda_prefix_backward(void *cx, void *dinp, const void *dout, int P, int J,
                                         int KV, int copies, const struct glm_dropout *dropout)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t n = (size_t)P * J * KV;
    const mask_of mask = dropout ? mask_from(dropout) : mask_of();
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "prefix_backward", k_prefix_backward, ceil_div(n, 256), 256, 0,
                   (float *)dinp, (const float *)dout, P, J, KV, copies, dropout != NULL, mask);
}
#endif
