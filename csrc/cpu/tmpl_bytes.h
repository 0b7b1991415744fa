/* Products of bytes (kind GLM_I8): what a set multiplies them by, and a run of a row of x as bytes,
 * its scale, and its outliers kept apart. Nothing here depends on the vector's length: every set
 * has the same bits. */

/* Quads of bytes: DOT_I8(acc, w, x) adds those of w times those of x to int32 lanes, exactly, where
 * w is BYTES_OF_W(bytes), which may be BYTE_BIAS too large, and x is not -128; DOT_NIBBLES the same
 * for w of 0 to 15, on NEON in lanes of any order, else in those of DOT_I8;
 * SUM4_INT: lane sums; QUADS(v, rows): four rows as wide as
 * a panel of tmpl_linear_backward.h (NR bytes) as quads of a column, in the vectors v. */
#ifndef DOT_I8
#define BYTE_BIAS 0
#define BYTES_OF_W(v) (v)
INLINE vf dot_i8(vf acc, vf w, vf x)
{
    vi sum = (vi)acc;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        sum += ((vi)((vu)w << (24 - 8 * j)) >> 24) * ((vi)((vu)x << (24 - 8 * j)) >> 24);
    return (vf)sum;
}
#define DOT_I8 dot_i8
INLINE v4 sum4_int(vf a, vf b, vf c, vf d)
{
    int32_t sum[4] = {0};
    for (int i = 0; i < VL; i++) {
        sum[0] += ((vi)a)[i];
        sum[1] += ((vi)b)[i];
        sum[2] += ((vi)c)[i];
        sum[3] += ((vi)d)[i];
    }
    v4 v;
    memcpy(&v, sum, sizeof v);
    return v;
}
#define SUM4_INT sum4_int
INLINE void quads(vf *v, const char *rows)
{
    char *to = (char *)v;
    for (int n = 0; n < 2 * VL; n++)
        for (int i = 0; i < 4; i++)
            to[4 * n + i] = rows[i * 2 * VL + n];
}
#define QUADS quads
#endif
#ifndef DOT_NIBBLES
#define DOT_NIBBLES DOT_I8
#endif

/* Square sum of the n values at x whose size is below `bound`, and the largest of those sizes; how
 * many are not below. The sum is one of 16 lanes whatever a vector has, and nothing is rounded once
 * that others round twice: every set has the same bytes. */
INLINE float squares_below(float *largest, int *others, const float *x, int n, float bound)
{
    vf square[16 / VL] = {{0}}, top = {0};
    vi below = {0};
    for (int k = 0; k < n; k += VL) {
        const vf v = n - k < VL ? load_part(x + k, n - k) : load(x + k);
        const vf size = (vf)((vi)v & 0x7fffffff);
        const vi is_below = size < splat(bound);
        const vf kept = (vf)((vi)size & is_below);
        square[k / VL % (16 / VL)] += kept * kept;
        top = VMAX(kept, top);
        below += is_below;
    }
    *largest = 0;
    *others = (n + VL - 1) / VL * VL;
    for (int i = 0; i < VL; i++) {
        *largest = top[i] > *largest ? top[i] : *largest;
        *others += below[i];
    }
    float sum[16];
    memcpy(sum, square, sizeof sum);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            sum[i] += sum[i + width];
    return sum[0];
}

/* Whether one of `4 * VL` values at x is larger than `least`. */
INLINE int any_above(const float *x, float least)
{
    vf top = {0};
    uint64_t of[VL / 2], any = 0;
    for (int i = 0; i < 4; i++) {
        const vf size = (vf)((vi)load(x + i * VL) & 0x7fffffff);
        top = VMAX(size, top);
    }
    const vi above = top > splat(least);
    memcpy(of, &above, sizeof of);
    for (int i = 0; i < VL / 2; i++)
        any |= of[i];
    return any != 0;
}

/* Column k of value x among the OUTLIERS largest so far, the first of equals first. */
INLINE void add_largest(struct x_run *run, float x, int k)
{
    int at = run->count < OUTLIERS ? run->count++ : OUTLIERS - 1;
    for (; at > 0 && fabsf(run->value[at - 1]) < fabsf(x); at--) {
        run->value[at] = run->value[at - 1];
        run->column[at] = run->column[at - 1];
    }
    run->value[at] = x;
    run->column[at] = k;
}

/* n <= SHORT_RUN_BYTES columns at x; columns past the end are 0. Of the OUTLIERS largest those
 * beyond six times the root mean square of the others do not share the scale: their products are
 * made in float. A run that is not finite gets the scale NaN. */
INLINE void quantize_x(int8_t *q, struct x_run *run, const float *x, int n)
{
    typedef int8_t vb __attribute__((vector_size(VL), aligned(1)));
    float rest;
    int k = 0, bad, larger;
    *run = (struct x_run){0};
    const float mean = sqrtf(squares_below(&rest, &bad, x, n, INFINITY) / (float)n);
    if (rest > 6.0f * mean && !bad) {
        float least = mean;
        for (int begin = 0; begin < n; begin += 4 * VL) {
            if (begin + 4 * VL <= n && !any_above(x + begin, least))
                continue;
            for (k = begin; k < n && k < begin + 4 * VL; k++)
                if (fabsf(x[k]) > least) {
                    add_largest(run, x[k], k);
                    if (run->count == OUTLIERS)
                        least = fabsf(run->value[OUTLIERS - 1]);
                }
        }
        const float limit =
            6.0f * sqrtf(squares_below(&rest, &larger, x, n, fabsf(run->value[run->count - 1])) /
                         (float)n);
        for (; run->count && fabsf(run->value[run->count - 1]) <= limit; run->count--)
            rest = fabsf(run->value[run->count - 1]);
    }
    run->scale = !bad ? rest / 127.0f : NAN;
    const vf inverse = splat(rest > 0 && run->scale > 0 ? 127.0f / rest : 0);
    vi sum = {0};
    for (k = 0; k < n; k += VL) {
        const vf v = n - k < VL ? load_part(x + k, n - k) : load(x + k);
        const vf shift = splat(12582912.0f), most = splat(127.0f);
        vf rounded = v * inverse + shift - shift;
        rounded = select_lanes(rounded > most, most, select_lanes(rounded < -most, -most, rounded));
        const vi whole = __builtin_convertvector(rounded, vi);
        *(vb *)(q + k) = __builtin_convertvector(whole, vb);
        sum += whole;
    }
    for (int i = 0; i < run->count; i++) {
        sum[0] -= q[run->column[i]];
        q[run->column[i]] = 0;
    }
    for (int i = 0; i < VL; i++)
        run->sum += sum[i];
    memset(q + k, 0, (size_t)(SHORT_RUN_BYTES - k));
}

/* Of each two vectors the even columns, then the odd ones: as W of 4 bits has them. */
INLINE void evens_first(int8_t q[SHORT_RUN_BYTES])
{
    for (int8_t *at = q; at < q + SHORT_RUN_BYTES; at += 8 * VL) {
        int8_t both[8 * VL];
        memcpy(both, at, sizeof both);
        for (int i = 0; i < 4 * VL; i++) {
            at[i] = both[2 * i];
            at[4 * VL + i] = both[2 * i + 1];
        }
    }
}
