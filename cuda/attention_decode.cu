/* Attention forward for segments of a few tokens with a long past: a block a token and head. Its
 * warps take keys in turn, four at a time, and their results are put together at the end. */
#include "attention.cuh"

enum { WARPS = 8, AT_ONCE = 4 };

static __host__ __device__ __forceinline__ int mix_stride(int HD) { return (HD + 3) / 4 * 4; }

/* CHUNKS float4 of a head for each lane */
template <int CHUNKS> static __device__ __forceinline__ void decode_heads(const attention &a)
{
    GLM_DYN_SHARED(float, shared); /* (WARPS, HD padded), then maxima and sums of the warps */
    const int HD = a.HD, LD = mix_stride(HD), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float *mixes = shared, *mosts = shared + WARPS * LD, *totals = mosts + WARPS;
    int item = blockIdx.x, first = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const glm_segment s = a.segments[i];
        const int items = s.count <= DECODE_TOKENS ? s.count * a.NH : 0;
        for (; item < first + items; item += gridDim.x) {
            const int t = (item - first) / a.NH, h = (item - first) % a.NH, g = h / a.G;
            const int row = t * a.G + h % a.G, seen = seen_by(s, t);
            const float *q = query_of(a, s, g, row);
            f4 query[CHUNKS], mix[CHUNKS];
            float most = -GLM_INFINITY, total = 0;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                query[c] = load4_or_zero(q, 4 * (lane + 32 * c), HD);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mix[c].v[j] = 0;
            }
            for (int k0 = warp * AT_ONCE; k0 < seen; k0 += WARPS * AT_ONCE) {
                float score[AT_ONCE], top = most;
                const float *value[AT_ONCE];
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    const pair_of kv = key_of(a, s, g, k ? min(k0 + k, seen - 1) : k0);
                    value[k] = kv.v;
                    score[k] = 0;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        const f4 x = load4_or_zero(kv.k, 4 * (lane + 32 * c), HD);
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            score[k] += query[c].v[j] * x.v[j];
                    }
                }
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    score[k] = warp_sum(score[k]) * a.scale;
                    top = fmaxf(top, score[k]); /* past the end it is the last key's again */
                }
                const float shrink = top == most ? 1.0f : expf(most - top);
                total *= shrink;
                most = top;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        mix[c].v[j] *= shrink;
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++)
                    if (k0 + k < seen) {
                        const float p = expf(score[k] - top);
                        total += p;
#pragma unroll
                        for (int c = 0; c < CHUNKS; c++) {
                            const f4 x = load4_or_zero(value[k], 4 * (lane + 32 * c), HD);
#pragma unroll
                            for (int j = 0; j < 4; j++)
                                mix[c].v[j] += p * x.v[j];
                        }
                    }
            }
            __syncthreads(); /* readers of the item before */
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int at = 4 * (lane + 32 * c);
                if (at < HD) {
                    float4 x;
                    x.x = mix[c].v[0], x.y = mix[c].v[1], x.z = mix[c].v[2], x.w = mix[c].v[3];
                    *reinterpret_cast<float4 *>(mixes + warp * LD + at) = x;
                }
            }
            if (lane == 0) {
                mosts[warp] = most;
                totals[warp] = total;
            }
            __syncthreads();
            float top = -GLM_INFINITY, sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                top = fmaxf(top, mosts[w]);
#pragma unroll
            for (int w = 0; w < WARPS; w++) /* a warp without keys has neither */
                if (totals[w] != 0)
                    sum += totals[w] * (mosts[w] == top ? 1.0f : expf(mosts[w] - top));
            const size_t at = head_row(a, s, g, row);
            const float share = 1.0f / sum;
            for (int c = threadIdx.x; c < HD; c += blockDim.x) {
                float x = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    if (totals[w] != 0)
                        x += mixes[w * LD + c] * (mosts[w] == top ? 1.0f : expf(mosts[w] - top));
                a.out[at * HD + c] = x * share;
            }
            if (threadIdx.x == 0)
                a.lse[at] = top + logf(sum);
        }
        first += items;
    }
}

GLM_KERNEL(256) k_attention_decode_128(attention a) { decode_heads<1>(a); }
GLM_KERNEL(256) k_attention_decode_256(attention a) { decode_heads<2>(a); }

#ifdef GLM_HOST
void glm_cuda_attention_decode(struct cuda *cuda, const attention &a)
{
    const int blocks = attention_blocks(cuda);
    const size_t bytes = (size_t)(WARPS * (mix_stride(a.HD) + 2)) * sizeof(float);
    if (a.HD <= 128)
        GLM_LAUNCH(cuda, "attention_forward", k_attention_decode_128, blocks, 256, bytes, a);
    else
        GLM_LAUNCH(cuda, "attention_forward", k_attention_decode_256, blocks, 256, bytes, a);
}
#endif
