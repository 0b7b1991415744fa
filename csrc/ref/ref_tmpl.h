/* The definition of every op of struct glm_ops in plain loops: documentation, and the oracle of the
 * tests. ref_f32.c and ref_f64.c include it with REAL = float and double. All arithmetic is in
 * double, only what is stored is REAL: the float reference is right to one rounding. Shapes and
 * formulas stand in ops.h. */
#include "backend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef REAL real;

/* ---- context ---- */

struct context {
    int (*poll)(void *arg);
    void *arg;
    int stopped;
};

/* Every op asks once, before it starts: 1 when its work is to be skipped. */
static int stop(void *cx)
{
    struct context *context = cx;
    if (!context->stopped && context->poll)
        context->stopped = context->poll(context->arg) != 0;
    return context->stopped;
}

/* ---- stored number types ---- */

/* A 16-bit float: 1 sign bit, then the exponent, stored plus `bias`, then `mantissa` bits. */
struct format {
    int mantissa, bias;
};
static const struct format half = {10, 15}, bfloat16 = {7, 127};

static double decode(uint16_t bits, struct format f)
{
    int fraction = bits & ((1 << f.mantissa) - 1), exponent = (bits & 0x7fff) >> f.mantissa;
    double x;
    if (exponent == 2 * f.bias + 1)
        x = fraction ? NAN : INFINITY;
    else if (exponent == 0) /* subnormal */
        x = ldexp(fraction, 1 - f.bias - f.mantissa);
    else
        x = ldexp((1 << f.mantissa) + fraction, exponent - f.bias - f.mantissa);
    return bits & 0x8000 ? -x : x;
}

/* Rounds to nearest even. With x = q * 2^(exponent - mantissa), q an integer that holds the leading
 * bit unless x is subnormal, the bits are simply the sum below: a q that rounds up to the next
 * power of two carries into the exponent, and from the largest number into infinity. */
static uint16_t encode(double x, struct format f)
{
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    int infinity = (2 * f.bias + 1) << f.mantissa, smallest = 1 - f.bias, exponent;
    if (isnan(x))
        return sign | (uint16_t)infinity | (uint16_t)(1 << (f.mantissa - 1));
    if (isinf(x))
        return sign | (uint16_t)infinity;
    if (x == 0)
        return sign;
    frexp(x, &exponent); /* |x| = [1/2, 1) * 2^exponent */
    exponent = exponent - 1 > smallest ? exponent - 1 : smallest;
    int q = (int)rint(ldexp(fabs(x), f.mantissa - exponent)); /* rounds to nearest even */
    int bits = ((exponent - smallest) << f.mantissa) + q;
    return sign | (uint16_t)(bits < infinity ? bits : infinity);
}

static double load_as(const void *data, enum glm_dtype dtype, size_t i)
{
    switch (dtype) {
    case GLM_F16:
        return decode(((const uint16_t *)data)[i], half);
    case GLM_BF16:
        return decode(((const uint16_t *)data)[i], bfloat16);
    case GLM_F64:
        return ((const double *)data)[i];
    case GLM_I8:
        return ((const int8_t *)data)[i];
    case GLM_I4: { /* two's complement: 8 .. 15 mean -8 .. -1 */
        int nibble = ((const uint8_t *)data)[i / 2] >> (i % 2 ? 0 : 4) & 15;
        return nibble < 8 ? nibble : nibble - 16;
    }
    default:
        return ((const float *)data)[i];
    }
}

static void store_as(void *data, enum glm_dtype dtype, size_t i, double x)
{
    switch (dtype) {
    case GLM_F16:
        ((uint16_t *)data)[i] = encode(x, half);
        break;
    case GLM_BF16:
        ((uint16_t *)data)[i] = encode(x, bfloat16);
        break;
    case GLM_F64:
        ((double *)data)[i] = x;
        break;
    default:
        ((float *)data)[i] = (float)x;
    }
}

static double load(const struct glm_mat *mat, size_t i)
{
    double x = load_as(mat->data, mat->dtype, i);
    if (!mat->scale)
        return x;
    size_t row = i / (size_t)mat->cols, col = i % (size_t)mat->cols;
    return x * decode(mat->scale[mat->group ? row * glm_scale_cols(mat) + col / mat->group : row],
                      half);
}

static double to_half(double x) { return decode(encode(x, half), half); }

static void store_integer(void *data, enum glm_dtype dtype, size_t i, double q)
{
    uint8_t *byte = (uint8_t *)data + (dtype == GLM_I8 ? i : i / 2);
    if (dtype == GLM_I8)
        *byte = (uint8_t)(int8_t)q;
    else
        *byte =
            (uint8_t)(i % 2 ? (*byte & 0xf0) | ((int)q & 15) : (*byte & 15) | ((int)q & 15) << 4);
}

/* The integer of x at a scale, low to high; THUDM's (group 0) rounds to float16 before. */
static double integer(double x, double scale, int group, double low, double high)
{
    if (scale == 0 || !isfinite(scale))
        return 0;
    double q = rint(group ? x / scale : to_half(x / scale));
    return fmin(high, fmax(low, q));
}

/* The scale of a group: see glm_ops.quantize */
static double best_scale(const double *w, int n)
{
    double top = 0, best = 0, most = 0;
    for (int i = 0; i < n; i++)
        top = fabs(w[i]) > fabs(top) ? w[i] : top;
    for (int j = -9; top != 0 && j <= 9; j++) {
        double wq = 0, qq = 0;
        for (int i = 0; i < n; i++) {
            double q = integer(w[i], -top / (8 + 0.1 * j), 1, -8, 7);
            wq += w[i] * q;
            qq += q * q;
        }
        if (wq * wq / qq > most) { /* the squared error is sum(w^2) less this */
            most = wq * wq / qq;
            best = wq / qq;
        }
    }
    return to_half(best);
}

static void quantize(void *cx, void *data, uint16_t *scales, enum glm_dtype dtype, int group,
                     const void *inp, enum glm_dtype inp_dtype, int rows, int cols)
{
    const double high = dtype == GLM_I8 ? 127 : 7, low = group ? -8 : -high;
    const int width = group ? group : cols, per_row = (cols + width - 1) / width;
    double *w = malloc((size_t)width * sizeof *w);
    if (stop(cx) || !w)
        rows = 0;
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < per_row; g++) {
            int n = cols - g * width < width ? cols - g * width : width, finite = 1;
            size_t at = (size_t)r * cols + (size_t)g * width;
            double top = 0;
            for (int i = 0; i < n; i++) {
                w[i] = load_as(inp, inp_dtype, at + i);
                if (!group)
                    w[i] = to_half(w[i]);
                finite = finite && isfinite(w[i]);
                top = fmax(top, fabs(w[i]));
            }
            double scale = INFINITY;
            if (finite)
                scale = group ? best_scale(w, n) : to_half(top / high);
            scales[(size_t)r * per_row + g] = encode(scale, half);
            for (int i = 0; i < n; i++)
                store_integer(data, dtype, at + i, integer(w[i], scale, group, low, high));
        }
    free(w);
}

static void convert(void *cx, void *out, enum glm_dtype out_dtype, const void *inp,
                    enum glm_dtype inp_dtype, size_t n)
{
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        store_as(out, out_dtype, i, load_as(inp, inp_dtype, i));
}

static void merge(void *cx, void *data, enum glm_dtype dtype, const void *B, const void *A,
                  const void *magnitude_, const void *rnorm_, int O, int I, int R, double scale)
{
    const real *b = B, *a = A, *magnitude = magnitude_, *rnorm = rnorm_;
    if (stop(cx))
        return;
    for (int o = 0; o < O; o++)
        for (int i = 0; i < I; i++) {
            size_t at = (size_t)o * I + i;
            double sum = 0;
            for (int r = 0; r < R; r++)
                sum += (double)b[(size_t)o * R + r] * a[(size_t)r * I + i];
            double merged = load_as(data, dtype, at) + scale * sum;
            store_as(data, dtype, at, magnitude ? merged * magnitude[o] * rnorm[o] : merged);
        }
}

/* ---- rows in and out: embedding, gather ---- */

static void embedding_forward(void *cx, void *out_, const struct glm_mat *weight,
                              const int32_t *ids, int N)
{
    real *out = out_;
    int C = weight->cols;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++)
            out[(size_t)n * C + c] = (real)load(weight, (size_t)ids[n] * C + c);
}

static void embedding_backward(void *cx, void *dweight_, const void *dout_, const int32_t *ids,
                               int N, int C)
{
    real *dweight = dweight_;
    const real *dout = dout_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++)
            dweight[(size_t)ids[n] * C + c] += dout[(size_t)n * C + c];
}

static void gather_forward(void *cx, void *out_, const void *inp_, const int32_t *rows, int M,
                           int C)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++)
            out[(size_t)m * C + c] = inp[(size_t)rows[m] * C + c];
}

static void gather_backward(void *cx, void *dinp_, const void *dout_, const int32_t *rows, int M,
                            int C)
{
    real *dinp = dinp_;
    const real *dout = dout_;
    if (stop(cx))
        return;
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++)
            dinp[(size_t)rows[m] * C + c] += dout[(size_t)m * C + c];
}

/* ---- rmsnorm ---- */

static void rmsnorm_forward(void *cx, void *out_, void *rstd_, const void *inp_,
                            const void *weight_, int N, int C, double eps)
{
    real *out = out_, *rstd = rstd_;
    const real *inp = inp_, *weight = weight_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++, inp += C, out += C) {
        double squares = 0;
        for (int c = 0; c < C; c++)
            squares += (double)inp[c] * inp[c];
        double r = 1 / sqrt(squares / C + eps);
        rstd[n] = (real)r;
        for (int c = 0; c < C; c++)
            out[c] = (real)(inp[c] * r * weight[c]);
    }
}

static void add_rmsnorm_forward(void *cx, void *out, void *rstd, void *sum, const void *a,
                                const void *b, const void *weight, int N, int C, double eps)
{
    if (stop(cx))
        return;
    for (size_t i = 0; i < (size_t)N * C; i++)
        ((real *)sum)[i] = ((const real *)a)[i] + ((const real *)b)[i];
    rmsnorm_forward(cx, out, rstd, sum, weight, N, C, eps);
}

static void rmsnorm_backward(void *cx, void *dinp_, void *dweight_, const void *dout_,
                             const void *inp_, const void *weight_, const void *rstd_, int N, int C)
{
    real *dinp = dinp_, *dweight = dweight_;
    const real *dout = dout_, *inp = inp_, *weight = weight_, *rstd = rstd_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        double r = rstd[n], mean = 0;
        for (int c = 0; c < C; c++)
            mean += (double)dout[row + c] * weight[c] * inp[row + c] / C;
        for (int c = 0; c < C; c++) {
            double g = (double)dout[row + c] * weight[c];
            dinp[row + c] = (real)(dinp[row + c] + r * g - inp[row + c] * r * r * r * mean);
        }
    }
    for (int c = 0; dweight && c < C; c++) {
        double sum = 0;
        for (int n = 0; n < N; n++)
            sum += (double)dout[(size_t)n * C + c] * inp[(size_t)n * C + c] * rstd[n];
        dweight[c] = (real)(dweight[c] + sum);
    }
}

/* ---- layernorm ---- */

static void layernorm_forward(void *cx, void *out_, void *mean_, void *rstd_, const void *inp_,
                              const void *weight_, const void *bias_, int N, int C, double eps)
{
    real *out = out_, *mean = mean_, *rstd = rstd_;
    const real *inp = inp_, *weight = weight_, *bias = bias_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++, inp += C, out += C) {
        double sum = 0, squares = 0;
        for (int c = 0; c < C; c++)
            sum += inp[c];
        double m = sum / C;
        for (int c = 0; c < C; c++)
            squares += (inp[c] - m) * (inp[c] - m);
        double r = 1 / sqrt(squares / C + eps);
        mean[n] = (real)m;
        rstd[n] = (real)r;
        for (int c = 0; c < C; c++)
            out[c] = (real)((inp[c] - m) * r * weight[c] + bias[c]);
    }
}

static void layernorm_backward(void *cx, void *dinp_, void *dweight_, void *dbias_,
                               const void *dout_, const void *inp_, const void *weight_,
                               const void *mean_, const void *rstd_, int N, int C)
{
    real *dinp = dinp_, *dweight = dweight_, *dbias = dbias_;
    const real *dout = dout_, *inp = inp_, *weight = weight_, *mean = mean_, *rstd = rstd_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        double m = mean[n], r = rstd[n], along_1 = 0, along_xhat = 0;
        for (int c = 0; c < C; c++) {
            double g = (double)dout[row + c] * weight[c];
            along_1 += g / C;
            along_xhat += g * (inp[row + c] - m) * r / C;
        }
        for (int c = 0; c < C; c++) {
            double g = (double)dout[row + c] * weight[c], xhat = (inp[row + c] - m) * r;
            dinp[row + c] = (real)(dinp[row + c] + r * (g - along_1 - xhat * along_xhat));
        }
    }
    for (int c = 0; c < C; c++) {
        double sum = 0, sum_xhat = 0;
        for (int n = 0; n < N; n++) {
            double dy = dout[(size_t)n * C + c];
            sum += dy;
            sum_xhat += dy * ((double)inp[(size_t)n * C + c] - mean[n]) * rstd[n];
        }
        if (dweight)
            dweight[c] = (real)(dweight[c] + sum_xhat);
        if (dbias)
            dbias[c] = (real)(dbias[c] + sum);
    }
}

/* ---- linear ---- */

static void linear_forward(void *cx, void *out_, const void *inp_, const struct glm_mat *weight,
                           const void *bias_, int N, double scale, int accumulate)
{
    real *out = out_;
    const real *inp = inp_, *bias = bias_;
    int O = weight->rows, I = weight->cols;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++) {
            real *y = out + (size_t)n * O + o;
            double sum = 0;
            for (int i = 0; i < I; i++)
                sum += inp[(size_t)n * I + i] * load(weight, (size_t)o * I + i);
            *y = (real)(scale * sum + (bias ? bias[o] : 0) + (accumulate ? *y : 0));
        }
}

static void adapted_forward(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                            const void *bias, const void *xa, const struct glm_mat *B, int N,
                            double scale)
{
    linear_forward(cx, out, inp, weight, bias, N, 1, 0);
    linear_forward(cx, out, xa, B, NULL, N, scale, 1);
}

static void linear_backward_input(void *cx, void *dinp_, const void *dout_,
                                  const struct glm_mat *weight, int N, double scale, int accumulate)
{
    real *dinp = dinp_;
    const real *dout = dout_;
    int O = weight->rows, I = weight->cols;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int i = 0; i < I; i++) {
            real *dx = dinp + (size_t)n * I + i;
            double sum = 0;
            for (int o = 0; o < O; o++)
                sum += dout[(size_t)n * O + o] * load(weight, (size_t)o * I + i);
            *dx = (real)(scale * sum + (accumulate ? *dx : 0));
        }
}

static void linear_backward_weight(void *cx, void *dweight_, void *dbias_, const void *dout_,
                                   const void *inp_, int N, int O, int I, double scale)
{
    real *dweight = dweight_, *dbias = dbias_;
    const real *dout = dout_, *inp = inp_;
    if (stop(cx))
        return;
    for (int o = 0; o < O; o++) {
        for (int i = 0; dweight && i < I; i++) {
            real *dw = dweight + (size_t)o * I + i;
            double sum = 0;
            for (int n = 0; n < N; n++)
                sum += (double)dout[(size_t)n * O + o] * inp[(size_t)n * I + i];
            *dw = (real)(*dw + scale * sum);
        }
        if (dbias) {
            double sum = 0;
            for (int n = 0; n < N; n++)
                sum += dout[(size_t)n * O + o];
            dbias[o] = (real)(dbias[o] + scale * sum);
        }
    }
}

/* ---- DoRA ---- */

static void dora_norm(void *cx, void *rnorm_, const struct glm_mat *weight, const void *B,
                      const void *A, int R, double scale)
{
    real *rnorm = rnorm_;
    const real *b = B, *a = A;
    const int O = weight->rows, I = weight->cols;
    if (stop(cx))
        return;
    for (int o = 0; o < O; o++) {
        double squares = 0;
        for (int i = 0; i < I; i++) {
            double sum = 0;
            for (int r = 0; r < R; r++)
                sum += (double)b[(size_t)o * R + r] * a[(size_t)r * I + i];
            const double x = load(weight, (size_t)o * I + i) + scale * sum;
            squares += x * x;
        }
        rnorm[o] = (real)(1 / sqrt(squares));
    }
}

static void dora_forward(void *cx, void *out_, const void *inp_, const void *magnitude_,
                         const void *rnorm_, const void *bias_, int N, int O)
{
    real *out = out_;
    const real *inp = inp_, *magnitude = magnitude_, *rnorm = rnorm_, *bias = bias_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++) {
            const size_t at = (size_t)n * O + o;
            out[at] = (real)((double)magnitude[o] * rnorm[o] * inp[at] + (bias ? bias[o] : 0));
        }
}

static void dora_backward(void *cx, void *dinp_, void *dmagnitude_, const void *dout_,
                          const void *inp_, const void *magnitude_, const void *rnorm_, int N,
                          int O)
{
    real *dinp = dinp_, *dmagnitude = dmagnitude_;
    const real *dout = dout_, *inp = inp_, *magnitude = magnitude_, *rnorm = rnorm_;
    if (stop(cx))
        return;
    for (int o = 0; dmagnitude && o < O; o++) {
        double sum = 0;
        for (int n = 0; n < N; n++)
            sum += (double)dout[(size_t)n * O + o] * inp[(size_t)n * O + o];
        dmagnitude[o] = (real)(dmagnitude[o] + rnorm[o] * sum);
    }
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++) {
            const size_t at = (size_t)n * O + o;
            dinp[at] = (real)((double)magnitude[o] * rnorm[o] * dout[at]);
        }
}

/* ---- rope ---- */

/* direction: 1 forward, -1 back */
static void rotate(real *x, const real *table, const int32_t *position, int N, int heads, int HD,
                   int stride, int rotary_dim, int direction)
{
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < rotary_dim / 2; j++) {
                const real *angle = table + ((size_t)position[n] * (rotary_dim / 2) + j) * 2;
                real *pair = x + (size_t)n * stride + (size_t)h * HD + 2 * j;
                double c = angle[0], s = direction * (double)angle[1], x0 = pair[0], x1 = pair[1];
                pair[0] = (real)(x0 * c - x1 * s);
                pair[1] = (real)(x1 * c + x0 * s);
            }
}

static void rope_forward(void *cx, void *x, const void *table, const int32_t *position, int N,
                         int heads, int HD, int stride, int rotary_dim)
{
    if (!stop(cx))
        rotate(x, table, position, N, heads, HD, stride, rotary_dim, 1);
}

static void rope_backward(void *cx, void *dx, const void *table, const int32_t *position, int N,
                          int heads, int HD, int stride, int rotary_dim)
{
    if (!stop(cx))
        rotate(dx, table, position, N, heads, HD, stride, rotary_dim, -1);
}

/* direction: 1 forward, -1 back */
static void rotate_2d(real *x, const real *table, const int32_t *position, const int32_t *block,
                      int N, int heads, int HD, int stride, int direction)
{
    const int quarter = HD / 4;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < 2 * heads; h++) /* halves of heads */
            for (int j = 0; j < quarter; j++) {
                size_t at = h % 2 ? block[n] : position[n];
                const real *angle = table + (at * quarter + j) * 2;
                real *half_head = x + (size_t)n * stride + (size_t)h * (HD / 2);
                double c = angle[0], s = direction * (double)angle[1];
                double x0 = half_head[j], x1 = half_head[quarter + j];
                half_head[j] = (real)(x0 * c - x1 * s);
                half_head[quarter + j] = (real)(x1 * c + x0 * s);
            }
}

static void rope_2d_forward(void *cx, void *x, const void *table, const int32_t *position,
                            const int32_t *block, int N, int heads, int HD, int stride)
{
    if (!stop(cx))
        rotate_2d(x, table, position, block, N, heads, HD, stride, 1);
}

static void rope_2d_backward(void *cx, void *dx, const void *table, const int32_t *position,
                             const int32_t *block, int N, int heads, int HD, int stride)
{
    if (!stop(cx))
        rotate_2d(dx, table, position, block, N, heads, HD, stride, -1);
}

/* ---- attention ---- */

static double dot(const real *a, const real *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* The keys of a segment are numbered shared rows first, then past rows, then its own tokens. Its
 * token t sees the keys below this number. */
static int keys_seen(const struct glm_segment *s, int t)
{
    int context = s->context < s->count ? s->context : s->count;
    return s->shared_count + s->past_count + (t < context ? context : t + 1);
}

/* Cache row of key j, or -1 when it is one of the segment's own tokens. */
static int cache_row(const struct glm_segment *s, int j)
{
    if (j < s->shared_count)
        return s->shared_begin + j;
    j -= s->shared_count;
    return j < s->past_count ? s->past_begin + j : -1;
}

/* Where head g of key j and its value lie: in the cache or in the token's qkv row. */
struct key_value {
    const real *k, *v;
};
static struct key_value key_value(const real *qkv, struct glm_kv cache, const struct glm_segment *s,
                                  struct glm_heads heads, int g, int j)
{
    size_t NH = heads.NH, KVH = heads.KVH, HD = heads.HD;
    int row = cache_row(s, j);
    if (row >= 0) {
        size_t at = (row * KVH + g) * HD;
        return (struct key_value){(const real *)cache.k + at, (const real *)cache.v + at};
    }
    size_t token = s->begin + (j - s->shared_count - s->past_count);
    const real *k = qkv + (token * (NH + 2 * KVH) + NH + g) * HD;
    return (struct key_value){k, k + KVH * HD};
}

static void attention_forward(void *cx, void *out_, void *lse_, const void *qkv_,
                              struct glm_kv cache, const struct glm_segment *segments,
                              int n_segments, struct glm_heads heads)
{
    real *out = out_, *lse = lse_;
    const real *qkv = qkv_;
    int NH = heads.NH, KVH = heads.KVH, HD = heads.HD;
    double scale = 1 / sqrt(HD), mix[HD];
    if (stop(cx))
        return;
    for (const struct glm_segment *s = segments; s < segments + n_segments; s++)
        for (int t = 0; t < s->count; t++)
            for (int h = 0; h < NH; h++) {
                size_t n = s->begin + t;
                const real *q = qkv + (n * (NH + 2 * KVH) + h) * HD;
                int g = h / (NH / KVH);
                double max = -INFINITY, sum = 0;
                for (int j = 0; j < keys_seen(s, t); j++)
                    max = fmax(max, scale * dot(q, key_value(qkv, cache, s, heads, g, j).k, HD));
                memset(mix, 0, sizeof mix);
                for (int j = 0; j < keys_seen(s, t); j++) {
                    struct key_value kv = key_value(qkv, cache, s, heads, g, j);
                    double e = exp(scale * dot(q, kv.k, HD) - max);
                    sum += e;
                    for (int i = 0; i < HD; i++)
                        mix[i] += e * kv.v[i];
                }
                for (int i = 0; i < HD; i++)
                    out[(n * NH + h) * HD + i] = (real)(mix[i] / sum);
                lse[n * NH + h] = (real)(max + log(sum));
            }
}

/* Probability that token t gives key k under query head h, and the gradient of its scaled score:
 *   p = exp(score - lse)    dscore = p * (dout . v - dout . out)
 * since d softmax = p * (dp - sum p dp), and the sum over keys of p (dout . v) is dout . out. */
struct score {
    double p, dscore;
};
static struct score score_backward(const real *dout, const real *out, const real *lse,
                                   const real *q, struct key_value kv, int HD)
{
    double p = exp(dot(q, kv.k, HD) / sqrt(HD) - *lse);
    return (struct score){p, p * (dot(dout, kv.v, HD) - dot(dout, out, HD))};
}

/* With s_tj the scores of token t:
 *   dq_t = sum_j ds_tj k_j / sqrt(HD)
 *   dk_j = sum_t ds_tj q_t / sqrt(HD)    dv_j = sum_t p_tj dout_t
 * t running over the tokens that see j, and over the query heads that read its key head. */
static void attention_backward(void *cx, void *dqkv_, struct glm_kv dcache, const void *dout_,
                               const void *out_, const void *lse_, const void *qkv_,
                               struct glm_kv cache, const struct glm_segment *segments,
                               int n_segments, struct glm_heads heads)
{
    real *dqkv = dqkv_;
    const real *dout = dout_, *out = out_, *lse = lse_, *qkv = qkv_;
    int NH = heads.NH, KVH = heads.KVH, HD = heads.HD;
    size_t width = (size_t)(NH + 2 * KVH) * HD;
    double scale = 1 / sqrt(HD), dq[HD], dk[HD], dv[HD];
    if (stop(cx))
        return;
    for (const struct glm_segment *s = segments; s < segments + n_segments; s++) {
        for (int t = 0; t < s->count; t++)
            for (int h = 0; h < NH; h++) {
                size_t n = s->begin + t, o = n * NH + h;
                const real *q = qkv + n * width + (size_t)h * HD;
                memset(dq, 0, sizeof dq);
                for (int j = 0; j < keys_seen(s, t); j++) {
                    struct key_value kv = key_value(qkv, cache, s, heads, h / (NH / KVH), j);
                    struct score a =
                        score_backward(dout + o * HD, out + o * HD, lse + o, q, kv, HD);
                    for (int i = 0; i < HD; i++)
                        dq[i] += scale * a.dscore * kv.k[i];
                }
                for (int i = 0; i < HD; i++)
                    dqkv[n * width + (size_t)h * HD + i] = (real)dq[i];
            }
        for (int j = 0; j < s->shared_count + s->past_count + s->count; j++)
            for (int g = 0; g < KVH; g++) {
                struct key_value kv = key_value(qkv, cache, s, heads, g, j);
                memset(dk, 0, sizeof dk);
                memset(dv, 0, sizeof dv);
                for (int t = 0; t < s->count; t++)
                    for (int h = g * (NH / KVH); h < (g + 1) * (NH / KVH); h++) {
                        size_t n = s->begin + t, o = n * NH + h;
                        const real *q = qkv + n * width + (size_t)h * HD;
                        if (j >= keys_seen(s, t))
                            continue;
                        struct score a =
                            score_backward(dout + o * HD, out + o * HD, lse + o, q, kv, HD);
                        for (int i = 0; i < HD; i++) {
                            dk[i] += scale * a.dscore * q[i];
                            dv[i] += a.p * dout[o * HD + i];
                        }
                    }
                int own = j - s->shared_count - s->past_count;
                if (own >= 0) {
                    real *to = dqkv + (size_t)(s->begin + own) * width + (size_t)(NH + g) * HD;
                    for (int i = 0; i < HD; i++) {
                        to[i] = (real)dk[i];
                        to[(size_t)KVH * HD + i] = (real)dv[i];
                    }
                } else if (j < s->shared_count && dcache.k) {
                    size_t at = ((size_t)cache_row(s, j) * KVH + g) * HD;
                    for (int i = 0; i < HD; i++) {
                        ((real *)dcache.k)[at + i] = (real)(((real *)dcache.k)[at + i] + dk[i]);
                        ((real *)dcache.v)[at + i] = (real)(((real *)dcache.v)[at + i] + dv[i]);
                    }
                }
            }
    }
}

static void qkv_forward(void *cx, void *qkv_, const void *q_, const void *k_, const void *v_, int N,
                        struct glm_heads h)
{
    real *qkv = qkv_;
    const real *q = q_, *k = k_, *v = v_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < h.NH * h.HD; i++)
            *qkv++ = *q++;
        for (int i = 0; i < h.KVH * h.HD; i++)
            *qkv++ = *k++;
        for (int i = 0; i < h.KVH * h.HD; i++)
            *qkv++ = *v++;
    }
}

static void qkv_backward(void *cx, void *dq_, void *dk_, void *dv_, const void *dqkv_, int N,
                         struct glm_heads h)
{
    real *dq = dq_, *dk = dk_, *dv = dv_;
    const real *dqkv = dqkv_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < h.NH * h.HD; i++)
            *dq++ = *dqkv++;
        for (int i = 0; i < h.KVH * h.HD; i++)
            *dk++ = *dqkv++;
        for (int i = 0; i < h.KVH * h.HD; i++)
            *dv++ = *dqkv++;
    }
}

static void qkv_by_head_forward(void *cx, void *qkv_, const void *inp_, int N, struct glm_heads h)
{
    real *qkv = qkv_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++, qkv += 3 * h.NH * h.HD)
        for (int head = 0; head < h.NH; head++)
            for (int part = 0; part < 3; part++)
                for (int i = 0; i < h.HD; i++)
                    qkv[(part * h.NH + head) * h.HD + i] = *inp++;
}

static void qkv_by_head_backward(void *cx, void *dinp_, const void *dqkv_, int N,
                                 struct glm_heads h)
{
    real *dinp = dinp_;
    const real *dqkv = dqkv_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++, dqkv += 3 * h.NH * h.HD)
        for (int head = 0; head < h.NH; head++)
            for (int part = 0; part < 3; part++)
                for (int i = 0; i < h.HD; i++)
                    *dinp++ = dqkv[(part * h.NH + head) * h.HD + i];
}

static void kv_append(void *cx, struct glm_kv cache, const void *qkv, const int32_t *slot, int N,
                      struct glm_heads heads)
{
    size_t NH = heads.NH, HD = heads.HD, KV = (size_t)heads.KVH * heads.HD;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++) {
        const real *k = (const real *)qkv + n * (NH * HD + 2 * KV) + NH * HD;
        memcpy((real *)cache.k + slot[n] * KV, k, KV * sizeof(real));
        memcpy((real *)cache.v + slot[n] * KV, k + KV, KV * sizeof(real));
    }
}

static void rope_append(void *cx, struct glm_kv cache, void *qkv, const void *table,
                        const int32_t *position, const int32_t *slot, int N, struct glm_heads heads,
                        int rotary_dim)
{
    rope_forward(cx, qkv, table, position, N, heads.NH + heads.KVH, heads.HD,
                 (heads.NH + 2 * heads.KVH) * heads.HD, rotary_dim);
    kv_append(cx, cache, qkv, slot, N, heads);
}

/* ---- dropout ---- */

/* Philox4x32-10: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". */
static void philox(uint32_t c[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b,
                            (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        memcpy(c, next, sizeof next);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

/* The word of (row n, element) */
static uint32_t word_of(const struct glm_dropout *d, int n, size_t element)
{
    uint32_t c[4] = {(uint32_t)(element / 4), (uint32_t)d->position[n], (uint32_t)d->stream[n],
                     d->site};
    philox(c, (uint32_t)d->seed, (uint32_t)(d->seed >> 32) ^ d->step);
    return c[element % 4];
}

/* x times the mask of (row n, element) over 1 - p. */
static double drop(const struct glm_dropout *d, int n, size_t element, double x)
{
    uint64_t threshold = (uint64_t)(d->p * 4294967296.0);
    return word_of(d, n, element) < threshold ? 0 : x / (1 - d->p);
}

static void noise(void *cx, void *x_, int N, int C, double size, const struct glm_dropout *draw)
{
    real *x = x_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) {
            const double u = (word_of(draw, n, c) >> 8) / 8388608.0 - 1;
            x[(size_t)n * C + c] = (real)(x[(size_t)n * C + c] + size * u);
        }
}

static void dropout_forward(void *cx, void *out_, const void *inp_, int N, int C,
                            const struct glm_dropout *dropout)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++)
            out[(size_t)n * C + c] = (real)drop(dropout, n, c, inp[(size_t)n * C + c]);
}

static void dropout_backward(void *cx, void *dinp_, const void *dout_, int N, int C,
                             const struct glm_dropout *dropout)
{
    real *dinp = dinp_;
    const real *dout = dout_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) {
            size_t at = (size_t)n * C + c;
            dinp[at] = (real)(dinp[at] + drop(dropout, n, c, dout[at]));
        }
}

/* ---- prefix ---- */

static void prefix_forward(void *cx, void *out_, const void *inp_, int P, int J, int KV, int copies,
                           const struct glm_dropout *dropout)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (int j = 0; j < J; j++)
        for (int b = 0; b < copies; b++)
            for (int p = 0; p < P; p++)
                for (int i = 0; i < KV; i++) {
                    int n = b * P + p;
                    double x = inp[((size_t)p * J + j) * KV + i];
                    out[((size_t)j * copies * P + n) * KV + i] =
                        (real)(dropout ? drop(dropout, n, (size_t)j * KV + i, x) : x);
                }
}

static void prefix_backward(void *cx, void *dinp_, const void *dout_, int P, int J, int KV,
                            int copies, const struct glm_dropout *dropout)
{
    real *dinp = dinp_;
    const real *dout = dout_;
    if (stop(cx))
        return;
    for (int p = 0; p < P; p++)
        for (int j = 0; j < J; j++)
            for (int i = 0; i < KV; i++) {
                real *dx = dinp + ((size_t)p * J + j) * KV + i;
                double sum = 0;
                for (int b = 0; b < copies; b++) {
                    int n = b * P + p;
                    double dy = dout[((size_t)j * copies * P + n) * KV + i];
                    sum += dropout ? drop(dropout, n, (size_t)j * KV + i, dy) : dy;
                }
                *dx = (real)(*dx + sum);
            }
}

/* ---- activations ---- */

static void swiglu_forward(void *cx, void *out_, const void *inp_, int N, int F)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int f = 0; f < F; f++) {
            double gate = inp[(size_t)n * 2 * F + f], up = inp[(size_t)n * 2 * F + F + f];
            out[(size_t)n * F + f] = (real)(gate / (1 + exp(-gate)) * up);
        }
}

static void linear_swiglu_forward(void *cx, void *out, void *h, const void *inp,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    linear_forward(cx, h, inp, weight, bias, N, 1, 0);
    swiglu_forward(cx, out, h, N, weight->rows / 2);
}

static void rmsnorm_swiglu_forward(void *cx, void *out, void *h, void *ln, void *rstd,
                                   const void *inp, const void *norm, const struct glm_mat *weight,
                                   const void *bias, int N, double eps)
{
    rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
    linear_swiglu_forward(cx, out, h, ln, weight, bias, N);
}

static void linear_rope_append(void *cx, struct glm_kv cache, void *qkv, const void *inp,
                               const struct glm_mat *weight, const void *bias, const void *table,
                               const int32_t *position, const int32_t *slot, int N,
                               struct glm_heads heads, int rotary_dim)
{
    linear_forward(cx, qkv, inp, weight, bias, N, 1, 0);
    rope_append(cx, cache, qkv, table, position, slot, N, heads, rotary_dim);
}

static void rmsnorm_rope_append(void *cx, struct glm_kv cache, void *qkv, void *ln, void *rstd,
                                const void *inp, const void *norm, const struct glm_mat *weight,
                                const void *bias, const void *table, const int32_t *position,
                                const int32_t *slot, int N, struct glm_heads heads, int rotary_dim,
                                double eps)
{
    rmsnorm_forward(cx, ln, rstd, inp, norm, N, weight->cols, eps);
    linear_rope_append(cx, cache, qkv, ln, weight, bias, table, position, slot, N, heads,
                       rotary_dim);
}

/* silu(x) = x sigmoid(x), so silu' = sigmoid (1 + x (1 - sigmoid)) */
static void swiglu_backward(void *cx, void *dinp_, const void *dout_, const void *inp_, int N,
                            int F)
{
    real *dinp = dinp_;
    const real *dout = dout_, *inp = inp_;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int f = 0; f < F; f++) {
            size_t at = (size_t)n * 2 * F + f;
            double gate = inp[at], up = inp[at + F], dy = dout[(size_t)n * F + f];
            double sigmoid = 1 / (1 + exp(-gate));
            dinp[at] = (real)(dy * up * sigmoid * (1 + gate * (1 - sigmoid)));
            dinp[at + F] = (real)(dy * gate * sigmoid);
        }
}

static void swiglu_linear_forward(void *cx, void *out, void *act, const void *h,
                                  const struct glm_mat *weight, const void *bias, int N)
{
    swiglu_forward(cx, act, h, N, weight->cols);
    linear_forward(cx, out, act, weight, bias, N, 1, 0);
}
static void swiglu_linear_backward(void *cx, void *dinp, const void *dact, void *h,
                                   const struct glm_mat *weight, int N)
{
    swiglu_backward(cx, h, dact, h, N, weight->rows / 2);
    linear_backward_input(cx, dinp, h, weight, N, 1, 0);
}

static void swiglu_mlp_forward(void *cx, void *out, void *rstd, void *sum, void *work, void *h,
                               const void *b, const void *weight, const struct glm_mat *up,
                               const struct glm_mat *down, const void *bias, int N, double eps)
{
    add_rmsnorm_forward(cx, work, rstd, sum, sum, b, weight, N, up->cols, eps);
    linear_forward(cx, h, work, up, NULL, N, 1, 0);
    if (out)
        swiglu_linear_forward(cx, out, work, h, down, bias, N);
}
static void swiglu_mlp_backward(void *cx, void *dinp, void *h, const void *dout,
                                const struct glm_mat *up, const struct glm_mat *down, int N)
{
    linear_backward_input(cx, dinp, dout, down, N, 1, 0);
    swiglu_linear_backward(cx, dinp, dinp, h, up, N);
}

#define ON(op) op
#define MADE(op) op
#include "self_attention.h"

static void gelu_forward(void *cx, void *out_, const void *inp_, size_t n)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++) {
        double x = inp[i], u = sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
        out[i] = (real)(0.5 * x * (1 + tanh(u)));
    }
}

static void gelu_backward(void *cx, void *dinp_, const void *dout_, const void *inp_, size_t n)
{
    real *dinp = dinp_;
    const real *dout = dout_, *inp = inp_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++) {
        double x = inp[i], k = sqrt(2 / 3.14159265358979323846);
        double t = tanh(k * (x + 0.044715 * x * x * x)), du = k * (1 + 3 * 0.044715 * x * x);
        dinp[i] = (real)(dout[i] * 0.5 * (1 + t + x * (1 - t * t) * du));
    }
}

static void tanh_forward(void *cx, void *out_, const void *inp_, size_t n)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        out[i] = (real)tanh(inp[i]);
}

static void tanh_backward(void *cx, void *dinp_, const void *dout_, const void *out_, size_t n)
{
    real *dinp = dinp_;
    const real *dout = dout_, *out = out_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        dinp[i] = (real)(dout[i] * (1 - (double)out[i] * out[i]));
}

/* ---- cross entropy ---- */

static void cross_entropy_forward(void *cx, void *loss_, void *lse_, const void *logits_,
                                  const int32_t *target, int M, int V)
{
    real *loss = loss_, *lse = lse_;
    const real *logits = logits_;
    if (stop(cx))
        return;
    for (int m = 0; m < M; m++, logits += V) {
        double max = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++)
            max = fmax(max, logits[v]);
        for (int v = 0; v < V; v++)
            sum += exp(logits[v] - max);
        lse[m] = (real)(max + log(sum));
        loss[m] = (real)(max + log(sum) - logits[target[m]]);
    }
}

static void cross_entropy_backward(void *cx, void *logits_, const void *lse_, const int32_t *target,
                                   int M, int V, double scale)
{
    real *logits = logits_;
    const real *lse = lse_;
    if (stop(cx))
        return;
    for (int m = 0; m < M; m++, logits += V)
        for (int v = 0; v < V; v++)
            logits[v] = (real)(scale * (exp((double)logits[v] - lse[m]) - (v == target[m])));
}

/* ---- over flat arrays ---- */

static void add(void *cx, void *out_, const void *a_, const void *b_, size_t n)
{
    real *out = out_;
    const real *a = a_, *b = b_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        out[i] = a[i] + b[i];
}

static void scaled_add(void *cx, void *out_, const void *a_, const void *b_, size_t n, double scale)
{
    real *out = out_;
    const real *a = a_, *b = b_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        out[i] = (real)(scale * a[i] + b[i]);
}

static void sum_squares(void *cx, double *out, const void *x_, size_t n)
{
    const real *x = x_;
    *out = 0;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        *out += (double)x[i] * x[i];
}

static void first_nonfinite(void *cx, int *row, const void *x_, int N, int C)
{
    const real *x = x_;
    *row = -1;
    if (stop(cx))
        return;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++)
            if (!isfinite(x[(size_t)n * C + c])) {
                *row = n;
                return;
            }
}

static double mass_of(double score, double top) { return floor(ldexp(exp(score - top), 40)); }

/* Scores of columns that do not stay become -infinity: those that have top_k larger ones, then one
 * after another the last in the order of falling scores and rising columns. */
static void drop_columns(real *score, int V, const struct glm_choice *c, double top)
{
    double total = 0, rest;
    for (int v = 0; c->top_k > 0 && v < V; v++) {
        int larger = 0;
        for (int w = 0; w < V; w++)
            larger += score[w] > score[v];
        if (larger >= c->top_k)
            score[v] = -INFINITY;
    }
    if (c->top_p >= 1)
        return;
    for (int v = 0; v < V; v++)
        total += mass_of(score[v], top);
    rest = floor((1 - c->top_p) * total);
    for (;;) {
        int last = -1, left = 0;
        for (int v = 0; v < V; v++)
            if (score[v] > -INFINITY) {
                last = last < 0 || score[v] <= score[last] ? v : last;
                left++;
            }
        rest -= mass_of(score[last], top);
        if (left == 1 || rest < 0)
            return;
        score[last] = -INFINITY;
    }
}

static int largest(const real *x, int V, int *finite)
{
    int best = 0;
    *finite = 1;
    for (int v = 0; v < V; v++) {
        *finite = *finite && isfinite(x[v]);
        if (x[v] > x[best])
            best = v;
    }
    return best;
}

static int choose_of(real *x, int V, const struct glm_choice *c, const int32_t *touched)
{
    int finite, best = largest(x, V, &finite);
    if (!finite)
        return -1;
    if (!c)
        return best;
    touched += c->first;
    for (int i = 0; i < c->penalised; i++, touched++)
        x[*touched] = (real)(x[*touched] < 0 ? x[*touched] * c->penalty : x[*touched] / c->penalty);
    for (int i = 0; i < c->banned; i++, touched++)
        x[*touched] = -INFINITY;
    best = largest(x, V, &finite);
    if (!isfinite(x[best]))
        return -2;
    if (c->temperature == 0 || !isfinite((real)(x[best] / c->temperature)))
        return best;
    for (int v = 0; v < V; v++)
        x[v] = (real)(x[v] / c->temperature);
    const double top = x[best];
    drop_columns(x, V, c, top);
    uint32_t r[4] = {c->index, c->stream, 0x73616d70, 0};
    philox(r, (uint32_t)c->seed, (uint32_t)(c->seed >> 32));
    double total = 0, sum = 0;
    for (int v = 0; v < V; v++)
        total += mass_of(x[v], top);
    total = floor((r[0] + 0.5) / 4294967296.0 * total);
    for (int v = 0; v < V; v++)
        if ((sum += mass_of(x[v], top)) > total)
            return v;
    return best;
}

static void choose(void *cx, int32_t *id, void *x, int M, int V, const struct glm_choice *choices,
                   const int32_t *touched)
{
    if (stop(cx))
        return;
    for (int m = 0; m < M; m++)
        id[m] = choose_of((real *)x + (size_t)m * V, V, choices ? choices + m : NULL, touched);
}

static void adamw(void *cx, void *p_, const void *grad_, void *m_, void *v_, size_t n, double lr,
                  double b1, double b2, double eps, double wd, int t, double gscale)
{
    real *p = p_, *m = m_, *v = v_;
    const real *grad = grad_;
    double correct1 = 1 - pow(b1, t), correct2 = 1 - pow(b2, t);
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++) {
        double g = gscale * grad[i];
        double m1 = b1 * m[i] + (1 - b1) * g, v1 = b2 * v[i] + (1 - b2) * g * g;
        m[i] = (real)m1;
        v[i] = (real)v1;
        double decayed = p[i] - lr * wd * p[i];
        p[i] = (real)(decayed - lr * (m1 / correct1) / (sqrt(v1 / correct2) + eps));
    }
}

/* ---- the backend ---- */

static const struct glm_ops ops = {
#define OP(op, extent, ...) .op = op,
#include "ops.h"
};

/* A multiple of 64 bytes, as aligned_alloc asks, and never nothing. */
static void *backend_alloc(struct glm_backend *be, size_t bytes)
{
    be->allocated++;
    return bytes > SIZE_MAX - 64 ? NULL : aligned_alloc(64, bytes / 64 * 64 + 64);
}

static void backend_free(struct glm_backend *be, void *p)
{
    (void)be;
    free(p);
}

/* upload, download and copy: all memory is the host's. */
static void backend_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    (void)be;
    if (bytes)
        memmove(to, from, bytes);
}

static void backend_zero(struct glm_backend *be, void *p, size_t bytes)
{
    (void)be;
    if (bytes)
        memset(p, 0, bytes);
}

static void backend_set_threads(struct glm_backend *be, int threads)
{
    (void)be;
    (void)threads;
}

static int backend_threads(struct glm_backend *be)
{
    (void)be;
    return 1;
}

static void backend_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg)
{
    *(struct context *)be->cx = (struct context){poll, arg, 0};
}

static int backend_stopped(struct glm_backend *be) { return ((struct context *)be->cx)->stopped; }

static void backend_destroy(struct glm_backend *be)
{
    if (be)
        free(be->cx);
    free(be);
}

glm_status REF_CREATE(struct glm_backend **out, struct glm_error *err)
{
    struct glm_backend *be = malloc(sizeof *be);
    struct context *cx = calloc(1, sizeof *cx);
    *out = NULL;
    if (!be || !cx) {
        free(be);
        free(cx);
        return glm_fail(err, GLM_EMEMORY, "%s: no memory for the backend itself", REF_NAME);
    }
    *be = (struct glm_backend){
        .name = REF_NAME,
        .ops = &ops,
        .cx = cx,
        .real_size = sizeof(real),
        .real = REAL_DTYPE,
        .alloc = backend_alloc,
        .free = backend_free,
        .upload = backend_copy,
        .download = backend_copy,
        .copy = backend_copy,
        .zero = backend_zero,
        .set_threads = backend_set_threads,
        .threads = backend_threads,
        .set_poll = backend_set_poll,
        .stopped = backend_stopped,
        .destroy = backend_destroy,
    };
    *out = be;
    return GLM_OK;
}
