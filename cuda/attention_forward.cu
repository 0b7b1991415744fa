/* Attention forward by tiles, softmax carried along (Milakov & Gimelshein 2018): never a T x S matrix.
 *
 * Float: T rows and T keys a tile, 128 threads, 128 / T adjacent threads to a row; each of them has
 * 16 columns of the row's output in registers. T is 32, 16 or 8 for heads up to 64, 128 or 256, so
 * that three tiles take at most 31 KB. */
#include "attention.cuh"

template <int T> static __device__ __forceinline__ void forward_tiles(const attention &a)
{
    const int LANES = 128 / T, KEYS = T > LANES ? T / LANES : 1;
    GL_DYN_SHARED(float, shared);
    const int HD = a.HD, LD = tile_stride(HD);
    float *qs = shared, *ks = qs + T * LD, *vs = ks + T * LD, *ps = vs + T * LD;
    const int r = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int piece = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int rows = s.count * a.G, tiles = (rows + T - 1) / T;
        const int pieces = s.count > DECODE_TOKENS ? tiles * a.KVH : 0;
        for (; piece < first + pieces; piece += gridDim.x) {
            /* the longest rows first */
            const int g = (piece - first) % a.KVH, row0 = (tiles - 1 - (piece - first) / a.KVH) * T;
            const int row = row0 + r, last_row = row0 + T < rows ? row0 + T - 1 : rows - 1;
            const int seen = row < rows ? seen_by(s, row / a.G) : 0;
            const int last = seen_by(s, last_row / a.G);
            __syncthreads(); /* readers of the piece before */
            fill_row(qs + r * LD, row < rows ? query_of(a, s, g, row) : NULL, HD, lane, LANES);
            float most = -GLM_INFINITY, total = 0;
            float4 mix[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                mix[j].x = mix[j].y = mix[j].z = mix[j].w = 0;
            for (int k0 = 0; k0 < last; k0 += T) {
                const int key = k0 + r;
                pair_of kv;
                kv.k = kv.v = NULL;
                if (key < last)
                    kv = key_of(a, s, g, key);
                __syncthreads(); /* readers of the tile before */
                fill_row(ks + r * LD, kv.k, HD, lane, LANES);
                fill_row(vs + r * LD, kv.v, HD, lane, LANES);
                __syncthreads();
                float score[KEYS], top = -GLM_INFINITY, sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS; n++)
                    score[n] = 0;
                for (int c = 0; c < HD; c += 4) {
                    const float4 q = at4(qs + r * LD + c);
#pragma unroll
                    for (int n = 0; n < KEYS; n++)
                        if (LANES <= T || lane < T)
                            score[n] = dot4(q, at4(ks + (lane + n * LANES) * LD + c), score[n]);
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
                    const float p = k < T && k0 + k < seen ? expf(score[n] - top) : 0.0f;
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
                const int visible = seen - k0 < T ? seen - k0 : T;
                for (int k = 0; k < visible; k++) { /* hidden keys may hold NaN */
                    const float p = ps[r * T + k];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int c = 4 * (lane + j * LANES);
                        if (c < HD)
                            add4(mix[j], p, at4(vs + k * LD + c));
                    }
                }
            }
            if (row < rows) {
                const size_t at = head_row(a, s, g, row);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    put4(a.out + at * HD, 4 * (lane + j * LANES), HD, mix[j], 1.0f / total);
                if (lane == 0)
                    a.lse[at] = most + logf(total);
            }
        }
        first += pieces;
    }
}

GLM_TILE_KERNEL(128, 3) k_attention_forward_32(attention a) { forward_tiles<32>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_forward_16(attention a) { forward_tiles<16>(a); }
GLM_TILE_KERNEL(128, 3) k_attention_forward_8(attention a) { forward_tiles<8>(a); }

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
    glm_cuda_attention_decode(cuda, a);
    if (T == 32)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_32, blocks, 128, bytes, a);
    else if (T == 16)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_16, blocks, 128, bytes, a);
    else
        GLM_LAUNCH(cuda, "attention_forward", k_attention_forward_8, blocks, 128, bytes, a);
}
#endif
