/* Rotary positions, in place: a thread rotates two adjacent pairs, 16 bytes; in two dimensions, where
 * pairs are apart, four of them. */
#include "launch.cuh"

/* Pairs of a that lie before column rotary_dim, by the angles of a position. */
static __device__ __forceinline__ f4 rotated(f4 a, const float *table, int i, int rotary_dim,
                                             float sign)
{
    const f4 angle = load4_or_zero(table, i, rotary_dim);
    f4 r = a;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const float c = angle.v[j], s = sign * angle.v[j + 1];
        if (i + j < rotary_dim) {
            r.v[j] = a.v[j] * c - a.v[j + 1] * s;
            r.v[j + 1] = a.v[j + 1] * c + a.v[j] * s;
        }
    }
    return r;
}

GLM_KERNEL(256)
k_rope(float *x, const float *table, const int *position, int N, int heads, int HD, int stride,
       int rotary_dim, float sign)
{
    const int quads = (rotary_dim + 3) / 4;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t n = at / ((size_t)heads * quads);
    if (n >= (size_t)N)
        return;
    const int in_row = (int)(at % ((size_t)heads * quads)), h = in_row / quads,
              i = in_row % quads * 4;
    float *head = x + n * stride + (size_t)h * HD;
    store4(head, i, rotary_dim,
           rotated(load4(head, i, rotary_dim), table + (size_t)position[n] * rotary_dim, i,
                   rotary_dim, sign));
}

/* Half 0 of a head turns by the angle of position[n], half 1 by that of block[n]. */
GLM_KERNEL(256)
k_rope_2d(float *x, const float *table, const int *position, const int *block, int N, int heads,
          int HD, int stride, float sign)
{
    const int Q = HD / 4, quads = (Q + 3) / 4, in_row = 2 * heads * quads;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / in_row;
    let_next_begin();
    after_previous();
    if (n >= (size_t)N)
        return;
    const int of_row = (int)(at % in_row), half = of_row / quads, i = of_row % quads * 4;
    float *low = x + n * stride + (size_t)half * (2 * Q), *high = low + Q;
    const float *angles = table + (size_t)(half % 2 ? block : position)[n] * (2 * Q);
    const f4 first = load4(angles, 2 * i, 2 * Q), second = load4_or_zero(angles, 2 * i + 4, 2 * Q);
    const f4 a = load4(low, i, Q), b = load4(high, i, Q);
    f4 turned_a, turned_b;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const f4 angle = j < 2 ? first : second;
        const float c = angle.v[2 * (j % 2)], s = sign * angle.v[2 * (j % 2) + 1];
        turned_a.v[j] = a.v[j] * c - b.v[j] * s;
        turned_b.v[j] = b.v[j] * c + a.v[j] * s;
    }
    store4(low, i, Q, turned_a);
    store4(high, i, Q, turned_b);
}

/* Queries and keys of a token are rotated in place; keys and values go to its row of the cache. */
GLM_KERNEL(256)
k_rope_append(float *k, float *v, float *qkv, const float *table, const int *position,
              const int *slot, int N, int NH, int KVH, int HD, int rotary_dim)
{
    const int quads = (HD + 3) / 4, heads = NH + KVH;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t n = at / ((size_t)heads * quads);
    let_next_begin();
    after_previous();
    if (n >= (size_t)N)
        return;
    const int in_row = (int)(at % ((size_t)heads * quads)), h = in_row / quads,
              i = in_row % quads * 4;
    float *head = qkv + (n * (heads + KVH) + h) * HD;
    if (h < NH && i >= rotary_dim)
        return;
    const f4 r =
        rotated(load4(head, i, HD), table + (size_t)position[n] * rotary_dim, i, rotary_dim, 1);
    store4(head, i, HD, r);
    if (h < NH)
        return;
    const size_t to = ((size_t)slot[n] * KVH + (h - NH)) * HD;
    store4(k + to, i, HD, r);
    store4(v + to, i, HD, load4(head + (size_t)KVH * HD, i, HD));
}

#ifdef GLM_HOST
static void rope(void *cx, void *x, const void *table, const int32_t *position, int N, int heads,
                 int HD, int stride, int rotary_dim, float sign)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t threads = (size_t)N * heads * ((rotary_dim + 3) / 4);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "rope", k_rope, ceil_div(threads, 256), 256, 0, (float *)x,
                   (const float *)table, position, N, heads, HD, stride, rotary_dim, sign);
}

extern "C" void glm_cuda_rope_forward(void *cx, void *x, const void *table, const int32_t *position,
                                      int N, int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, x, table, position, N, heads, HD, stride, rotary_dim, 1);
}

extern "C" void glm_cuda_rope_append(void *cx, struct glm_kv cache, void *qkv, const void *table,
                                     const int32_t *position, const int32_t *slot, int N,
                                     struct glm_heads heads, int rotary_dim)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t threads = (size_t)N * (heads.NH + heads.KVH) * ((heads.HD + 3) / 4);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "rope_append", k_rope_append, ceil_div(threads, 256), 256, 0,
                         (float *)cache.k, (float *)cache.v, (float *)qkv, (const float *)table,
                         position, slot, N, heads.NH, heads.KVH, heads.HD, rotary_dim);
}

extern "C" void glm_cuda_rope_backward(void *cx, void *dx, const void *table,
                                       const int32_t *position, int N, int heads, int HD,
                                       int stride, int rotary_dim)
{
    rope(cx, dx, table, position, N, heads, HD, stride, rotary_dim, -1);
}

static void rope_2d(void *cx, void *x, const void *table, const int32_t *position,
                    const int32_t *block, int N, int heads, int HD, int stride, float sign)
{
    struct cuda *cuda = cuda_of(cx);
    const size_t threads = (size_t)N * 2 * heads * ceil_div(HD / 4, 4);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH_AFTER(cuda, "rope_2d", k_rope_2d, ceil_div(threads, 256), 256, 0, (float *)x,
                         (const float *)table, position, block, N, heads, HD, stride, sign);
}

extern "C" void glm_cuda_rope_2d_forward(void *cx, void *x, const void *table,
                                         const int32_t *position, const int32_t *block, int N,
                                         int heads, int HD, int stride)
{
    rope_2d(cx, x, table, position, block, N, heads, HD, stride, 1);
}

extern "C" void glm_cuda_rope_2d_backward(void *cx, void *dx, const void *table,
                                          const int32_t *position, const int32_t *block, int N,
                                          int heads, int HD, int stride)
{
    rope_2d(cx, dx, table, position, block, N, heads, HD, stride, -1);
}
#endif
