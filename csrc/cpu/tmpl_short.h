/* linear_forward over few columns of float weights: many rows of x by W of at most SHORT_COLUMNS,
 * adapters' B among them. Where a sum is short, adding up its lanes takes as long as the products.
 * So here vectors run along the output, over panels of W turned over, and the lanes of a sum are
 * made one after the other and added up in the order of SUM4: the bits are those of tmpl_linear.h,
 * which goes on to multiply few rows where W lies. One row alone does so here, too: with nothing packed
 * and no runs around it, it takes the time in which W comes out of the cache. */

/* clang-format off */
enum {
    SHORT_COLUMNS = 192,               /* one run of every set */
    SHORT_TASK = 128,                  /* rows of W of a task */
    SR = REGISTERS == 32 ? 4 : 3, SV = 2, /* rows of x, vectors of output, of a tile */
    SHORT_PANEL = SV * VL,
};
/* clang-format on */

/* Rows o .. o + cols - 1 of W, turned over: (columns, SHORT_PANEL); what is past the end is 0. */
INLINE void turn_over(float *to, const struct glm_mat *w, enum glm_dtype dtype, int o, int cols)
{
    const int K = w->cols;
    const size_t stride = glm_bytes(dtype, (size_t)K);
    for (int v = 0; v < SV; v++)
        for (int k = 0; k < K; k += VL) {
            const char *p =
                (const char *)w->data + (size_t)(o + v * VL) * stride + glm_bytes(dtype, (size_t)k);
            const int n = K - k < VL ? K - k : VL;
            vf x[VL];
            for (int r = 0; r < VL; r++, p += stride)
                if (v * VL + r >= cols) {
                    x[r] = (vf){0};
                } else if (n == VL) {
                    x[r] = load_as(p, dtype, 0);
                } else {
                    vf two[2];
                    load_last(two, p, GLM_F32, dtype, n);
                    x[r] = two[0];
                }
            transpose(x);
            for (int i = 0; i < n; i++)
                store(to + (size_t)(k + i) * SHORT_PANEL + v * VL, x[i]);
        }
}

/* acc (SR, SV) = lane `lane` of the sums: its products in order */
INLINE void short_lane(vf *acc, const float *const *x, const float *w, int lane, int K)
{
    const int whole = (K + 2 * VL - 1) / (2 * VL) * 2 * VL;
    for (int i = 0; i < SR * SV; i++)
        acc[i] = (vf){0};
    int k = lane;
    for (; k < K; k += VL)
#pragma GCC unroll 4
        for (int r = 0; r < SR; r++) {
            const vf one = splat(x[r][k]);
#pragma GCC unroll 2
            for (int v = 0; v < SV; v++)
                acc[r * SV + v] =
                    MADD(one, load(w + (size_t)k * SHORT_PANEL + v * VL), acc[r * SV + v]);
        }
    if (k < whole) /* a packed row has zeros there: of -0 they make 0 */
        for (int i = 0; i < SR * SV; i++)
            acc[i] += (vf){0};
}

INLINE void short_add(vf *to, const vf *a, const vf *b)
{
    for (int i = 0; i < SR * SV; i++)
        to[i] = a[i] + b[i];
}

/* Four lanes that are neighbours */
INLINE void short_quad(vf *sum, const float *const *x, const float *w, int quad, int K)
{
    vf a[SR * SV], b[SR * SV];
    if (4 * quad >= K) {
        for (int i = 0; i < SR * SV; i++)
            sum[i] = (vf){0};
        return;
    }
    short_lane(sum, x, w, 4 * quad, K);
    short_lane(a, x, w, 4 * quad + 1, K);
    short_add(sum, sum, a);
    short_lane(a, x, w, 4 * quad + 2, K);
    short_lane(b, x, w, 4 * quad + 3, K);
    short_add(a, a, b);
    short_add(sum, sum, a);
}

/* sum (SR, SV) = x W^T for rows of x and a panel; quarters of a vector as lane_sum adds them */
INLINE void short_tile(vf *sum, const float *const *x, const float *w, int K)
{
    short_quad(sum, x, w, 0, K);
#if VL == 8
    vf second[SR * SV];
    short_quad(second, x, w, 1, K);
    short_add(sum, sum, second);
#elif VL == 16
    vf second[SR * SV], third[SR * SV];
    short_quad(second, x, w, 2, K);
    short_add(sum, sum, second);
    short_quad(second, x, w, 1, K);
    short_quad(third, x, w, 3, K);
    short_add(second, second, third);
    short_add(sum, sum, second);
#endif
}

/* a->x is x as it lies */
static void short_task(const void *arg, int task, char *scratch)
{
    const struct nt_args *a = arg;
    const struct glm_mat *w = a->w;
    const int O = w->rows, K = w->cols, tiles = (O + SHORT_TASK - 1) / SHORT_TASK;
    const int n0 = task / tiles * a->rows, o0 = task % tiles * SHORT_TASK;
    const int end = a->N - n0 < a->rows ? a->N : n0 + a->rows;
    const int o_end = O - o0 < SHORT_TASK ? O : o0 + SHORT_TASK;
    float *panel = (float *)scratch;
    for (int o = o0; o < o_end; o += SHORT_PANEL) {
        const int cols = o_end - o < SHORT_PANEL ? o_end - o : SHORT_PANEL;
        if (w->dtype == GLM_F32)
            turn_over(panel, w, GLM_F32, o, cols);
        else if (w->dtype == GLM_F16)
            turn_over(panel, w, GLM_F16, o, cols);
        else
            turn_over(panel, w, GLM_BF16, o, cols);
        for (int n = n0; n < end; n += SR) {
            const float *x[SR];
            vf sum[SR * SV];
            for (int r = 0; r < SR; r++)
                x[r] = (const float *)a->x + (size_t)(n + r < end ? n + r : n) * K;
            short_tile(sum, x, panel, K);
            for (int r = 0; r < SR && n + r < end; r++) {
                float *out = a->out + (size_t)(n + r) * a->ldo + o;
                for (int v = 0; v < SV && v * VL < cols; v++, out += VL) {
                    const int left = cols - v * VL < VL ? cols - v * VL : VL;
                    vf y = sum[r * SV + v] * splat(a->scale);
                    if (a->bias)
                        y += load_part(a->bias + o + v * VL, left);
                    if (left == VL)
                        store(out, a->accumulate ? load(out) + y : y);
                    else
                        store_part(out, a->accumulate ? load_part(out, left) + y : y, left);
                }
            }
        }
    }
}

/* out[0 .. n - 1], n <= 4, of one row from its sums */
INLINE void store_one_row(const struct nt_args *a, int o, v4 s, int n)
{
    v4 y = a->scale * ((v4){0} + s);
    float *out = a->out + o;
    if (n >= 4) {
        if (a->bias)
            y += *(const v4 *)(a->bias + o);
        *(v4 *)out = a->accumulate ? *(v4 *)out + y : y;
        return;
    }
    for (int i = 0; i < n; i++) {
        const float v = a->bias ? y[i] + a->bias[o + i] : y[i];
        out[i] = a->accumulate ? out[i] + v : v;
    }
}

enum { ONE_COLS = REGISTERS == 32 ? 8 : 4 };

/* One row of x, as it lies, by W where it lies: what tile_in_place makes, without its runs. */
INLINE void one_short_row(const struct nt_args *a, enum glm_dtype dtype, int o0, int end)
{
    const int K = a->w->cols, rest = K % VL, whole = K - rest, in_chunk = K % (2 * VL);
    const size_t stride = glm_bytes(dtype, (size_t)K), last = glm_bytes(dtype, (size_t)whole);
    const float *x = (const float *)a->x;
    for (int o = o0; o < end; o += ONE_COLS) {
        const char *first = (const char *)a->w->data + (size_t)o * stride, *row[ONE_COLS];
        vf acc[ONE_COLS];
        v4 s[2];
#pragma GCC unroll 8
        for (int c = 0; c < ONE_COLS; c++) {
            row[c] = first + (size_t)(o + c < end ? c : end - 1 - o) * stride;
            acc[c] = (vf){0};
        }
        for (int k = 0; k < whole; k += VL) {
            const vf xv = load(x + k);
            const size_t at = glm_bytes(dtype, (size_t)k);
#pragma GCC unroll 8
            for (int c = 0; c < ONE_COLS; c++) {
                __builtin_prefetch(row[c] + at + ONE_COLS * stride, 0, 3);
                acc[c] = MADD(xv, load_as(row[c] + at, dtype, 0), acc[c]);
            }
        }
        if (rest) {
            const vf xv = load_part(x + whole, rest);
#pragma GCC unroll 8
            for (int c = 0; c < ONE_COLS; c++) {
                vf w[2];
                if (dtype == GLM_F32)
                    w[0] = load_part((const float *)(row[c] + last), rest);
                else
                    load_last(w, row[c] + last, GLM_F32, dtype, rest);
                acc[c] = MADD(xv, w[0], acc[c]);
            }
        }
        if (in_chunk && in_chunk <= VL) /* as in short_lane */
#pragma GCC unroll 8
            for (int c = 0; c < ONE_COLS; c++)
                acc[c] += (vf){0};
        sum_lanes(s, acc, ONE_COLS, GLM_F32);
        for (int c = 0; c < ONE_COLS && o + c < end; c += 4)
            store_one_row(a, o + c, s[c / 4], end - o - c);
    }
}

static void one_short_row_task(const void *arg, int task, char *scratch)
{
    const struct nt_args *a = arg;
    const int o = task * IN_PLACE_COLS, left = a->w->rows - o;
    const int end = o + (left < IN_PLACE_COLS ? left : IN_PLACE_COLS);
    (void)scratch;
    if (a->w->dtype == GLM_F32)
        one_short_row(a, GLM_F32, o, end);
    else if (a->w->dtype == GLM_F16)
        one_short_row(a, GLM_F16, o, end);
    else
        one_short_row(a, GLM_BF16, o, end);
}

/* Whether W and its products are such. */
INLINE int is_short(const struct glm_mat *w, enum glm_dtype kind)
{
    return kind == GLM_F32 && w->cols <= SHORT_COLUMNS &&
           (w->dtype == GLM_F32 || w->dtype == GLM_F16 || w->dtype == GLM_BF16);
}
