/* Attention forward by tiles, softmax carried along (Milakov & Gimelshein 2018): never a T x S
 * matrix.
 *
 * Float: T rows and T keys a tile, 128 threads, 128 / T adjacent threads to a row; each of them has
 * 16 columns of the row's output in registers. T is 32, 16 or 8 for heads up to 64, 128 or 256, so
 * that three tiles take at most 31 KB.
 *
 * 16 bits (Dao 2023): keys and values are converted once, into scratch. A block of 4 warps has 64
 * rows, or 128 ("tall") where there is enough to do: these read a key half as often and each
 * fragment of it for two products, but take longer for a tile. A tile has 64 keys; the next keys
 * are on their way while values are multiplied, the values while keys are. Scores and output stay
 * in registers; only the operands of the two products are rounded. A key hidden from a row is a
 * zero times its value: if that value is NaN, rows of the same tile before it are NaN too. */
#include "attention.cuh"

#ifdef GLM_HOST
#include "products.h"
#endif

template <int T> static __device__ __forceinline__ void forward_tiles(const attention &a)
{
    const int LANES = 128 / T, KEYS = T > LANES ? T / LANES : 1;
    GLM_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *qs = shared, *ks = qs + T * LD, *vs = ks + T * LD, *ps = vs + T * LD;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + T - 1) / T;
        const int items = s.count > GLM_DECODE_TOKENS ? tiles * a.KVH : 0;
        for (; item < first + items; item += gridDim.x) {
            /* the longest rows first */
            const int g = (item - first) % a.KVH, row0 = (tiles - 1 - (item - first) / a.KVH) * T;
            const int row = row0 + r;
            const bool real = row < rows;
            const int seen = real ? seen_by(s, row / a.G) : 0;
            const int last = seen_by(s, (min(row0 + T, rows) - 1) / a.G);
            /* its readers are this row's threads, and past the __syncwarp below */
            fill_row(qs + r * LD, real ? query_of(a, s, g, row) : NULL, HD, lane, LANES);
            float most = -GLM_INFINITY, total = 0;
            float4 mix[4];
            clear(mix);
            for (int k0 = 0; k0 < last; k0 += T) {
                const pair_of kv = key_before(a, s, g, k0 + r, last);
                __syncthreads(); /* readers of the tile before */
                fill_rows(ks + r * LD, vs + r * LD, kv, HD, lane, LANES);
                __syncthreads();
                float score[KEYS], top = -GLM_INFINITY, sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS; n++)
                    score[n] = 0;
                for (int c = 0; c < HD; c += 4) {
                    const float4 q = at4(qs + r * LD + c);
#pragma unroll
                    for (int n = 0; n < KEYS; n++)
                        score[n] =
                            dot4(q, at4(ks + min(lane + n * LANES, T - 1) * LD + c), score[n]);
                }
#pragma unroll
                for (int n = 0; n < KEYS; n++) {
                    const int k = lane + n * LANES;
                    score[n] = k < T && k0 + k < seen ? score[n] * a.scale : -GLM_INFINITY;
                    top = fmaxf(top, score[n]);
                }
                top = fmaxf(most, lanes_max<LANES>(top));
                const float shrink = top == most ? 1.0f : expf(most - top);
#pragma unroll
                for (int n = 0; n < KEYS; n++) {
                    const int k = lane + n * LANES;
                    const float p = expf(score[n] - top); /* of a hidden key: 0 */
                    if (k < T)
                        ps[r * T + k] = p;
                    sum += p;
                }
                total = total * shrink + lanes_sum<LANES>(sum);
                most = top;
                __syncwarp(); /* a row's threads are in one warp */
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mix[j].x *= shrink, mix[j].y *= shrink, mix[j].z *= shrink, mix[j].w *= shrink;
                const int visible = min(seen - k0, T);
                for (int k = 0; k < visible; k++) /* hidden keys may hold NaN */
                    add_row<LANES>(mix, ps[r * T + k], vs + k * LD, HD, lane);
            }
            if (real) {
                const size_t at = head_row(a, s, g, row);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (4 * (lane + j * LANES) < HD)
                        put4(a.out + at * HD, 4 * (lane + j * LANES), HD, mix[j], 1.0f / total);
                if (lane == 0)
                    a.lse[at] = most + logf(total);
            }
        }
        first += items;
    }
}

GLM_TILE_KERNEL(128, 3) k_attention_forward_32(attention a) { forward_tiles<32>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_forward_16(attention a) { forward_tiles<16>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_forward_8(attention a) { forward_tiles<8>(a); }

/* ---- 16 bits */

/* 1 when a segment before i, that goes by tiles, shares the cache row. */
static __device__ __forceinline__ int done_before(const attention &a, int i, int row)
{
    for (int j = 0; j < i; j++) {
        const glm_segment s = a.segments[j];
        if (s.count > a.fewest && row >= s.shared_begin && row < s.shared_begin + s.shared_count)
            return 1;
    }
    return 0;
}

/* Columns c .. c + 7 of a head of HD, a multiple of 8, in 16 bits; zeros past its end */
static __device__ __forceinline__ uint4 words_of_head(const unsigned short *head, int c, int HD)
{
    uint4 q;
    q.x = q.y = q.z = q.w = 0;
    if (c >= HD)
        return q;
    if (((size_t)head & 15) == 0)
        return *reinterpret_cast<const uint4 *>(head + c);
    unsigned w[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        w[j] = head[c + 2 * j] | (unsigned)head[c + 2 * j + 1] << 16;
    q.x = w[0], q.y = w[1], q.z = w[2], q.w = w[3];
    return q;
}

/* Keys and values of every row that a tile may ask for, once in 16 bits, rows of D with zeros past
 * HD: (row, KVH, key or value, D), rows of qkv first, then those of the cache. */
template <int D, bool BF16> static __device__ __forceinline__ void narrow_pairs(const attention &a)
{
    const int STEPS = D / 8, of_row = 2 * a.KVH * STEPS;
    const size_t step = (size_t)gridDim.x * blockDim.x;
    size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const size_t items = s.count > a.fewest ? (size_t)(before(s) + s.count) * of_row : 0;
        for (; item < first + items; item += step) {
            const int j = (int)((item - first) / of_row), e = (int)((item - first) % of_row);
            const int g = e / (2 * STEPS), value = e / STEPS % 2, c = 8 * (e % STEPS);
            if (j < s.shared_count && done_before(a, i, s.shared_begin + j))
                continue;
            unsigned short *to = a.pairs + pair_at<D>(a, s, g, j) + value * D;
            if (a.qkv_16 && j >= before(s)) {
                const size_t row = s.begin + j - before(s),
                             head = row * (a.NH + 2 * a.KVH) + a.NH + value * a.KVH + g;
                *reinterpret_cast<uint4 *>(to + c) = words_of_head(a.qkv_16 + head * a.HD, c, a.HD);
                continue;
            }
            const pair_of kv = key_of(a, s, g, j);
            narrow8_row<BF16>(to, value ? kv.v : kv.k, a.HD, c, 1);
        }
        first += items;
    }
}

enum { KEYS = 64 }; /* of a tile */

/* Of scores of 16 rows from `row` on with KEYS keys from k0 on: those that a row does not see. */
static __device__ __forceinline__ void hide(float (*score)[4], const attention &a,
                                            const glm_segment &s, int row, int k0)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = min(row + 8 * h + lane / 4, s.count * a.G - 1); /* no row: as the last */
        const int seen = seen_by(s, r / a.G) - k0 - 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (8 * n + j >= seen)
                    score[n][2 * h + j] = -GLM_INFINITY;
    }
}

/* Keys k0 .. k0 + KEYS - 1 of a segment, or their values: those from `last` on are zeros. */
template <int D>
static __device__ __forceinline__ void copy_tile(unsigned short *tile, const attention &a, int i,
                                                 int g, int k0, int last, int value)
{
    const glm_segment s = a.segments[i]; /* read again rather than held: registers are short */
    const int STEPS = D / 8, c = threadIdx.x % STEPS;
    const unsigned short *from = a.pairs + value * D + 8 * c;
#pragma unroll 2
    for (int n = 0; n < KEYS * STEPS / 128; n++) {
        const int r = threadIdx.x / STEPS + n * (128 / STEPS), j = k0 + r;
        copy16(tile + swizzled<D>(r, c), from + pair_at<D>(a, s, g, j), j < last);
    }
    copies_commit();
}

/* Queries of rows row0 .. row0 + ROWS - 1, of the last row where there are fewer. */
template <int D, int ROWS, bool BF16>
static __device__ __forceinline__ void fill_queries(unsigned short *tile, const attention &a,
                                                    const glm_segment &s, int g, int row0)
{
    const int STEPS = D / 8, BELOW = 128 / STEPS, c = threadIdx.x % STEPS, last = s.count * a.G - 1;
    if (a.qkv_16) {
#pragma unroll 1
        for (int r = threadIdx.x / STEPS; r < ROWS; r += BELOW)
            *reinterpret_cast<uint4 *>(tile + swizzled<D>(r, c)) =
                words_of_head(a.qkv_16 + query_at(a, s, g, min(row0 + r, last)), 8 * c, a.HD);
        return;
    }
    if (a.HD != D || ((size_t)a.qkv & 15)) {
        for (int r = threadIdx.x / STEPS; r < ROWS; r += BELOW)
            narrow8_row<BF16>(tile + swizzled<D>(r, c) - 8 * c,
                              query_of(a, s, g, min(row0 + r, last)), a.HD, 8 * c, 1);
        return;
    }
    const int TOGETHER = 4; /* loads on their way */
    for (int r = threadIdx.x / STEPS; r < ROWS; r += TOGETHER * BELOW) {
        float v[TOGETHER][8];
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) {
            const float *from = query_of(a, s, g, min(row0 + r + n * BELOW, last)) + 8 * c;
            *reinterpret_cast<float4 *>(v[n]) = at4(from);
            *reinterpret_cast<float4 *>(v[n] + 4) = at4(from + 4);
        }
#pragma unroll
        for (int n = 0; n < TOGETHER; n++)
            *reinterpret_cast<uint4 *>(tile + swizzled<D>(r + n * BELOW, c)) =
                narrow8(v[n], BF16 ? GLM_BF16 : GLM_F16);
    }
}

/* Tiles of rows that a segment gives to blocks. */
static __device__ __forceinline__ int items_of(const attention &a, const glm_segment &s, int ROWS)
{
    return s.count > a.fewest ? (s.count * a.G + ROWS - 1) / ROWS * a.KVH : 0;
}

/* Steps of a score's product in one run of code: all, but where registers do not suffice. */
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ == 900
enum { AHEAD = 1 };
#elif defined(__CUDACC_RTC__) && __CUDA_ARCH__ < 1200
enum { AHEAD = 4 };
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
enum { AHEAD = 4 };
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
enum { AHEAD = 2 };
#else
enum { AHEAD = 8 };
#endif

/* M: 16 * M rows a warp. No value depends on it. */
template <int D, int M, bool BF16>
static __device__ __forceinline__ void forward_fragments(const attention &a)
{
    const int ROWS = 64 * M, STEPS = D / 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    if (M > 1)
        return; /* shared memory has no room for two of them */
#endif
    GLM_DYN_SHARED(unsigned short, ks);
    unsigned short *vs = ks + KEYS * D, *qs = vs + KEYS * D;
    const int lane = threadIdx.x & 31, begin = 16 * M * (int)(threadIdx.x >> 5);
    const float scale = a.log2_scale;
    /* where this lane reads fragments of queries, keys and values: a row, and how it is turned */
    const unsigned short *q_row = qs + (begin + lane % 16) * D,
                         *k_row = ks + (8 * (lane / 16) + lane % 8) * D,
                         *v_row = vs + lane % 16 * D;
    int q_turn = lane / 16 ^ lane % 8, k_turn = lane / 8 % 2 ^ lane % 8;
    for (int item = blockIdx.x;; item += gridDim.x) {
        int i = 0, tile = item;
        for (; i < a.n_segments; i++) {
            const int items = items_of(a, a.segments[i], ROWS);
            if (tile < items)
                break;
            tile -= items;
        }
        if (i == a.n_segments)
            return;
        const glm_segment s = a.segments[i];
        const int g = tile % a.KVH, rows = s.count * a.G;
        const int row0 = ((rows - 1) / ROWS - tile / a.KVH) * ROWS; /* the longest rows first */
        const int last = seen_by(s, (min(row0 + ROWS, rows) - 1) / a.G);
        const int row = row0 + begin;                            /* the warp's first */
        const int common = seen_by(s, min(row, rows - 1) / a.G); /* keys that all its rows see */
        float mix[M][STEPS][4], most[M][2], total[M][2];
        /* the item before left queries and keys at its last barrier */
        copy_tile<D>(ks, a, i, g, 0, last, 0);
        fill_queries<D, ROWS, BF16>(qs, a, s, g, row0);
#pragma unroll
        for (int m = 0; m < M; m++) {
            clear<STEPS>(mix[m]);
            most[m][0] = most[m][1] = -GLM_INFINITY;
            total[m][0] = total[m][1] = 0;
        }
        for (int k0 = 0; k0 < last; k0 += KEYS) {
            copies_wait<0>();
            __syncthreads(); /* keys are there; readers of the values before */
            copy_tile<D>(vs, a, i, g, k0, last, 1);
            float score[M][KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < M; m++)
                clear<KEYS / 8>(score[m]);
#pragma unroll AHEAD
            for (int d = 0; d < D / 16; d++) {
                unsigned query[M][4];
#pragma unroll
                for (int m = 0; m < M; m++)
                    load_fragments<false>(query[m], q_row + 16 * m * D + turned(2 * d, q_turn));
#pragma unroll
                for (int n = 0; n < KEYS / 8; n += 2) {
                    unsigned b[4];
                    load_fragments<false>(b, k_row + 8 * n * D + turned(2 * d, k_turn));
#pragma unroll
                    for (int m = 0; m < M; m++)
                        mma_pair<BF16>(score[m] + n, query[m], b);
                }
            }
            if (k0 + KEYS > common) {
#pragma unroll
                for (int m = 0; m < M; m++)
                    hide(score[m], a, a.segments[i], row + 16 * m, k0);
            }
            float shrink[M][2];
            bool grew = false;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) { /* a row is a quad's */
                    float top = most[m][h];
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        top = fmaxf(top, fmaxf(score[m][n][2 * h], score[m][n][2 * h + 1]));
                    top = lanes_max<4>(top);
                    shrink[m][h] = top == most[m][h] ? 1.0f : exp2_of((most[m][h] - top) * scale);
                    grew |= top != most[m][h];
                    most[m][h] = top;
                }
            if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int n = 0; n < STEPS; n++) {
                        mix[m][n][0] *= shrink[m][0], mix[m][n][1] *= shrink[m][0];
                        mix[m][n][2] *= shrink[m][1], mix[m][n][3] *= shrink[m][1];
                    }
                    total[m][0] *= shrink[m][0], total[m][1] *= shrink[m][1];
                }
            }
            copies_wait<0>();
            __syncthreads(); /* values are there; readers of the keys */
            if (k0 + KEYS < last)
                copy_tile<D>(ks, a, i, g, k0 + KEYS, last, 0);
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) { /* exponentials beside the products before */
                unsigned p[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int n = 2 * k; n < 2 * k + 2; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float *x = &score[m][n][j]; /* of a hidden key it becomes 0 */
                            *x = exp2_of(*x * scale - most[m][j / 2] * scale);
                            total[m][j / 2] += *x; /* this lane's keys */
                        }
                    pack_a<BF16>(p[m], score[m] + 2 * k);
                }
#pragma unroll
                for (int n = 0; n < STEPS; n += 2) {
                    unsigned b[4];
                    load_fragments<true>(b, v_row + 16 * k * D + turned(n, q_turn));
#pragma unroll
                    for (int m = 0; m < M; m++)
                        mma_pair<BF16>(mix[m] + n, p[m], b);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float sum = lanes_sum<4>(total[m][h]), share = 1.0f / sum;
                const int r = row + 16 * m + 8 * h + lane / 4;
                if (r >= a.segments[i].count * a.G)
                    continue;
                const size_t at = head_row(a, a.segments[i], g, r);
#pragma unroll
                for (int n = 0; n < STEPS; n++)
                    put_pair<BF16>(a.out, a.out_16, at * a.HD, 8 * n + 2 * (lane % 4), a.HD,
                                   mix[m][n][2 * h] * share, mix[m][n][2 * h + 1] * share);
                if (lane % 4 == 0)
                    a.lse[at] = most[m][h] * a.scale + logf(sum);
            }
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
enum { BLOCKS = 1 }; /* as many as shared memory holds */
#else
enum { BLOCKS = 3 };
#endif

#define FORWARD_KERNELS(name, D, BF16)                                                  \
    GLM_KERNEL(256) k_attention_pairs_##name(attention a) { narrow_pairs<D, BF16>(a); } \
    GLM_TILE_KERNEL(128, BLOCKS) k_attention_forward_##name(attention a)                \
    {                                                                                   \
        forward_fragments<D, 1, BF16>(a);                                               \
    }                                                                                   \
    GLM_TILE_KERNEL(128, 2) k_attention_forward_##name##_tall(attention a)              \
    {                                                                                   \
        forward_fragments<D, 2, BF16>(a);                                               \
    }
FORWARD_KERNELS(f16_64, 64, false)
FORWARD_KERNELS(f16_128, 128, false)
FORWARD_KERNELS(bf16_64, 64, true)
FORWARD_KERNELS(bf16_128, 128, true)

#ifdef GLM_HOST
/* Tall tiles pay where there are many keys to a row, three of them for each multiprocessor, and
 * room for two there. */
static int is_tall(const struct cuda *cuda, struct glm_heads heads)
{
    return heads.longest > 1024 && cuda->shared >= 2 * (size_t)(64 << 10) &&
           (size_t)heads.tokens * heads.NH >= (size_t)3 * 128 * cuda->multiprocessors;
}

#define OF_TYPES(name, more)                            \
    {                                                   \
        {name##_f16_64##more, name##_f16_128##more},    \
        {                                               \
            name##_bf16_64##more, name##_bf16_128##more \
        }                                               \
    }

static void forward_narrow(struct cuda *cuda, attention a, int blocks, struct glm_heads heads)
{
    typedef void (*attention_kernel)(attention);
    static const attention_kernel pairs[2][2] = OF_TYPES(k_attention_pairs, );
    static const attention_kernel forward[2][2][2] = {OF_TYPES(k_attention_forward, ),
                                                      OF_TYPES(k_attention_forward, _tall)};
    const int bf16 = cuda->compute == GLM_BF16, wide = a.HD > 64, tall = is_tall(cuda, heads);
    const attention_kernel k_pairs = pairs[bf16][wide], k_forward = forward[tall][bf16][wide];
    const size_t tile = (size_t)64 * (wide ? 128 : 64) * 2; /* of keys, of values, of queries */
    a.pairs = (unsigned short *)glm_cuda_scratch(
        cuda, SCRATCH_A, glm_pairs_bytes(a.tokens + heads.rows, a.KVH, a.HD));
    if (!a.pairs)
        return;
    const char *op = a.qkv_16 ? "self_attention_forward" : "attention_forward";
    GLM_LAUNCH(cuda, op, k_pairs, blocks, 256, 0, a);
    GLM_LAUNCH(cuda, op, k_forward, blocks, 128, (size_t)(3 + tall) * tile, a);
}

void glm_cuda_attention_forward_16(struct cuda *cuda, attention a, struct glm_heads heads)
{
    forward_narrow(cuda, a, attention_blocks(cuda), heads);
}

extern "C" void glm_cuda_attention_forward(void *cx, void *out, void *lse, const void *qkv,
                                           struct glm_kv cache, const struct glm_segment *segments,
                                           int n_segments, struct glm_heads heads)
{
    struct cuda *cuda = cuda_of(cx);
    attention a = attention_of(qkv, cache, segments, n_segments, heads);
    const int T = a.HD <= 64 ? 32 : a.HD <= 128 ? 16 : 8, blocks = attention_blocks(cuda);
    const size_t bytes = (size_t)(3 * T * tile_stride(a.HD) + T * T) * sizeof(float);
    a.out = (float *)out;
    a.lse = (float *)lse;
    if (!n_segments || !glm_cuda_begin(cuda) || !attention_fits(cuda, a))
        return;
    glm_cuda_attention_decode(cuda, a, heads);
    if (heads.longest && heads.longest <= GLM_DECODE_TOKENS)
        return; /* tiles would find nothing to do */
    if (cuda->compute != GLM_F32 && a.HD <= 128)
        forward_narrow(cuda, a, blocks, heads);
    else if (T == 32)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_32, blocks, 128, bytes, a);
    else if (T == 16)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_16, blocks, 128, bytes, a);
    else
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_8, blocks, 128, bytes, a);
}
#endif
