/* Backward of the adapter of query_key_value in 16 bits: a kernel for all that B does with the
 * gradient of qkv, one for all that A does with the norm, so that each is read once.
 *
 * A block has a tile: 128 columns (a strip) of 128 rows (a chunk). What is summed over rows it writes
 * as a part; the last block of its strip, whichever that is, adds the parts, chunk after chunk, and
 * what is summed over columns the last of its chunk, strip after strip: so the bits of a sum do not
 * depend on the order of blocks. */
#include "adapter.cuh"
#include "products.h"

enum { STRIP = GLM_ADAPTER_STRIP, ROWS = GLM_ADAPTER_ROWS, WARPS = 8, PART = STRIP * RANKS };

/* B (O, R): dB += scale * dqkv^T xa, u = scale * dqkv B */
struct backward_b {
    float *dB, *u;          /* dB NULL: it is not made */
    float *parts, *parts_u; /* (groups of ranks, strips, chunks, PART); (strips, N, R) */
    const void *dqkv;
    const float *B, *xa;
    unsigned *of_strip, *of_chunk; /* blocks that have come by; zeros between launches */
    int N, O, R, type;             /* type: of dqkv, as the kernel has it: float or bfloat16 */
    float scale;
};

/* A (R, C): dA += u^T (x mask), dinp = (u A) mask, where x is the norm of `inp` as forward had it */
struct backward_a {
    float *dA, *dinp; /* NULL: it is not made */
    float *parts;     /* as above */
    const float *inp, *rstd, *norm, *A, *u;
    unsigned *of_strip;
    int N, C, R;
    mask_of mask;
};

/* What the warps of a block have summed; then in its first word what all are to know */
typedef float tile[WARPS][RANKS][STRIP];

static __device__ __forceinline__ f4 zeros()
{
    f4 x;
    x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
    return x;
}

/* Ranks r0 .. of row n of a thin operand (N, R); 0 past the last */
static __device__ __forceinline__ void thin_row(float (&t)[RANKS], const float *p, int n, int r0,
                                                int R)
{
#pragma unroll
    for (int j = 0; j < RANKS; j += 4) {
        const f4 x = load4_or_zero(p + (size_t)n * R, r0 + j, R);
#pragma unroll
        for (int k = 0; k < 4; k++)
            t[j + k] = x.v[k];
    }
}

/* Whether this block is the last of so many that come by: what they wrote before is there for it. */
static __device__ __forceinline__ bool is_last(unsigned *counter, unsigned blocks, tile &of)
{
    int *last = reinterpret_cast<int *>(&of);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicInc(counter, blocks - 1) == blocks - 1; /* it is 0 again then */
        __threadfence();
    }
    __syncthreads();
    return *last;
}

/* The block's sums over its rows, to four elements a thread: by column, or by rank. A thread has had
 * four columns of its warp's rows. */
template <bool BY_RANK>
static __device__ __forceinline__ void put_part(float *to, const float (&sum)[4][RANKS], tile &of)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads(); /* readers of the ranks before */
#pragma unroll
    for (int j = 0; j < RANKS; j++) {
        float4 x;
        x.x = sum[0][j], x.y = sum[1][j], x.z = sum[2][j], x.w = sum[3][j];
        *reinterpret_cast<float4 *>(&of[warp][j][4 * lane]) = x;
    }
    __syncthreads();
    f4 total = zeros();
#pragma unroll
    for (int k = 0; k < WARPS; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            total.v[i] += BY_RANK ? of[k][warp][4 * lane + i]
                                  : of[k][4 * (threadIdx.x & 1) + i][threadIdx.x >> 1];
    store4(to, 4 * threadIdx.x, PART, total);
}

/* The parts of a strip, chunk after chunk: this thread's four elements */
static __device__ __forceinline__ f4 sum_parts(const float *parts, int chunks)
{
    f4 total = zeros();
#pragma unroll 4
    for (int k = 0; k < chunks; k++) {
        const f4 x = load4(parts + (size_t)k * PART, 4 * threadIdx.x, PART);
#pragma unroll
        for (int i = 0; i < 4; i++)
            total.v[i] += x.v[i];
    }
    return total;
}

static __device__ __forceinline__ void add4(float *p, int i, int n, const f4 x, float scale)
{
    f4 y = load4(p, i, n);
#pragma unroll
    for (int k = 0; k < 4; k++)
        y.v[k] += scale * x.v[k];
    store4(p, i, n, y);
}

/* Lanes that differ in 4 * HALF give each other half of what they have left to add. */
template <int HALF> static __device__ __forceinline__ void halved(float (&v)[RANKS])
{
    const bool upper = threadIdx.x & 4 * HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float given = upper ? v[i] : v[i + HALF], mine = upper ? v[i + HALF] : v[i];
        v[i] = mine + __shfl_xor_sync(0xffffffffu, given, 4 * HALF);
    }
}

/* Of eight ranks' shares in each lane their sums over the warp: four lanes get the same one. */
static __device__ __forceinline__ float sum_of_lanes(float (&v)[RANKS])
{
    halved<4>(v);
    halved<2>(v);
    halved<1>(v);
    float x = v[0];
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x;
}

/* Four columns of row n of an operand of a type; 0 past the last */
template <int TYPE>
static __device__ __forceinline__ f4 columns_of(const void *p, int n, int c, int wide)
{
    if (c >= wide)
        return zeros();
    return load4_stored(static_cast<const char *>(p) + stored_bytes(TYPE, (size_t)n * wide), TYPE,
                        c, wide);
}

/* TYPE: of dqkv. A warp has a row at a time. */
template <int TYPE> static __device__ __forceinline__ void adapter_b(const backward_b &a)
{
    __shared__ tile of;
    const int across = (a.O + STRIP - 1) / STRIP, chunks = (a.N + ROWS - 1) / ROWS;
    const int strip = (int)blockIdx.x % across, chunk = (int)blockIdx.x / across;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = STRIP * strip + 4 * lane;
    const int begin = ROWS * chunk, end = min(a.N, begin + ROWS);
    float *parts_u = a.parts_u + (size_t)strip * a.N * a.R;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float w[4][RANKS], sum[4][RANKS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            thin_row(w[i], a.B, min(c, a.O - 4) + i, r0, a.R);
#pragma unroll
            for (int j = 0; j < RANKS; j++)
                sum[i][j] = 0;
        }
#pragma unroll 1
        for (int n = begin + warp; n < end; n += WARPS) {
            const f4 x = columns_of<TYPE>(a.dqkv, n, c, a.O);
            float t[RANKS], v[RANKS];
            thin_row(t, a.xa, n, r0, a.R);
#pragma unroll
            for (int j = 0; j < RANKS; j++) {
                v[j] = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[i][j] += x.v[i] * t[j];
                    v[j] += x.v[i] * w[i][j];
                }
            }
            const float total = sum_of_lanes(v);
            const int r = r0 + lane / 4;
            if (lane % 4 == 0 && r < a.R)
                parts_u[(size_t)n * a.R + r] = total;
        }
        const size_t at = ((size_t)(r0 / RANKS) * across + strip) * chunks + chunk;
        put_part<false>(a.parts + at * PART, sum, of);
    }
    if (is_last(a.of_chunk + chunk, across, of)) {
        const int last = end * a.R;
        for (int e = begin * a.R + 4 * (int)threadIdx.x; e < last; e += 4 * (int)blockDim.x) {
            f4 total = zeros();
#pragma unroll 4
            for (int k = 0; k < across; k++) {
                const f4 x = load4(a.parts_u + (size_t)k * a.N * a.R, e, last);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    total.v[i] += x.v[i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                total.v[i] *= a.scale;
            store4(a.u, e, last, total);
        }
    }
    if (!is_last(a.of_strip + strip, chunks, of) || !a.dB)
        return;
    const int column = STRIP * strip + (int)threadIdx.x / 2;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        const size_t at = ((size_t)(r0 / RANKS) * across + strip) * chunks;
        const int r = r0 + 4 * ((int)threadIdx.x & 1);
        if (column < a.O && r < a.R)
            add4(a.dB + (size_t)column * a.R, r, a.R, sum_parts(a.parts + at * PART, chunks),
                 a.scale);
    }
}

GLM_TILE_KERNEL(256, 2) k_adapter_b(backward_b a) { adapter_b<GLM_F32>(a); }
GLM_TILE_KERNEL(256, 2) k_adapter_b_bf16(backward_b a) { adapter_b<GLM_BF16>(a); }

/* Four elements of the norm as its kernel wrote them */
template <int TYPE>
static __device__ __forceinline__ f4 norm_of(const f4 x, float r, const f4 weight)
{
    f4 y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float exact = x.v[i] * r * weight.v[i];
        y.v[i] = TYPE == GLM_F16 ? half_value(half_bits(exact)) : bf16_value(bf16_bits(exact));
    }
    return y;
}

/* What the mask keeps of the rows of a warp from n on, four bits each: a row after the other, and before
 * anything else is done with them, for want of registers */
static __device__ __forceinline__ unsigned long long kept_of_rows(const mask_of &mask, int n,
                                                                  int end, int c)
{
    unsigned long long bits = 0;
#pragma unroll 1
    for (int k = ROWS / WARPS - 1; k >= 0; k--)
        bits = bits << 4 | kept_of(mask, min(n + k * WARPS, end - 1), c);
    return bits;
}

/* TYPE: of the norm */
template <int TYPE, bool DROPS>
static __device__ __forceinline__ void adapter_a(const backward_a &a)
{
    __shared__ tile of;
    const int across = (a.C + STRIP - 1) / STRIP, chunks = (a.N + ROWS - 1) / ROWS;
    const int strip = (int)blockIdx.x % across, chunk = (int)blockIdx.x / across;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = STRIP * strip + 4 * lane;
    const int begin = ROWS * chunk, end = min(a.N, begin + ROWS);
    const unsigned long long kept = DROPS ? kept_of_rows(a.mask, begin + warp, end, c) : 0;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float w[4][RANKS], sum[4][RANKS];
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            f4 x = zeros();
            if (r0 + j < a.R)
                x = load4(a.A + (size_t)(r0 + j) * a.C, min(c, a.C - 4), a.C);
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i][j] = x.v[i], sum[i][j] = 0;
        }
        unsigned long long rest = kept;
#pragma unroll 1
        for (int n = begin + warp; c < a.C && n < end; n += WARPS, rest >>= 4) {
            const size_t row = (size_t)n * a.C;
            const unsigned bits = (unsigned)rest;
            float t[RANKS];
            thin_row(t, a.u, n, r0, a.R);
            if (a.dA) {
                f4 x = norm_of<TYPE>(load4(a.inp + row, c, a.C), a.rstd[n], load4(a.norm, c, a.C));
                if (DROPS)
                    x = dropped(a.mask, x, bits);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < RANKS; j++)
                        sum[i][j] += x.v[i] * t[j];
            }
            if (!a.dinp)
                continue;
            f4 y = zeros();
#pragma unroll
            for (int j = 0; j < RANKS; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    y.v[i] += t[j] * w[i][j];
            if (DROPS)
                y = dropped(a.mask, y, bits);
            if (r0)
                add4(a.dinp + row, c, a.C, y, 1);
            else
                store4(a.dinp + row, c, a.C, y);
        }
        const size_t at = ((size_t)(r0 / RANKS) * across + strip) * chunks + chunk;
        if (a.dA)
            put_part<true>(a.parts + at * PART, sum, of);
    }
    if (!a.dA || !is_last(a.of_strip + strip, chunks, of) || c >= a.C)
        return;
    for (int r = warp; r < a.R; r += RANKS) {
        const size_t at = ((size_t)(r / RANKS) * across + strip) * chunks;
        add4(a.dA + (size_t)r * a.C, c, a.C, sum_parts(a.parts + at * PART, chunks), 1);
    }
}

GLM_TILE_KERNEL(256, 2) k_adapter_a_f16(backward_a a) { adapter_a<GLM_F16, false>(a); }
GLM_TILE_KERNEL(256, 2) k_adapter_a_bf16(backward_a a) { adapter_a<GLM_BF16, false>(a); }
GLM_TILE_KERNEL(256, 2) k_adapter_a_dropped_f16(backward_a a) { adapter_a<GLM_F16, true>(a); }
GLM_TILE_KERNEL(256, 2) k_adapter_a_dropped_bf16(backward_a a) { adapter_a<GLM_BF16, true>(a); }

#ifdef GLM_HOST
void glm_cuda_adapter_b(struct cuda *cuda, void *dB, void *u, const void *dqkv, enum glm_dtype type,
                        const void *xa, const struct glm_self_attention *of, int N)
{
    backward_b a = backward_b();
    a.N = N, a.O = of->B->rows, a.R = of->B->cols, a.type = type;
    const size_t of_dB = glm_adapter_parts(a.O, a.R, N), of_u = glm_adapter_parts_u(a.O, a.R, N);
    a.parts = (float *)glm_cuda_scratch(cuda, SCRATCH_B, of_dB + of_u);
    if (!a.parts)
        return;
    a.parts_u = a.parts + of_dB / sizeof(float);
    a.dB = (float *)dB, a.u = (float *)u, a.dqkv = dqkv;
    a.B = (const float *)of->B->data, a.xa = (const float *)xa, a.scale = (float)of->scale;
    a.of_strip = cuda->small->strips, a.of_chunk = cuda->small->chunks;
    const auto k_adapter = type == GLM_F32 ? k_adapter_b : k_adapter_b_bf16;
    const size_t blocks = ceil_div((size_t)a.O, STRIP) * ceil_div((size_t)N, ROWS);
    GLM_LAUNCH(cuda, "self_attention_backward", k_adapter, blocks, 256, 0, a);
}

int glm_cuda_adapter_a(struct cuda *cuda, void *dA, void *dinp, const void *u, const void *inp,
                       const void *rstd, enum glm_dtype type, const struct glm_self_attention *of,
                       int N)
{
    const int drops = of->dropout.p > 0;
    backward_a a = backward_a();
    a.N = N, a.C = of->A->cols, a.R = of->A->rows;
    a.parts = (float *)glm_cuda_scratch(cuda, SCRATCH_B, glm_adapter_parts(a.C, a.R, N));
    if (!a.parts)
        return 0;
    a.dA = (float *)dA, a.dinp = (float *)dinp, a.inp = (const float *)inp;
    a.rstd = (const float *)rstd, a.norm = (const float *)of->norm, a.u = (const float *)u;
    a.A = (const float *)of->A->data, a.of_strip = cuda->small->strips;
    if (drops)
        a.mask = mask_from(&of->dropout);
    const auto k_whole = type == GLM_F16 ? k_adapter_a_f16 : k_adapter_a_bf16;
    const auto k_dropped = type == GLM_F16 ? k_adapter_a_dropped_f16 : k_adapter_a_dropped_bf16;
    const auto k_norm = drops ? k_dropped : k_whole;
    const size_t blocks = ceil_div((size_t)a.C, STRIP) * ceil_div((size_t)N, ROWS);
    GLM_LAUNCH(cuda, "self_attention_backward", k_norm, blocks, 256, 0, a);
    return 1;
}
#endif
