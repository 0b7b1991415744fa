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

/* In 16 bits, of which a head has a multiple of 8: a thread has eight columns, 16 bytes. */
GLM_KERNEL(256)
k_rope_narrow(unsigned short *x, int type, const float *table, const int *position, int N,
              int heads, int HD, int stride, int rotary_dim, float sign)
{
    const int octets = (rotary_dim + 7) / 8;
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t n = at / ((size_t)heads * octets);
    if (n >= (size_t)N)
        return;
    const int in_row = (int)(at % ((size_t)heads * octets)), h = in_row / octets,
              i = in_row % octets * 8;
    unsigned short *head = x + n * stride + (size_t)h * HD;
    const float *angles = table + (size_t)position[n] * rotary_dim;
    float v[8];
    load8_of(head, type, i, v);
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
        f4 a;
#pragma unroll
        for (int j = 0; j < 4; j++)
            a.v[j] = v[half + j];
        a = rotated(a, angles, i + half, rotary_dim, sign);
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[half + j] = a.v[j];
    }
    store8_narrow(head + i, type, v);
}

struct turning {
    void *qkv;                  /* (N, heads of queries, keys and values) of a 16-bit type */
    const float *bias, *xa, *B; /* NULL: none; (N, R), (O, R) */
    const float *table;
    const int *position, *slot; /* slot NULL: nothing goes into the cache */
    float *k, *v;
    int type, N, NH, KVH, HD, R, rotary_dim;
    float scale;
};

/* qkv += bias + scale * xa B^T, in float; its queries and keys are rotated, its keys and values go
 * into the cache. A thread has four columns of eight rows; `blocks` blocks across. */
GLM_TILE_KERNEL(128, 4) k_turn(turning t, int blocks)
{
    enum { ROWS = 8, RANKS = 8 };
    const int heads = t.NH + 2 * t.KVH, O = heads * t.HD, n0 = ROWS * (int)(blockIdx.x / blocks);
    const int c = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    if (c >= O)
        return;
    const int h = c / t.HD, i = c % t.HD, turns = h < t.NH + t.KVH;
    float sum[ROWS][4];
#pragma unroll
    for (int n = 0; n < ROWS; n++)
        sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    for (int r0 = 0; r0 < t.R; r0 += RANKS) {
        f4 b[4][2];
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                b[k][j] = load4_or_zero(t.B + (size_t)(c + k) * t.R, r0 + 4 * j, t.R);
#pragma unroll
        for (int n = 0; n < ROWS; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const size_t row = min(n0 + n, t.N - 1);
                const f4 x = load4_or_zero(t.xa + row * t.R, r0 + 4 * j, t.R);
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int l = 0; l < 4; l++)
                        sum[n][k] += x.v[l] * b[k][j].v[l];
            }
    }
    f4 bias;
    bias.v[0] = bias.v[1] = bias.v[2] = bias.v[3] = 0;
    if (t.bias)
        bias = load4(t.bias, c, O);
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const size_t row = n0 + n;
        if (n0 + n >= t.N)
            return;
        unsigned short *to = static_cast<unsigned short *>(t.qkv) + row * O;
        f4 x = load4_stored(to, t.type, c, O);
#pragma unroll
        for (int k = 0; k < 4; k++)
            x.v[k] += bias.v[k] + t.scale * sum[n][k];
        if (turns)
            x = rotated(x, t.table + (size_t)t.position[row] * t.rotary_dim, i, t.rotary_dim, 1);
        store4_narrow(to + c, t.type, x);
        if (!t.slot || h < t.NH)
            continue;
        const int value = h >= t.NH + t.KVH, g = h - t.NH - value * t.KVH;
        store4((value ? t.v : t.k) + ((size_t)t.slot[row] * t.KVH + g) * t.HD, i, t.HD, x);
    }
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

void glm_cuda_turn(struct cuda *cuda, void *qkv, enum glm_dtype type, const void *xa,
                   const struct glm_self_attention *of, int N)
{
    const struct glm_heads h = of->heads;
    turning t = turning();
    t.qkv = qkv, t.type = type, t.N = N;
    t.NH = h.NH, t.KVH = h.KVH, t.HD = h.HD;
    t.bias = (const float *)of->qkv_bias, t.table = (const float *)of->table;
    t.position = of->position, t.slot = of->slot, t.rotary_dim = of->rotary_dim;
    t.k = (float *)of->cache.k, t.v = (float *)of->cache.v;
    if (of->A)
        t.xa = (const float *)xa, t.B = (const float *)of->B->data, t.R = of->B->cols;
    t.scale = (float)of->scale;
    const size_t across = ceil_div((size_t)(h.NH + 2 * h.KVH) * h.HD, 512);
    GLM_LAUNCH(cuda, "self_attention_forward", k_turn, across * ceil_div((size_t)N, 8), 128, 0, t,
               (int)across);
}

void glm_cuda_turn_back(struct cuda *cuda, void *dqkv, enum glm_dtype type,
                        const struct glm_self_attention *of, int N)
{
    const struct glm_heads h = of->heads;
    const int heads = h.NH + h.KVH, stride = (h.NH + 2 * h.KVH) * h.HD;
    const size_t threads = (size_t)N * heads * ((of->rotary_dim + 7) / 8);
    GLM_LAUNCH(cuda, "self_attention_backward", k_rope_narrow, ceil_div(threads, 256), 256, 0,
               (unsigned short *)dqkv, (int)type, (const float *)of->table, of->position, N, heads,
               h.HD, stride, of->rotary_dim, -1.0f);
}
#endif
