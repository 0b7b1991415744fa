/* Attention backward: p is recomputed from the scores and lse, and with
 *   delta = dout . out
 *   ds = p * (dout . v - delta)
 *   dq = scale * sum over keys of ds k
 *   dk = scale * sum over rows of ds q
 *   dv = sum over rows of p dout
 *
 * In float three launches, none of which writes what another block writes: delta, left in the first
 * element of each head of dqkv, which the last launch overwrites; keys and values; queries. A cache
 * row that several segments share is the first one's: its block adds up all segments in order.
 * In 16 bits: attention_backward_16.cu. */
#include "attention.cuh"
#include "products.h"

GLM_KERNEL(256) k_attention_delta(attention a)
{
    const int lane = threadIdx.x & 31, HD = a.HD;
    const size_t warp = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5,
                 warps = ((size_t)gridDim.x * blockDim.x) >> 5;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        for (size_t row = warp; row < (size_t)s.count * a.NH; row += warps) {
            const size_t at = (size_t)s.begin * a.NH + row;
            float sum = 0;
            for (int c = 4 * lane; c < HD; c += 128) {
                const f4 x = load4(a.dout + at * HD, c, HD), y = load4(a.out + at * HD, c, HD);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum += x.v[j] * y.v[j];
            }
            sum = warp_sum(sum);
            if (lane == 0)
                a.dqkv[at / a.NH * (a.NH + 2 * a.KVH) * HD + at % a.NH * HD] = sum;
        }
    }
}

static __device__ __forceinline__ const float *delta_of(const attention &a, const glm_segment &s,
                                                        int g, int row)
{
    return a.dqkv + (query_of(a, s, g, row) - a.qkv);
}

/* ---- float: tiles as in forward, but T rows that a block owns and T / 2 that it runs over */

/* Of a row of two tiles with rows lane, lane + LANES .. of two others, of COUNT: x . xs, y . ys */
template <int LANES, int COUNT, int N>
static __device__ __forceinline__ void two_scores(float (&score)[N], float (&through)[N],
                                                  const float *x, const float *y, const float *xs,
                                                  const float *ys, int HD, int LD, int lane)
{
#pragma unroll
    for (int n = 0; n < N; n++)
        score[n] = through[n] = 0;
    for (int c = 0; c < HD; c += 4) {
        const float4 x4 = at4(x + c), y4 = at4(y + c);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int at = min(lane + n * LANES, COUNT - 1) * LD + c;
            score[n] = dot4(x4, at4(xs + at), score[n]);
            through[n] = dot4(y4, at4(ys + at), through[n]);
        }
    }
}

/* ---- queries */

template <int T> static __device__ __forceinline__ void query_tiles(const attention &a)
{
    const int LANES = 128 / T, K = T / 2, KEYS = K > LANES ? K / LANES : 1;
    GLM_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *qs = shared, *ds = qs + T * LD, *ks = ds + T * LD, *vs = ks + K * LD, *gs = vs + K * LD;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + T - 1) / T, items = tiles * a.KVH;
        for (; item < first + items; item += gridDim.x) {
            const int g = (item - first) % a.KVH, row0 = (tiles - 1 - (item - first) / a.KVH) * T;
            const int row = row0 + r;
            const bool real = row < rows;
            const int seen = real ? seen_by(s, row / a.G) : 0;
            const int last = seen_by(s, (min(row0 + T, rows) - 1) / a.G);
            const size_t at = real ? head_row(a, s, g, row) : 0;
            /* their readers are this row's threads, and past the __syncwarp below */
            fill_row(qs + r * LD, real ? query_of(a, s, g, row) : NULL, HD, lane, LANES);
            fill_row(ds + r * LD, real ? a.dout + at * HD : NULL, HD, lane, LANES);
            const float lse = real ? a.lse[at] : 0.0f;
            const float delta = real ? *delta_of(a, s, g, row) : 0.0f;
            float4 dq[4];
            clear(dq);
            for (int k0 = 0; k0 < last; k0 += K) {
                const pair_of kv = key_before(a, s, g, k0 + r, last);
                __syncthreads(); /* readers of the tile before */
                if (r < K)
                    fill_rows(ks + r * LD, vs + r * LD, kv, HD, lane, LANES);
                __syncthreads();
                float score[KEYS], through[KEYS];
                two_scores<LANES, K>(score, through, qs + r * LD, ds + r * LD, ks, vs, HD, LD,
                                     lane);
#pragma unroll
                for (int n = 0; n < KEYS; n++) {
                    const int k = lane + n * LANES;
                    if (k < K)
                        gs[r * K + k] = expf(score[n] * a.scale - lse) * (through[n] - delta);
                }
                __syncwarp();
                const int visible = min(seen - k0, K); /* others are not read */
                for (int k = 0; k < visible; k++)
                    add_row<LANES>(dq, gs[r * K + k], ks + k * LD, HD, lane);
            }
            if (!real)
                continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (4 * (lane + j * LANES) < HD)
                    put4(a.dqkv + (query_of(a, s, g, row) - a.qkv), 4 * (lane + j * LANES), HD,
                         dq[j], a.scale);
        }
        first += items;
    }
}

GLM_TILE_KERNEL(128, 3) k_attention_dq_32(attention a) { query_tiles<32>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_dq_16(attention a) { query_tiles<16>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_dq_8(attention a) { query_tiles<8>(a); }

/* ---- keys and values: a block has T keys, own or shared, and runs over the rows that see them */

template <int T> static __device__ __forceinline__ void key_tiles(const attention &a)
{
    const int LANES = 128 / T, R = T / 2, ROWS = R > LANES ? R / LANES : 1;
    GLM_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *ks = shared, *vs = ks + T * LD, *qs = vs + T * LD, *ds = qs + R * LD, *ps = ds + R * LD,
          *gs = ps + T * R, *lses = gs + T * R, *deltas = lses + R;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int own_tiles = (s.count + T - 1) / T;
        const int tiles = own_tiles + (rows_to_add(a, i) + T - 1) / T;
        for (; item < first + tiles * a.KVH; item += gridDim.x) {
            const int g = (item - first) % a.KVH, tile = (item - first) / a.KVH;
            const bool own = tile < own_tiles;
            /* the first key of the tile: of the own ones, or a cache row */
            const int key0 = own ? tile * T : s.shared_begin + (tile - own_tiles) * T;
            const int keys = own ? s.count : s.shared_begin + s.shared_count, key = key0 + r;
            const bool real = key < keys;
            /* from those to places in what the segment sees */
            const int shift = own ? before(s) : -s.shared_begin;
            const pair_of kv = key_before(a, s, g, key + shift, keys + shift);
            /* their readers are this key's threads, and past the __syncwarp below */
            fill_rows(ks + r * LD, vs + r * LD, kv, HD, lane, LANES);
            float4 dk[4], dv[4];
            clear(dk);
            clear(dv);
            for (int o = i; o < (own ? i + 1 : a.n_segments); o++) {
                const glm_segment q = a.segments[o];
                const int begin = q.shared_begin, end = begin + q.shared_count;
                if (!own && (key0 >= end || key0 + T <= begin))
                    continue;
                const int rows = q.count * a.G, context = min(q.context, q.count);
                /* rows from `from` on see the key; the tile needs those from its first key's on */
                int from = own ? (key < context ? 0 : key * a.G) : 0;
                if (!real || (!own && (key < begin || key >= end)))
                    from = rows;
                const int start = own && key0 >= context ? key0 * a.G : 0;
                for (int row0 = start; row0 < rows; row0 += R) {
                    const int row = row0 + r;
                    const bool real_row = row < rows;
                    __syncthreads(); /* readers of the tile before */
                    if (r < R) {
                        const size_t at = real_row ? head_row(a, q, g, row) : 0;
                        fill_row(qs + r * LD, real_row ? query_of(a, q, g, row) : NULL, HD, lane,
                                 LANES);
                        fill_row(ds + r * LD, real_row ? a.dout + at * HD : NULL, HD, lane, LANES);
                        if (lane == 0) {
                            lses[r] = real_row ? a.lse[at] : 0.0f;
                            deltas[r] = real_row ? *delta_of(a, q, g, row) : 0.0f;
                        }
                    }
                    __syncthreads();
                    float score[ROWS], through[ROWS];
                    two_scores<LANES, R>(score, through, ks + r * LD, vs + r * LD, qs, ds, HD, LD,
                                         lane);
#pragma unroll
                    for (int n = 0; n < ROWS; n++) {
                        const int at_row = lane + n * LANES;
                        if (at_row < R) {
                            const float p = expf(score[n] * a.scale - lses[at_row]);
                            ps[r * R + at_row] = p;
                            gs[r * R + at_row] = p * (through[n] - deltas[at_row]);
                        }
                    }
                    __syncwarp();
                    const int top = min(rows - row0, R); /* those before `from` are not read */
                    for (int n = max(from - row0, 0); n < top; n++) {
                        add_row<LANES>(dv, ps[r * R + n], ds + n * LD, HD, lane);
                        add_row<LANES>(dk, gs[r * R + n], qs + n * LD, HD, lane);
                    }
                }
            }
            if (!real || (!own && !owns_row(a, i, key)))
                continue;
            float *to_k, *to_v;
            if (own) {
                to_k = a.dqkv + (kv.k - a.qkv);
                to_v = a.dqkv + (kv.v - a.qkv);
            } else {
                to_k = a.dcache_k + (kv.k - a.cache_k);
                to_v = a.dcache_v + (kv.v - a.cache_v);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int c = 4 * (lane + j * LANES);
                if (c >= HD)
                    continue;
                float4 k = dk[j], v = dv[j];
                k.x *= a.scale, k.y *= a.scale, k.z *= a.scale, k.w *= a.scale;
                if (!own) {
                    const f4 x = load4(to_k, c, HD), y = load4(to_v, c, HD);
                    k.x += x.v[0], k.y += x.v[1], k.z += x.v[2], k.w += x.v[3];
                    v.x += y.v[0], v.y += y.v[1], v.z += y.v[2], v.w += y.v[3];
                }
                put4(to_k, c, HD, k, 1.0f);
                put4(to_v, c, HD, v, 1.0f);
            }
        }
        first += tiles * a.KVH;
    }
}

GLM_TILE_KERNEL(128, 2) k_attention_dkv_32(attention a) { key_tiles<32>(a); }
GLM_TILE_KERNEL(128, 2) k_attention_dkv_16(attention a) { key_tiles<16>(a); }
GLM_TILE_KERNEL(128, 2) k_attention_dkv_8(attention a) { key_tiles<8>(a); }

#ifdef GLM_HOST
extern "C" void glm_cuda_attention_backward(void *cx, void *dqkv, struct glm_kv dcache,
                                            const void *dout, const void *out, const void *lse,
                                            const void *qkv, struct glm_kv cache,
                                            const struct glm_segment *segments, int n_segments,
                                            struct glm_heads heads)
{
    struct cuda *cuda = cuda_of(cx);
    attention a = attention_of(qkv, cache, segments, n_segments, heads);
    a.out = (float *)out;
    a.lse = (float *)lse;
    a.dout = (const float *)dout;
    a.dqkv = (float *)dqkv;
    a.dcache_k = (float *)dcache.k;
    a.dcache_v = (float *)dcache.v;
    const int T = a.HD <= 64 ? 32 : a.HD <= 128 ? 16 : 8, blocks = attention_blocks(cuda);
    const size_t tiles = (size_t)3 * T * tile_stride(a.HD);
    const size_t dq_bytes = (tiles + T * (T / 2)) * sizeof(float),
                 dkv_bytes = (tiles + 2 * T * (T / 2) + T) * sizeof(float);
    const char *op = "attention_backward";
    if (!n_segments || !glm_cuda_begin(cuda) || !attention_fits(cuda, a))
        return;
    if (glm_backward_narrows(cuda->compute, heads)) {
        glm_cuda_attention_backward_16(cuda, a, heads);
        return;
    }
    GLM_LAUNCH(cuda, op, k_attention_delta, blocks, 256, 0, a);
    if (T == 32) {
        GLM_LAUNCH(cuda, op, k_attention_dkv_32, blocks, 128, dkv_bytes, a);
        GLM_LAUNCH(cuda, op, k_attention_dq_32, blocks, 128, dq_bytes, a);
    } else if (T == 16) {
        GLM_LAUNCH(cuda, op, k_attention_dkv_16, blocks, 128, dkv_bytes, a);
        GLM_LAUNCH(cuda, op, k_attention_dq_16, blocks, 128, dq_bytes, a);
    } else {
        GLM_LAUNCH(cuda, op, k_attention_dkv_8, blocks, 128, dkv_bytes, a);
        GLM_LAUNCH(cuda, op, k_attention_dq_8, blocks, 128, dq_bytes, a);
    }
}
#endif
