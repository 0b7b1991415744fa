/* Products of up to 64 rows with an int8 or int4 matrix, operands in 16 bits: alone, with an
 * adapter's second one, or with swiglu of it.
 *
 * A block has 32 rows of W. Its eight warps share the columns, 128 bytes of each row at a time;
 * a warp has the next ones in flight while it multiplies these. The integers become 16-bit floats
 * exactly, in registers, and are operand a (rows of W by columns) of mma; inp is operand b. Where
 * columns have scales, those of 32 columns are summed and multiplied by it: nothing but inp is
 * rounded. Columns may be in any order inside an mma, if both operands have the same: a thread has
 * neighbours. */
#include "few.cuh"
#include "mma.cuh"

enum {
    CHUNK = 128,                 /* bytes of a row of W that a warp has at a time */
    WARPS = 8,                   /* of a block */
    ROWS = 32,                   /* of W */
    TILE_ROW = CHUNK + 16,       /* bytes; ldmatrix then meets no bank twice */
    SUM_ROW = ROWS + 4,          /* floats */
    SUMS = 8 * SUM_ROW,          /* of a warp, for 8 rows of inp */
};

/* ---- integers to pairs of 16-bit floats */

/* Two times (x + magic) - magic in 16 bits, x + magic by its bits; exact */
template <bool BF16> static __device__ __forceinline__ unsigned without(unsigned sum, float magic)
{
#if defined(__CUDA_EMU__)
    return BF16 ? pack2<true>(bf16_value(sum & 0xffff) - magic, bf16_value(sum >> 16) - magic)
                : pack2<false>(half_value(sum & 0xffff) - magic, half_value(sum >> 16) - magic);
#else
    unsigned r = 0;
    const unsigned both = pack2<BF16>(magic, magic);
    if (!BF16)
        asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(sum), "r"(both));
#if __CUDA_ARCH__ >= 800
    else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(r)
            : "r"(sum), "r"(0x3f803f80u), "r"(both ^ 0x80008000u));
#endif
    return r;
#endif
}

/* The eight nibbles of a word, column 2j the high one of byte j: pairs of columns j and j + 4 */
template <bool BF16> static __device__ __forceinline__ void pairs_of_int4(unsigned w, unsigned *p)
{
    /* 8 + q in the last bits of 1024 (bfloat16: 128), whose unit is 1 */
    const unsigned mask = 0x000f000f, magic = BF16 ? 0x43084308 : 0x64086408;
    const float less = BF16 ? 136.0f : 1032.0f;
    p[0] = without<BF16>((w >> 4 & mask) ^ magic, less);
    p[1] = without<BF16>((w & mask) ^ magic, less);
    p[2] = without<BF16>((w >> 12 & mask) ^ magic, less);
    p[3] = without<BF16>((w >> 8 & mask) ^ magic, less);
}

/* Bytes 0 and 1, 2 and 3 of a word */
template <bool BF16> static __device__ __forceinline__ void pairs_of_int8(unsigned w, unsigned *p)
{
    w ^= 0x80808080; /* 128 + q */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!BF16) { /* in the last bits of 1024 */
            p[i] = without<false>(bytes_of(w, 0x64646464, i ? 0x4342 : 0x4140), 1152.0f);
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

/* Scales of eight times 32 columns of a row, from block `block` of 32 on; without groups: ones */
static __device__ __forceinline__ void scales_of(uint2 *s, const stored_matrix &w, size_t row,
                                                 int block, int whole)
{
    const unsigned short *of_row = w.scale + row * w.scale_cols;
#pragma unroll
    for (int j = 0; j < 2; j++, block += 4) {
        s[j].x = s[j].y = 0x3c003c00;
        if (!w.group || 32 * block >= w.cols)
            continue;
        if (whole) {
            s[j] = *reinterpret_cast<const uint2 *>(of_row + block);
            continue;
        }
        unsigned one[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            one[k] = of_row[min(32 * (block + k), w.cols - 1) / w.group];
        s[j].x = one[0] | one[1] << 16, s[j].y = one[2] | one[3] << 16;
    }
}

/* Columns c .. of a row of inp in 16 bits, zeros past its end: four (int8), or eight (int4) in
 * pairs of columns j and j + 4 */
template <int DTYPE, bool BF16>
static __device__ __forceinline__ void inp_of(unsigned *x, const float *row, int c, int cols,
                                              int whole)
{
    const int N = DTYPE == GLM_I4 ? 8 : 4;
    float v[N];
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
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        x[k] = N == 8 ? pack2<BF16>(v[k], v[k + 4]) : pack2<BF16>(v[2 * k], v[2 * k + 1]);
}

template <int DTYPE, bool BF16>
static __device__ __forceinline__ void inp_of(unsigned *x, const unsigned short *row, int c,
                                              int cols, int whole)
{
    const int N = DTYPE == GLM_I4 ? 8 : 4;
    unsigned v[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        v[k] = 0;
    if (whole && c < cols) {
        if (N == 8) {
            const uint4 q = *reinterpret_cast<const uint4 *>(row + c);
            v[0] = q.x, v[1] = q.y, v[N / 2 - 2] = q.z, v[N / 2 - 1] = q.w;
        } else {
            const uint2 q = *reinterpret_cast<const uint2 *>(row + c);
            v[0] = q.x, v[1] = q.y;
        }
    }
    if (!whole)
#pragma unroll
        for (int k = 0; k < N; k++)
            if (c + k < cols)
                v[k / 2] |= (unsigned)row[c + k] << 16 * (k % 2);
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        x[k] = N == 8 ? bytes_of(v[k / 2], v[k / 2 + N / 4], k % 2 ? 0x7632 : 0x5410) : v[k];
}

/* ---- the product */

struct quantized_rows {
    few_rows few;
    const unsigned short *narrow; /* more than 8 rows: inp in 16 bits */
    int gated;                    /* swiglu: 16 rows of gates and as many of values */
};

template <bool WIDE> struct inp_type {
    typedef float type;
};
template <> struct inp_type<false> {
    typedef unsigned short type;
};

template <int DTYPE, bool BF16, int TILES>
static __device__ __forceinline__ void few_quantized(const quantized_rows &of)
{
    typedef typename inp_type<TILES == 1>::type inp_element;
    const few_rows &a = of.few;
    const int COLUMNS = DTYPE == GLM_I4 ? 8 : 4; /* of a thread in 16 bytes of four threads */
    const int STEPS = TILES == 1 ? 4 : TILES == 2 ? 2 : 1; /* whose inp is in flight at a time */
    const int LOADS = ROWS * CHUNK / 16 / 32;
    __shared__ __align__(16) unsigned char tiles[WARPS * ROWS * TILE_ROW];
    __shared__ __align__(16) uint2 scales[DTYPE == GLM_I4 ? WARPS * ROWS * 2 : 1];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane / 4, third = lane % 4;
    const int I = a.w.cols, bytes = (int)stored_bytes(DTYPE, I);
    const int own = of.gated ? ROWS / 2 : ROWS, outs = of.gated ? a.w.rows / 2 : a.w.rows;
    const int pieces = (a.N + 8 * TILES - 1) / (8 * TILES); /* of inp, block by block */
    const int first = blockIdx.x / pieces * own, n0 = blockIdx.x % pieces * 8 * TILES;
    const int chunks = (bytes + CHUNK - 1) / CHUNK;
    const char *data = static_cast<const char *>(a.w.data);
    const int whole = bytes % 16 == 0 && ((size_t)data & 15) == 0;
    const int whole_scales =
        a.w.group == 32 && a.w.scale_cols % 4 == 0 && ((size_t)a.w.scale & 7) == 0;
    const inp_element *inp = TILES == 1 ? (const inp_element *)(const void *)a.inp
                                        : (const inp_element *)(const void *)of.narrow;
    const int whole_inp = I % COLUMNS == 0 && ((size_t)inp & 15) == 0;
    unsigned char *tile = tiles + warp * ROWS * TILE_ROW;
    uint2 *scale = scales + (DTYPE == GLM_I4 ? warp * ROWS * 2 : 0);

    /* row r of the block's in W */
    const auto row_of = [&](int r) {
        const int half = of.gated && r >= ROWS / 2;
        return (size_t)(min(first + (half ? r - ROWS / 2 : r), outs - 1) + (half ? outs : 0));
    };
    uint4 q[LOADS];
    uint2 s[2];
    const auto fetch = [&](int chunk) {
        const int begin = CHUNK * chunk + 16 * (lane % 8), row = first + lane / 8;
        const char *at = data + (size_t)row * bytes + begin;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int there = row + (of.gated ? 4 * i % (ROWS / 2) : 4 * i) < outs;
            q[i] = piece_of(at, there ? bytes - begin : 0, whole);
            at += (size_t)bytes * (of.gated && 2 * i + 2 == LOADS ? outs - ROWS / 2 + 4 : 4);
        }
        if (DTYPE == GLM_I4)
            scales_of(s, a.w, row_of(lane), 8 * chunk, whole_scales);
    };
    float sum[2][TILES][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
        clear<TILES>(sum[m]);

    if (warp < chunks)
        fetch(warp);
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            *reinterpret_cast<uint4 *>(tile + (4 * i + lane / 8) * TILE_ROW + 16 * (lane % 8)) =
                q[i];
        if (DTYPE == GLM_I4)
            scale[2 * lane] = s[0], scale[2 * lane + 1] = s[1];
        __syncwarp();
        if (chunk + WARPS < chunks)
            fetch(chunk + WARPS);
#pragma unroll 1
        for (int step = 0; step < CHUNK / 16; step += STEPS) {
            const int c = 4 * COLUMNS * (chunk * (CHUNK / 16) + step) + COLUMNS * third;
            unsigned x[STEPS][TILES][COLUMNS / 2];
            if (4 * COLUMNS * (chunk * (CHUNK / 16) + step) >= I)
                break;
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const int row = n0 + 8 * n + quad;
                    inp_of<DTYPE, BF16>(x[k][n], inp + (size_t)row * I,
                                        row < a.N ? c + 4 * COLUMNS * k : I, I, whole_inp);
                }
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                unsigned w[4];
                load_fragments<false>(w, reinterpret_cast<const unsigned short *>(
                                             tile + lane * TILE_ROW + 16 * (step + k)));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    unsigned low[4], high[4];
                    if (DTYPE == GLM_I8) {
                        pairs_of_int8<BF16>(w[2 * m], low);
                        pairs_of_int8<BF16>(w[2 * m + 1], high);
                        const unsigned p[4] = {low[0], high[0], low[1], high[1]};
#pragma unroll
                        for (int n = 0; n < TILES; n++)
                            mma<BF16>(sum[m][n], p, x[k][n][0], x[k][n][1]);
                        continue;
                    }
                    pairs_of_int4<BF16>(w[2 * m], low);
                    pairs_of_int4<BF16>(w[2 * m + 1], high);
                    const unsigned p[2][4] = {{low[0], high[0], low[1], high[1]},
                                              {low[2], high[2], low[3], high[3]}};
                    const unsigned short *of_row =
                        reinterpret_cast<const unsigned short *>(scale) + step + k;
                    const float s_low = half_value(of_row[8 * (16 * m + quad)]),
                                s_high = half_value(of_row[8 * (16 * m + 8 + quad)]);
#pragma unroll
                    for (int n = 0; n < TILES; n++) {
                        float part[4] = {0, 0, 0, 0};
                        mma<BF16>(part, p[0], x[k][n][0], x[k][n][1]);
                        mma<BF16>(part, p[1], x[k][n][COLUMNS / 2 - 2], x[k][n][COLUMNS / 2 - 1]);
                        sum[m][n][0] += s_low * part[0], sum[m][n][1] += s_low * part[1];
                        sum[m][n][2] += s_high * part[2], sum[m][n][3] += s_high * part[3];
                    }
                }
            }
        }
        __syncwarp();
    }

    __syncthreads(); /* the sums take the tiles' place */
    float *parts = reinterpret_cast<float *>(tiles);
#pragma unroll
    for (int tile_n = 0; tile_n < TILES; tile_n++) {
        float *part = parts + tile_n % 2 * WARPS * SUMS; /* not those that others may still read */
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                part[warp * SUMS + (2 * third + j % 2) * SUM_ROW + 16 * m + quad + j / 2 * 8] =
                    sum[m][tile_n][j];
        __syncthreads();
        const int n = n0 + 8 * tile_n + warp;
        const size_t o = row_of(lane);
        float y = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            y += part[i * SUMS + warp * SUM_ROW + lane];
        y *= a.w.group ? a.scale : a.scale * half_value(a.w.scale[o]);
        if (n < a.N) {
            y += a.bias ? a.bias[o] : 0.0f;
            float more = 0;
            for (int i = 0; i < a.R; i++)
                more += a.xa[(size_t)n * a.R + i] * a.B[o * a.R + i];
            y += a.added * more;
        }
        if (of.gated)
            y *= __shfl_down_sync(0xffffffffu, y, ROWS / 2) / (1.0f + expf(-y));
        if (n < a.N && lane < own && first + lane < outs) {
            float *to = a.out + (size_t)n * outs + first + lane;
            *to = y + (a.accumulate ? *to : 0.0f);
        }
    }
}

/* Kernels for a dtype and a type, by the rows of inp they hold */
#define KERNELS(name, dtype, bf16)                                 \
    GLM_TILE_KERNEL(256, 2) k_few_##name##_upto_8(quantized_rows a) \
    {                                                              \
        few_quantized<dtype, bf16, 1>(a);                          \
    }                                                              \
    GLM_TILE_KERNEL(256, 2) k_few_##name##_upto_16(quantized_rows a) \
    {                                                              \
        few_quantized<dtype, bf16, 2>(a);                          \
    }                                                              \
    GLM_TILE_KERNEL(256, 2) k_few_##name##_upto_32(quantized_rows a) \
    {                                                              \
        few_quantized<dtype, bf16, 4>(a);                          \
    }                                                              \
    GLM_TILE_KERNEL(256, 1) k_few_##name##_upto_64(quantized_rows a) \
    {                                                              \
        few_quantized<dtype, bf16, 8>(a);                          \
    }
KERNELS(i8_f16, GLM_I8, false)
KERNELS(i8_bf16, GLM_I8, true)
KERNELS(i4_f16, GLM_I4, false)
KERNELS(i4_bf16, GLM_I4, true)

#ifdef GLM_HOST
#define BY_ROWS(name) \
    {k_few_##name##_upto_8, k_few_##name##_upto_16, k_few_##name##_upto_32, k_few_##name##_upto_64}

void glm_cuda_few_quantized(struct cuda *cuda, const char *op, few_rows a, const struct glm_mat *W,
                            int gated)
{
    void (*const table[2][2][4])(quantized_rows) = {{BY_ROWS(i8_f16), BY_ROWS(i8_bf16)},
                                                    {BY_ROWS(i4_f16), BY_ROWS(i4_bf16)}};
    const int at = a.N <= 8 ? 0 : a.N <= 16 ? 1 : a.N <= 32 ? 2 : 3;
    void (*const k_few)(quantized_rows) = table[W->dtype == GLM_I4][cuda->compute == GLM_BF16][at];
    quantized_rows of = {a, NULL, gated};
    of.few.w = matrix_of(W);
    if (a.N > GLM_FEW) {
        of.narrow = (const unsigned short *)glm_cuda_operand(
            cuda, SCRATCH_A, a.inp, (size_t)a.N * W->cols, cuda->compute, NULL);
        if (!of.narrow)
            return;
    }
    const size_t pieces = at < 3 ? 1 : ceil_div((size_t)a.N, 64);
    GLM_LAUNCH(cuda, op, k_few, pieces * ceil_div((size_t)W->rows, ROWS), 256, 0, of);
}
#endif
