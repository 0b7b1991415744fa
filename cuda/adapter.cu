/* Products with the thin float matrices of adapters, in float: one side of them is a rank. Each
 * reads the wide operand once, which is what it costs; cuBLAS takes two to six times as long. Eight
 * ranks go by at a time. */
#include "adapter.cuh"
#include "products.h"

/* wide: columns; w (wide, R), or (R, wide) where `rows` is set */
struct thin {
    float *out;
    const void *inp;
    const float *w, *bias;
    const float *thin; /* k_thin_gradient: the operand (N, R) */
    int N, wide, R, rows, accumulate;
    float scale;
    int type; /* of inp, as the kernel has it: float, or 16 bits where it is the wide operand and
                     `rows` is set */
    mask_of mask; /* of it, where the kernel drops */
};

/* Column i of the four of this thread in the 128 of its warp from c0 on: side by side where those of
 * w are, else so that a warp's loads of w are. */
static __device__ __forceinline__ int column_of(const thin &a, int c0, int i)
{
    const int lane = threadIdx.x & 31;
    return c0 + (a.rows ? 4 * lane + i : lane + 32 * i);
}

/* These columns of row n of an operand of a type; 0 past the last. */
template <int TYPE>
static __device__ __forceinline__ f4 columns_of(const thin &a, const void *p, size_t n, int c0)
{
    const void *row = static_cast<const char *>(p) + stored_bytes(TYPE, n * a.wide);
    f4 x;
    x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
    if (a.rows && column_of(a, c0, 0) < a.wide)
        x = load4_stored(row, TYPE, column_of(a, c0, 0), a.wide);
#pragma unroll
    for (int i = 0; !a.rows && i < 4; i++)
        if (column_of(a, c0, i) < a.wide)
            x.v[i] = load1(row, TYPE, column_of(a, c0, i));
    return x;
}

/* w's elements of these columns and ranks r0 .. ; 0 past the last rank, anything past the last
 * column, where the other operand is 0 or nothing is stored */
static __device__ __forceinline__ void ranks_of(float (&v)[4][RANKS], const thin &a, int c0, int r0)
{
#pragma unroll
    for (int j = 0; a.rows && j < RANKS; j++) {
        f4 x;
        x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
        if (r0 + j < a.R)
            x = columns_of<GLM_F32>(a, a.w, r0 + j, c0);
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i][j] = x.v[i];
    }
#pragma unroll
    for (int i = 0; !a.rows && i < 4; i++) {
        const int c = column_of(a, c0, i);
#pragma unroll
        for (int j = 0; j < RANKS; j += 4) {
            const f4 x = load4_or_zero(a.w + (size_t)min(c, a.wide - 1) * a.R, r0 + j, a.R);
#pragma unroll
            for (int k = 0; k < 4; k++)
                v[i][j + k] = x.v[k];
        }
    }
}

/* out (N, R) = scale * inp (N, wide) w + bias (+ out): a block has four rows, its eight warps take
 * columns in turn */
template <int TYPE, int DROPS = 0> static __device__ __forceinline__ void thin_in(const thin &a)
{
    enum { ROWS = 4 };
    __shared__ float part[8][ROWS][RANKS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n0 = ROWS * (int)blockIdx.x;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float sum[ROWS][RANKS];
#pragma unroll
        for (int n = 0; n < ROWS; n++)
#pragma unroll
            for (int j = 0; j < RANKS; j++)
                sum[n][j] = 0;
        for (int c0 = 128 * warp; c0 < a.wide; c0 += 8 * 128) {
            f4 x[ROWS];
            float w[4][RANKS];
#pragma unroll
            for (int n = 0; n < ROWS; n++)
                x[n] = columns_of<TYPE>(a, a.inp, min(n0 + n, a.N - 1), c0);
            unsigned bits = 0; /* a row at a time, for want of registers */
#pragma unroll 1
            for (int n = ROWS - 1; DROPS && n >= 0; n--)
                bits = bits << 4 | kept_of(a.mask, min(n0 + n, a.N - 1), column_of(a, c0, 0));
#pragma unroll
            for (int n = 0; DROPS && n < ROWS; n++)
                x[n] = dropped(a.mask, x[n], bits >> 4 * n);
            ranks_of(w, a, c0, r0);
#pragma unroll
            for (int n = 0; n < ROWS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < RANKS; j++)
                        sum[n][j] += x[n].v[i] * w[i][j];
        }
        __syncthreads(); /* readers of the ranks before */
#pragma unroll
        for (int n = 0; n < ROWS; n++)
#pragma unroll
            for (int j = 0; j < RANKS; j++) {
                const float total = warp_sum(sum[n][j]);
                if (lane == 0)
                    part[warp][n][j] = total;
            }
        __syncthreads();
        const int n = (int)threadIdx.x / RANKS, r = r0 + (int)threadIdx.x % RANKS;
        if (threadIdx.x >= ROWS * RANKS || n0 + n >= a.N || r >= a.R)
            continue;
        float total = 0;
#pragma unroll
        for (int k = 0; k < 8; k++)
            total += part[k][n][r - r0];
        total = a.scale * total + (a.bias ? a.bias[r] : 0.0f);
        float *to = a.out + (size_t)(n0 + n) * a.R + r;
        *to = a.accumulate ? *to + total : total;
    }
}

GLM_TILE_KERNEL(256, 2) k_thin_in(thin a) { thin_in<GLM_F32>(a); }
/* Of these `rows` is set, which saves registers where the compiler knows it. */
GLM_TILE_KERNEL(256, 2) k_thin_in_f16(thin a)
{
    a.rows = 1;
    thin_in<GLM_F16>(a);
}
GLM_TILE_KERNEL(256, 2) k_thin_in_bf16(thin a)
{
    a.rows = 1;
    thin_in<GLM_BF16>(a);
}
GLM_TILE_KERNEL(256, 2) k_thin_in_dropped_f16(thin a)
{
    a.rows = 1;
    thin_in<GLM_F16, 1>(a);
}
GLM_TILE_KERNEL(256, 2) k_thin_in_dropped_bf16(thin a)
{
    a.rows = 1;
    thin_in<GLM_BF16, 1>(a);
}

/* out (N, wide) = scale * inp (N, R) w + bias (+ out): a thread has four columns of four rows;
 * `blocks` blocks across */
GLM_TILE_KERNEL(128, 4) k_thin_out(thin a, int blocks)
{
    enum { ROWS = 4 };
    const int warp = threadIdx.x >> 5, c0 = 128 * (4 * ((int)blockIdx.x % blocks) + warp);
    const int n0 = ROWS * (int)(blockIdx.x / blocks);
    if (c0 >= a.wide)
        return;
    float sum[ROWS][4];
    f4 y[ROWS]; /* on its way while the ranks are */
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
        y[n].v[0] = y[n].v[1] = y[n].v[2] = y[n].v[3] = 0;
        if (a.accumulate)
            y[n] = columns_of<GLM_F32>(a, a.out, min(n0 + n, a.N - 1), c0);
    }
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float w[4][RANKS];
        ranks_of(w, a, c0, r0);
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const float *x = static_cast<const float *>(a.inp) + (size_t)min(n0 + n, a.N - 1) * a.R;
#pragma unroll
            for (int j = 0; j < RANKS; j += 4) {
                const f4 v = load4_or_zero(x, r0 + j, a.R);
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sum[n][i] += v.v[k] * w[i][j + k];
            }
        }
    }
    f4 bias;
    bias.v[0] = bias.v[1] = bias.v[2] = bias.v[3] = 0;
    if (a.bias)
        bias = columns_of<GLM_F32>(a, a.bias, 0, c0);
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        if (n0 + n >= a.N)
            break;
        float *to = a.out + (size_t)(n0 + n) * a.wide;
        const int c = column_of(a, c0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++)
            y[n].v[i] += bias.v[i] + a.scale * sum[n][i];
        if (a.rows && c < a.wide)
            store4(to, c, a.wide, y[n]);
#pragma unroll
        for (int i = 0; !a.rows && i < 4; i++)
            if (column_of(a, c0, i) < a.wide)
                to[column_of(a, c0, i)] = y[n].v[i];
    }
}

/* out (parts; as w) = inp^T thin, a part for GLM_THIN_ROWS rows: a block has 128 columns of one, its
 * eight warps take rows in turn */
GLM_TILE_KERNEL(256, 2) k_thin_gradient(thin a, int across)
{
    __shared__ float part[8][RANKS][128];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int chunk = (int)blockIdx.x / across, c0 = 128 * ((int)blockIdx.x % across);
    const int c = c0 + 4 * lane, end = min(a.N, (chunk + 1) * GLM_THIN_ROWS);
    float *out = a.out + (size_t)chunk * a.wide * a.R;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float sum[4][RANKS];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < RANKS; j++)
                sum[i][j] = 0;
#pragma unroll 4
        for (int n = chunk * GLM_THIN_ROWS + warp; n < end; n += 8) {
            f4 x;
            x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
            if (c < a.wide)
                x = load4(static_cast<const float *>(a.inp) + (size_t)n * a.wide, c, a.wide);
#pragma unroll
            for (int j = 0; j < RANKS; j += 4) {
                const f4 t = load4_or_zero(a.thin + (size_t)n * a.R, r0 + j, a.R);
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sum[i][j + k] += x.v[i] * t.v[k];
            }
        }
        __syncthreads(); /* readers of the ranks before */
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            float4 x;
            x.x = sum[0][j], x.y = sum[1][j], x.z = sum[2][j], x.w = sum[3][j];
            *reinterpret_cast<float4 *>(&part[warp][j][4 * lane]) = x;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < RANKS * 128; e += blockDim.x) {
            /* neighbours write neighbours */
            const int j = a.rows ? e / 128 : e % RANKS, i = a.rows ? e % 128 : e / RANKS;
            if (c0 + i >= a.wide || r0 + j >= a.R)
                continue;
            float total = 0;
#pragma unroll
            for (int k = 0; k < 8; k++)
                total += part[k][j][i];
            const size_t at =
                a.rows ? (size_t)(r0 + j) * a.wide + c0 + i : (size_t)(c0 + i) * a.R + r0 + j;
            out[at] = total;
        }
    }
}

/* dweight += scale * the sum of so many parts of n elements */
GLM_KERNEL(256) k_thin_sum(float *dweight, const float *part, size_t n, int parts, float scale)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 sum = load4(part, i, n), w = load4(dweight, i, n);
    for (int k = 1; k < parts; k++) {
        const f4 x = load4(part + (size_t)k * n, i, n);
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum.v[j] += x.v[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        w.v[j] += scale * sum.v[j];
    store4(dweight, i, n, w);
}

#ifdef GLM_HOST
void glm_cuda_thin(struct cuda *cuda, const char *op, void *out, const void *inp,
                   enum glm_dtype type, const struct glm_mat *W, const void *bias, int N,
                   double scale, int accumulate, int transposed, const struct glm_dropout *drop)
{
    const auto k_f16 = drop ? k_thin_in_dropped_f16 : k_thin_in_f16;
    const auto k_bf16 = drop ? k_thin_in_dropped_bf16 : k_thin_in_bf16;
    const auto k_in = type == GLM_F16 ? k_f16 : type == GLM_BF16 ? k_bf16 : k_thin_in;
    const int rows = W->rows < W->cols;
    thin a = thin();
    a.out = (float *)out, a.inp = inp;
    a.w = (const float *)W->data, a.bias = (const float *)bias;
    a.N = N, a.wide = rows ? W->cols : W->rows, a.R = rows ? W->rows : W->cols;
    a.rows = rows, a.accumulate = accumulate, a.scale = (float)scale, a.type = type;
    if (drop)
        a.mask = mask_from(drop);
    const int blocks = (int)ceil_div((size_t)a.wide, 512);
    if (rows != transposed) /* the sum is over the wide side */
        GLM_LAUNCH(cuda, op, k_in, ceil_div((size_t)N, 4), 256, 0, a);
    else
        GLM_LAUNCH(cuda, op, k_thin_out, (size_t)blocks * ceil_div((size_t)N, 4), 128, 0, a,
                   blocks);
}

void glm_cuda_thin_gradient(struct cuda *cuda, const char *op, void *dweight, const void *dout,
                            const void *inp, int N, int O, int I, double scale)
{
    const int rows = O < I, parts = glm_thin_parts(N);
    const size_t n = (size_t)O * I;
    float *part = (float *)glm_cuda_scratch(cuda, SCRATCH_B, parts * n * sizeof(float));
    if (!part)
        return;
    thin a = thin();
    a.out = part, a.inp = rows ? inp : dout;
    a.thin = (const float *)(rows ? dout : inp);
    a.N = N, a.wide = rows ? I : O, a.R = rows ? O : I, a.rows = rows;
    const int across = (int)ceil_div((size_t)a.wide, 128);
    GLM_LAUNCH(cuda, op, k_thin_gradient, (size_t)across * parts, 256, 0, a, across);
    GLM_LAUNCH(cuda, op, k_thin_sum, ceil_div(n, 1024), 256, 0, (float *)dweight,
               (const float *)part, n, parts, (float)scale);
}
#endif
