/* Attention backward: p is computed again from the scores and lse, and with
 *   delta = dout . out    ds = p * (dout . v - delta)
 * dq = scale * sum over keys of ds k, dk = scale * sum over rows of ds q, dv = sum over rows of p
 * dout.
 *
 * Three launches, none of which writes what another block writes: delta, left in the first element
 * of each head of dqkv, which the last launch overwrites; keys and values; queries. A cache row
 * that several segments share is the first one's: its block adds up all segments in order. Tiles as
 * in forward: T rows that a block owns, T / 2 of those it runs over. */
#include "attention.cuh"
#include "mma.cuh"

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

/* ---- queries: as forward, with T / 2 keys a tile */

template <int T> static __device__ __forceinline__ void query_tiles(const attention &a)
{
    const int LANES = 128 / T, K = T / 2, KEYS = K > LANES ? K / LANES : 1;
    GL_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *qs = shared, *ds = qs + T * LD, *ks = ds + T * LD, *vs = ks + K * LD, *gs = vs + K * LD;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int piece = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + T - 1) / T, pieces = tiles * a.KVH;
        for (; piece < first + pieces; piece += gridDim.x) {
            const int g = (piece - first) % a.KVH, row0 = (tiles - 1 - (piece - first) / a.KVH) * T;
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
#pragma unroll
            for (int j = 0; j < 4; j++)
                dq[j].x = dq[j].y = dq[j].z = dq[j].w = 0;
            for (int k0 = 0; k0 < last; k0 += K) {
                const int key = k0 + r;
                pair_of kv;
                kv.k = kv.v = NULL;
                if (key < last)
                    kv = key_of(a, s, g, key);
                __syncthreads();
                if (r < K) {
                    fill_row(ks + r * LD, kv.k, HD, lane, LANES);
                    fill_row(vs + r * LD, kv.v, HD, lane, LANES);
                }
                __syncthreads();
                float score[KEYS], through[KEYS];
#pragma unroll
                for (int n = 0; n < KEYS; n++)
                    score[n] = through[n] = 0;
                for (int c = 0; c < HD; c += 4) {
                    const float4 q = at4(qs + r * LD + c), d = at4(ds + r * LD + c);
#pragma unroll
                    for (int n = 0; n < KEYS; n++) {
                        const int at_key = min(lane + n * LANES, K - 1) * LD + c;
                        score[n] = dot4(q, at4(ks + at_key), score[n]);
                        through[n] = dot4(d, at4(vs + at_key), through[n]);
                    }
                }
#pragma unroll
                for (int n = 0; n < KEYS; n++) {
                    const int k = lane + n * LANES;
                    if (k < K)
                        gs[r * K + k] = expf(score[n] * a.scale - lse) * (through[n] - delta);
                }
                __syncwarp();
                const int visible = min(seen - k0, K); /* others are not read */
                for (int k = 0; k < visible; k++) {
                    const float w = gs[r * K + k];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int c = 4 * (lane + j * LANES);
                        if (c < HD)
                            add4(dq[j], w, at4(ks + k * LD + c));
                    }
                }
            }
            if (!real)
                continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (4 * (lane + j * LANES) < HD)
                    put4(a.dqkv + (query_of(a, s, g, row) - a.qkv), 4 * (lane + j * LANES), HD,
                         dq[j], a.scale);
        }
        first += pieces;
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
    GL_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *ks = shared, *vs = ks + T * LD, *qs = vs + T * LD, *ds = qs + R * LD, *ps = ds + R * LD,
          *gs = ps + T * R, *lses = gs + T * R, *deltas = lses + R;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int piece = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int own_tiles = (s.count + T - 1) / T;
        const int tiles = own_tiles + (a.dcache_k ? (s.shared_count + T - 1) / T : 0);
        for (; piece < first + tiles * a.KVH; piece += gridDim.x) {
            const int g = (piece - first) % a.KVH, tile = (piece - first) / a.KVH;
            const bool own = tile < own_tiles;
            /* the first key of the tile: of the own ones, or a cache row */
            const int key0 = own ? tile * T : s.shared_begin + (tile - own_tiles) * T;
            const int keys = own ? s.count : s.shared_begin + s.shared_count, key = key0 + r;
            const bool real = key < keys;
            pair_of kv;
            kv.k = kv.v = NULL;
            if (real)
                kv = key_of(a, s, g, own ? before(s) + key : key - s.shared_begin);
            /* their readers are this key's threads, and past the __syncwarp below */
            fill_row(ks + r * LD, kv.k, HD, lane, LANES);
            fill_row(vs + r * LD, kv.v, HD, lane, LANES);
            float4 dk[4], dv[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                dk[j].x = dk[j].y = dk[j].z = dk[j].w = 0;
                dv[j].x = dv[j].y = dv[j].z = dv[j].w = 0;
            }
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
#pragma unroll
                    for (int n = 0; n < ROWS; n++)
                        score[n] = through[n] = 0;
                    for (int c = 0; c < HD; c += 4) {
                        const float4 k = at4(ks + r * LD + c), v = at4(vs + r * LD + c);
#pragma unroll
                        for (int n = 0; n < ROWS; n++) {
                            const int at_row = min(lane + n * LANES, R - 1) * LD + c;
                            score[n] = dot4(k, at4(qs + at_row), score[n]);
                            through[n] = dot4(v, at4(ds + at_row), through[n]);
                        }
                    }
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
                        const float p = ps[r * R + n], w = gs[r * R + n];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int c = 4 * (lane + j * LANES);
                            if (c < HD) {
                                add4(dv[j], p, at4(ds + n * LD + c));
                                add4(dk[j], w, at4(qs + n * LD + c));
                            }
                        }
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

/* As forward: a warp has 16 rows, a tile 32 keys. */
template <int D, bool BRAIN> static __device__ __forceinline__ void query_pieces(const attention &a)
{
    const int ROWS = 64, KEYS = 32, LD = D + 8, STEPS = D / 8;
    GL_DYN_SHARED(unsigned short, shared);
    unsigned short *ks = shared, *vs = shared + KEYS * LD;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    const float factor = a.factor ? *a.factor : 1.0f;
    const float undo = a.scale * (a.factor ? *a.alpha : 1.0f);
    int piece = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + ROWS - 1) / ROWS, pieces = tiles * a.KVH;
        for (; piece < first + pieces; piece += gridDim.x) {
            const int g = (piece - first) % a.KVH,
                      row0 = (tiles - 1 - (piece - first) / a.KVH) * ROWS;
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
#pragma unroll
            for (int pass = 0; pass < 2; pass++) {
                __syncthreads(); /* readers of the piece before, or of the queries */
                for (int e = threadIdx.x; e < ROWS * STEPS; e += 128) {
                    const int r = e / STEPS;
                    const float *from = NULL;
                    if (row0 + r < rows)
                        from = pass ? a.dout + head_row(a, s, g, row0 + r) * HD
                                    : query_of(a, s, g, row0 + r);
                    narrow_piece<BRAIN>(shared + r * LD, from, HD, 8 * (e % STEPS),
                                        pass ? factor : 1.0f);
                }
                __syncthreads();
#pragma unroll
                for (int d = 0; d < D / 16; d++)
                    load_pieces<false>(pass ? dout[d] : query[d], shared +
                                                                      (16 * warp + lane % 16) * LD +
                                                                      16 * d + 8 * (lane / 16));
            }
#pragma unroll
            for (int n = 0; n < STEPS; n++)
                dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0;
            for (int k0 = 0; k0 < last; k0 += KEYS) {
                __syncthreads(); /* readers of the tile before */
                for (int e = threadIdx.x; e < KEYS * STEPS; e += 128) {
                    const int r = e / STEPS, c = 8 * (e % STEPS);
                    pair_of kv;
                    kv.k = kv.v = NULL;
                    if (k0 + r < last)
                        kv = key_of(a, s, g, k0 + r);
                    narrow_piece<BRAIN>(ks + r * LD, kv.k, HD, c, 1);
                    narrow_piece<BRAIN>(vs + r * LD, kv.v, HD, c, 1);
                }
                __syncthreads();
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) { /* 16 keys at a time */
                    float score[2][4], through[2][4];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        score[0][j] = score[1][j] = through[0][j] = through[1][j] = 0;
#pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        const int at = (16 * k + 8 * (lane / 16) + lane % 8) * LD + 16 * d +
                                       8 * (lane / 8 % 2);
                        unsigned b[4];
                        load_pieces<false>(b, ks + at);
                        mma<BRAIN>(score[0], query[d], b[0], b[1]);
                        mma<BRAIN>(score[1], query[d], b[2], b[3]);
                        load_pieces<false>(b, vs + at);
                        mma<BRAIN>(through[0], dout[d], b[0], b[1]);
                        mma<BRAIN>(through[1], dout[d], b[2], b[3]);
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
                    const unsigned ds[4] = {pack2<BRAIN>(score[0][0], score[0][1]),
                                            pack2<BRAIN>(score[0][2], score[0][3]),
                                            pack2<BRAIN>(score[1][0], score[1][1]),
                                            pack2<BRAIN>(score[1][2], score[1][3])};
#pragma unroll
                    for (int n = 0; n < STEPS; n += 2) {
                        unsigned b[4];
                        load_pieces<true>(b,
                                          ks + (16 * k + lane % 16) * LD + 8 * n + 8 * (lane / 16));
                        mma<BRAIN>(dq[n], ds, b[0], b[1]);
                        mma<BRAIN>(dq[n + 1], ds, b[2], b[3]);
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
        first += pieces;
    }
}

/* A block has 32 keys and runs over 16 rows at a time; a warp has 16 of the keys and half of the
 * columns of dk and dv, and computes the scores for both halves. */
template <int D, bool BRAIN> static __device__ __forceinline__ void key_pieces(const attention &a)
{
    const int KEYS = 32, ROWS = 16, LD = D + 8, STEPS = D / 8, OWN = D / 16;
    GL_DYN_SHARED(unsigned short, shared);
    unsigned short *ks = shared, *vs = ks + KEYS * LD, *qs = vs + KEYS * LD, *os = qs + ROWS * LD;
    const int lane = threadIdx.x & 31, HD = a.HD, half = 16 * (int)(threadIdx.x >> 6),
              column = (int)(threadIdx.x >> 5 & 1) * (D / 2);
    const float factor = a.factor ? *a.factor : 1.0f, undo = a.factor ? *a.alpha : 1.0f;
    int piece = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int own_tiles = (s.count + KEYS - 1) / KEYS;
        const int tiles = own_tiles + (a.dcache_k ? (s.shared_count + KEYS - 1) / KEYS : 0);
        for (; piece < first + tiles * a.KVH; piece += gridDim.x) {
            const int g = (piece - first) % a.KVH, tile = (piece - first) / a.KVH;
            const bool own = tile < own_tiles;
            const int key0 = own ? tile * KEYS : s.shared_begin + (tile - own_tiles) * KEYS;
            const int keys = own ? s.count : s.shared_begin + s.shared_count;
            const int key = key0 + half + lane / 4; /* and key + 8 */
            const bool real[2] = {key < keys, key + 8 < keys};
            __syncthreads(); /* readers of the piece before */
            for (int e = threadIdx.x; e < KEYS * STEPS; e += 128) {
                const int r = e / STEPS, c = 8 * (e % STEPS), k = key0 + r;
                pair_of kv;
                kv.k = kv.v = NULL;
                if (k < keys)
                    kv = key_of(a, s, g, own ? before(s) + k : k - s.shared_begin);
                narrow_piece<BRAIN>(ks + r * LD, kv.k, HD, c, 1);
                narrow_piece<BRAIN>(vs + r * LD, kv.v, HD, c, 1);
            }
            float dk[OWN][4], dv[OWN][4];
#pragma unroll
            for (int n = 0; n < OWN; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    dk[n][j] = dv[n][j] = 0;
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
                    for (int e = threadIdx.x; e < ROWS * STEPS; e += 128) {
                        const int r = e / STEPS, c = 8 * (e % STEPS), row = row0 + r;
                        narrow_piece<BRAIN>(qs + r * LD, row < rows ? query_of(a, q, g, row) : NULL,
                                            HD, c, 1);
                        narrow_piece<BRAIN>(
                            os + r * LD, row < rows ? a.dout + head_row(a, q, g, row) * HD : NULL,
                            HD, c, factor);
                    }
                    __syncthreads();
                    float score[2][4], through[2][4];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        score[0][j] = score[1][j] = through[0][j] = through[1][j] = 0;
#pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        const int at_key = (half + lane % 16) * LD + 16 * d + 8 * (lane / 16);
                        const int at_row =
                            (8 * (lane / 16) + lane % 8) * LD + 16 * d + 8 * (lane / 8 % 2);
                        unsigned x[4], b[4];
                        load_pieces<false>(x, ks + at_key);
                        load_pieces<false>(b, qs + at_row);
                        mma<BRAIN>(score[0], x, b[0], b[1]);
                        mma<BRAIN>(score[1], x, b[2], b[3]);
                        load_pieces<false>(x, vs + at_key);
                        load_pieces<false>(b, os + at_row);
                        mma<BRAIN>(through[0], x, b[0], b[1]);
                        mma<BRAIN>(through[1], x, b[2], b[3]);
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
                    const unsigned p[4] = {pack2<BRAIN>(score[0][0], score[0][1]),
                                           pack2<BRAIN>(score[0][2], score[0][3]),
                                           pack2<BRAIN>(score[1][0], score[1][1]),
                                           pack2<BRAIN>(score[1][2], score[1][3])};
                    const unsigned w[4] = {pack2<BRAIN>(through[0][0], through[0][1]),
                                           pack2<BRAIN>(through[0][2], through[0][3]),
                                           pack2<BRAIN>(through[1][0], through[1][1]),
                                           pack2<BRAIN>(through[1][2], through[1][3])};
#pragma unroll
                    for (int n = 0; n < OWN; n += 2) {
                        const int at = (lane % 16) * LD + column + 8 * n + 8 * (lane / 16);
                        unsigned b[4];
                        load_pieces<true>(b, os + at);
                        mma<BRAIN>(dv[n], p, b[0], b[1]);
                        mma<BRAIN>(dv[n + 1], p, b[2], b[3]);
                        load_pieces<true>(b, qs + at);
                        mma<BRAIN>(dk[n], w, b[0], b[1]);
                        mma<BRAIN>(dk[n + 1], w, b[2], b[3]);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int k = key + 8 * h;
                if (!real[h] || (!own && !owns_row(a, i, k)))
                    continue;
                const pair_of kv = key_of(a, s, g, own ? before(s) + k : k - s.shared_begin);
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

#define PIECE_KERNELS(name, D, BRAIN)                                                         \
    GLM_TILE_KERNEL(128, 2) k_attention_dq_##name(attention a) { query_pieces<D, BRAIN>(a); } \
    GLM_TILE_KERNEL(128, 2) k_attention_dkv_##name(attention a) { key_pieces<D, BRAIN>(a); }
PIECE_KERNELS(f16_64, 64, false)
PIECE_KERNELS(f16_128, 128, false)
PIECE_KERNELS(bf16_64, 64, true)
PIECE_KERNELS(bf16_128, 128, true)

#ifdef GLM_HOST
typedef void (*attention_kernel)(attention);

static void backward_pieces(struct cuda *cuda, attention a, int blocks)
{
    static const attention_kernel dq[2][2] = {{k_attention_dq_f16_64, k_attention_dq_f16_128},
                                              {k_attention_dq_bf16_64, k_attention_dq_bf16_128}};
    static const attention_kernel dkv[2][2] = {{k_attention_dkv_f16_64, k_attention_dkv_f16_128},
                                               {k_attention_dkv_bf16_64, k_attention_dkv_bf16_128}};
    const int brain = cuda->compute == GLM_BF16, wide = a.HD > 64;
    const attention_kernel k_dq = dq[brain][wide], k_dkv = dkv[brain][wide];
    const size_t row = (size_t)((wide ? 128 : 64) + 8) * 2;
    const char *op = "attention_backward";
    if (!brain) { /* a score's gradient is a sum over a head: room for it above 2^5 */
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
        backward_pieces(cuda, a, blocks);
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
