/* Stored number types into one another: conversion, merging an adapter, quantisation. */

struct convert_args {
    struct elements elements;
    void *out;
    const void *inp;
    enum glm_dtype to, from;
};

static void convert_task(const void *arg, int task, char *scratch)
{
    const struct convert_args *a = arg;
    const size_t begin = first_element(a->elements, task), end = end_element(a->elements, task);
    (void)scratch;
    if (a->from == GLM_F64 && a->to == GLM_F64) {
        memcpy((double *)a->out + begin, (const double *)a->inp + begin, (end - begin) * 8);
        return;
    }
    if (a->from == a->to) { /* bits stay, NaN payloads included */
        const size_t size = glm_bytes(a->from, 1);
        memcpy((char *)a->out + begin * size, (const char *)a->inp + begin * size,
               (end - begin) * size);
        return;
    }
    if (a->from == GLM_F32 && a->to == GLM_BF16) {
        const float *from = a->inp;
        uint16_t *to = a->out;
        for (size_t i = begin; i < end; i++)
            to[i] = float_to_bfloat(from[i]);
        return;
    }
    size_t i = begin;
    if (a->to == GLM_F32 && a->from != GLM_F64)
        for (; i + VL <= end; i += VL)
            store((float *)a->out + i, load_as(a->inp, a->from, i));
    for (; i < end; i++) {
        if (a->from == GLM_F64 && a->to != GLM_F32) {
            /* one rounding: to odd float first, then to 16 bits */
            const double d = ((const double *)a->inp)[i];
            float x = (float)d;
            uint32_t bits;
            if (x == x && (double)x != d && isfinite(x)) {
                memcpy(&bits, &x, 4);
                if (fabs((double)x) > fabs(d))
                    bits--; /* toward zero */
                bits |= 1;
                memcpy(&x, &bits, 4);
            }
            ((uint16_t *)a->out)[i] = a->to == GLM_F16 ? float_to_half(x) : float_to_bfloat(x);
            continue;
        }
        const float x = load_one(a->inp, a->from, i);
        if (a->to == GLM_F32)
            ((float *)a->out)[i] = x;
        else if (a->to == GLM_F16)
            ((uint16_t *)a->out)[i] = float_to_half(x);
        else if (a->to == GLM_BF16)
            ((uint16_t *)a->out)[i] = float_to_bfloat(x);
        else
            ((double *)a->out)[i] = x;
    }
}

static void convert(void *cx, void *out, enum glm_dtype out_dtype, const void *inp,
                    enum glm_dtype inp_dtype, size_t n)
{
    const struct convert_args a = {elements_of(n), out, inp, out_dtype, inp_dtype};
    run_elements(cx, convert_task, &a, a.elements);
}

struct merge_args {
    struct rows rows;
    void *data;
    enum glm_dtype dtype;
    const float *B, *A, *magnitude, *rnorm;
    int I, R;
    float scale;
};

static void merge_task(const void *arg, int task, char *scratch)
{
    const struct merge_args *m = arg;
    float *row = (float *)scratch;
    enum { WIDTH = 4096 };
    const size_t size = glm_bytes(m->dtype, 1);
    for (int o = first_row(m->rows, task); o < end_row(m->rows, task); o++) {
        const float factor = m->magnitude ? m->magnitude[o] * m->rnorm[o] : 1;
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
                const float x = factor * (load_one(at, m->dtype, i) + m->scale * row[i]);
                if (m->dtype == GLM_F32)
                    ((float *)at)[i] = x;
                else if (m->dtype == GLM_F64)
                    ((double *)at)[i] = factor * (((double *)at)[i] + (double)m->scale * row[i]);
                else
                    ((uint16_t *)at)[i] =
                        m->dtype == GLM_F16 ? float_to_half(x) : float_to_bfloat(x);
            }
        }
    }
}

static void merge(void *cx, void *data, enum glm_dtype dtype, const void *B, const void *A,
                  const void *magnitude, const void *rnorm, int O, int I, int R, double scale)
{
    struct cpu *cpu = cx;
    const struct merge_args a = {.rows = rows_of(O, (size_t)I * R),
                                 .data = data,
                                 .dtype = dtype,
                                 .B = B,
                                 .A = A,
                                 .magnitude = magnitude,
                                 .rnorm = rnorm,
                                 .I = I,
                                 .R = R,
                                 .scale = (float)scale};
    glm_pool_run(cpu->pool, ceil_div((size_t)O, (size_t)a.rows.each),
                 products_ns((size_t)O * I * R), merge_task, &a);
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

struct quantize_args {
    struct rows rows;
    uint8_t *data;
    uint16_t *scale;
    const void *inp;
    enum glm_dtype dtype, inp_dtype;
    int group, cols;
};

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
    return select_lanes(q < low, low, select_lanes(q > high, high, q));
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
    for (int r = first_row(a->rows, task); r < end_row(a->rows, task); r++)
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

static void quantize(void *cx, void *data, uint16_t *scale, enum glm_dtype dtype, int group,
                     const void *inp, enum glm_dtype inp_dtype, int rows, int cols)
{
    const struct quantize_args a = {.rows = rows_of(rows, (size_t)cols * 8),
                                    .data = data,
                                    .scale = scale,
                                    .inp = inp,
                                    .dtype = dtype,
                                    .inp_dtype = inp_dtype,
                                    .group = group,
                                    .cols = cols};
    run_rows(cx, quantize_task, &a, a.rows);
}
