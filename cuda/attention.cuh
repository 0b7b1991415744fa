/* What the attention kernels share: who sees which key and where it lies, and shared-memory tiles.
 *
 * The rows of a segment under one key head are its tokens times the query heads that read it, token
 * by token: so a tile of keys serves every head of its group, and one token fills a tile as well.
 * The host does not know how long segments are (they lie on the device): a fixed grid of blocks
 * strides over the work, each block finding its own in the list of segments. */
#pragma once
#include "decode.h"
#include "launch.cuh"
#include "mma.cuh"

struct attention {
    const float *qkv, *cache_k, *cache_v;
    const struct glm_segment *segments;
    int n_segments, NH, KVH, HD, G; /* G query heads to a key head */
    float scale, log2_scale;        /* the second for exponentials of 2 */
    float *out, *lse;               /* forward writes, backward reads */
    unsigned short *pairs;          /* keys and values in 16 bits: see pair_at */
    int tokens;                     /* rows of qkv */
    const float *dout;              /* backward */
    float *dqkv, *dcache_k, *dcache_v;
    /* in place of qkv, out, dout and dqkv where those are 16 bits, as float ones are NULL then */
    const unsigned short *qkv_16, *dout_16;
    unsigned short *out_16, *dqkv_16;
    int fewest; /* longer segments go by tiles */
};

#define LOG2_E 1.4426950408889634f

static __device__ __forceinline__ int before(const glm_segment &s)
{
    return s.shared_count + s.past_count;
}

/* Keys that token t of a segment sees, of the run shared, past, own. */
static __device__ __forceinline__ int seen_by(const glm_segment &s, int t)
{
    return before(s) + max(t + 1, min(s.context, s.count));
}

struct pair_of {
    const float *k, *v;
};

/* Key j of a segment under key head g, and its value. */
static __device__ __forceinline__ pair_of key_of(const attention &a, const glm_segment &s, int g,
                                                 int j)
{
    pair_of p;
    GLM_EXPECT(0 <= j && j < before(s) + s.count);
    const int own = j - before(s);
    if (own >= 0) {
        p.k = a.qkv + ((size_t)(s.begin + own) * (a.NH + 2 * a.KVH) + a.NH + g) * a.HD;
        p.v = p.k + (size_t)a.KVH * a.HD;
        return p;
    }
    const int row = j < s.shared_count ? s.shared_begin + j : s.past_begin + (j - s.shared_count);
    const size_t at = ((size_t)row * a.KVH + g) * a.HD;
    p.k = a.cache_k + at;
    p.v = a.cache_v + at;
    return p;
}

/* Where its 16-bit copy begins, the value D behind it: (row, KVH, key or value, D), the rows of qkv
 * before those of the cache. */
template <int D>
static __device__ __forceinline__ size_t pair_at(const attention &a, const glm_segment &s, int g,
                                                 int j)
{
    int row = s.begin + j - before(s);
    if (j < before(s))
        row = a.tokens +
              (j < s.shared_count ? s.shared_begin + j : s.past_begin + j - s.shared_count);
    return ((size_t)row * a.KVH + g) * (2 * D);
}

/* The same below `end`, else NULL: zeros, where it goes into a tile. */
static __device__ __forceinline__ pair_of key_before(const attention &a, const glm_segment &s,
                                                     int g, int j, int end)
{
    pair_of none;
    none.k = none.v = NULL;
    return j < end ? key_of(a, s, g, j) : none;
}

/* Token and head of a row of a segment under key head g: index (token, head) into out and lse. */
static __device__ __forceinline__ size_t head_row(const attention &a, const glm_segment &s, int g,
                                                  int row)
{
    return (size_t)(s.begin + row / a.G) * a.NH + (size_t)g * a.G + row % a.G;
}

/* Its query's place in qkv */
static __device__ __forceinline__ size_t query_at(const attention &a, const glm_segment &s, int g,
                                                  int row)
{
    return ((size_t)(s.begin + row / a.G) * (a.NH + 2 * a.KVH) + g * a.G + row % a.G) * a.HD;
}

static __device__ __forceinline__ const float *query_of(const attention &a, const glm_segment &s,
                                                        int g, int row)
{
    return a.qkv + query_at(a, s, g, row);
}

/* Cache rows whose gradients blocks of segment i add up: none where a segment before it shares just
 * the same ones. */
static __device__ __forceinline__ int rows_to_add(const attention &a, int i)
{
    const glm_segment s = a.segments[i];
    for (int j = 0; j < i; j++)
        if (a.segments[j].shared_begin == s.shared_begin &&
            a.segments[j].shared_count == s.shared_count)
            return 0;
    return a.dcache_k ? s.shared_count : 0;
}

/* 1 when no segment before i shares the cache row. */
static __device__ __forceinline__ int owns_row(const attention &a, int i, int row)
{
    for (int j = 0; j < i; j++) {
        const int begin = a.segments[j].shared_begin, count = a.segments[j].shared_count;
        if (row >= begin && row < begin + count)
            return 0;
    }
    return 1;
}

/* Floats of a row of a float tile: 16-byte rows, four banks apart. */
static __host__ __device__ __forceinline__ int tile_stride(int HD) { return (HD + 3) / 4 * 4 + 4; }

/* A row of HD floats, or of zeros, into a tile; `lanes` threads share the row, this is `lane`. */
static __device__ __forceinline__ void fill_row(float *to, const float *from, int HD, int lane,
                                                int lanes)
{
    for (int c = 4 * lane; c < HD; c += 4 * lanes) {
        f4 x;
        if (from)
            x = load4(from, c, HD);
        else
            x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
        float4 q;
        q.x = x.v[0], q.y = x.v[1], q.z = x.v[2], q.w = x.v[3];
        *reinterpret_cast<float4 *>(to + c) = q;
    }
}

static __device__ __forceinline__ void fill_rows(float *k, float *v, pair_of kv, int HD, int lane,
                                                 int lanes)
{
    fill_row(k, kv.k, HD, lane, lanes);
    fill_row(v, kv.v, HD, lane, lanes);
}

static __device__ __forceinline__ float dot4(const float4 a, const float4 b, float sum)
{
    return a.w * b.w + (a.z * b.z + (a.y * b.y + (a.x * b.x + sum)));
}

static __device__ __forceinline__ float4 at4(const float *p)
{
    return *reinterpret_cast<const float4 *>(p);
}

static __device__ __forceinline__ void add4(float4 &sum, float p, const float4 x)
{
    sum.x += p * x.x, sum.y += p * x.y, sum.z += p * x.z, sum.w += p * x.w;
}

/* This thread's columns of a sum (HD) += p times those of a tile's row, which LANES share. */
template <int LANES>
static __device__ __forceinline__ void add_row(float4 *sum, float p, const float *row, int HD,
                                               int lane)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int c = 4 * (lane + j * LANES);
        if (c < HD)
            add4(sum[j], p, at4(row + c));
    }
}

static __device__ __forceinline__ void clear(float4 (&sum)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        sum[j].x = sum[j].y = sum[j].z = sum[j].w = 0;
}

static __device__ __forceinline__ void put4(float *row, int c, int HD, const float4 x, float factor)
{
    f4 y;
    y.v[0] = x.x * factor, y.v[1] = x.y * factor, y.v[2] = x.z * factor, y.v[3] = x.w * factor;
    store4(row, c, HD, y);
}

/* Sum and maximum over the LANES adjacent threads that share a row. */
template <int LANES> static __device__ __forceinline__ float lanes_sum(float v)
{
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

template <int LANES> static __device__ __forceinline__ float lanes_max(float v)
{
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

#ifdef GLM_HOST
#include <math.h>
#include <stdio.h>

static inline attention attention_of(const void *qkv, struct glm_kv cache,
                                     const struct glm_segment *segments, int n_segments,
                                     struct glm_heads heads)
{
    attention a = attention();
    a.qkv = (const float *)qkv;
    a.cache_k = (const float *)cache.k;
    a.cache_v = (const float *)cache.v;
    a.segments = segments;
    a.n_segments = n_segments;
    a.NH = heads.NH;
    a.KVH = heads.KVH;
    a.tokens = heads.tokens;
    a.fewest = GLM_DECODE_TOKENS;
    a.HD = heads.HD;
    a.G = heads.NH / heads.KVH;
    a.scale = (float)(1 / sqrt((double)heads.HD));
    a.log2_scale = a.scale * LOG2_E;
    return a;
}

/* Enough blocks for an even share of uneven tiles. */
static inline int attention_blocks(const struct cuda *cuda)
{
    const int blocks = 8 * cuda->multiprocessors;
    return blocks < PARTIALS ? blocks : PARTIALS; /* each may leave a maximum in glm_small */
}

void glm_cuda_attention_decode(struct cuda *cuda, const attention &a, struct glm_heads heads);
void glm_cuda_attention_forward_16(struct cuda *cuda, attention a, struct glm_heads heads);
void glm_cuda_attention_backward_16(struct cuda *cuda, const attention &a, struct glm_heads heads);

/* Heads wider than 256 have no kernel. */
static inline int attention_fits(struct cuda *cuda, const attention &a)
{
    if (a.HD <= 256)
        return 1;
    if (!cuda->error[0])
        snprintf(cuda->error, sizeof cuda->error, "%s: heads of %d are wider than 256", cuda->name,
                 a.HD);
    return 0;
}
#endif
