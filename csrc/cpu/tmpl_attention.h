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
