/* Attention forward by tiles, softmax carried along (Milakov & Gimelshein 2018): never a T x S
 * matrix.
 *
 * Float: T rows and T keys a tile, 128 threads, 128 / T adjacent threads to a row; each of them has
 * 16 columns of the row's output in registers. T is 32, 16 or 8 for heads up to 64, 128 or 256, so
 * that three tiles take at most 31 KB.
 *
 * 16 bits: a warp has 16 rows, a block 64, a tile 32 keys, 17 KB at most. Scores and output stay in
 * registers; only the operands of the two products are rounded. A key hidden from a row is a zero
 * times its value: if that value is NaN, rows of the same tile before it are NaN too. */
#include "attention.cuh"

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

template <int D, bool BF16>
static __device__ __forceinline__ void forward_fragments(const attention &a)
{
    const int ROWS = 64, KEYS = 32, LD = D + 8, STEPS = D / 8;
    GLM_DYN_SHARED(unsigned short, shared); /* queries, then keys and values: both 64 rows */
    unsigned short *ks = shared, *vs = shared + KEYS * LD;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, HD = a.HD;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + ROWS - 1) / ROWS;
        const int items = s.count > GLM_DECODE_TOKENS ? tiles * a.KVH : 0;
        for (; item < first + items; item += gridDim.x) {
            const int g = (item - first) % a.KVH,
                      row0 = (tiles - 1 - (item - first) / a.KVH) * ROWS;
            const int last = seen_by(s, (min(row0 + ROWS, rows) - 1) / a.G);
            const int row = row0 + 16 * warp + lane / 4; /* and row + 8 */
            const bool real[2] = {row < rows, row + 8 < rows};
            const int seen[2] = {real[0] ? seen_by(s, row / a.G) : 0,
                                 real[1] ? seen_by(s, (row + 8) / a.G) : 0};
            unsigned query[D / 16][4];
            float mix[STEPS][4], most[2] = {-GLM_INFINITY, -GLM_INFINITY}, total[2] = {0, 0};
            __syncthreads(); /* readers of the item before */
            load_queries<D, ROWS, BF16>(shared, a, s, g, row0, rows);
            __syncthreads();
#pragma unroll
            for (int d = 0; d < D / 16; d++)
                load_a<LD>(query[d], shared + 16 * warp * LD + 16 * d);
            clear<STEPS>(mix);
            for (int k0 = 0; k0 < last; k0 += KEYS) {
                __syncthreads(); /* readers of the tile before */
                load_keys<D, KEYS, BF16>(ks, vs, a, s, g, k0, last);
                __syncthreads();
                float score[KEYS / 8][4];
                clear<KEYS / 8>(score);
#pragma unroll
                for (int d = 0; d < D / 16; d++)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n += 2) {
                        unsigned b[4];
                        load_b<LD>(b, ks + 8 * n * LD + 16 * d);
                        mma_pair<BF16>(score + n, query[d], b);
                    }
                float shrink[2];
#pragma unroll
                for (int h = 0; h < 2; h++) { /* rows `row` and `row` + 8: a quad of lanes each */
                    float top = -GLM_INFINITY, sum = 0;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int key = k0 + 8 * n + 2 * (lane % 4) + j;
                            float *x = &score[n][2 * h + j];
                            *x = key < seen[h] ? *x * a.scale : -GLM_INFINITY;
                            top = fmaxf(top, *x);
                        }
                    top = fmaxf(most[h], lanes_max<4>(top));
                    shrink[h] = top == most[h] ? 1.0f : expf(most[h] - top);
                    most[h] = top;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            float *x = &score[n][2 * h + j];
                            *x = expf(*x - top); /* of a hidden key: 0 */
                            sum += *x;
                        }
                    total[h] = total[h] * shrink[h] + lanes_sum<4>(sum);
                }
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    mix[n][0] *= shrink[0], mix[n][1] *= shrink[0];
                    mix[n][2] *= shrink[1], mix[n][3] *= shrink[1];
                }
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
                    unsigned p[4], b[4];
                    pack_a<BF16>(p, score + 2 * k);
#pragma unroll
                    for (int n = 0; n < STEPS; n += 2) {
                        load_b_columns<LD>(b, vs + 16 * k * LD + 8 * n);
                        mma_pair<BF16>(mix + n, p, b);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (!real[h])
                    continue;
                const size_t at = head_row(a, s, g, row + 8 * h);
                const float share = 1.0f / total[h];
#pragma unroll
                for (int n = 0; n < STEPS; n++) {
                    put2(a.out + at * HD, 8 * n + 2 * (lane % 4), HD, mix[n][2 * h] * share,
                         mix[n][2 * h + 1] * share);
                }
                if (lane % 4 == 0)
                    a.lse[at] = most[h] + logf(total[h]);
            }
        }
        first += items;
    }
}

GLM_TILE_KERNEL(128, 2) k_attention_forward_f16_64(attention a) { forward_fragments<64, false>(a); }
GLM_TILE_KERNEL(128, 2) k_attention_forward_f16_128(attention a)
{
    forward_fragments<128, false>(a);
}
GLM_TILE_KERNEL(128, 2) k_attention_forward_bf16_64(attention a) { forward_fragments<64, true>(a); }
GLM_TILE_KERNEL(128, 2) k_attention_forward_bf16_128(attention a)
{
    forward_fragments<128, true>(a);
}

#ifdef GLM_HOST
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
    if (cuda->compute != GLM_F32 && a.HD <= 128) {
        void (*const kernels[2][2])(attention) = {
            {k_attention_forward_f16_64, k_attention_forward_f16_128},
            {k_attention_forward_bf16_64, k_attention_forward_bf16_128}};
        void (*const kernel)(attention) = kernels[cuda->compute == GLM_BF16][a.HD > 64];
        const size_t narrow = (size_t)64 * ((a.HD > 64 ? 128 : 64) + 8) * 2;
        GLM_LAUNCH(cuda, "attention_forward", kernel, blocks, 128, narrow, a);
    } else if (T == 32)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_32, blocks, 128, bytes, a);
    else if (T == 16)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_16, blocks, 128, bytes, a);
    else
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_8, blocks, 128, bytes, a);
}
#endif
