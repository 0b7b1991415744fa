/* Products with the thin float matrices of adapters, in float: one side of them is a rank. Each
 * reads the wide operand once, which is what it costs; cuBLAS takes two to six times as long. Eight
 * ranks go by at a time. */
#include "launch.cuh"

#ifdef GLM_HOST
#include "products.h"
#endif

enum { RANKS = 8, PART = 256 /* rows, GLM_THIN_ROWS */ };

/* wide: columns; w (wide, R), or (R, wide) where `rows` is set */
struct thin {
    float *out;
    const float *inp, *w, *bias;
    const float *thin; /* k_thin_gradient: the operand (N, R) */
    int N, wide, R, rows, accumulate;
    float scale;
};

/* w's elements of ranks r0 .. of column c; 0 past the last */
static __device__ __forceinline__ void ranks_of(float (&v)[RANKS], const thin &a, int c, int r0)
{
    if (a.rows) {
#pragma unroll
        for (int j = 0; j < RANKS; j++)
            v[j] = r0 + j < a.R ? a.w[(size_t)(r0 + j) * a.wide + c] : 0.0f;
        return;
    }
#pragma unroll
    for (int j = 0; j < RANKS; j += 4) {
        const f4 x = load4_or_zero(a.w + (size_t)c * a.R, r0 + j, a.R);
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[j + i] = x.v[i];
    }
}

/* The same of four columns from c on. */
static __device__ __forceinline__ void ranks_of4(float (&v)[4][RANKS], const thin &a, int c, int r0)
{
    if (a.rows) {
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            f4 x;
            x.v[0] = x.v[1] = x.v[2] = x.v[3] = 0;
            if (r0 + j < a.R)
                x = load4_or_zero(a.w + (size_t)(r0 + j) * a.wide, c, a.wide);
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i][j] = x.v[i];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (c + i < a.wide)
            ranks_of(v[i], a, c + i, r0);
        else
#pragma unroll
            for (int j = 0; j < RANKS; j++)
                v[i][j] = 0;
    }
}

/* out (N, R) = scale * inp (N, wide) w + bias (+ out): a warp has two rows */
GLM_TILE_KERNEL(128, 4) k_thin_in(thin a)
{
    const int lane = threadIdx.x & 31;
    const int n = 2 * (int)((blockIdx.x * blockDim.x + threadIdx.x) >> 5);
    if (n >= a.N)
        return;
    const float *one = a.inp + (size_t)n * a.wide,
                *two = a.inp + (size_t)min(n + 1, a.N - 1) * a.wide;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float sum[2][RANKS];
#pragma unroll
        for (int j = 0; j < RANKS; j++)
            sum[0][j] = sum[1][j] = 0;
        for (int c = 4 * lane; c < a.wide; c += 128) {
            const f4 x = load4(one, c, a.wide), y = load4(two, c, a.wide);
            float w[4][RANKS];
            ranks_of4(w, a, c, r0);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < RANKS; j++) {
                    sum[0][j] += x.v[i] * w[i][j];
                    sum[1][j] += y.v[i] * w[i][j];
                }
        }
#pragma unroll
        for (int j = 0; j < RANKS; j++) {
            const float x = warp_sum(sum[0][j]), y = warp_sum(sum[1][j]);
            const int r = r0 + j;
            if (r >= a.R || lane > 1 || n + lane >= a.N)
                continue;
            float *to = a.out + (size_t)(n + lane) * a.R + r;
            float total = a.scale * (lane ? y : x) + (a.bias ? a.bias[r] : 0.0f);
            *to = a.accumulate ? *to + total : total;
        }
    }
}

/* out (N, wide) = scale * inp (N, R) w + bias (+ out): a thread has four columns of eight rows;
 * `blocks` blocks across */
GLM_TILE_KERNEL(128, 3) k_thin_out(thin a, int blocks)
{
    enum { ROWS = 8 };
    const int c = 4 * ((int)(blockIdx.x % blocks) * (int)blockDim.x + (int)threadIdx.x);
    const int n0 = ROWS * (int)(blockIdx.x / blocks);
    if (c >= a.wide)
        return;
    float sum[ROWS][4];
#pragma unroll
    for (int n = 0; n < ROWS; n++)
        sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float w[4][RANKS];
        ranks_of4(w, a, c, r0);
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const float *x = a.inp + (size_t)min(n0 + n, a.N - 1) * a.R;
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
        bias = load4(a.bias, c, a.wide);
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        if (n0 + n >= a.N)
            break;
        float *to = a.out + (size_t)(n0 + n) * a.wide;
        f4 y = bias;
        if (a.accumulate) {
            const f4 x = load4(to, c, a.wide);
#pragma unroll
            for (int i = 0; i < 4; i++)
                y.v[i] += x.v[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            y.v[i] += a.scale * sum[n][i];
        store4(to, c, a.wide, y);
    }
}

/* out (parts; as w) = inp^T thin, a part for GLM_THIN_ROWS rows: a block has 128 columns of one, its
 * eight warps take rows in turn */
GLM_TILE_KERNEL(256, 2) k_thin_gradient(thin a, int across)
{
    __shared__ float part[8][RANKS][128];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int chunk = (int)blockIdx.x / across, c0 = 128 * ((int)blockIdx.x % across);
    const int c = c0 + 4 * lane, end = min(a.N, (chunk + 1) * PART);
    float *out = a.out + (size_t)chunk * a.wide * a.R;
    for (int r0 = 0; r0 < a.R; r0 += RANKS) {
        float sum[4][RANKS];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < RANKS; j++)
                sum[i][j] = 0;
#pragma unroll 4
        for (int n = chunk * PART + warp; n < end; n += 8) {
            const f4 x = load4_or_zero(a.inp + (size_t)n * a.wide, c, a.wide);
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
                   const struct glm_mat *W, const void *bias, int N, double scale, int accumulate,
                   int transposed)
{
    const int rows = W->rows < W->cols;
    thin a = thin();
    a.out = (float *)out, a.inp = (const float *)inp;
    a.w = (const float *)W->data, a.bias = (const float *)bias;
    a.N = N, a.wide = rows ? W->cols : W->rows, a.R = rows ? W->rows : W->cols;
    a.rows = rows, a.accumulate = accumulate, a.scale = (float)scale;
    const int blocks = (int)ceil_div((size_t)a.wide, 512);
    if (rows != transposed) /* the sum is over the wide side */
        GLM_LAUNCH(cuda, op, k_thin_in, ceil_div((size_t)N, 8), 128, 0, a);
    else
        GLM_LAUNCH(cuda, op, k_thin_out, (size_t)blocks * ceil_div((size_t)N, 8), 128, 0, a,
                   blocks);
}

void glm_cuda_thin_gradient(struct cuda *cuda, void *dweight, const void *dout, const void *inp,
                            int N, int O, int I, double scale)
{
    const int rows = O < I, parts = glm_thin_parts(N);
    const size_t n = (size_t)O * I;
    float *part = (float *)glm_cuda_scratch(cuda, SCRATCH_B, parts * n * sizeof(float));
    if (!part)
        return;
    thin a = thin();
    a.out = part, a.inp = (const float *)(rows ? inp : dout);
    a.thin = (const float *)(rows ? dout : inp);
    a.N = N, a.wide = rows ? I : O, a.R = rows ? O : I, a.rows = rows;
    const int across = (int)ceil_div((size_t)a.wide, 128);
    GLM_LAUNCH(cuda, "linear_backward_weight", k_thin_gradient, (size_t)across * parts, 256, 0, a,
               across);
    GLM_LAUNCH(cuda, "linear_backward_weight", k_thin_sum, ceil_div(n, 1024), 256, 0,
               (float *)dweight, (const float *)part, n, parts, (float)scale);
}
#endif
