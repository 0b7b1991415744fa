/* Products of few rows: W is read once, 16 bytes at a time, whatever its dtype. Of up to 8 rows few.cu
 * has the kernels that end in the product, few_gated.cu those that end in swiglu of it. With operands
 * in 16 bits and integers in W few_quantized.cu has both, for up to 64 rows. */
#pragma once
#include "launch.cuh"

struct stored_matrix {
    const void *data;
    const unsigned short *scale;
    int dtype, rows, cols, group, scale_cols;
};

/* 16 bytes that this kernel reads once: they take no room in the first cache. */
static __device__ __forceinline__ uint4 load_once(const uint4 *p)
{
#if defined(__CUDA_EMU__)
    return *p;
#else
    uint4 q;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(p));
    return q;
#endif
}

/* Four of the bytes of a (0 to 3) and b (4 to 7), by the nibbles of `which` */
static __device__ __forceinline__ unsigned bytes_of(unsigned a, unsigned b, unsigned which)
{
#if defined(__CUDA_EMU__)
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++)
        r |= (unsigned)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return r;
#else
    return __byte_perm(a, b, which);
#endif
}

static __device__ __forceinline__ float scale_at(const stored_matrix &w, size_t row, int col)
{
    return half_value(w.scale[w.group ? row * w.scale_cols + col / w.group : row]);
}

/* ---- a warp has ROWS rows of W and all NB rows of inp */

/* Of rows of W that are heads: queries and keys turn, as k_rope_append has it, and keys and values
 * go into the cache, too. */
struct turned_heads {
    const float *table;
    const int *position, *slot;
    float *k, *v;
    int NH, KVH, HD, rotary_dim;
};

struct few_rows {
    float *out;
    const float *inp, *bias;
    stored_matrix w;
    int N, accumulate;
    float scale;
    const float *xa, *B; /* an adapter's (N, R) and (O, R), times added; NULL: none */
    int R;
    float added;
};

/* Elements o and o + 1, o even, of row n: out, and where they belong in the cache. */
static __device__ __forceinline__ void put_turned(const few_rows &a, const turned_heads &t, int n,
                                                  int o, float x, float y)
{
    const int h = o / t.HD, i = o % t.HD, kv = h - t.NH;
    float *to = a.out + (size_t)n * a.w.rows + o;
    if (kv < t.KVH && i < t.rotary_dim) {
        const float *angle = t.table + (size_t)t.position[n] * t.rotary_dim + i;
        const float was = x;
        x = was * angle[0] - y * angle[1];
        y = y * angle[0] + was * angle[1];
    }
    to[0] = x, to[1] = y;
    if (kv < 0)
        return;
    const size_t at = ((size_t)t.slot[n] * t.KVH + kv % t.KVH) * t.HD + i;
    to = (kv < t.KVH ? t.k : t.v) + at;
    to[0] = x, to[1] = y;
}

/* Rows of W of a warp: neighbours; GATED: as many of the second half as of the first. */
template <bool GATED, int ROWS>
static __device__ __forceinline__ int row_at(int first, int r, int O)
{
    if (!GATED)
        return r ? min(first + r, O - 1) : first;
    const int F = O / 2, half = ROWS / 2;
    return r < half ? min(first + r, F - 1) : F + min(first + r - half, F - 1);
}

/* Eight elements of the word group `at` of a 16-byte piece (four of float). */
template <int DTYPE> static __device__ __forceinline__ void decode(const uint4 q, int at, float *v)
{
    const unsigned w[4] = {q.x, q.y, q.z, q.w};
    if (DTYPE == GLM_F32) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = __int_as_float((int)w[j]);
    } else if (DTYPE == GLM_F16 || DTYPE == GLM_BF16) {
        widen8(q, DTYPE, v);
    } else if (DTYPE == GLM_I8) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = (float)((int)(w[2 * at + j / 4] << (24 - 8 * (j % 4))) >> 24);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[2 * j] = (float)((int)(w[at] << (24 - 8 * j)) >> 28);
            v[2 * j + 1] = (float)((int)(w[at] << (28 - 8 * j)) >> 28);
        }
    }
}

/* Of row o of W and row n of inp, from the sums of a warp's lanes; every lane gets it. */
template <bool GATED>
static __device__ __forceinline__ float total_of(const few_rows &a, int o, int n, float sum)
{
    const float s = a.w.scale && !a.w.group ? a.scale * half_value(a.w.scale[o]) : a.scale;
    float total = s * warp_sum(sum) + (a.bias ? a.bias[o] : 0.0f);
    if (!GATED && a.R) {
        float more = 0;
        n = min(n, a.N - 1);
#pragma unroll 1
        for (int i = threadIdx.x & 31; i < a.R; i += 32)
            more += a.xa[(size_t)n * a.R + i] * a.B[(size_t)o * a.R + i];
        total += a.added * warp_sum(more);
    }
    return total;
}

template <int DTYPE> static __device__ __forceinline__ uint4 word_of(const char *row, int c)
{
    return load_once(reinterpret_cast<const uint4 *>(row + stored_bytes(DTYPE, c)));
}

/* RMSNorm of inp as it is read: columns are multiplied by its weight, their squares are summed, and
 * what a row is divided by comes last. */
struct norm_of_rows {
    const float *weight;
    float eps;
};

static __device__ __forceinline__ f4 normed(f4 x, const f4 &weight, float &squares)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        squares += x.v[j] * x.v[j];
        x.v[j] *= weight.v[j];
    }
    return x;
}

/* Columns c .. c + 7 of NB rows of inp, which lie on the grid or not; c + 8 <= I. */
template <int NB>
static __device__ __forceinline__ void load_inputs(f4 (&x)[2 * NB], const few_rows &a, int c)
{
    const int I = a.w.cols;
    const bool whole = ((size_t)a.inp & 15) == 0;
#pragma unroll
    for (int i = 0; i < 2 * NB; i++) {
        const float *from = a.inp + (size_t)min(i / 2, a.N - 1) * I + c + 4 * (i % 2);
        if (whole) {
            const float4 q = *reinterpret_cast<const float4 *>(from);
            x[i].v[0] = q.x, x[i].v[1] = q.y, x[i].v[2] = q.z, x[i].v[3] = q.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[i].v[j] = from[j];
        }
    }
}

/* sum += the products of words of ROWS rows of W, from column c on, with the rows of inp, HELD
 * or in memory; with `norm` their squares are added, too, unless they are HELD */
template <int DTYPE, int NB, int ROWS, bool HELD>
static __device__ __forceinline__ void
add_words(float (&sum)[ROWS][NB], const few_rows &a, const uint4 (&q)[ROWS], const float (&s)[ROWS],
          int c, const f4 (&held)[2 * NB], const norm_of_rows *norm, float (&squares)[NB])
{
    const int PIECE = DTYPE == GLM_F32 ? 4 : DTYPE == GLM_I8 ? 16 : DTYPE == GLM_I4 ? 32 : 8;
    const int SUB = PIECE < 8 ? PIECE : 8, I = a.w.cols;
#pragma unroll
    for (int at = 0; at < PIECE / SUB; at++) {
        float w[ROWS][SUB];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            decode<DTYPE>(q[r], at, w[r]);
            if (DTYPE == GLM_I4)
#pragma unroll
                for (int j = 0; j < SUB; j++)
                    w[r][j] *= s[r];
        }
        f4 weight[2];
#pragma unroll
        for (int k = 0; !HELD && norm && k < SUB; k += 4)
            weight[k / 4] = load4(norm->weight, c + at * SUB + k, I);
#pragma unroll
        for (int n = 0; n < NB; n++) {
            const float *x = a.inp + (size_t)min(n, a.N - 1) * I;
#pragma unroll
            for (int k = 0; k < SUB; k += 4) {
                f4 v = HELD ? held[2 * n + k / 4] : load4(x, c + at * SUB + k, I);
                if (!HELD && norm)
                    v = normed(v, weight[k / 4], squares[n]);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        sum[r][n] += w[r][k + j] * v.v[j];
            }
        }
    }
}

/* out = inp W^T and what is added; GATED: swiglu of it, O / 2 columns; with `turn` its heads turned;
 * with `norm` of the norm of inp */
template <int DTYPE, int NB, int ROWS, bool GATED>
static __device__ __forceinline__ void few_body(const few_rows &a, const turned_heads *turn = NULL,
                                                const norm_of_rows *norm = NULL)
{
    const int PIECE = DTYPE == GLM_F32 ? 4 : DTYPE == GLM_I8 ? 16 : DTYPE == GLM_I4 ? 32 : 8;
    const int lane = threadIdx.x & 31, O = a.w.rows, I = a.w.cols;
    const int own = GATED ? ROWS / 2 : ROWS, outs = GATED ? O / 2 : O;
    const int first = (int)((blockIdx.x * blockDim.x + threadIdx.x) >> 5) * own;
    let_next_begin();
    if (first >= outs) {
        after_previous();
        return;
    }
    float sum[ROWS][NB], squares[NB];
    const char *row[ROWS];
#pragma unroll
    for (int n = 0; n < NB; n++)
        squares[n] = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const size_t o = row_at<GATED, ROWS>(first, r, O);
        row[r] = static_cast<const char *>(a.w.data) + stored_bytes(DTYPE, o * I);
#pragma unroll
        for (int n = 0; n < NB; n++)
            sum[r][n] = 0;
    }
    if (I % PIECE == 0 && ((size_t)a.w.data & 15) == 0) {
        /* the words of DEPTH turns are on their way, and the inputs of one */
        const bool HELD = PIECE == 8 && NB <= 2;
        const int DEPTH = DTYPE != GLM_F16 && DTYPE != GLM_BF16 ? 1 : NB <= 4 ? 2 : 1;
        const int TURN = 32 * PIECE;
        uint4 ahead[DEPTH][ROWS];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (lane * PIECE + d * TURN < I)
                    ahead[d][r] = word_of<DTYPE>(row[r], lane * PIECE + d * TURN);
        f4 next[2 * NB], weight[2];
#pragma unroll
        for (int k = 0; HELD && norm && k < 2; k++)
            weight[k] = load4_or_zero(norm->weight, lane * PIECE + 4 * k, I);
        after_previous();
        if (HELD && lane * PIECE < I)
            load_inputs<NB>(next, a, lane * PIECE);
        for (int c0 = lane * PIECE; c0 < I; c0 += DEPTH * TURN)
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int c = c0 + d * TURN;
                if (d && c >= I)
                    break;
                uint4 q[ROWS];
                float s[ROWS];
                f4 x[2 * NB];
#pragma unroll
                for (int i = 0; HELD && i < 2 * NB; i++)
                    x[i] = norm ? normed(next[i], weight[i % 2], squares[i / 2]) : next[i];
                if (HELD && c + TURN < I) {
                    load_inputs<NB>(next, a, c + TURN);
#pragma unroll
                    for (int k = 0; norm && k < 2; k++)
                        weight[k] = load4(norm->weight, c + TURN + 4 * k, I);
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    q[r] = ahead[d][r];
                    if (c + DEPTH * TURN < I)
                        ahead[d][r] = word_of<DTYPE>(row[r], c + DEPTH * TURN);
                    s[r] = DTYPE == GLM_I4 && a.w.group
                               ? scale_at(a.w, row_at<GATED, ROWS>(first, r, O), c)
                               : 1.0f;
                }
                add_words<DTYPE, NB, ROWS, HELD>(sum, a, q, s, c, x, norm, squares);
            }
    } else {
        after_previous();
        for (int c = lane; c < I; c += 32) {
            float x[NB];
#pragma unroll
            for (int n = 0; n < NB; n++) {
                x[n] = a.inp[(size_t)min(n, a.N - 1) * I + c];
                if (norm) {
                    squares[n] += x[n] * x[n];
                    x[n] *= norm->weight[c];
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float w = load1(row[r], DTYPE, c);
                if (DTYPE == GLM_I4 && a.w.group)
                    w *= scale_at(a.w, row_at<GATED, ROWS>(first, r, O), c);
#pragma unroll
                for (int n = 0; n < NB; n++)
                    sum[r][n] += w * x[n];
            }
        }
    }
#pragma unroll
    for (int n = 0; norm && n < NB; n++) {
        const float rstd = 1.0f / sqrtf(warp_sum(squares[n]) / (float)I + norm->eps);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            sum[r][n] *= rstd;
    }
#pragma unroll
    for (int r = 0; r < own; r++)
#pragma unroll
        for (int n = 0; n < NB; n++) {
            float y = total_of<GATED>(a, row_at<GATED, ROWS>(first, r, O), n, sum[r][n]);
            if (GATED) {
                const int at = (r + own) % ROWS; /* its value */
                y *= total_of<GATED>(a, row_at<GATED, ROWS>(first, at, O), n, sum[at][n]) /
                     (1.0f + expf(-y));
            }
            if (turn) { /* the second of a pair has the first beside it; outs is even */
                const bool second = r % 2 && !lane && first + r < outs;
                const float other = sum[r ^ 1][n];
                sum[r][n] = y;
                if (second && n < a.N)
                    put_turned(a, *turn, n, first + r - 1, other, y);
                continue;
            }
            if (lane || first + r >= outs || n >= a.N)
                continue;
            float *to = a.out + (size_t)n * outs + first + r;
            *to = y + (a.accumulate ? *to : 0.0f);
        }
}

/* Kernels for a dtype, by the rows of inp they hold. */
#define FEW_KERNELS(of, name, dtype, gated, one, two, eight)                                       \
    GLM_TILE_KERNEL(256, 2) k_##of##_##name##_1(few_rows a) { few_body<dtype, 1, one, gated>(a); } \
    GLM_TILE_KERNEL(256, 2) k_##of##_##name##_2(few_rows a) { few_body<dtype, 2, two, gated>(a); } \
    GLM_TILE_KERNEL(256, 2) k_##of##_##name##_4(few_rows a) { few_body<dtype, 4, two, gated>(a); } \
    GLM_TILE_KERNEL(256, 2) k_##of##_##name##_8(few_rows a) { few_body<dtype, 8, eight, gated>(a); }

#ifdef GLM_HOST
#include "products.h"

typedef void (*few_kernel)(few_rows);
#define FEW_ROW(of, name) \
    {k_##of##_##name##_1, k_##of##_##name##_2, k_##of##_##name##_4, k_##of##_##name##_8}
#define FEW_TABLE(of) \
    {FEW_ROW(of, f32), FEW_ROW(of, f16), FEW_ROW(of, bf16), FEW_ROW(of, i8), FEW_ROW(of, i4)}

static stored_matrix matrix_of(const struct glm_mat *mat)
{
    const stored_matrix w = {mat->data, mat->scale, (int)mat->dtype,    mat->rows,
                             mat->cols, mat->group, glm_scale_cols(mat)};
    return w;
}

static inline int is_few(const struct cuda *cuda, const struct glm_mat *W, int N)
{
    return N <= glm_few_rows(cuda->compute, W);
}

/* The kernel for W's dtype and N rows */
static inline few_kernel few_of(const few_kernel table[5][4], const struct glm_mat *W, int N)
{
    const int kind = W->dtype <= GLM_BF16 ? (int)W->dtype : W->dtype == GLM_I8 ? 3 : 4;
    return table[kind][N == 1 ? 0 : N == 2 ? 1 : N <= 4 ? 2 : 3];
}

/* few.cu; a.w is filled in */
void glm_cuda_few(struct cuda *cuda, const char *op, few_rows a, const struct glm_mat *W);
/* few_quantized.cu; gated: swiglu of it */
void glm_cuda_few_quantized(struct cuda *cuda, const char *op, few_rows a, const struct glm_mat *W,
                            int gated);
/* linear.cu: x times *factor (NULL: 1) in the product's type; x itself where that is float. */
const void *glm_cuda_operand(struct cuda *cuda, enum glm_scratch which, const void *x, size_t n,
                             enum glm_dtype type, const float *factor);
#endif
