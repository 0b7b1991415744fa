/* Attention backward in 16 bits, heads up to 128: the formulas of attention_backward.cu on tensor
 * cores. Operands of the products are rounded, dout and ds after they were multiplied by *factor;
 * sums are float.
 *
 * Three launches. The first leaves the operands in scratch in 16 bits, in rows of D elements, so that
 * the second's tiles are plain copies, under way while the tile before is multiplied. There are too
 * few keys to keep a GPU busy, so the query heads of a key head are cut into `shares`, each of which
 * leaves its sums over its heads in scratch. The last adds up the shares of every key, in order. */
#include "attention.cuh"
#include "products.h"

struct gradients {
    attention a;
    int tokens, slots; /* slot n: token n, then the cache's rows */
    int D, share, shares;
    float scale2;                /* of scores, whose exp2 is taken */
    unsigned short *q, *dout;    /* (tokens, NH, D) */
    unsigned short *k, *v;       /* (slots, KVH, D) */
    float4 *known;               /* (tokens, NH): LOG2_E lse, factor delta, -, - */
    float *sums;                 /* (shares, 2, slots, KVH, D): of dk, of dv */
    const float *factor, *alpha; /* of dout, and its inverse; NULL: 1 */
};

static __device__ __forceinline__ size_t sum_at(const gradients &b, int share, int kv, int slot,
                                                int g)
{
    return ((((size_t)share * 2 + kv) * b.slots + slot) * b.a.KVH + g) * b.D;
}

/* ---- operands: a warp has a row */

template <bool BF16>
static __device__ __forceinline__ void narrow4(unsigned short *row, int c, const f4 x, float factor)
{
    uint2 both;
    both.x = pack2<BF16>(x.v[0] * factor, x.v[1] * factor);
    both.y = pack2<BF16>(x.v[2] * factor, x.v[3] * factor);
    *reinterpret_cast<uint2 *>(row + c) = both;
}

/* Four columns of row `at` of HD elements, from floats or from 16 bits, where there are those */
template <bool BF16>
static __device__ __forceinline__ f4 columns4(const float *p, const unsigned short *p_16, size_t at,
                                              int c, int HD)
{
    if (p_16 && c < HD)
        return load4_stored(p_16 + at * HD, BF16 ? GLM_BF16 : GLM_F16, c, HD);
    return load4_or_zero(p + at * HD, c, HD);
}

template <bool BF16> static __device__ __forceinline__ void narrow_operands(const gradients &b)
{
    const attention &a = b.a;
    const int c = 4 * (threadIdx.x & 31), HD = a.HD;
    const size_t warp = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5,
                 warps = ((size_t)gridDim.x * blockDim.x) >> 5, width = a.NH + 2 * a.KVH;
    const float factor = b.factor ? *b.factor : 1.0f;
    for (size_t at = warp; at < (size_t)b.tokens * a.NH; at += warps) {
        const f4 q = columns4<BF16>(a.qkv, a.qkv_16, at / a.NH * width + at % a.NH, c, HD);
        const f4 x = columns4<BF16>(a.dout, a.dout_16, at, c, HD);
        const f4 y = columns4<BF16>(a.out, a.out_16, at, c, HD);
        float sum = 0;
        if (c < b.D) {
            narrow4<BF16>(b.q + at * b.D, c, q, 1);
            narrow4<BF16>(b.dout + at * b.D, c, x, factor);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum += x.v[j] * y.v[j];
        sum = warp_sum(sum);
        if (c == 0) {
            float4 known;
            known.x = LOG2_E * a.lse[at], known.y = factor * sum, known.z = known.w = 0;
            b.known[at] = known;
        }
    }
    for (size_t at = warp; at < (size_t)b.slots * a.KVH; at += warps) {
        const size_t slot = at / a.KVH, g = at % a.KVH, row = (slot - b.tokens) * a.KVH + g;
        const bool own = slot < (size_t)b.tokens;
        const size_t head = slot * width + a.NH + g;
        if (c >= b.D)
            continue;
        const f4 k = own ? columns4<BF16>(a.qkv, a.qkv_16, head, c, HD)
                         : load4_or_zero(a.cache_k + row * HD, c, HD);
        const f4 v = own ? columns4<BF16>(a.qkv, a.qkv_16, head + a.KVH, c, HD)
                         : load4_or_zero(a.cache_v + row * HD, c, HD);
        narrow4<BF16>(b.k + at * b.D, c, k, 1);
        narrow4<BF16>(b.v + at * b.D, c, v, 1);
    }
}

GLM_KERNEL(256) k_attention_narrow_f16(gradients b) { narrow_operands<false>(b); }
GLM_KERNEL(256) k_attention_narrow_bf16(gradients b) { narrow_operands<true>(b); }

/* Operand a (16, 16) of a product: columns c .. c + 15 of 16 rows in global memory, of which this
 * lane's are `low` and `high`. */
static __device__ __forceinline__ void load_a_rows(unsigned *x, const unsigned short *low,
                                                   const unsigned short *high, int c)
{
    const int at = c + 2 * (threadIdx.x & 3);
    x[0] = *reinterpret_cast<const unsigned *>(low + at);
    x[2] = *reinterpret_cast<const unsigned *>(low + at + 8);
    x[1] = *reinterpret_cast<const unsigned *>(high + at);
    x[3] = *reinterpret_cast<const unsigned *>(high + at + 8);
}

/* Slice d of an operand: in registers below HELD, else in this thread's places of shared memory. */
template <int HELD>
static __device__ __forceinline__ void put_slice(unsigned (*held)[4], uint4 *rest, int d,
                                                 const unsigned *x)
{
    uint4 q;
    q.x = x[0], q.y = x[1], q.z = x[2], q.w = x[3];
    if (d < HELD)
        held[d][0] = q.x, held[d][1] = q.y, held[d][2] = q.z, held[d][3] = q.w;
    else
        rest[(d - HELD) * 128] = q;
}

template <int HELD>
static __device__ __forceinline__ void get_slice(unsigned *x, const unsigned (*held)[4],
                                                 const uint4 *rest, int d)
{
    uint4 q;
    if (d < HELD)
        q.x = held[d][0], q.y = held[d][1], q.z = held[d][2], q.w = held[d][3];
    else
        q = rest[(d - HELD) * 128];
    x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
}

/* ---- keys and values: a block has 64 keys, own or shared, a warp 16 of them in registers; it runs
 * over 32 tokens of a query head at a time */

enum { OWN_KEYS = 64 };
/* Of the keys and of the values registers hold so many slices of 16 columns, shared memory the
 * others: there are just registers enough. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
enum { ROWS = 16, K_SLICES = 4, V_SLICES = 0 };
#else
enum { ROWS = 32, K_SLICES = 8, V_SLICES = 4 };
#endif

struct key_tile {
    int segment, g, share;
    bool own;            /* keys of the segment, else cache rows */
    int key, end, slot0; /* the first key; one past the last there is; key k's slot is slot0 + k */
};

/* Those that the most rows see come first. */
static __device__ __forceinline__ bool find_tile(key_tile &x, const gradients &b, int item)
{
    const attention &a = b.a;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int own_tiles = (s.count + OWN_KEYS - 1) / OWN_KEYS, each = a.KVH * b.shares;
        const int tiles = own_tiles + (rows_to_add(a, i) + OWN_KEYS - 1) / OWN_KEYS;
        if (item >= tiles * each) {
            item -= tiles * each;
            continue;
        }
        const int tile = item / each;
        x.segment = i, x.g = item % a.KVH, x.share = item % each / a.KVH;
        x.own = tile < own_tiles;
        x.key = x.own ? tile * OWN_KEYS : s.shared_begin + (tile - own_tiles) * OWN_KEYS;
        x.end = x.own ? s.count : s.shared_begin + s.shared_count;
        x.slot0 = x.own ? s.begin : b.tokens;
        return true;
    }
    return false;
}

/* A tile of rows: tokens from `token` on, below `end`, of a query head. */
struct place {
    int segment, head, token, end;
};

/* The first tokens from segment w.segment on that see some of the keys from `key` on: own ones of
 * that segment, or cache rows. */
static __device__ __forceinline__ bool seeing(place &w, const attention &a, bool own, int key)
{
    for (; w.segment < a.n_segments; w.segment++) {
        const glm_segment s = a.segments[w.segment];
        w.token = s.begin + (own && key >= min(s.context, s.count) ? key : 0);
        w.end = s.begin + s.count;
        if (own ||
            (s.count && key < s.shared_begin + s.shared_count && key + OWN_KEYS > s.shared_begin))
            return true;
    }
    return false;
}

/* Token `token` of the batch, of a segment, sees the key: an own one, or a cache row. */
static __device__ __forceinline__ bool sees(const glm_segment &s, bool own, int token, int key)
{
    const int own_token = token - s.begin, place = key - s.shared_begin;
    return own ? key <= own_token || key < min(s.context, s.count)
               : 0 <= place && place < s.shared_count;
}

template <int D>
static __device__ __forceinline__ void copy_rows(unsigned short *to, float4 *known,
                                                 const gradients &b, const place &w)
{
    const int LD = D + 8, STEPS = D / 8;
    const uint4 *q = reinterpret_cast<const uint4 *>(b.q),
                *o = reinterpret_cast<const uint4 *>(b.dout);
#pragma unroll
    for (int e = threadIdx.x; e < ROWS * STEPS; e += 128) {
        const int r = e / STEPS, c = e % STEPS, token = min(w.token + r, w.end - 1);
        const bool real = w.token + r < w.end; /* others are zeros and add nothing */
        const unsigned at = (unsigned)(token * b.a.NH + w.head) * STEPS + c;
        copy16(to + r * LD + 8 * c, q + at, real);
        copy16(to + (ROWS + r) * LD + 8 * c, o + at, real);
    }
    if (threadIdx.x < ROWS) {
        const int token = w.token + (int)threadIdx.x;
        copy16(known + threadIdx.x, b.known + (min(token, w.end - 1) * b.a.NH + w.head),
               token < w.end);
    }
    copies_commit();
}

template <int D, bool BF16>
static __device__ __forceinline__ void key_fragments(const gradients &b, int item, int blocks)
{
    const int LD = D + 8, STEPS = D / 8;
    GLM_DYN_SHARED(unsigned short, shared); /* two tiles of queries and dout, and what is known */
    float4 *known = reinterpret_cast<float4 *>(shared + 4 * ROWS * LD);
    uint4 *more_vs = reinterpret_cast<uint4 *>(known + 2 * ROWS) + threadIdx.x;
    uint4 *more_ks = more_vs + (8 - V_SLICES) * 128;
    const attention &a = b.a;
    const int lane = threadIdx.x & 31, own_key = 16 * (int)(threadIdx.x >> 5) + lane / 4;
    key_tile of;
    for (int stage = 0; find_tile(of, b, item); item += blocks) {
        const bool own = of.own;
        const int key0 = of.key, head0 = of.g * a.G + of.share * b.share,
                  heads = min((of.g + 1) * a.G, head0 + b.share);
        unsigned ks[K_SLICES][4], vs[V_SLICES + 1][4];
        float dk[STEPS][4], dv[STEPS][4];
        place next;
        next.segment = of.segment, next.head = head0;
        next.token = next.end = 0;
        bool more = seeing(next, a, own, key0);
        if (more)
            copy_rows<D>(shared + stage * 2 * ROWS * LD, known + stage * ROWS, b, next);
        {
            const int low = min(key0 + own_key, of.end - 1); /* past the end the last one again */
            const int high = min(key0 + own_key + 8, of.end - 1);
            const size_t at = ((size_t)(of.slot0 + low) * a.KVH + of.g) * D;
            const size_t at8 = ((size_t)(of.slot0 + high) * a.KVH + of.g) * D;
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                unsigned x[4];
                load_a_rows(x, b.k + at, b.k + at8, 16 * d);
                put_slice<K_SLICES>(ks, more_ks, d, x);
                load_a_rows(x, b.v + at, b.v + at8, 16 * d);
                put_slice<V_SLICES>(vs, more_vs, d, x);
            }
        }
        clear<STEPS>(dk);
        clear<STEPS>(dv);
        while (more) {
            const unsigned short *qs = shared + stage * 2 * ROWS * LD, *os = qs + ROWS * LD;
            const float4 *of_rows = known + stage * ROWS;
            const int token = next.token;
            const int segment = next.segment;
            bool whole = true; /* the warp's keys are seen by all rows */
#pragma unroll
            for (int h = 0; h < 2; h++)
                whole = whole && sees(a.segments[segment], own, token, key0 + own_key + 8 * h);
            whole = __all_sync(0xffffffffu, whole);
            next.token += ROWS;
            if (next.token >= next.end) {
                if (++next.head == heads) {
                    next.head -= (heads - 1) % a.G % b.share + 1;
                    next.segment++;
                    more = !own;
                }
                more = more && seeing(next, a, own, key0);
            }
            copies_wait<0>();
            __syncthreads(); /* the tile is there; readers of the one before are done */
            stage ^= 1;
            if (more)
                copy_rows<D>(shared + stage * 2 * ROWS * LD, known + stage * ROWS, b, next);
#pragma unroll 1
            for (int u = 0; u < ROWS; u += 16) {
                float score[2][4], through[2][4];
                unsigned x[4], p[4], w[4];
                clear<2>(score);
                clear<2>(through);
#pragma unroll
                for (int d = 0; d < D / 16; d++) {
                    unsigned y[4];
                    get_slice<K_SLICES>(y, ks, more_ks, d);
                    load_b<LD>(x, qs + u * LD + 16 * d);
                    mma_pair<BF16>(score, y, x);
                    get_slice<V_SLICES>(y, vs, more_vs, d);
                    load_b<LD>(x, os + u * LD + 16 * d);
                    mma_pair<BF16>(through, y, x);
                }
                if (!whole) {
                    const glm_segment s = a.segments[segment];
                    const int row = token + u + 2 * (lane % 4), key = key0 + own_key;
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            if (!sees(s, own, row + 8 * n + j % 2, key + j / 2 * 8))
                                score[n][j] = -GLM_INFINITY;
                }
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int row = u + 8 * n + 2 * (lane % 4) + j;
                        const float2 r = *reinterpret_cast<const float2 *>(of_rows + row);
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            float *y = &score[n][2 * h + j], *z = &through[n][2 * h + j];
                            *y = exp2_of(*y * b.scale2 - r.x);
                            *z = *y * (*z - r.y);
                        }
                    }
                pack_a<BF16>(p, score);
                pack_a<BF16>(w, through);
#pragma unroll
                for (int n = 0; n < STEPS; n += 2) {
                    load_b_columns<LD>(x, os + u * LD + 8 * n);
                    mma_pair<BF16>(dv + n, p, x);
                    load_b_columns<LD>(x, qs + u * LD + 8 * n);
                    mma_pair<BF16>(dk + n, w, x);
                }
            }
        }
        find_tile(of, b, item); /* again: it would take registers meanwhile */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int key = of.key + own_key + 8 * h;
            if (key >= of.end || (!of.own && !owns_row(a, of.segment, key)))
                continue;
            float *to_k = b.sums + sum_at(b, of.share, 0, of.slot0 + key, of.g),
                  *to_v = b.sums + sum_at(b, of.share, 1, of.slot0 + key, of.g);
#pragma unroll
            for (int n = 0; n < STEPS; n++) {
                const int c = 8 * n + 2 * (lane % 4);
                put2(to_k, c, D, dk[n][2 * h], dk[n][2 * h + 1]);
                put2(to_v, c, D, dv[n][2 * h], dv[n][2 * h + 1]);
            }
        }
    }
}

/* ---- queries: a warp has 16 rows in registers, a block 64, a tile 32 keys */

enum { KEYS = 32 };

template <int D>
static __device__ __forceinline__ void copy_keys(unsigned short *to, const gradients &b,
                                                 const glm_segment &s, int g, int j, int end)
{
    const int LD = D + 8, STEPS = D / 8;
#pragma unroll
    for (int e = threadIdx.x; e < KEYS * STEPS; e += 128) {
        const int r = e / STEPS, c = 8 * (e % STEPS), key = min(j + r, end - 1);
        const int own = key - before(s);
        const int row =
            key < s.shared_count ? s.shared_begin + key : s.past_begin + (key - s.shared_count);
        const int slot = own >= 0 ? s.begin + own : b.tokens + row;
        const size_t at = ((size_t)slot * b.a.KVH + g) * D + c;
        copy16(to + r * LD + c, b.k + at, true);
        copy16(to + (KEYS + r) * LD + c, b.v + at, true);
    }
    copies_commit();
}

template <int D, bool BF16>
static __device__ __forceinline__ void query_fragments(const gradients &b, int item, int blocks)
{
    const int BLOCK = 64, LD = D + 8, STEPS = D / 8;
    GLM_DYN_SHARED(unsigned short, shared); /* two tiles of keys and values */
    const attention &a = b.a;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    const float undo = a.scale * (b.factor ? *b.alpha : 1.0f);
    int first = 0, stage = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + BLOCK - 1) / BLOCK, items = tiles * a.KVH;
        for (; item < first + items; item += blocks) {
            /* the longest rows first */
            const int g = (item - first) % a.KVH,
                      row0 = (tiles - 1 - (item - first) / a.KVH) * BLOCK;
            const int last = seen_by(s, (min(row0 + BLOCK, rows) - 1) / a.G);
            const int row = row0 + 16 * warp + lane / 4; /* and row + 8 */
            copy_keys<D>(shared + stage * 2 * KEYS * LD, b, s, g, 0, last);
            int seen[2];
            float lse[2], delta[2], dq[STEPS][4];
            unsigned query[D / 16][4], dout[D / 16][4];
            size_t at[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int real = min(row + 8 * h, rows - 1); /* past the end the last one again */
                at[h] = head_row(a, s, g, real);
                seen[h] = seen_by(s, real / a.G);
                const float4 known = b.known[at[h]];
                lse[h] = known.x, delta[h] = known.y;
            }
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                load_a_rows(query[d], b.q + at[0] * D, b.q + at[1] * D, 16 * d);
                load_a_rows(dout[d], b.dout + at[0] * D, b.dout + at[1] * D, 16 * d);
            }
            clear<STEPS>(dq);
            for (int k0 = 0; k0 < last; k0 += KEYS) {
                const unsigned short *ks = shared + stage * 2 * KEYS * LD, *vs = ks + KEYS * LD;
                copies_wait<0>();
                __syncthreads(); /* the tile is there; readers of the one before are done */
                stage ^= 1;
                if (k0 + KEYS < last)
                    copy_keys<D>(shared + stage * 2 * KEYS * LD, b, s, g, k0 + KEYS, last);
                const bool whole = __all_sync(0xffffffffu, k0 + KEYS <= min(seen[0], seen[1]));
#pragma unroll 1
                for (int k = 0; k < KEYS; k += 16) {
                    float score[2][4], through[2][4];
                    unsigned ds[4], x[4];
                    clear<2>(score);
                    clear<2>(through);
#pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        load_b<LD>(x, ks + k * LD + 16 * d);
                        mma_pair<BF16>(score, query[d], x);
                        load_b<LD>(x, vs + k * LD + 16 * d);
                        mma_pair<BF16>(through, dout[d], x);
                    }
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int h = j / 2, key = k0 + k + 8 * n + 2 * (lane % 4) + j % 2;
                            float p = exp2_of(score[n][j] * b.scale2 - lse[h]);
                            if (!whole && key >= seen[h])
                                p = 0;
                            score[n][j] = p * (through[n][j] - delta[h]);
                        }
                    pack_a<BF16>(ds, score);
#pragma unroll
                    for (int n = 0; n < STEPS; n += 2) {
                        load_b_columns<LD>(x, ks + k * LD + 8 * n);
                        mma_pair<BF16>(dq + n, ds, x);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (row + 8 * h < rows) {
                    const size_t to = query_at(a, s, g, row + 8 * h);
#pragma unroll
                    for (int n = 0; n < STEPS; n++)
                        put_pair<BF16>(a.dqkv, a.dqkv_16, to, 8 * n + 2 * (lane % 4), HD,
                                       dq[n][2 * h] * undo, dq[n][2 * h + 1] * undo);
                }
        }
        first += items;
    }
}

/* Both at once: the tiles of keys go first, and queries fill the multiprocessors that they leave. */
template <int D, bool BF16> static __device__ __forceinline__ void fragments(const gradients &b)
{
    const int block = blockIdx.x, half = gridDim.x / 2;
    if (block < half)
        key_fragments<D, BF16>(b, block, half);
    else
        query_fragments<D, BF16>(b, block - half, half);
}

GLM_TILE_KERNEL(128, 2) k_attention_gradients_f16_64(gradients b) { fragments<64, false>(b); }
GLM_TILE_KERNEL(128, 2) k_attention_gradients_f16_128(gradients b) { fragments<128, false>(b); }
GLM_TILE_KERNEL(128, 2) k_attention_gradients_bf16_64(gradients b) { fragments<64, true>(b); }
GLM_TILE_KERNEL(128, 2) k_attention_gradients_bf16_128(gradients b) { fragments<128, true>(b); }

/* ---- the shares of keys and values, added up; to a cache row's gradient they are added */

GLM_KERNEL(256) k_attention_sum(gradients b)
{
    const attention &a = b.a;
    const int HD = a.HD, STEPS = b.D / 4;
    const float undo = b.factor ? *b.alpha : 1.0f;
    const unsigned slots = a.dcache_k ? b.slots : b.tokens, n = slots * a.KVH * 2 * STEPS;
    for (unsigned e = blockIdx.x * blockDim.x + threadIdx.x; e < n; e += gridDim.x * blockDim.x) {
        const int c = 4 * (int)(e % STEPS), x = (int)(e / STEPS);
        const int kv = x % 2, g = x / 2 % a.KVH, slot = x / 2 / a.KVH, row = slot - b.tokens;
        GLM_EXPECT(slot < (int)slots);
        if (c >= HD || (row >= 0 && owns_row(a, a.n_segments, row)))
            continue; /* of a row that no segment shares there are none */
        f4 sum;
        sum.v[0] = sum.v[1] = sum.v[2] = sum.v[3] = 0;
        for (int share = 0; share < b.shares; share++) {
            const f4 y = load4(b.sums + sum_at(b, share, kv, slot, g), c, b.D);
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum.v[j] += y.v[j];
        }
        const size_t own = ((size_t)slot * (a.NH + 2 * a.KVH) + a.NH + kv * a.KVH + g) * HD;
        float *to = row < 0 ? a.dqkv + own
                            : (kv ? a.dcache_v : a.dcache_k) + ((size_t)row * a.KVH + g) * HD;
        const float times = kv ? undo : undo * a.scale;
        f4 there;
        there.v[0] = there.v[1] = there.v[2] = there.v[3] = 0;
        if (row >= 0)
            there = load4(to, c, HD);
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum.v[j] = sum.v[j] * times + there.v[j];
        if (row < 0 && a.dqkv_16)
            store4_narrow(a.dqkv_16 + own + c, GLM_BF16, sum);
        else
            store4(to, c, HD, sum);
    }
}

#ifdef GLM_HOST
typedef void (*gradients_kernel)(gradients);

/* n elements of a type from scratch on, which moves on */
template <class T> static T *taken(char **scratch, size_t n)
{
    T *p = reinterpret_cast<T *>(*scratch);
    *scratch += n * sizeof(T);
    return p;
}

void glm_cuda_attention_backward_16(struct cuda *cuda, const attention &a, struct glm_heads heads)
{
    static const gradients_kernel kernels[2][2] = {
        {k_attention_gradients_f16_64, k_attention_gradients_f16_128},
        {k_attention_gradients_bf16_64, k_attention_gradients_bf16_128}};
    const int bf16 = cuda->compute == GLM_BF16, blocks = attention_blocks(cuda);
    const gradients_kernel narrow = bf16 ? k_attention_narrow_bf16 : k_attention_narrow_f16,
                           kernel = kernels[bf16][a.HD > 64];
    gradients b = gradients();
    b.a = a;
    b.scale2 = a.scale * LOG2_E;
    b.tokens = heads.tokens;
    b.slots = heads.tokens + heads.rows;
    b.D = glm_head_width(heads);
    b.share = glm_backward_share(heads);
    b.shares = glm_backward_shares(heads);
    const size_t of_queries = (size_t)b.tokens * a.NH, of_keys = (size_t)b.slots * a.KVH;
    char *scratch = (char *)glm_cuda_scratch(cuda, SCRATCH_A, glm_backward_scratch(heads));
    if (!scratch)
        return;
    b.q = taken<unsigned short>(&scratch, of_queries * b.D);
    b.dout = taken<unsigned short>(&scratch, of_queries * b.D);
    b.k = taken<unsigned short>(&scratch, of_keys * b.D);
    b.v = taken<unsigned short>(&scratch, of_keys * b.D);
    b.known = taken<float4>(&scratch, of_queries);
    b.sums = taken<float>(&scratch, 2 * b.shares * of_keys * b.D);
    /* a score's gradient is a sum over a head: room for it above 2^5 */
    b.factor = glm_cuda_factor(cuda, a.dout, of_queries * a.HD, cuda->compute, 5, 1);
    b.alpha = &cuda->small->alpha;
    /* tiles of ROWS and KEYS; of ROWS what is known, and slices of the values */
    const size_t bytes = (size_t)4 * 32 * (b.D + 8) * 2 + 2 * ROWS * sizeof(float4) +
                         (size_t)4 * 128 * sizeof(uint4);
    const char *op = a.qkv_16 ? "self_attention_backward" : "attention_backward";
    GLM_LAUNCH(cuda, op, narrow, blocks, 256, 0, b);
    GLM_LAUNCH(cuda, op, kernel, 2 * blocks, 128, bytes, b);
    GLM_LAUNCH(cuda, op, k_attention_sum, blocks, 256, 0, b);
}
#endif
