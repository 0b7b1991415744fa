/* Attention backward: p is recomputed from the scores and lse, and with
 *   delta = dout . out
 *   ds = p * (dout . v - delta)
 *   dq = scale * sum over keys of ds k
 *   dk = scale * sum over rows of ds q
 *   dv = sum over rows of p dout
 *
 * Three launches, none of which writes what another block writes: delta, left in the first element
 * of each head of dqkv, which the last launch overwrites; keys and values; queries. A cache row
 * that several segments share is the first one's: its block adds up all segments in order. */
#include "attention.cuh"

GLM_BLOCK_REDUCTION(block_max, float, warp_max, 0)

GLM_KERNEL(256) k_attention_delta(attention a)
{
    const int lane = threadIdx.x & 31, HD = a.HD;
    float most = 0;
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
                for (int j = 0; j < 4; j++) {
                    sum += x.v[j] * y.v[j];
                    most = fmaxf(most, fabsf(x.v[j]));
                }
            }
            sum = warp_sum(sum);
            if (lane == 0)
                a.dqkv[at / a.NH * (a.NH + 2 * a.KVH) * HD + at % a.NH * HD] = sum;
        }
    }
    if (!a.largest)
        return;
    most = block_max(most);
    if (threadIdx.x == 0)
        a.largest[blockIdx.x] = most;
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
        const int tiles = own_tiles + (a.dcache_k ? (s.shared_count + T - 1) / T : 0);
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

/* ---- 16 bits: operands of the products are rounded, dout and ds after they were multiplied by
 * *factor; heads up to 128 */

/* As load_queries the gradients of the output, times factor. */
template <int D, int ROWS, bool BF16>
static __device__ __forceinline__ void load_gradients(unsigned short *to, const attention &a,
                                                      const glm_segment &s, int g, int row0,
                                                      int rows, float factor)
{
    const int LD = D + 8, STEPS = D / 8;
    for (int e = threadIdx.x; e < ROWS * STEPS; e += 128) {
        const int r = e / STEPS, row = row0 + r;
        narrow8_row<BF16>(to + r * LD, row < rows ? a.dout + head_row(a, s, g, row) * a.HD : NULL,
                          a.HD, 8 * (e % STEPS), factor);
    }
}

/* As forward: a warp has 16 rows, a tile 32 keys. */
template <int D, bool BF16>
static __device__ __forceinline__ void query_fragments(const attention &a)
{
    const int ROWS = 64, KEYS = 32, LD = D + 8, STEPS = D / 8;
    GLM_DYN_SHARED(unsigned short, shared);
    unsigned short *ks = shared, *vs = shared + KEYS * LD;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    const float factor = a.factor ? *a.factor : 1.0f;
    const float undo = a.scale * (a.factor ? *a.alpha : 1.0f);
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + ROWS - 1) / ROWS, items = tiles * a.KVH;
        for (; item < first + items; item += gridDim.x) {
            const int g = (item - first) % a.KVH,
                      row0 = (tiles - 1 - (item - first) / a.KVH) * ROWS;
            const int last = seen_by(s, (min(row0 + ROWS, rows) - 1) / a.G);
            const int row = row0 + 16 * warp + lane / 4; /* and row + 8 */
            const bool real[2] = {row < rows, row + 8 < rows};
            int seen[2];
            float lse[2], delta[2], dq[STEPS][4];
            unsigned query[D / 16][4], dout[D / 16][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int at = real[h] ? row + 8 * h : rows - 1;
                seen[h] = real[h] ? seen_by(s, at / a.G) : 0;
                lse[h] = a.lse[head_row(a, s, g, at)];
                delta[h] = factor * *delta_of(a, s, g, at);
            }
            __syncthreads(); /* readers of the item before */
            load_queries<D, ROWS, BF16>(shared, a, s, g, row0, rows);
            __syncthreads();
#pragma unroll
            for (int d = 0; d < D / 16; d++)
                load_a<LD>(query[d], shared + 16 * warp * LD + 16 * d);
            __syncthreads();
            load_gradients<D, ROWS, BF16>(shared, a, s, g, row0, rows, factor);
            __syncthreads();
#pragma unroll
            for (int d = 0; d < D / 16; d++)
                load_a<LD>(dout[d], shared + 16 * warp * LD + 16 * d);
            clear<STEPS>(dq);
            for (int k0 = 0; k0 < last; k0 += KEYS) {
                __syncthreads(); /* readers of the tile before */
                load_keys<D, KEYS, BF16>(ks, vs, a, s, g, k0, last);
                __syncthreads();
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) { /* 16 keys at a time */
                    float score[2][4], through[2][4];
                    unsigned ds[4], b[4];
                    clear<2>(score);
                    clear<2>(through);
#pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        load_b<LD>(b, ks + 16 * k * LD + 16 * d);
                        mma_pair<BF16>(score, query[d], b);
                        load_b<LD>(b, vs + 16 * k * LD + 16 * d);
                        mma_pair<BF16>(through, dout[d], b);
                    }
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int h = j / 2, key = k0 + 16 * k + 8 * n + 2 * (lane % 4) + j % 2;
                            score[n][j] = key < seen[h] ? expf(score[n][j] * a.scale - lse[h]) *
                                                              (through[n][j] - delta[h])
                                                        : 0.0f;
                        }
                    pack_a<BF16>(ds, score);
#pragma unroll
                    for (int n = 0; n < STEPS; n += 2) {
                        load_b_columns<LD>(b, ks + 16 * k * LD + 8 * n);
                        mma_pair<BF16>(dq + n, ds, b);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (real[h]) {
                    float *to = a.dqkv + (query_of(a, s, g, row + 8 * h) - a.qkv);
#pragma unroll
                    for (int n = 0; n < STEPS; n++)
                        put2(to, 8 * n + 2 * (lane % 4), HD, dq[n][2 * h] * undo,
                             dq[n][2 * h + 1] * undo);
                }
        }
        first += items;
    }
}

/* A block has 32 keys and runs over 16 rows at a time; a warp has 16 of the keys and half of the
 * columns of dk and dv, and computes the scores for both halves. */
template <int D, bool BF16> static __device__ __forceinline__ void key_fragments(const attention &a)
{
    const int KEYS = 32, ROWS = 16, LD = D + 8, OWN = D / 16;
    GLM_DYN_SHARED(unsigned short, shared);
    unsigned short *ks = shared, *vs = ks + KEYS * LD, *qs = vs + KEYS * LD, *os = qs + ROWS * LD;
    const int lane = threadIdx.x & 31, HD = a.HD, half = 16 * (int)(threadIdx.x >> 6),
              column = (int)(threadIdx.x >> 5 & 1) * (D / 2);
    const float factor = a.factor ? *a.factor : 1.0f, undo = a.factor ? *a.alpha : 1.0f;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int own_tiles = (s.count + KEYS - 1) / KEYS;
        const int tiles = own_tiles + (a.dcache_k ? (s.shared_count + KEYS - 1) / KEYS : 0);
        for (; item < first + tiles * a.KVH; item += gridDim.x) {
            const int g = (item - first) % a.KVH, tile = (item - first) / a.KVH;
            const bool own = tile < own_tiles;
            const int key0 = own ? tile * KEYS : s.shared_begin + (tile - own_tiles) * KEYS;
            const int keys = own ? s.count : s.shared_begin + s.shared_count;
            const int key = key0 + half + lane / 4; /* and key + 8 */
            const bool real[2] = {key < keys, key + 8 < keys};
            __syncthreads(); /* readers of the item before */
            const int shift = own ? before(s) : -s.shared_begin;
            load_keys<D, KEYS, BF16>(ks, vs, a, s, g, key0 + shift, keys + shift);
            float dk[OWN][4], dv[OWN][4];
            clear<OWN>(dk);
            clear<OWN>(dv);
            for (int o = i; o < (own ? i + 1 : a.n_segments); o++) {
                const glm_segment q = a.segments[o];
                const int begin = q.shared_begin, end = begin + q.shared_count;
                if (!own && (key0 >= end || key0 + KEYS <= begin))
                    continue;
                const int rows = q.count * a.G, context = min(q.context, q.count);
                int from[2]; /* rows from there on see the key */
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int k = key + 8 * h;
                    from[h] = own && k >= context ? k * a.G : 0;
                    if (!real[h] || (!own && (k < begin || k >= end)))
                        from[h] = rows;
                }
                for (int row0 = own && key0 >= context ? key0 * a.G : 0; row0 < rows;
                     row0 += ROWS) {
                    __syncthreads(); /* readers of the tile before */
                    load_queries<D, ROWS, BF16>(qs, a, q, g, row0, rows);
                    load_gradients<D, ROWS, BF16>(os, a, q, g, row0, rows, factor);
                    __syncthreads();
                    float score[2][4], through[2][4];
                    unsigned x[4], b[4], p[4], w[4];
                    clear<2>(score);
                    clear<2>(through);
#pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        load_a<LD>(x, ks + half * LD + 16 * d);
                        load_b<LD>(b, qs + 16 * d);
                        mma_pair<BF16>(score, x, b);
                        load_a<LD>(x, vs + half * LD + 16 * d);
                        load_b<LD>(b, os + 16 * d);
                        mma_pair<BF16>(through, x, b);
                    }
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int row = row0 + 8 * n + 2 * (lane % 4) + j;
                            const int at = min(row, rows - 1);
                            const float lse = a.lse[head_row(a, q, g, at)];
                            const float delta = factor * *delta_of(a, q, g, at);
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                float *x = &score[n][2 * h + j], *y = &through[n][2 * h + j];
                                const bool sees = row >= from[h] && row < rows;
                                *x = sees ? expf(*x * a.scale - lse) : 0.0f;
                                *y = sees ? *x * (*y - delta) : 0.0f;
                            }
                        }
                    pack_a<BF16>(p, score);
                    pack_a<BF16>(w, through);
#pragma unroll
                    for (int n = 0; n < OWN; n += 2) {
                        load_b_columns<LD>(b, os + column + 8 * n);
                        mma_pair<BF16>(dv + n, p, b);
                        load_b_columns<LD>(b, qs + column + 8 * n);
                        mma_pair<BF16>(dk + n, w, b);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int k = key + 8 * h;
                if (!real[h] || (!own && !owns_row(a, i, k)))
                    continue;
                const pair_of kv = key_of(a, s, g, k + shift);
                float *to_k = own ? a.dqkv + (kv.k - a.qkv) : a.dcache_k + (kv.k - a.cache_k);
                float *to_v = own ? a.dqkv + (kv.v - a.qkv) : a.dcache_v + (kv.v - a.cache_v);
#pragma unroll
                for (int n = 0; n < OWN; n++) {
                    const int c = column + 8 * n + 2 * (lane % 4);
                    float x[2], y[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const bool adds = !own && c + j < HD;
                        x[j] = dk[n][2 * h + j] * a.scale * undo + (adds ? to_k[c + j] : 0.0f);
                        y[j] = dv[n][2 * h + j] * undo + (adds ? to_v[c + j] : 0.0f);
                    }
                    put2(to_k, c, HD, x[0], x[1]);
                    put2(to_v, c, HD, y[0], y[1]);
                }
            }
        }
        first += tiles * a.KVH;
    }
}

#define FRAGMENT_KERNELS(name, D, BF16)                                                         \
    GLM_TILE_KERNEL(128, 2) k_attention_dq_##name(attention a) { query_fragments<D, BF16>(a); } \
    GLM_TILE_KERNEL(128, 2) k_attention_dkv_##name(attention a) { key_fragments<D, BF16>(a); }
FRAGMENT_KERNELS(f16_64, 64, false)
FRAGMENT_KERNELS(f16_128, 128, false)
FRAGMENT_KERNELS(bf16_64, 64, true)
FRAGMENT_KERNELS(bf16_128, 128, true)

#ifdef GLM_HOST
typedef void (*attention_kernel)(attention);

static void backward_fragments(struct cuda *cuda, attention a, int blocks)
{
    static const attention_kernel dq[2][2] = {{k_attention_dq_f16_64, k_attention_dq_f16_128},
                                              {k_attention_dq_bf16_64, k_attention_dq_bf16_128}};
    static const attention_kernel dkv[2][2] = {{k_attention_dkv_f16_64, k_attention_dkv_f16_128},
                                               {k_attention_dkv_bf16_64, k_attention_dkv_bf16_128}};
    const int bf16 = cuda->compute == GLM_BF16, wide = a.HD > 64;
    const attention_kernel k_dq = dq[bf16][wide], k_dkv = dkv[bf16][wide];
    const size_t row = (size_t)((wide ? 128 : 64) + 8) * 2;
    const char *op = "attention_backward";
    if (!bf16) { /* a score's gradient is a sum over a head: room for it above 2^5 */
        glm_cuda_factor(cuda, blocks, 5, 1);
        a.factor = &cuda->small->factor;
        a.alpha = &cuda->small->alpha;
    }
    GLM_LAUNCH(cuda, op, k_dkv, blocks, 128, 96 * row, a);
    GLM_LAUNCH(cuda, op, k_dq, blocks, 128, 64 * row, a);
}

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
    const int narrow = cuda->compute != GLM_F32 && a.HD <= 128;
    a.largest = narrow ? cuda->small->largest : NULL;
    GLM_LAUNCH(cuda, op, k_attention_delta, blocks, 256, 0, a);
    if (narrow) {
        backward_fragments(cuda, a, blocks);
    } else if (T == 32) {
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
