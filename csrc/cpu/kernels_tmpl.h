/* Every inner loop of the CPU backend, once, over vectors of VL floats (GCC vector extensions). The
 * including file sets VL, NAME, and, where the set has them, HALF_TO_FLOAT(p): VL halves at p as a
 * vector; BYTES_TO_INT(p): VL signed bytes; INT_TO_FLOAT(v); SUM4(a, b, c, d): lane sums;
 * MADD(a, b, c).
 *
 * Sums over lanes are made in one order, adjacent lanes first, then halves: an element's bits must
 * not depend on the tile it fell into. Every function is static: nothing compiled for a newer
 * processor may be reached from an older. */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* a * b + c. Whether it is rounded once is the instruction set's, never the compiler's choice,
 * which may differ from one place to the next: it is compiled without contraction. */
#ifndef MADD
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

/* Lane by lane: a where mask is set, else b. */
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf load_part(const float *p, int n)
{
    vf v = {0};
    memcpy(&v, p, (size_t)n * 4);
    return v;
}

INLINE void store_part(float *p, vf v, int n) { memcpy(p, &v, (size_t)n * 4); }

INLINE float lane_sum(vf v)
{
    float x[VL];
    memcpy(x, &v, sizeof x);
    for (int i = 0; i < VL; i += 2)
        x[i / 2] = x[i] + x[i + 1];
    for (int i = 0; i < VL / 2; i += 2)
        x[i / 2] = x[i] + x[i + 1];
    for (int n = VL / 4; n > 1; n /= 2) /* quarters of four lanes: first half plus second half */
        for (int i = 0; i < n / 2; i++)
            x[i] += x[i + n / 2];
    return x[0];
}

#ifndef SUM4
INLINE v4 sum4(vf a, vf b, vf c, vf d)
{
    return (v4){lane_sum(a), lane_sum(b), lane_sum(c), lane_sum(d)};
}
#define SUM4 sum4
#endif

/* Pairs a0 a1 .. b0 b1 ..: their even and odd elements, and back again. */
#if VL == 4
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#elif VL == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) \
    __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define LOW(a, b) \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#endif

/* ---- number types */

INLINE float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    uint32_t bits;
    float f;
    if (e == 31)
        bits = sign | 0x7f800000u | m << 13;
    else if (e)
        bits = sign | (e + 112) << 23 | m << 13;
    else {
        f = (float)m * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_half(float f)
{
    uint32_t x;
    memcpy(&x, &f, 4);
    const uint32_t sign = x >> 16 & 0x8000;
    x &= 0x7fffffffu;
    if (x > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00 | (x >> 13 & 0x3ff));
    if (x >= 0x477ff000u) /* 65520 and up round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (x < 0x38800000u) { /* subnormal: adding 2^-1 aligns the last bit, the sum rounds to even */
        float a;
        memcpy(&a, &x, 4);
        a += 0.5f;
        memcpy(&x, &a, 4);
        return (uint16_t)(sign | (x - 0x3f000000u));
    }
    x += 0xc8000fffu + (x >> 13 & 1);
    return (uint16_t)(sign | x >> 13);
}

INLINE float bfloat_to_float(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bfloat(float f)
{
    uint32_t x;
    memcpy(&x, &f, 4);
    if ((x & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(x >> 16 | 0x40);
    return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

INLINE float load_one(const void *p, enum glm_dtype dtype, size_t i)
{
    switch (dtype) {
    case GLM_F32:
        return ((const float *)p)[i];
    case GLM_F16:
        return half_to_float(((const uint16_t *)p)[i]);
    case GLM_BF16:
        return bfloat_to_float(((const uint16_t *)p)[i]);
    case GLM_I8:
        return ((const int8_t *)p)[i];
    case GLM_I4: {
        const uint8_t both = ((const uint8_t *)p)[i / 2];
        return (float)((int8_t)(i % 2 ? both << 4 : both & 0xf0) / 16);
    }
    default:
        return (float)((const double *)p)[i];
    }
}

#ifndef HALF_TO_FLOAT
INLINE vf half_to_float_vector(const uint16_t *p)
{
    vf v;
    for (int i = 0; i < VL; i++)
        v[i] = half_to_float(p[i]);
    return v;
}
#define HALF_TO_FLOAT half_to_float_vector
#endif

#ifndef BYTES_TO_INT
INLINE vi bytes_to_int(const char *p)
{
    vi v;
    for (int i = 0; i < VL; i++)
        v[i] = ((const int8_t *)p)[i];
    return v;
}
#define BYTES_TO_INT bytes_to_int
#define INT_TO_FLOAT(v) __builtin_convertvector(v, vf)
#endif

INLINE vf bfloat_to_float_vector(const uint16_t *p)
{
    typedef uint16_t vh __attribute__((vector_size(2 * VL), aligned(2)));
    const vi wide = __builtin_convertvector(*(const vh *)p, vi) << 16;
    return (vf)wide;
}

/* VL elements from i on */
INLINE vf load_as(const void *p, enum glm_dtype dtype, size_t i)
{
    if (dtype == GLM_F32)
        return load((const float *)p + i);
    if (dtype == GLM_F16)
        return HALF_TO_FLOAT((const uint16_t *)p + i);
    if (dtype == GLM_BF16)
        return bfloat_to_float_vector((const uint16_t *)p + i);
    vf v;
    for (int j = 0; j < VL; j++)
        v[j] = (float)((const double *)p)[i + j];
    return v;
}

static void load_row(float *out, const void *row, enum glm_dtype dtype, int n)
{
    int i = 0;
    for (; i + VL <= n; i += VL)
        store(out + i, load_as(row, dtype, i));
    for (; i < n; i++)
        out[i] = load_one(row, dtype, i);
}

static void convert_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const size_t begin = task * f->piece, end = begin + f->piece < f->n ? begin + f->piece : f->n;
    (void)scratch;
    if (f->from == GLM_F64 && f->to == GLM_F64) {
        memcpy((double *)f->p[0] + begin, (const double *)f->q[0] + begin, (end - begin) * 8);
        return;
    }
    if (f->from == f->to) { /* bits stay, NaN payloads included */
        const size_t size = glm_bytes(f->from, 1);
        memcpy((char *)f->p[0] + begin * size, (const char *)f->q[0] + begin * size,
               (end - begin) * size);
        return;
    }
    for (size_t i = begin; i < end; i++) {
        if (f->from == GLM_F64 &&
            f->to != GLM_F32) { /* one rounding: to odd float first, then to 16 bits */
            const double d = ((const double *)f->q[0])[i];
            float x = (float)d;
            uint32_t bits;
            if (x == x && (double)x != d && isfinite(x)) {
                memcpy(&bits, &x, 4);
                if (fabs((double)x) > fabs(d))
                    bits--; /* toward zero */
                bits |= 1;
                memcpy(&x, &bits, 4);
            }
            ((uint16_t *)f->p[0])[i] = f->to == GLM_F16 ? float_to_half(x) : float_to_bfloat(x);
            continue;
        }
        const float x = load_one(f->q[0], f->from, i);
        if (f->to == GLM_F32)
            ((float *)f->p[0])[i] = x;
        else if (f->to == GLM_F16)
            ((uint16_t *)f->p[0])[i] = float_to_half(x);
        else if (f->to == GLM_BF16)
            ((uint16_t *)f->p[0])[i] = float_to_bfloat(x);
        else
            ((double *)f->p[0])[i] = x;
    }
}

static void merge_task(const void *arg, int task, char *scratch)
{
    const struct merge_args *m = arg;
    float *row = (float *)scratch;
    enum { WIDTH = 4096 };
    const size_t size = glm_bytes(m->dtype, 1);
    for (int o = task * m->rows; o < m->O && o < (task + 1) * m->rows; o++)
        for (int begin = 0; begin < m->I; begin += WIDTH) {
            const int n = m->I - begin < WIDTH ? m->I - begin : WIDTH;
            char *at = (char *)m->data + ((size_t)o * m->I + begin) * size;
            for (int i = 0; i < n; i++)
                row[i] = 0;
            for (int r = 0; r < m->R; r++) {
                const float b = m->B[(size_t)o * m->R + r];
                const float *a = m->A + (size_t)r * m->I + begin;
                for (int i = 0; i < n; i++)
                    row[i] += b * a[i];
            }
            for (int i = 0; i < n; i++) {
                const float x = load_one(at, m->dtype, i) + m->scale * row[i];
                if (m->dtype == GLM_F32)
                    ((float *)at)[i] = x;
                else if (m->dtype == GLM_F64)
                    ((double *)at)[i] += (double)m->scale * row[i];
                else
                    ((uint16_t *)at)[i] =
                        m->dtype == GLM_F16 ? float_to_half(x) : float_to_bfloat(x);
            }
        }
}

/* ---- quantisation: what the integers and scales mean stands in tensor.h */

/* x rounded to 11 significant bits, as float16 has them where it is normal: quotients below its
 * normal range round to integer 0 anyway */
INLINE float round_to_half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
    memcpy(&x, &bits, 4);
    return x;
}

/* nearest integer, ties to even, of |x| < 2^22; no call of a library in the loop */
INLINE float nearest(float x) { return x + 12582912.0f - 12582912.0f; }

INLINE void store_integers(uint8_t *to, const float *q, int n, enum glm_dtype dtype)
{
    if (dtype == GLM_I8)
        for (int i = 0; i < n; i++)
            to[i] = (uint8_t)(int8_t)q[i];
    else
        for (int i = 0; i < n / 2; i++)
            to[i] = (uint8_t)((uint32_t)(int)q[2 * i] << 4 | ((uint32_t)(int)q[2 * i + 1] & 15));
}

enum { QUANTIZE_WIDTH = 4096 }; /* elements that are widened at a time */

/* Elements from `begin` on of the row at `from` as floats; `rounded` to float16. 1: all finite */
INLINE int load_weights(float *w, const char *from, enum glm_dtype dtype, int n, int rounded)
{
    uint32_t bad = 0;
    load_row(w, from, dtype, n);
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        if (rounded && dtype != GLM_F16)
            w[i] = half_to_float(float_to_half(w[i]));
        memcpy(&bits, w + i, 4);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

static uint16_t quantize_row(const struct quantize_args *a, uint8_t *to, const char *from, float *w)
{
    const float levels = a->dtype == GLM_I8 ? 127.0f : 7.0f;
    float top = 0;
    int finite = 1;
    for (int k = 0; k < a->cols; k += QUANTIZE_WIDTH) {
        const int n = a->cols - k < QUANTIZE_WIDTH ? a->cols - k : QUANTIZE_WIDTH;
        finite &= load_weights(w, from + glm_bytes(a->inp_dtype, (size_t)k), a->inp_dtype, n, 1);
        for (int i = 0; i < n; i++)
            top = fabsf(w[i]) > top ? fabsf(w[i]) : top;
    }
    const uint16_t scale = finite ? float_to_half(top / levels) : 0x7c00;
    const float s = half_to_float(scale);
    for (int k = 0; k < a->cols; k += QUANTIZE_WIDTH) {
        const int n = a->cols - k < QUANTIZE_WIDTH ? a->cols - k : QUANTIZE_WIDTH;
        load_weights(w, from + glm_bytes(a->inp_dtype, (size_t)k), a->inp_dtype, n, 1);
        for (int i = 0; i < n; i++) {
            float x = s > 0 && finite ? nearest(round_to_half(w[i] / s)) : 0;
            x = x < -levels ? -levels : x; /* a scale that float16 rounds down to few bits */
            w[i] = x > levels ? levels : x;
        }
        store_integers(to + glm_bytes(a->dtype, (size_t)k), w, n, a->dtype);
    }
    return scale;
}

/* The integers, -8 to 7, of values times an inverse scale. */
INLINE vf divide(vf w, float inverse)
{
    const vf shift = splat(12582912.0f), low = splat(-8.0f), high = splat(7.0f);
    const vf q = w * splat(inverse) + shift - shift;
    return choose(q < low, low, choose(q > high, high, q));
}

/* w: n finite values, zeros up to a whole vector; q: their integers. Returns the scale's bits. With
 * integers q the best scale is wq / qq, and the squared error then ww - wq^2 / qq. */
INLINE uint16_t quantize_group(float *q, const float *w, int n)
{
    float top = 0, best = 0, most = 0;
    for (int i = 0; i < n; i++)
        top = fabsf(w[i]) > fabsf(top) ? w[i] : top;
    for (int j = -9; j <= 9 && top != 0; j++) {
        const float inverse = -(8.0f + 0.1f * (float)j) / top;
        vf wq = {0}, qq = {0};
        for (int i = 0; i < n; i += VL) {
            const vf x = divide(load(w + i), inverse);
            wq += load(w + i) * x;
            qq += x * x;
        }
        const v4 sum = SUM4(wq, qq, wq, qq);
        if (sum[0] * sum[0] / sum[1] > most) {
            most = sum[0] * sum[0] / sum[1];
            best = sum[0] / sum[1];
        }
    }
    /* infinite where float16 cannot hold it, or float32 not its square */
    const uint16_t scale = top == 0                      ? 0
                           : most < INFINITY && most > 0 ? float_to_half(best)
                                                         : 0x7c00;
    const float s = half_to_float(scale), inverse = s > 0 || s < 0 ? 1.0f / s : 0;
    for (int i = 0; i < n; i += VL)
        store(q + i, divide(load(w + i), inverse));
    return scale;
}

static void quantize_task(const void *arg, int task, char *scratch)
{
    const struct quantize_args *a = arg;
    const int per_row = a->group ? (a->cols + a->group - 1) / a->group : 1;
    float *w = (float *)scratch, *q = w + QUANTIZE_WIDTH + VL;
    for (int r = task * a->rows_a_task; r < a->rows && r < (task + 1) * a->rows_a_task; r++)
        for (int g = 0; g < per_row; g++) {
            const size_t begin = (size_t)r * a->cols + (size_t)g * a->group;
            const char *from = (const char *)a->inp + glm_bytes(a->inp_dtype, begin);
            uint8_t *to = a->data + glm_bytes(a->dtype, begin);
            uint16_t *scale = a->scale + (size_t)r * per_row + g;
            if (!a->group) {
                *scale = quantize_row(a, to, from, w);
                continue;
            }
            const int left = a->cols - g * a->group, n = left < a->group ? left : a->group;
            if (!load_weights(w, from, a->inp_dtype, n, 0)) {
                memset(q, 0, (size_t)n * 4);
                *scale = 0x7c00;
            } else {
                memset(w + n, 0, VL * 4);
                *scale = quantize_group(q, w, n);
            }
            store_integers(to, q, n, a->dtype);
        }
}

/* ---- dot products of rows where they lie, for attention */

/* s[r][c] = sum over k < K of x[r][k] * w[c][k];  R x 4 sums at once */
INLINE void dot_tile(v4 *s, int R, const float *const *x, const char *const *w,
                     enum glm_dtype dtype, int K)
{
    vf acc[4][4];
    int k = 0;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++)
            acc[r][c] = (vf){0};
    for (; k + VL <= K; k += VL) {
        vf xv[4];
        for (int r = 0; r < R; r++)
            xv[r] = load(x[r] + k);
        for (int c = 0; c < 4; c++) {
            const vf wv = load_as(w[c], dtype, k);
            for (int r = 0; r < R; r++)
                acc[r][c] = MADD(xv[r], wv, acc[r][c]);
        }
    }
    if (k < K) {
        for (int c = 0; c < 4; c++) {
            vf wv = {0};
            for (int i = k; i < K; i++)
                wv[i - k] = load_one(w[c], dtype, i);
            for (int r = 0; r < R; r++)
                acc[r][c] = MADD(load_part(x[r] + k, K - k), wv, acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        s[r] = SUM4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* out[n][o] (ldo) of `rows` x `cols` dot products of K features; add: onto what is there. w rows
 * are `stride` bytes apart */
INLINE void dot_block(float *out, size_t ldo, const float *x, size_t ldx, int rows, const char *w,
                      size_t stride, enum glm_dtype dtype, int cols, int K, int add)
{
    for (int n = 0; n < rows; n += 3) {
        const float *xs[3];
        for (int r = 0; r < 3; r++)
            xs[r] = x + (size_t)(n + r < rows ? n + r : rows - 1) * ldx;
        const int R = rows - n < 3 ? rows - n : 3;
        for (int o = 0; o < cols; o += 4) {
            const char *ws[4];
            v4 s[3];
            for (int c = 0; c < 4; c++)
                ws[c] = w + (size_t)(o + c < cols ? o + c : cols - 1) * stride;
            if (R == 1)
                dot_tile(s, 1, xs, ws, dtype, K);
            else
                dot_tile(s, 3, xs, ws, dtype, K);
            const int used = cols - o < 4 ? cols - o : 4;
            for (int r = 0; r < R; r++) {
                float *at = out + (n + r) * ldo + o;
                if (used == 4) {
                    *(v4 *)at = add ? *(v4 *)at + s[r] : s[r];
                    continue;
                }
                for (int c = 0; c < used; c++)
                    at[c] = add ? at[c] + s[r][c] : s[r][c];
            }
        }
    }
}

/* ---- linear_forward: both operands are contiguous along the reduction, so vectors run along it.
 *
 * An output is a sum of blocks of NT_BLOCK features. In a block, lane l adds up every VL-th
 * product, then the lanes are summed: the same order whether W is read where it lies (up to XR
 * rows, at the speed of the memory) or packed into panels (more rows). */

enum {
    XR = VL == 16 ? 6 : 3,
    STEP = 2 * VL,
    PACKED_X = L1_ROWS * NT_BLOCK > XR *NT_WIDTH ? L1_ROWS *NT_BLOCK : XR *NT_WIDTH
};

/* Columns k .. k + STEP - 1 of a row of W, as integers where it is quantized. Of 4-bit columns the
 * even ones come first, then the odd ones; x is packed to match. */
INLINE void load_step(vf v[2], const char *row, enum glm_dtype dtype, int k)
{
    if (dtype == GLM_I4) {
        const vi both = BYTES_TO_INT(row + k / 2);
        v[0] = INT_TO_FLOAT(both >> 4);
        v[1] = INT_TO_FLOAT(both << 28 >> 28);
    } else if (dtype == GLM_I8) {
        v[0] = INT_TO_FLOAT(BYTES_TO_INT(row + k));
        v[1] = INT_TO_FLOAT(BYTES_TO_INT(row + k + VL));
    } else {
        v[0] = load_as(row, dtype, (size_t)k);
        v[1] = load_as(row, dtype, (size_t)k + VL);
    }
}

/* The same for the last columns of a row: zeros follow. */
INLINE void load_last(vf v[2], const char *row, enum glm_dtype dtype, int k, int n)
{
    float x[STEP] = {0};
    for (int i = 0; i < n; i++)
        x[dtype == GLM_I4 ? i / 2 + i % 2 * VL : i] = load_one(row, dtype, (size_t)k + i);
    v[0] = load(x);
    v[1] = load(x + VL);
}

/* Rows of x for dot_panel and dot_rows: vector by vector, R of them; rows and features past the end
 * are 0. */
INLINE void pack_x(float *to, int R, const float *x, size_t ldx, int rows, int K,
                   enum glm_dtype dtype)
{
    for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k += STEP) {
            const float *from = x + r * ldx + k;
            float *at = to + ((size_t)k / VL * R + r) * VL;
            const int n = r >= rows ? 0 : K - k < STEP ? K - k : STEP;
            vf v[2];
            __builtin_prefetch(from + ldx); /* the next row: too far for the hardware to guess */
            if (n == STEP) {
                v[0] = load(from);
                v[1] = load(from + VL);
            } else {
                v[0] = load_part(from, n < VL ? n : VL);
                v[1] = load_part(from + VL, n < VL ? 0 : n - VL);
            }
            if (dtype == GLM_I4) {
                const vf a = v[0], b = v[1];
                v[0] = EVEN(a, b);
                v[1] = ODD(a, b);
            }
            store(at, v[0]);
            store(at + R * VL, v[1]);
        }
}

/* The float values of `group` columns' scales from column k of a row on; 1 where there is one scale
 * for the row, which multiplies the sum. */
INLINE float scale_at(const struct glm_mat *w, int row, int k)
{
    if (!w->group)
        return 1.0f;
    return half_to_float(w->scale[(size_t)row * glm_scale_cols(w) + k / w->group]);
}

/* Four rows of W from row o on, columns k0 .. k0 + K - 1: vector by vector, four of them; rows past
 * the end are 0. */
INLINE void pack_w(float *to, const struct glm_mat *w, enum glm_dtype dtype, int grouped, int o,
                   int rows, int k0, int K)
{
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    for (int c = 0; c < 4; c++) {
        const char *row = (const char *)w->data + (size_t)(o + c) * stride;
        float scale = 1.0f;
        int k = 0;
        for (; c < rows && k < K; k += STEP) {
            vf v[2];
            float *at = to + ((size_t)k / VL * 4 + c) * VL;
            __builtin_prefetch(row + stride + glm_bytes(dtype, (size_t)(k0 + k)));
            if (__builtin_expect(K - k >= STEP, 1))
                load_step(v, row, dtype, k0 + k);
            else
                load_last(v, row, dtype, k0 + k, K - k);
            if (grouped) {
                if ((k0 + k) % w->group == 0 || k == 0)
                    scale = scale_at(w, o + c, k0 + k);
                v[0] *= splat(scale);
                v[1] *= splat(scale);
            }
            store(at, v[0]);
            store(at + 4 * VL, v[1]);
        }
        for (; k < K; k += VL)
            store(to + ((size_t)k / VL * 4 + c) * VL, (vf){0});
    }
}

/* s[r][c] = dot product of row r of packed x with row c of packed w, `vectors` vectors long */
INLINE void dot_panel(v4 *s, const float *x, const float *w, int vectors)
{
    vf acc[XR][4];
    for (int r = 0; r < XR; r++)
        for (int c = 0; c < 4; c++)
            acc[r][c] = (vf){0};
    for (int k = 0; k < vectors; k++, x += XR * VL, w += 4 * VL) {
        vf xv[XR];
        for (int r = 0; r < XR; r++)
            xv[r] = load(x + r * VL);
        for (int c = 0; c < 4; c++) {
            const vf wv = load(w + c * VL);
            for (int r = 0; r < XR; r++)
                acc[r][c] = MADD(xv[r], wv, acc[r][c]);
        }
    }
    for (int r = 0; r < XR; r++)
        s[r] = SUM4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* Four rows of W where they lie, eight for a single row of x: enough sums in flight. */
INLINE int rows_in_place(int R) { return R == 1 ? 8 : 4; }

/* acc[r][c] += products of STEP features of row r of x with two vectors of a row of W */
INLINE void add_step(vf acc[XR][8], int R, int c, const float *x, const vf v[2])
{
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
            acc[r][c] = MADD(load(x + (h * R + r) * VL), v[h], acc[r][c]);
}

/* The same with C = rows_in_place(R) rows of W from row o on, columns k0 .. k0 + K - 1; s has C / 4
 * vectors for each row of x. Where W ends its last row repeats. */
INLINE void dot_rows(v4 *s, int R, const float *x, const struct glm_mat *w, enum glm_dtype dtype,
                     int grouped, int o, int k0, int K)
{
    const int C = rows_in_place(R);
    const size_t stride = glm_bytes(dtype, (size_t)w->cols);
    const char *row[8];
    float scale[8][NT_BLOCK / 32];
    vf acc[XR][8], v[2];
    int k = 0;
    for (int c = 0; c < C; c++) {
        const int at = o + c < w->rows ? o + c : w->rows - 1;
        row[c] = (const char *)w->data + (size_t)at * stride;
        if (grouped && w->group == 32)
            load_row(scale[c], w->scale + (size_t)at * glm_scale_cols(w) + k0 / 32, GLM_F16,
                     (K + 31) / 32);
        for (int g = 0; grouped && w->group != 32 && g * 32 < K; g++)
            scale[c][g] = scale_at(w, at, k0 + g * 32);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            acc[r][c] = (vf){0};
    for (; k + STEP <= K; k += STEP, x += 2 * R * VL)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_step(v, row[c], dtype, k0 + k);
            if (grouped) {
                v[0] *= splat(scale[c][k / 32]);
                v[1] *= splat(scale[c][k / 32]);
            }
            add_step(acc, R, c, x, v);
        }
    if (k < K)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            load_last(v, row[c], dtype, k0 + k, K - k);
            if (grouped) {
                v[0] *= splat(scale[c][k / 32]);
                v[1] *= splat(scale[c][k / 32]);
            }
            add_step(acc, R, c, x, v);
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c += 4)
            s[(r * C + c) / 4] = SUM4(acc[r][c], acc[r][c + 1], acc[r][c + 2], acc[r][c + 3]);
}

/* tile (rows, NT_COLS) of up to R rows, W read in place */
INLINE void tile_in_place(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped,
                          int R, int n0, int rows, int o0, int cols, float *xp)
{
    const int I = a->w->cols, C = rows_in_place(R);
    for (int begin = 0; begin < I; begin += NT_WIDTH) {
        const int width = I - begin < NT_WIDTH ? I - begin : NT_WIDTH;
        pack_x(xp, R, a->inp + (size_t)n0 * I + begin, (size_t)I, rows, width, dtype);
        for (int o = 0; o < cols; o += C)
            for (int k = 0; k < width; k += NT_BLOCK) {
                v4 s[XR];
                dot_rows(s, R, xp + (size_t)k * R, a->w, dtype, grouped, o0 + o, begin + k,
                         width - k < NT_BLOCK ? width - k : NT_BLOCK);
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < C; c += 4)
                        *(v4 *)(tile + r * NT_COLS + o + c) += s[(r * C + c) / 4];
            }
    }
}

/* tile (rows, NT_COLS) of many rows: W packed once, x so many rows at a time as L1 holds */
INLINE void tile_packed(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped,
                        int n0, int rows, int o0, int cols, float *xp, float *wp)
{
    const int I = a->w->cols;
    for (int begin = 0; begin < I; begin += NT_BLOCK) {
        const int K = I - begin < NT_BLOCK ? I - begin : NT_BLOCK;
        const int vectors = (K + STEP - 1) / STEP * 2;
        for (int o = 0; o < cols; o += 4)
            pack_w(wp + (size_t)o * NT_BLOCK, a->w, dtype, grouped, o0 + o, cols - o, begin, K);
        for (int m = 0; m < rows; m += L1_ROWS) {
            const int end = rows - m < L1_ROWS ? rows - m : L1_ROWS;
            for (int n = 0; n < end; n += XR)
                pack_x(xp + (size_t)n * NT_BLOCK, XR, a->inp + (size_t)(n0 + m + n) * I + begin,
                       (size_t)I, end - n, K, dtype);
            for (int o = 0; o < cols; o += 4)
                for (int n = 0; n < end; n += XR) {
                    v4 s[XR];
                    dot_panel(s, xp + (size_t)n * NT_BLOCK, wp + (size_t)o * NT_BLOCK, vectors);
                    for (int r = 0; r < XR; r++)
                        *(v4 *)(tile + (m + n + r) * NT_COLS + o) += s[r];
                }
        }
    }
}

INLINE void nt_tile(float *tile, const struct nt_args *a, enum glm_dtype dtype, int grouped, int n0,
                    int rows, int o0, int cols)
{
    float *xp = tile + NT_ROWS * NT_COLS, *wp = xp + PACKED_X;
    if (rows == 1)
        tile_in_place(tile, a, dtype, grouped, 1, n0, rows, o0, cols, xp);
    else if (rows <= XR)
        tile_in_place(tile, a, dtype, grouped, XR, n0, rows, o0, cols, xp);
    else
        tile_packed(tile, a, dtype, grouped, n0, rows, o0, cols, xp, wp);
}

static void nt_task(const void *arg, int task, char *scratch)
{
    const struct nt_args *a = arg;
    const struct glm_mat *w = a->w;
    const int O = w->rows, o_tiles = (O + NT_COLS - 1) / NT_COLS;
    const int n0 = task / o_tiles * a->rows, o0 = task % o_tiles * NT_COLS;
    const int rows = a->N - n0 < a->rows ? a->N - n0 : a->rows,
              cols = O - o0 < NT_COLS ? O - o0 : NT_COLS;
    float *tile = (float *)scratch;
    memset(tile, 0, (size_t)NT_COLS * 4 * (size_t)((rows + XR - 1) / XR * XR));
    if (w->dtype == GLM_F32)
        nt_tile(tile, a, GLM_F32, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_F16)
        nt_tile(tile, a, GLM_F16, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_BF16)
        nt_tile(tile, a, GLM_BF16, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_I8)
        nt_tile(tile, a, GLM_I8, 0, n0, rows, o0, cols);
    else if (w->dtype == GLM_I4 && w->group)
        nt_tile(tile, a, GLM_I4, 1, n0, rows, o0, cols);
    else if (w->dtype == GLM_I4)
        nt_tile(tile, a, GLM_I4, 0, n0, rows, o0, cols);
    else
        nt_tile(tile, a, GLM_F64, 0, n0, rows, o0, cols);
    for (int o = 0; w->scale && !w->group && o < cols; o++) {
        const float scale = half_to_float(w->scale[o0 + o]);
        for (int n = 0; n < rows; n++)
            tile[n * NT_COLS + o] *= scale;
    }
    for (int n = 0; n < rows; n++) {
        float *out = a->out + (size_t)(n0 + n) * O + o0;
        for (int o = 0; o < cols; o++) {
            float v = a->scale * tile[n * NT_COLS + o];
            if (a->bias)
                v += a->bias[o0 + o];
            out[o] = a->accumulate ? out[o] + v : v;
        }
    }
}

/* ---- the backward products: rank-1 updates over packed panels, vectors run along the output */

enum { MR = VL == 16 ? 12 : VL == 8 ? 6 : 4, NV = 2, NR = NV * VL };

/* acc (MR, NR) += a[m * am] * b[n] */
INLINE void add_outer(vf acc[MR][NV], const float *a, size_t am, const float *b)
{
    vf bv[NV];
    for (int v = 0; v < NV; v++)
        bv[v] = load(b + v * VL);
    for (int m = 0; m < MR; m++) {
        const vf av = splat(a[m * am]);
        for (int v = 0; v < NV; v++)
            acc[m][v] = MADD(av, bv[v], acc[m][v]);
    }
}

/* tile (MR, NR; ldt) += sum over k < K of a(m, k) * b[k * ldb + n], where a(m, k) =
 * a[m * am + k % 4 * ak + k / 4 * quad] */
INLINE void rank1_tile(float *tile, size_t ldt, const float *a, size_t am, size_t ak, size_t quad,
                       const float *b, size_t ldb, int K)
{
    vf acc[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            acc[m][v] = load(tile + m * ldt + v * VL);
    int k = 0;
    for (; k + 4 <= K; k += 4, a += quad, b += 4 * ldb)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            add_outer(acc, a + i * ak, am, b + i * ldb);
    for (; k < K; k++, a += ak, b += ldb)
        add_outer(acc, a, am, b);
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++)
            store(tile + m * ldt + v * VL, acc[m][v]);
}

/* Rows of A for rank1_tile, quads of k together: (K / 4, MR, 4); rows and k past the end are 0. */
INLINE void pack_a(float *to, const float *from, size_t am, size_t ak, int rows, int K)
{
    for (int r = 0; r < MR; r++)
        for (int k = 0; k < K; k += 4) {
            v4 v = {0};
            const float *at = from + r * am + k * ak;
            const int n = r >= rows ? 0 : K - k < 4 ? K - k : 4;
            if (n == 4 && ak == 1)
                v = *(const v4 *)at;
            else
                for (int i = 0; i < n; i++)
                    v[i] = at[i * ak];
            *(v4 *)(to + k * MR + r * 4) = v;
        }
}

/* Rows k0 .. k0 + K - 1, columns n0 .. n0 + cols - 1 of B as (K, NR) panels; columns past the end
 * are 0. */
INLINE void pack_b(float *bp, const struct glm_mat *b, enum glm_dtype dtype, int k0, int K, int n0,
                   int cols)
{
    const size_t stride = glm_bytes(dtype, (size_t)b->cols);
    for (int k = 0; k < K; k++) {
        const char *row = (const char *)b->data + (size_t)(k0 + k) * stride;
        float scale = 1.0f;
        if (b->scale && !b->group)
            scale = half_to_float(b->scale[k0 + k]);
        for (int n = 0; n < cols; n += NR) {
            vf v[NV];
            __builtin_prefetch(row + stride + glm_bytes(dtype, (size_t)(n0 + n)));
            if (n + NR <= cols)
                load_step(v, row, dtype, n0 + n);
            else
                load_last(v, row, dtype, n0 + n, cols - n);
            if (dtype == GLM_I4) {
                const vf even = v[0], odd = v[1];
                v[0] = LOW(even, odd);
                v[1] = HIGH(even, odd);
                if (b->group && ((n0 + n) % b->group == 0 || n == 0))
                    scale = scale_at(b, k0 + k, n0 + n);
            }
            float *to = bp + (size_t)n * GEMM_BLOCK + k * NR;
            for (int h = 0; h < NV; h++)
                store(to + h * VL, glm_is_quantized(dtype) ? v[h] * splat(scale) : v[h]);
        }
    }
}

INLINE void pack_b_as(float *bp, const struct glm_mat *b, int k0, int K, int n0, int cols)
{
    switch (b->dtype) {
    case GLM_F32:
        pack_b(bp, b, GLM_F32, k0, K, n0, cols);
        break;
    case GLM_F16:
        pack_b(bp, b, GLM_F16, k0, K, n0, cols);
        break;
    case GLM_BF16:
        pack_b(bp, b, GLM_BF16, k0, K, n0, cols);
        break;
    case GLM_I8:
        pack_b(bp, b, GLM_I8, k0, K, n0, cols);
        break;
    case GLM_I4:
        pack_b(bp, b, GLM_I4, k0, K, n0, cols);
        break;
    default:
        pack_b(bp, b, GLM_F64, k0, K, n0, cols);
    }
}

static void gemm_task(const void *arg, int task, char *scratch)
{
    const struct gemm_args *g = arg;
    const int N = g->b->cols, n_tiles = (N + GEMM_COLS - 1) / GEMM_COLS;
    const int m0 = task / n_tiles * g->rows, n0 = task % n_tiles * GEMM_COLS;
    const int rows = g->M - m0 < g->rows ? g->M - m0 : g->rows,
              cols = N - n0 < GEMM_COLS ? N - n0 : GEMM_COLS;
    float *tile = (float *)scratch, *ap = tile + GEMM_ROWS * GEMM_COLS,
          *bp = ap + GEMM_ROWS * GEMM_BLOCK;
    memset(tile, 0, (size_t)GEMM_COLS * 4 * (size_t)((rows + MR - 1) / MR * MR));
    for (int k0 = 0; k0 < g->b->rows; k0 += GEMM_BLOCK) {
        const int K = g->b->rows - k0 < GEMM_BLOCK ? g->b->rows - k0 : GEMM_BLOCK;
        for (int m = 0; m < rows; m += MR)
            pack_a(ap + (size_t)m * GEMM_BLOCK,
                   g->a + (size_t)(m0 + m) * g->am + (size_t)k0 * g->ak, g->am, g->ak, rows - m, K);
        pack_b_as(bp, g->b, k0, K, n0, cols);
        for (int n = 0; n < cols; n += NR) /* a panel of B stays in L1 */
            for (int m = 0; m < rows; m += MR)
                rank1_tile(tile + m * GEMM_COLS + n, GEMM_COLS, ap + (size_t)m * GEMM_BLOCK, 4, 1,
                           4 * MR, bp + (size_t)n * GEMM_BLOCK, NR, K);
    }
    for (int m = 0; m < rows; m++) {
        float *c = g->c + (size_t)(m0 + m) * N + n0;
        for (int n = 0; n < cols; n++) {
            const float v = g->scale * tile[m * GEMM_COLS + n];
            c[n] = g->accumulate ? c[n] + v : v;
        }
    }
}

/* ---- elementary functions */

/* e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by its series to r^7; below -87.3 it
 * stays at 1e-38 */
INLINE vf exp_vector(vf x)
{
    const vf high = splat(88.37626f), low = splat(-87.33654f), shifter = splat(12582912.0f);
    x = choose(x > high, high, x);
    x = choose(x < low, low, x);
    vf n = MADD(x, splat(1.44269504f), shifter);
    const vi exponent = (vi)n << 23;
    n = n - shifter;
    vf r = MADD(n, splat(-0.693359375f), x);
    r = MADD(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = MADD(p, r, splat(1.3981999507e-3f));
    p = MADD(p, r, splat(8.3334519073e-3f));
    p = MADD(p, r, splat(4.1665795894e-2f));
    p = MADD(p, r, splat(1.6666665459e-1f));
    p = MADD(p, r, splat(5.0000001201e-1f));
    p = MADD(p * r, r, r) + splat(1.0f);
    p = (vf)((vi)p + exponent);
    return choose(x == x, p, x); /* a NaN's bits are no exponent */
}

INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp_vector(-x)); }

/* ---- norms */

INLINE float dot_row(const float *a, const float *b, int n)
{
    vf s = {0};
    int i = 0;
    for (; i + VL <= n; i += VL)
        s = MADD(load(a + i), load(b + i), s);
    if (i < n)
        s = MADD(load_part(a + i, n - i), load_part(b + i, n - i), s);
    return lane_sum(s);
}

static void rmsnorm_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C;
    const float *weight = a->b;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *x = (const float *)a->a + (size_t)n * C;
        float *out = (float *)a->out + (size_t)n * C;
        const float rstd = 1.0f / sqrtf(dot_row(x, x, C) / (float)C + (float)a->eps);
        ((float *)a->extra)[n] = rstd;
        for (int i = 0; i < C; i++)
            out[i] = x[i] * rstd * weight[i];
    }
}

/* out = dinp, a = dout, b = inp, c = weight, d = rstd */
static void rmsnorm_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C;
    const float *weight = a->c;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *dout = (const float *)a->a + (size_t)n * C,
                    *x = (const float *)a->b + (size_t)n * C;
        float *dinp = (float *)a->out + (size_t)n * C;
        const float rstd = ((const float *)a->d)[n];
        vf s = {0};
        int i = 0;
        for (; i + VL <= C; i += VL)
            s += load(dout + i) * load(weight + i) * load(x + i);
        if (i < C)
            s +=
                load_part(dout + i, C - i) * load_part(weight + i, C - i) * load_part(x + i, C - i);
        const float mean = lane_sum(s) / (float)C * rstd * rstd * rstd;
        for (i = 0; i < C; i++)
            dinp[i] += rstd * dout[i] * weight[i] - x[i] * mean;
    }
}

/* a task is a run of columns: the sum over rows is never split */
static void rmsnorm_dweight_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C, begin = task * 64, end = begin + 64 < C ? begin + 64 : C;
    float *sum = (float *)scratch, *dweight = a->out;
    for (int i = begin; i < end; i++)
        sum[i - begin] = 0;
    for (int n = 0; n < a->N; n++) {
        const float *dout = (const float *)a->a + (size_t)n * C,
                    *x = (const float *)a->b + (size_t)n * C;
        const float rstd = ((const float *)a->d)[n];
        for (int i = begin; i < end; i++)
            sum[i - begin] += dout[i] * x[i] * rstd;
    }
    for (int i = begin; i < end; i++)
        dweight[i] += sum[i - begin];
}

static void rope_task(const void *arg, int task, char *scratch)
{
    const struct rope_args *r = arg;
    const int pairs = r->rotary_dim / 2;
    (void)scratch;
    for (int n = task * r->rows; n < r->N && n < (task + 1) * r->rows; n++) {
        const float *angle = r->table + (size_t)r->position[n] * r->rotary_dim;
        for (int h = 0; h < r->heads; h++) {
            float *x = r->x + (size_t)n * r->stride + (size_t)h * r->HD;
            for (int j = 0; j < pairs; j++) {
                const float c = angle[2 * j], s = r->sign * angle[2 * j + 1], x0 = x[2 * j],
                            x1 = x[2 * j + 1];
                x[2 * j] = x0 * c - x1 * s;
                x[2 * j + 1] = x1 * c + x0 * s;
            }
        }
    }
}

/* ---- attention: keys in blocks of ATT_KEYS from the first visible one, softmax kept running
 * (Milakov & Gimelshein 2018) */

/* Row j of what a segment sees: shared, past, then own tokens; its keys or values of head g, and
 * their gradient. */
INLINE const float *visible(const struct att_args *a, const struct glm_segment *s, int j, int g,
                            int value)
{
    const int HD = a->heads.HD, KV = a->heads.KVH * HD;
    const float *cache = value ? a->cache.v : a->cache.k;
    if (j < s->shared_count)
        return cache + (size_t)(s->shared_begin + j) * KV + (size_t)g * HD;
    j -= s->shared_count;
    if (j < s->past_count)
        return cache + (size_t)(s->past_begin + j) * KV + (size_t)g * HD;
    j -= s->past_count;
    return a->qkv + (size_t)(s->begin + j) * (a->heads.NH + 2 * a->heads.KVH) * HD +
           (size_t)(a->heads.NH + (value ? a->heads.KVH : 0) + g) * HD;
}

INLINE int last_visible(const struct glm_segment *s, int t)
{
    const int own = t + 1 < s->context ? s->context : t + 1;
    return s->shared_count + s->past_count + (own < s->count ? own : s->count);
}

/* out (HD) = out * keep + sum over j < n of p[j] * v[j]; v (n, HD) */
INLINE void weighted_rows(float *out, float keep, const float *p, const float *v, int n, int HD)
{
    int d = 0;
    for (; d + 4 * VL <= HD; d += 4 * VL) {
        vf acc[4];
        for (int i = 0; i < 4; i++)
            acc[i] = load(out + d + i * VL) * splat(keep);
        for (int j = 0; j < n; j++) {
            const vf w = splat(p[j]);
            for (int i = 0; i < 4; i++)
                acc[i] = MADD(w, load(v + (size_t)j * HD + d + i * VL), acc[i]);
        }
        for (int i = 0; i < 4; i++)
            store(out + d + i * VL, acc[i]);
    }
    for (; d < HD; d += VL) {
        const int part = HD - d < VL ? HD - d : VL;
        vf acc = load_part(out + d, part) * splat(keep);
        for (int j = 0; j < n; j++)
            acc = MADD(splat(p[j]), load_part(v + (size_t)j * HD + d, part), acc);
        store_part(out + d, acc, part);
    }
}

/* Whether n floats are all finite: 0 times them adds nothing. */
INLINE int all_finite(const float *x, int n)
{
    vf s = {0};
    int i = 0;
    for (; i + VL <= n; i += VL)
        s += load(x + i) * splat(0.0f);
    s += load_part(x + i, n - i) * splat(0.0f);
    return lane_sum(s) == 0;
}

/* out row r (ldo apart) += sum over j < seen[r] of p[r][j] * v[j] for `rows` rows; p (rows,
 * ATT_KEYS), zero where a row does not see a key; v (keys, HD). Each element's sum runs over j in
 * order, whatever the tile. */
INLINE void add_weighted(float *out, size_t ldo, const float *p, const float *v, int rows, int keys,
                         int HD, const int *seen)
{
    int r = 0;
    if (HD % NR == 0 &&
        all_finite(v, keys * HD)) /* 0 * NaN would reach rows that do not see the NaN */
        for (; r + MR <= rows; r += MR)
            for (int d = 0; d < HD; d += NR)
                rank1_tile(out + r * ldo + d, ldo, p + r * ATT_KEYS, ATT_KEYS, 1, 4, v + d,
                           (size_t)HD, keys);
    for (; r < rows; r++)
        weighted_rows(out + r * ldo, 1.0f, p + r * ATT_KEYS, v, seen[r], HD);
}

/* out[j] (HD) += sum over r < rows of p[r][j] * x[r] (ldx apart), for all ATT_KEYS keys that `keys`
 * rounds up to */
INLINE void add_transposed(float *out, const float *p, const float *x, size_t ldx, int rows,
                           int keys, int HD)
{
    if (HD % NR == 0) {
        for (int j = 0; j < keys; j += MR)
            for (int d = 0; d < HD; d += NR)
                rank1_tile(out + j * HD + d, (size_t)HD, p + j, 1, ATT_KEYS, 4 * ATT_KEYS, x + d,
                           ldx, rows);
        return;
    }
    for (int j = 0; j < keys; j++)
        for (int d = 0; d < HD; d += VL) {
            const int part = HD - d < VL ? HD - d : VL;
            vf sum = load_part(out + j * HD + d, part);
            for (int r = 0; r < rows; r++)
                sum += splat(p[r * ATT_KEYS + j]) * load_part(x + r * ldx + d, part);
            store_part(out + j * HD + d, sum, part);
        }
}

static void attention_forward_task(const void *arg, int task, char *scratch)
{
    const struct att_args *a = arg;
    const int NH = a->heads.NH, KVH = a->heads.KVH, HD = a->heads.HD, group = NH / KVH;
    const size_t width = (size_t)(NH + 2 * KVH) * HD;
    const float scale = 1.0f / sqrtf((float)HD);
    const struct glm_segment *s = a->segments;
    while (task >= att_blocks(s) * KVH)
        task -= att_blocks(s++) * KVH;
    const int g = task % KVH, t0 = task / KVH * ATT_ROWS;
    const int rows = s->count - t0 < ATT_ROWS ? s->count - t0 : ATT_ROWS;
    const int seen = last_visible(s, t0 + rows - 1);
    float *kb = (float *)scratch, *vb = kb + ATT_KEYS * HD, *score = vb + ATT_KEYS * HD;
    float *top = score + ATT_ROWS * ATT_KEYS; /* (rows, group), then the sums */
    /* a group may be wide: heads go in bands so that top and sum fit */
    enum { BAND = 64 };
    for (int h0 = 0; h0 < group; h0 += BAND) {
        const int heads = group - h0 < BAND ? group - h0 : BAND;
        float *sum = top + ATT_ROWS * BAND;
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < heads; h++) {
                top[r * BAND + h] = -INFINITY;
                sum[r * BAND + h] = 0;
                memset(a->out + ((size_t)(s->begin + t0 + r) * NH + g * group + h0 + h) * HD, 0,
                       (size_t)HD * 4);
            }
        for (int j0 = 0; j0 < seen; j0 += ATT_KEYS) {
            const int keys = seen - j0 < ATT_KEYS ? seen - j0 : ATT_KEYS;
            for (int j = 0; j < keys; j++) {
                memcpy(kb + j * HD, visible(a, s, j0 + j, g, 0), (size_t)HD * 4);
                memcpy(vb + j * HD, visible(a, s, j0 + j, g, 1), (size_t)HD * 4);
            }
            for (int h = 0; h < heads; h++) {
                const int head = g * group + h0 + h;
                const float *q = a->qkv + (size_t)(s->begin + t0) * width + (size_t)head * HD;
                dot_block(score, ATT_KEYS, q, width, rows, (const char *)kb, (size_t)HD * 4,
                          GLM_F32, keys, HD, 0);
                float *out = a->out + ((size_t)(s->begin + t0) * NH + head) * HD;
                int own[ATT_ROWS]; /* keys of this block that each row sees */
                const size_t ldo = (size_t)NH * HD;
                for (int r = 0; r < rows; r++) {
                    int n = last_visible(s, t0 + r) - j0;
                    n = n < 0 ? 0 : n < keys ? n : keys;
                    own[r] = n;
                    float *p = score + r * ATT_KEYS, m = top[r * BAND + h];
                    for (int j = 0; j < n; j++) {
                        p[j] *= scale;
                        m = p[j] > m || p[j] != p[j] ? p[j] : m;
                    }
                    for (int j = n; j < keys; j++)
                        p[j] = 0;
                    if (n == 0)
                        continue;
                    const float keep =
                        top[r * BAND + h] == -INFINITY ? 0 : expf(top[r * BAND + h] - m);
                    vf total = {0};
                    for (int j = 0; j < n; j += VL) {
                        const int part = n - j < VL ? n - j : VL;
                        vf e = exp_vector(load_part(p + j, part) - splat(m));
                        store_part(p + j, e, part);
                        total += load_part(p + j, part);
                    }
                    top[r * BAND + h] = m;
                    sum[r * BAND + h] = sum[r * BAND + h] * keep + lane_sum(total);
                    if (keep != 1.0f)
                        for (int d = 0; d < HD; d++)
                            out[r * ldo + d] *= keep;
                }
                add_weighted(out, ldo, score, vb, rows, keys, HD, own);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < heads; h++) {
                const size_t at = (size_t)(s->begin + t0 + r) * NH + g * group + h0 + h;
                const float inverse = 1.0f / sum[r * BAND + h];
                for (int d = 0; d < HD; d++)
                    a->out[at * HD + d] *= inverse;
                a->lse[at] = top[r * BAND + h] + logf(sum[r * BAND + h]);
            }
    }
}

/* A task is one key head of one segment (of all segments where gradients of shared rows add up): no
 * two tasks write the same row. Keys in blocks, outermost; dq adds up over them in order. */
static void attention_backward_segment(const struct att_args *a, const struct glm_segment *s, int g,
                                       char *scratch)
{
    const int NH = a->heads.NH, KVH = a->heads.KVH, HD = a->heads.HD, group = NH / KVH,
              KV = KVH * HD;
    const size_t width = (size_t)(NH + 2 * KVH) * HD;
    const float scale = 1.0f / sqrtf((float)HD);
    const int before = s->shared_count + s->past_count, seen = before + s->count;
    float *kb = (float *)scratch, *vb = kb + ATT_KEYS * HD, *dk = vb + ATT_KEYS * HD,
          *dv = dk + ATT_KEYS * HD;
    float *p = dv + ATT_KEYS * HD, *dp = p + ATT_ROWS * ATT_KEYS;
    for (int t = 0; t < s->count; t++)
        memset(a->dqkv + (size_t)(s->begin + t) * width + (size_t)g * group * HD, 0,
               (size_t)group * HD * 4);
    for (int j0 = 0; j0 < seen; j0 += ATT_KEYS) {
        const int keys = seen - j0 < ATT_KEYS ? seen - j0 : ATT_KEYS;
        for (int j = 0; j < keys; j++) {
            memcpy(kb + j * HD, visible(a, s, j0 + j, g, 0), (size_t)HD * 4);
            memcpy(vb + j * HD, visible(a, s, j0 + j, g, 1), (size_t)HD * 4);
        }
        memset(dk, 0, (size_t)2 * ATT_KEYS * HD * 4);
        /* causal: queries before the block's first own key see none of it */
        const int first =
            j0 <= before || s->context > j0 - before ? 0 : (j0 - before) / ATT_ROWS * ATT_ROWS;
        for (int h = 0; h < group; h++) {
            const int head = g * group + h;
            for (int t0 = first; t0 < s->count; t0 += ATT_ROWS) {
                const int rows = s->count - t0 < ATT_ROWS ? s->count - t0 : ATT_ROWS;
                const float *q = a->qkv + (size_t)(s->begin + t0) * width + (size_t)head * HD;
                const float *dout = a->dout + ((size_t)(s->begin + t0) * NH + head) * HD;
                const size_t ldo = (size_t)NH * HD;
                int own[ATT_ROWS];
                dot_block(p, ATT_KEYS, q, width, rows, (const char *)kb, (size_t)HD * 4, GLM_F32,
                          keys, HD, 0);
                dot_block(dp, ATT_KEYS, dout, ldo, rows, (const char *)vb, (size_t)HD * 4, GLM_F32,
                          keys, HD, 0);
                for (int r = 0; r < rows; r++) {
                    const size_t at = (size_t)(s->begin + t0 + r) * NH + head;
                    const float D = dot_row(dout + r * ldo, a->out + at * HD, HD), lse = a->lse[at];
                    int n = last_visible(s, t0 + r) - j0;
                    n = n < 0 ? 0 : n < keys ? n : keys;
                    own[r] = n;
                    for (int j = 0; j < keys; j += VL) {
                        const int part = keys - j < VL ? keys - j : VL;
                        const vf e = exp_vector(
                            load_part(p + r * ATT_KEYS + j, part) * splat(scale) - splat(lse));
                        const vf d =
                            e * (load_part(dp + r * ATT_KEYS + j, part) - splat(D)) * splat(scale);
                        store_part(p + r * ATT_KEYS + j, e, part);
                        store_part(dp + r * ATT_KEYS + j, d, part);
                    }
                    for (int j = n; j < ATT_KEYS; j++)
                        p[r * ATT_KEYS + j] = dp[r * ATT_KEYS + j] = 0;
                }
                add_weighted(a->dqkv + (size_t)(s->begin + t0) * width + (size_t)head * HD, width,
                             dp, kb, rows, keys, HD, own);
                add_transposed(dk, dp, q, width, rows, keys, HD);
                add_transposed(dv, p, dout, ldo, rows, keys, HD);
            }
        }
        for (int j = 0; j < keys; j++) {
            const int row = j0 + j;
            float *to_k, *to_v;
            if (row >= before) {
                to_k = a->dqkv + (size_t)(s->begin + row - before) * width + (size_t)(NH + g) * HD;
                to_v = to_k + KV;
                memcpy(to_k, dk + j * HD, (size_t)HD * 4);
                memcpy(to_v, dv + j * HD, (size_t)HD * 4);
            } else if (row < s->shared_count && a->dcache.k) {
                to_k = (float *)a->dcache.k + (size_t)(s->shared_begin + row) * KV + (size_t)g * HD;
                to_v = (float *)a->dcache.v + (size_t)(s->shared_begin + row) * KV + (size_t)g * HD;
                for (int d = 0; d < HD; d++) {
                    to_k[d] += dk[j * HD + d];
                    to_v[d] += dv[j * HD + d];
                }
            }
        }
    }
}

static void attention_backward_task(const void *arg, int task, char *scratch)
{
    const struct att_args *a = arg;
    if (!a->dcache.k) {
        attention_backward_segment(a, a->segments + task / a->heads.KVH, task % a->heads.KVH,
                                   scratch);
        return;
    }
    for (int i = 0; i < a->n_segments; i++)
        attention_backward_segment(a, a->segments + i, task, scratch);
}

/* ---- activations, dropout */

static void swiglu_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int F = a->C;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *gate = (const float *)a->a + (size_t)n * 2 * F, *up = gate + F;
        float *out = (float *)a->out + (size_t)n * F;
        for (int i = 0; i < F; i += VL) {
            const int part = F - i < VL ? F - i : VL;
            const vf g = part == VL ? load(gate + i) : load_part(gate + i, part);
            const vf u = part == VL ? load(up + i) : load_part(up + i, part);
            const vf y = g * sigmoid(g) * u;
            if (part == VL)
                store(out + i, y);
            else
                store_part(out + i, y, part);
        }
    }
}

/* out = dinp (may be the input), a = dout, b = inp */
static void swiglu_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int F = a->C;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *dout = (const float *)a->a + (size_t)n * F,
                    *gate = (const float *)a->b + (size_t)n * 2 * F;
        float *dgate = (float *)a->out + (size_t)n * 2 * F;
        for (int i = 0; i < F; i += VL) {
            const int part = F - i < VL ? F - i : VL;
            const vf g = load_part(gate + i, part), u = load_part(gate + F + i, part),
                     d = load_part(dout + i, part);
            const vf y = sigmoid(g), silu = g * y;
            store_part(dgate + i, d * u * (y + silu * (splat(1.0f) - y)), part);
            store_part(dgate + F + i, d * silu, part);
        }
    }
}

INLINE void dropout_rows(const struct row_args *a, int task, int backward)
{
    const struct glm_dropout *drop = a->dropout;
    const uint64_t threshold = (uint64_t)(drop->p * 4294967296.0);
    const float keep = (float)(1.0 / (1.0 - drop->p));
    const int C = a->C;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *inp = (const float *)a->a + (size_t)n * C;
        float *out = (float *)a->out + (size_t)n * C;
        for (int i = 0; i < C; i += 4) {
            uint32_t word[4] = {(uint32_t)i / 4, (uint32_t)drop->position[n],
                                (uint32_t)drop->stream[n], drop->site};
            glm_philox(word, (uint32_t)drop->seed, (uint32_t)(drop->seed >> 32) ^ drop->step);
            for (int j = 0; j < 4 && i + j < C; j++) {
                const float y = word[j] < threshold ? 0.0f : inp[i + j] * keep;
                out[i + j] = backward ? out[i + j] + y : y;
            }
        }
    }
}

static void dropout_forward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 0);
}

static void dropout_backward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 1);
}

static void tanh_forward_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        ((float *)f->p[0])[i] = tanhf(((const float *)f->q[0])[i]);
}

static void tanh_backward_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *dout = f->q[0], *out = f->q[1];
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        ((float *)f->p[0])[i] = dout[i] * (1.0f - out[i] * out[i]);
}

/* ---- loss, optimiser, sums */

/* out = loss, extra = lse, a = logits, index = target; a task is `rows` rows */
static void cross_entropy_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int V = a->C;
    (void)scratch;
    for (int m = task * a->rows; m < a->N && m < (task + 1) * a->rows; m++) {
        const float *x = (const float *)a->a + (size_t)m * V;
        float top = x[0];
        for (int i = 1; i < V; i++)
            top = x[i] > top || x[i] != x[i] ? x[i] : top;
        double sum = 0;
        for (int i0 = 0; i0 < V; i0 += 64 * VL) { /* short float sums, then double */
            vf s = {0};
            const int end = V - i0 < 64 * VL ? V : i0 + 64 * VL;
            int i = i0;
            for (; i + VL <= end; i += VL)
                s += exp_vector(load(x + i) - splat(top));
            sum += lane_sum(s);
            for (; i < end; i++)
                sum += expf(x[i] - top);
        }
        const float lse = (float)((double)top + log(sum));
        ((float *)a->extra)[m] = lse;
        ((float *)a->out)[m] = (float)((double)top + log(sum) - x[a->index[m]]);
    }
}

/* out = logits, a = lse, index = target, eps = scale */
static void cross_entropy_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int V = a->C;
    const float scale = (float)a->eps;
    (void)scratch;
    for (int m = task * a->rows; m < a->N && m < (task + 1) * a->rows; m++) {
        float *x = (float *)a->out + (size_t)m * V;
        const float lse = ((const float *)a->a)[m];
        for (int i = 0; i < V; i += VL) {
            const int part = V - i < VL ? V - i : VL;
            const vf p =
                splat(scale) *
                exp_vector((part == VL ? load(x + i) : load_part(x + i, part)) - splat(lse));
            if (part == VL)
                store(x + i, p);
            else
                store_part(x + i, p, part);
        }
        x[a->index[m]] -= scale;
    }
}

static void add_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *x = f->q[0], *y = f->q[1];
    float *out = f->p[0];
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        out[i] = x[i] + y[i];
}

/* p[0][task] = sum of squares of piece `task` */
static void sum_squares_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *x = f->q[0];
    const size_t begin = (size_t)task * PIECE, end = begin + PIECE < f->n ? begin + PIECE : f->n;
    double s[8] = {0};
    (void)scratch;
    for (size_t i = begin; i < end; i++)
        s[(i - begin) % 8] += (double)x[i] * x[i];
    ((double *)f->p[0])[task] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* p: value, m, v; q[0]: gradient; k: lr, b1, b2, eps, lr * wd, 1 / (1 - b1^t), 1 / (1 - b2^t),
 * gscale */
static void adamw_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    float *p = f->p[0], *m = f->p[1], *v = f->p[2];
    const float *grad = f->q[0];
    const float lr = (float)f->k[0], b1 = (float)f->k[1], b2 = (float)f->k[2], eps = (float)f->k[3];
    const float decay = (float)f->k[4], c1 = (float)f->k[5], c2 = (float)f->k[6],
                gscale = (float)f->k[7];
    const float a1 = (float)(1 - f->k[1]), a2 = (float)(1 - f->k[2]);
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++) {
        const float g = grad[i] * gscale;
        m[i] = b1 * m[i] + a1 * g;
        v[i] = b2 * v[i] + a2 * g * g;
        const float x = p[i] - decay * p[i];
        p[i] = x - lr * (m[i] * c1) / (sqrtf(v[i] * c2) + eps);
    }
}

/* out[task] = first non-finite row of its run of rows, or -1 */
static void nonfinite_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    (void)scratch;
    ((int *)a->out)[task] = -1;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const uint32_t *x = (const uint32_t *)a->a + (size_t)n * a->C;
        uint32_t bad = 0;
        for (int i = 0; i < a->C; i++)
            bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
        if (bad) {
            ((int *)a->out)[task] = n;
            return;
        }
    }
}

#define TABLE2(name) glm_cpu_kernels_##name
#define TABLE(name) TABLE2(name)
#define STRING2(name) #name
#define STRING(name) STRING2(name)

const struct glm_cpu_kernels TABLE(NAME) = {
    .name = STRING(NAME),
    .nt = nt_task,
    .gemm = gemm_task,
    .rmsnorm_forward = rmsnorm_forward_task,
    .rmsnorm_backward = rmsnorm_backward_task,
    .rmsnorm_dweight = rmsnorm_dweight_task,
    .rope = rope_task,
    .attention_forward = attention_forward_task,
    .attention_backward = attention_backward_task,
    .swiglu_forward = swiglu_forward_task,
    .swiglu_backward = swiglu_backward_task,
    .dropout_forward = dropout_forward_task,
    .dropout_backward = dropout_backward_task,
    .cross_entropy_forward = cross_entropy_forward_task,
    .cross_entropy_backward = cross_entropy_backward_task,
    .add = add_task,
    .sum_squares = sum_squares_task,
    .adamw = adamw_task,
    .tanh_forward = tanh_forward_task,
    .tanh_backward = tanh_backward_task,
    .convert = convert_task,
    .merge = merge_task,
    .nonfinite = nonfinite_task,
    .quantize = quantize_task,
    .load_row = load_row,
};
