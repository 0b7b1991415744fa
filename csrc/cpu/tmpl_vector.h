/* Vectors of VL floats (GCC vector extensions), the stored number types as such vectors, and the
 * elementary functions: what every kernel is written in. */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float vf __attribute__((vector_size(4 * VL), aligned(4)));
typedef float v_any __attribute__((vector_size(4 * VL), aligned(1))); /* as bytes lie in a file */
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4)));
typedef uint64_t vw __attribute__((vector_size(4 * VL), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

/* Vector registers, which tiles are cut for. */
#ifndef REGISTERS
#define REGISTERS (VL == 16 ? 32 : 16)
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }
INLINE vf load_bytes(const char *p) { return *(const v_any *)p; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* a * b + c. Whether it is rounded once is the instruction set's, never the compiler's choice,
 * which may differ from one place to the next: it is compiled without contraction. */
#ifndef MADD
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

/* Lane by lane: a where mask is set, else b. */
INLINE vf select_lanes(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* The larger and the smaller; b where either is NaN. */
#ifndef VMAX
#define VMAX(a, b) select_lanes((a) > (b), a, b)
#define VMIN(a, b) select_lanes((a) < (b), a, b)
#endif

/* The lower halves of 64-bit lanes times m. */
#ifndef MULTIPLY_EVEN
#define MULTIPLY_EVEN(x, m) (((x) & 0xffffffffu) * (uint64_t)(m))
#endif

/* The first n floats at p, then zeros; and back. Without them: copies through memory. */
#ifndef LOAD_PART
INLINE vf load_part(const float *p, int n)
{
    vf v = {0};
    memcpy(&v, p, (size_t)n * 4);
    return v;
}

INLINE void store_part(float *p, vf v, int n) { memcpy(p, &v, (size_t)n * 4); }
#else
INLINE vf load_part(const float *p, int n) { return LOAD_PART(p, n); }
INLINE void store_part(float *p, vf v, int n) { STORE_PART(p, v, n); }
#endif

/* So many bytes, fewer than four vectors; zeros follow up to those. */
#ifndef COPY_PART
INLINE void copy_part(char *to, const char *from, size_t bytes)
{
    memset(to, 0, 16 * VL);
    memcpy(to, from, bytes);
}
#define COPY_PART copy_part
#endif

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

/* Transposes VL vectors of VL lanes: each stage shuffles the vectors like cards. */
INLINE void transpose(vf *x)
{
    vf y[VL];
    for (int half = VL / 2; half; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            y[2 * i] = LOW(x[i], x[i + VL / 2]);
            y[2 * i + 1] = HIGH(x[i], x[i + VL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            x[i] = y[i];
    }
}

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

static void add_row(float *to, const float *from, int n)
{
    for (int i = 0; i < n; i++)
        to[i] += from[i];
}

/* ---- elementary functions */

/* 2^n for an integer -126 <= n <= 127 that was rounded by adding 1.5 * 2^23 */
INLINE vf power_of_two(vf shifted) { return (vf)(((vi)shifted << 23) + (vi)splat(1.0f)); }

/* e^x, at most 2 ulp off where it is a normal number below 2.4e38 (tests/test_ops.py); it stays
 * between 1.2e-38 and 2.4e38, NaN stays NaN. x = n ln 2 + r, |r| <= ln 2 / 2, e^r by its series */
INLINE vf exp_vector(vf x)
{
    const vf shifter = splat(12582912.0f);
    x = VMIN(splat(88.37f), x);
    x = VMAX(splat(-87.33654f), x);
    const vf shifted = MADD(x, splat(1.44269504f), shifter), n = shifted - shifter;
    vf r = MADD(n, splat(-0.693359375f), x);
    r = MADD(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = MADD(p, r, splat(1.3981999507e-3f));
    p = MADD(p, r, splat(8.3334519073e-3f));
    p = MADD(p, r, splat(4.1665795894e-2f));
    p = MADD(p, r, splat(1.6666665459e-1f));
    p = MADD(p, r, splat(5.0000001201e-1f));
    p = MADD(p * r, r, r) + splat(1.0f);
    return p * power_of_two(shifted);
}

/* 2^x by the same rules: the softmax of attention, whose scores are scaled by log2 e */
INLINE vf exp2_vector(vf x)
{
    const vf shifter = splat(12582912.0f);
    x = VMIN(splat(127.0f), x);
    x = VMAX(splat(-126.0f), x);
    const vf shifted = x + shifter, r = x - (shifted - shifter);
    vf p = splat(1.535336188319500e-4f);
    p = MADD(p, r, splat(1.339887440266574e-3f));
    p = MADD(p, r, splat(9.618437357674640e-3f));
    p = MADD(p, r, splat(5.550332471162809e-2f));
    p = MADD(p, r, splat(2.402264791363012e-1f));
    p = MADD(p, r, splat(6.931472028550421e-1f));
    p = MADD(p, r, splat(1.0f));
    return p * power_of_two(shifted);
}

/* x * sigmoid(x) is at most 4 ulp off */
INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp_vector(-x)); }

INLINE float sum_row(const float *a, int n)
{
    vf s = {0};
    int i = 0;
    for (; i + VL <= n; i += VL)
        s += load(a + i);
    if (i < n)
        s += load_part(a + i, n - i);
    return lane_sum(s);
}

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
