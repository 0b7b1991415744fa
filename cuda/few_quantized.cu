/* Products of up to 64 rows with an int8 or int4 matrix, operands in 16 bits: alone, with an
 * adapter's second one, or with swiglu of it.
 *
 * A block has 16 or 32 rows of W. Its eight warps share the columns, 128 bytes of each row at a time;
 * a warp has the next ones in flight while it multiplies these. The integers become 16-bit floats
 * exactly, in registers, and are operand a (rows of W by columns) of mma; inp is operand b. Where
 * columns have scales, those of 32 columns are summed and multiplied by it: nothing but inp is
 * rounded. Columns may be in any order inside an mma, if both operands have the same: a thread has
 * neighbours. */
#include "few.cuh"
#include "mma.cuh"

enum {
    CHUNK = 128,           /* bytes of a row of W that a warp has at a time */
    WARPS = 8,             /* of a block */
    TILE_ROW = CHUNK + 16, /* ldmatrix then meets no bank twice */
};

/* ---- integers to pairs of 16-bit floats */

/* sum - magic, exact, of two 16-bit floats each */
template <bool BF16>
static __device__ __forceinline__ unsigned without(unsigned sum, unsigned magic)
{
#if defined(__CUDA_EMU__)
    return BF16 ? pack2<true>(bf16_value(sum & 0xffff) - bf16_value(magic & 0xffff),
                              bf16_value(sum >> 16) - bf16_value(magic >> 16))
                : pack2<false>(half_value(sum & 0xffff) - half_value(magic & 0xffff),
                               half_value(sum >> 16) - half_value(magic >> 16));
#else
    unsigned r = 0;
    if (!BF16)
        asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(sum), "r"(magic));
#if __CUDA_ARCH__ >= 800
    else /* times 1: what capability 8 has */
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(r)
            : "r"(sum), "r"(0x3f803f80u), "r"(magic ^ 0x80008000u));
#endif
    return r;
#endif
}

/* The eight nibbles of a word, column 2j the high one of byte j: pairs of columns j and j + 4 */
template <bool BF16> static __device__ __forceinline__ void pairs_of_int4(unsigned w, unsigned *p)
{
    /* 8 + q in the last bits of 1024 (bfloat16: 128), whose unit is 1 */
    const unsigned mask = 0x000f000f, magic = BF16 ? 0x43084308 : 0x64086408;
    p[0] = without<BF16>((w >> 4 & mask) ^ magic, magic);
    p[1] = without<BF16>((w & mask) ^ magic, magic);
    p[2] = without<BF16>((w >> 12 & mask) ^ magic, magic);
    p[3] = without<BF16>((w >> 8 & mask) ^ magic, magic);
}

/* Bytes 0 and 1, 2 and 3 of a word */
template <bool BF16> static __device__ __forceinline__ void pairs_of_int8(unsigned w, unsigned *p)
{
    w ^= 0x80808080; /* 128 + q */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!BF16) { /* in the last bits of 1024 */
            p[i] = without<false>(bytes_of(w, 0x64646464, i ? 0x4342 : 0x4140), 0x64806480);
            continue;
        }
        /* bfloat16 holds q, but no sum with it: by way of float, in the last bits of 2^23; its
         * lower half is then 0 */
        const float less = 8388736.0f;
        const unsigned low = bytes_of(w, 0x4b000000, i ? 0x7442 : 0x7440),
                       high = bytes_of(w, 0x4b000000, i ? 0x7443 : 0x7441);
        p[i] = bytes_of((unsigned)__float_as_int(__int_as_float((int)low) - less),
                        (unsigned)__float_as_int(__int_as_float((int)high) - less), 0x7632);
    }
}

/* ---- what a warp fetches */

/* 16 bytes of which `left` are there, zeros for the others; whole: all or none, and aligned */
static __device__ __forceinline__ uint4 piece_of(const char *at, int left, int whole)
{
    uint4 q = {0, 0, 0, 0};
    if (whole) {
        if (left > 0)
            q = load_once(reinterpret_cast<const uint4 *>(at));
        return q;
    }
#pragma unroll 1
    for (int i = 15; i >= 0; i--) {
        q.w = q.w << 8 | q.z >> 24;
        q.z = q.z << 8 | q.y >> 24;
        q.y = q.y << 8 | q.x >> 24;
        q.x = q.x << 8 | (i < left ? (unsigned)(unsigned char)at[i] : 0u);
    }
    return q;
}

/* Scales of four times 32 columns of a row, from block `block` of 32 on; without groups: ones */
static __device__ __forceinline__ uint2 scales_of(const stored_matrix &w, size_t row, int block,
                                                  int whole)
{
    const unsigned short *of_row = w.scale + row * w.scale_cols;
    uint2 s = {0x3c003c00, 0x3c003c00};
    if (!w.group || 32 * block >= w.cols)
        return s;
    if (whole)
        return *reinterpret_cast<const uint2 *>(of_row + block);
    unsigned one[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        one[k] = of_row[min(32 * (block + k), w.cols - 1) / w.group];
    s.x = one[0] | one[1] << 16, s.y = one[2] | one[3] << 16;
    return s;
}

/* Elements c .. of a row of inp, zeros past its end: eight for int4, four for int8 */
template <int N>
static __device__ __forceinline__ void inp_of(float *v, const float *row, int c, int cols,
                                              int whole)
{
#pragma unroll
    for (int k = 0; k < N; k += 4) {
        v[k] = v[k + 1] = v[k + 2] = v[k + 3] = 0;
        if (whole && c + k < cols) {
            const float4 q = *reinterpret_cast<const float4 *>(row + c + k);
            v[k] = q.x, v[k + 1] = q.y, v[k + 2] = q.z, v[k + 3] = q.w;
        }
    }
    if (!whole)
#pragma unroll
        for (int k = 0; k < N; k++)
            if (c + k < cols)
                v[k] = row[c + k];
}

/* The same of 16-bit elements, two a word */
template <int N>
static __device__ __forceinline__ void inp_of(unsigned *v, const unsigned short *row, int c,
                                              int cols, int whole)
{
#pragma unroll
    for (int k = 0; k < N / 2; k += 2) {
        v[k] = v[k + 1] = 0;
        if (whole && c + 2 * k < cols) {
            const uint2 q = *reinterpret_cast<const uint2 *>(row + c + 2 * k);
            v[k] = q.x, v[k + 1] = q.y;
        }
    }
    if (!whole)
#pragma unroll
        for (int k = 0; k < N; k++)
            if (c + k < cols)
                v[k / 2] |= (unsigned)row[c + k] << 16 * (k % 2);
}

/* As operand b: pairs of columns j and j + 4 for int4, of neighbours for int8 */
template <int N, bool BF16>
static __device__ __forceinline__ void pairs_of(unsigned *x, const float *v)
{
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        x[k] = N == 8 ? pack2<BF16>(v[k], v[k + 4]) : pack2<BF16>(v[2 * k], v[2 * k + 1]);
}

template <int N, bool BF16>
static __device__ __forceinline__ void pairs_of(unsigned *x, const unsigned *v)
{
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        x[k] = N == 8 ? bytes_of(v[k / 2], v[k / 2 + N / 4], k % 2 ? 0x7632 : 0x5410) : v[k];
}

/* ---- the product */

struct quantized_rows {
    few_rows few;
    const unsigned short *narrow; /* more than 8 rows: inp in 16 bits */
    int gated;                    /* swiglu: of a block's rows half are gates, half values */
};

/* inp as it is read: where one tile has all of it, as it came */
template <bool FLOAT> struct inp_type {
    typedef float element, word;
};
template <> struct inp_type<false> {
    typedef unsigned short element;
    typedef unsigned word;
};

/* A block has 16 M rows of W and 8 TILES of inp. */
template <int DTYPE, bool BF16, int TILES, int M>
static __device__ __forceinline__ void few_quantized(const quantized_rows &of)
{
    typedef typename inp_type<TILES == 1>::element element;
    typedef typename inp_type<TILES == 1>::word word;
    const few_rows &a = of.few;
    const int ROWS = 16 * M, HALF = ROWS / 2, LOADS = ROWS * CHUNK / 16 / 32;
    const int SUM_ROW = ROWS + 4, SUMS = 8 * SUM_ROW; /* floats; banks differ */
    const int COLUMNS = DTYPE == GLM_I4 ? 8 : 4;      /* that a thread has of 16 bytes */
    const int WORDS = TILES == 1 ? COLUMNS : COLUMNS / 2;
    const int STEP = 4 * COLUMNS, STEPS = CHUNK / 16;
    const bool AHEAD = TILES < 4;    /* inp is fetched so, where registers are there .. */
    const int K = TILES < 8 ? 2 : 1; /* .. for so many steps at a time */
    __shared__ __align__(16) unsigned char tiles[WARPS * ROWS * TILE_ROW];
    __shared__ __align__(16) uint2 scales[DTYPE == GLM_I4 ? WARPS * ROWS * 2 : 1];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane / 4, third = lane % 4;
    const int I = a.w.cols, bytes = (int)stored_bytes(DTYPE, I);
    const int own = of.gated ? HALF : ROWS, outs = of.gated ? a.w.rows / 2 : a.w.rows;
    const int pieces = (a.N + 8 * TILES - 1) / (8 * TILES); /* of inp, block by block */
    const int first = blockIdx.x / pieces * own, n0 = blockIdx.x % pieces * 8 * TILES;
    const int chunks = (bytes + CHUNK - 1) / CHUNK;
    const char *data = static_cast<const char *>(a.w.data);
    const int whole = bytes % 16 == 0 && ((size_t)data & 15) == 0;
    const int whole_scales =
        a.w.group == 32 && a.w.scale_cols % 4 == 0 && ((size_t)a.w.scale & 7) == 0;
    const element *inp = TILES == 1 ? (const element *)(const void *)a.inp
                                    : (const element *)(const void *)of.narrow;
    const int whole_inp = I % COLUMNS == 0 && ((size_t)inp & 15) == 0;
    unsigned char *tile = tiles + warp * ROWS * TILE_ROW;
    uint2 *scale = scales + (DTYPE == GLM_I4 ? warp * ROWS * 2 : 0);

    /* row r of the block's in W */
    const auto row_of = [&](int r) {
        const int value = of.gated && r >= HALF;
        return (size_t)(min(first + (value ? r - HALF : r), outs - 1) + (value ? outs : 0));
    };
    /* a chunk of W, in flight until it is put into the tile */
    uint4 q[LOADS];
    uint2 s[M];
    const auto fetch = [&](int chunk) {
        const int begin = CHUNK * chunk + 16 * (lane % 8), row = first + lane / 8;
        const char *at = data + (size_t)row * bytes + begin;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int there = row + (of.gated ? 4 * i % HALF : 4 * i) < outs;
            q[i] = piece_of(at, there ? bytes - begin : 0, whole);
            at += (size_t)bytes * (of.gated && 2 * i + 2 == LOADS ? outs - HALF + 4 : 4);
        }
        if (DTYPE == GLM_I4)
#pragma unroll
            for (int i = 0; i < M; i++)
                s[i] = scales_of(a.w, row_of((lane + 32 * i) / 2), 8 * chunk + 4 * (lane % 2),
                                 whole_scales);
    };
    /* inp of K steps, in flight while the ones before are multiplied */
    word v[K][TILES][WORDS];
    const auto fetch_inp = [&](int chunk, int step) {
        const int c = STEP * (STEPS * chunk + step) + COLUMNS * third;
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const int row = n0 + 8 * n + quad;
                inp_of<COLUMNS>(v[k][n], inp + (size_t)row * I, row < a.N ? c + STEP * k : I, I,
                                whole_inp);
            }
    };
    float sum[M][TILES][4];
#pragma unroll
    for (int m = 0; m < M; m++)
        clear<TILES>(sum[m]);

    fetch(warp); /* past a row's end nothing is read */
    if (AHEAD)
        fetch_inp(warp, 0);
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            *reinterpret_cast<uint4 *>(tile + (4 * i + lane / 8) * TILE_ROW + 16 * (lane % 8)) =
                q[i];
        if (DTYPE == GLM_I4)
#pragma unroll
            for (int i = 0; i < M; i++)
                scale[lane + 32 * i] = s[i];
        __syncwarp();
        fetch(chunk + WARPS);
#pragma unroll 1
        for (int step = 0; step < STEPS; step += K) {
            unsigned x[K][TILES][COLUMNS / 2];
            if (!AHEAD)
                fetch_inp(chunk, step);
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int n = 0; n < TILES; n++)
                    pairs_of<COLUMNS, BF16>(x[k][n], v[k][n]);
            if (AHEAD && step + K < STEPS)
                fetch_inp(chunk, step + K);
            else if (AHEAD)
                fetch_inp(chunk + WARPS, 0);
#pragma unroll
            for (int m = 0; m < M; m++) {
                unsigned w[4]; /* of rows quad and quad + 8: step 0, 0, 1, 1 */
                load_fragments<false>(w, reinterpret_cast<const unsigned short *>(
                                             tile + (16 * m + lane % 16) * TILE_ROW +
                                             16 * (step + (K - 1) * (lane / 16))));
                if (DTYPE == GLM_I8) {
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        unsigned low[2], high[2];
                        pairs_of_int8<BF16>(w[2 * k], low);
                        pairs_of_int8<BF16>(w[2 * k + 1], high);
                        const unsigned p[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
                        for (int n = 0; n < TILES; n++)
                            mma<BF16>(sum[m][n], p, x[k][n][0], x[k][n][1]);
                    }
                    continue;
                }
                const unsigned short *of_row =
                    reinterpret_cast<const unsigned short *>(scale) + 8 * (16 * m + quad) + step;
                unsigned p[K][2][4];
#pragma unroll
                for (int k = 0; k < K; k++) {
                    unsigned low[4], high[4];
                    pairs_of_int4<BF16>(w[2 * k], low);
                    pairs_of_int4<BF16>(w[2 * k + 1], high);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        p[k][i][0] = low[2 * i], p[k][i][1] = high[2 * i];
                        p[k][i][2] = low[2 * i + 1], p[k][i][3] = high[2 * i + 1];
                    }
                }
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    float part[K][4];
                    clear<K>(part);
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int k = 0; k < K; k++)
                            mma<BF16>(part[k], p[k][i], x[k][n][i * (COLUMNS / 2 - 2)],
                                      x[k][n][i * (COLUMNS / 2 - 2) + 1]);
#pragma unroll
                    for (int k = 0; k < K; k++) {
                        const float by_low = half_value(of_row[k]),
                                    by_high = half_value(of_row[64 + k]);
#pragma unroll
                        for (int j = 0; j < 4; j++) /* fused in every kernel, or bits differ */
                            sum[m][n][j] = fmaf(j < 2 ? by_low : by_high, part[k][j], sum[m][n][j]);
                    }
                }
            }
        }
        __syncwarp();
    }

    __syncthreads(); /* the sums take the tiles' place */
    float *parts = reinterpret_cast<float *>(tiles);
    const int row = threadIdx.x % ROWS, column = threadIdx.x / ROWS;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        float *part = parts + t % 2 * WARPS * SUMS; /* not those that others may still read */
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                part[warp * SUMS + (2 * third + j % 2) * SUM_ROW + 16 * m + quad + j / 2 * 8] =
                    sum[m][t][j];
        __syncthreads();
        if (column >= 8) /* a whole warp */
            continue;
        const int n = n0 + 8 * t + column;
        const size_t o = row_of(row);
        float y = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            y += part[i * SUMS + column * SUM_ROW + row];
        y *= a.w.group ? a.scale : a.scale * half_value(a.w.scale[o]);
        if (n < a.N) {
            y += a.bias ? a.bias[o] : 0.0f;
            float more = 0;
            for (int i = 0; i < a.R; i++)
                more += a.xa[(size_t)n * a.R + i] * a.B[o * a.R + i];
            y += a.added * more;
        }
        if (of.gated)
            y *= __shfl_down_sync(0xffffffffu, y, HALF) / (1.0f + expf(-y));
        if (n < a.N && row < own && first + row < outs) {
            float *to = a.out + (size_t)n * outs + first + row;
            *to = y + (a.accumulate ? *to : 0.0f);
        }
    }
}

/* Kernels for a dtype and a type, by the rows of inp that a block has: 8, 16, 32 and,
 * for int8, 64: int4 has no registers for it */
#define KERNELS(name, dtype, bf16)                              \
    GLM_TILE_KERNEL(256, 3) k_few_##name##_8(quantized_rows a)  \
    {                                                           \
        few_quantized<dtype, bf16, 1, 1>(a);                    \
    }                                                           \
    GLM_TILE_KERNEL(256, 2) k_few_##name##_16(quantized_rows a) \
    {                                                           \
        few_quantized<dtype, bf16, 2, 1>(a);                    \
    }                                                           \
    GLM_TILE_KERNEL(256, 1) k_few_##name##_32(quantized_rows a) \
    {                                                           \
        few_quantized<dtype, bf16, 4, 2>(a);                    \
    }
KERNELS(i8_f16, GLM_I8, false)
KERNELS(i8_bf16, GLM_I8, true)
KERNELS(i4_f16, GLM_I4, false)
KERNELS(i4_bf16, GLM_I4, true)
GLM_TILE_KERNEL(256, 1) k_few_i8_f16_64(quantized_rows a) { few_quantized<GLM_I8, false, 8, 2>(a); }
GLM_TILE_KERNEL(256, 1) k_few_i8_bf16_64(quantized_rows a) { few_quantized<GLM_I8, true, 8, 2>(a); }

#ifdef GLM_HOST
#define BY_ROWS(name, most) \
    {k_few_##name##_8, k_few_##name##_16, k_few_##name##_32, k_few_##name##_##most}

void glm_cuda_few_quantized(struct cuda *cuda, const char *op, few_rows a, const struct glm_mat *W,
                            int gated)
{
    void (*const table[2][2][4])(quantized_rows) = {{BY_ROWS(i8_f16, 64), BY_ROWS(i8_bf16, 64)},
                                                    {BY_ROWS(i4_f16, 32), BY_ROWS(i4_bf16, 32)}};
    const int at = a.N <= 8 ? 0 : a.N <= 16 ? 1 : a.N <= 32 ? 2 : 3;
    void (*const k_few)(quantized_rows) = table[W->dtype == GLM_I4][cuda->compute == GLM_BF16][at];
    const size_t pieces = ceil_div((size_t)a.N, W->dtype == GLM_I8 ? 64 : 32),
                 rows = at < 2 ? 16 : 32;
    quantized_rows of = {a, NULL, gated};
    of.few.w = matrix_of(W);
    if (a.N > GLM_FEW) {
        of.narrow = (const unsigned short *)glm_cuda_operand(
            cuda, SCRATCH_A, a.inp, (size_t)a.N * W->cols, cuda->compute, NULL);
        if (!of.narrow)
            return;
    }
    GLM_LAUNCH(cuda, op, k_few, pieces * ceil_div((size_t)W->rows, rows), 256, 0, of);
}
#endif
