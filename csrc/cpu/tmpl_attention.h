/* ---- attention, never more than a block of it at a time.
 *
 * The query rows of a segment that share a key head, tokens outermost, heads of the group
 * innermost, are lanes: a task takes panels of them, and loads a block of keys and values once for
 * all. Scores are computed transposed, s[key][lane], so that a row's softmax goes lane by lane. The
 * softmax is kept running (Milakov & Gimelshein 2018) over blocks of keys counted from the first
 * visible one. Every sum of a row runs over its keys (or features) in order, whatever lane it lies
 * in: its bits depend on nothing else.
 *
 * Panels: "packed" rows lie as (feature / VL, row, VL), "transposed" rows as (row / VL, feature,
 * VL), both with features padded by zeros to vectors. Where the large products are in bfloat16
 * (bf16, a constant of each function) the same tiles multiply pairs of neighbours along the sum,
 * two to a float's place: features in scores, keys or lanes in what is added up. */

struct att_args {
    float *out, *lse, *dqkv;
    const float *dout, *qkv;
    struct glm_kv cache, dcache;
    const struct glm_segment *segments;
    int n_segments;
    struct glm_heads heads;
};

/* clang-format off */
enum {
    AR = REGISTERS == 32 ? 12 : VL == 8 ? 6 : 4, /* rows of a register tile, by 2 vectors, */
    AREST = VL == 8 ? 2 : 4,              /* and of the tiles that end a product */
    LD = ATT_BLOCK                        /* lanes from one key's scores to the next */
};
/* clang-format on */
#define LOG2E 1.44269504088896341f
#define LN2 0.69314718055994531f

/* Rows of an attention panel: fewer where heads are wide, so that nine panels fit the scratch. */
INLINE int att_block(int HD)
{
    return HD <= 256 ? ATT_BLOCK : ATT_BLOCK * 256 / ((HD + 15) / 16 * 16) / 16 * 16;
}

/* Parts that the query rows of a key head of a segment are cut into; attention_forward has a task
 * for each of them and each key head. */
INLINE int att_parts(const struct glm_segment *s, struct glm_heads heads)
{
    const int64_t rows = (int64_t)s->count * (heads.NH / heads.KVH),
                  most = (int64_t)ATT_PANELS * att_block(heads.HD);
    return (int)((rows + most - 1) / most);
}

/* Row j of what a segment sees: shared, past, then own tokens; its keys or values of head g. */
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

/* Keys that token t of a segment sees. */
INLINE int last_visible(const struct glm_segment *s, int t)
{
    const int own = t + 1 < s->context ? s->context : t + 1;
    return s->shared_count + s->past_count + (own < s->count ? own : s->count);
}

#ifdef DOT_BF16
#define ATT_MADD(a, b, c) (bf16 ? DOT_BF16(c, a, b) : MADD(a, b, c))
#define NEIGHBOURS(a, b) TO_BF16(a, b) /* of 2 * VL features in order */
#define PAIRED(a, b) HALVES_TO_PAIRS(TO_BF16(a, b))
#else /* never reached: bf16 is 0 */
#define ATT_MADD(a, b, c) MADD(a, b, c)
#define NEIGHBOURS(a, b) (a)
#define PAIRED(a, b) (a)
#endif

/* c (R, V vectors; ldc) = (+) sum over `chunks` runs of `len` terms of a[r * am + k * ak] times
 * vector k of panel v of b (bv apart) */
INLINE void att_tile(int bf16, int R, int V, int add, float *c, size_t ldc, const float *a,
                     size_t am, size_t ak, size_t a_chunk, const float *b, size_t bv, int chunks,
                     int len)
{
    vf acc[AR][2];
    (void)bf16;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
            acc[r][v] = add ? load(c + r * ldc + v * VL) : (vf){0};
    for (int i = 0; i < chunks; i++, a += a_chunk) {
        const float *at = a;
#pragma GCC unroll 4
        for (int k = 0; k < len; k++, at += ak, b += VL) {
            vf bvec[2];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++)
                bvec[v] = load(b + v * bv);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const vf x = splat(at[r * am]);
#pragma GCC unroll 2
                for (int v = 0; v < V; v++)
                    acc[r][v] = ATT_MADD(x, bvec[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
            store(c + r * ldc + v * VL, acc[r][v]);
}

/* The same for `rows` rows, where a and c have room for whole fours, and `vectors` panels. */
INLINE void att_product(int bf16, int add, float *c, size_t ldc, int rows, const float *a,
                        size_t am, size_t ak, size_t a_chunk, const float *b, size_t bv,
                        int vectors, int chunks, int len)
{
    for (int v = 0; v < vectors; v += 2, b += 2 * bv, c += 2 * VL) {
        int r = 0;
        if (vectors - v > 1) {
            for (; r + AR <= rows; r += AR)
                att_tile(bf16, AR, 2, add, c + r * ldc, ldc, a + r * am, am, ak, a_chunk, b, bv,
                         chunks, len);
            for (; r < rows; r += AREST)
                att_tile(bf16, AREST, 2, add, c + r * ldc, ldc, a + r * am, am, ak, a_chunk, b, bv,
                         chunks, len);
        } else {
            for (; r + AR <= rows; r += AR)
                att_tile(bf16, AR, 1, add, c + r * ldc, ldc, a + r * am, am, ak, a_chunk, b, bv,
                         chunks, len);
            for (; r < rows; r += AREST)
                att_tile(bf16, AREST, 1, add, c + r * ldc, ldc, a + r * am, am, ak, a_chunk, b, bv,
                         chunks, len);
        }
    }
}

/* Sizes of one call: features padded to vectors, rows of a block so that its panels fit. */
struct att_sizes {
    int HD, features, units, block; /* units: floats, or pairs, of a padded row */
    size_t step, sum_step;          /* floats from one vector of a packed row to the next */
};

INLINE struct att_sizes att_sizes_of(int HD, int bf16)
{
    const int whole = bf16 ? 2 * VL : VL;
    struct att_sizes z = {.HD = HD, .features = (HD + whole - 1) / whole * whole};
    z.units = bf16 ? z.features / 2 : z.features;
    z.block = att_block(HD);
    z.step = (size_t)z.block * VL;
    z.sum_step = bf16 ? z.step / 2 : z.step;
    return z;
}

/* VL features from d on, times factor; zeros past the end */
INLINE vf load_features(const float *row, int d, int HD, float factor)
{
    const vf v = HD - d >= VL ? load(row + d) : HD > d ? load_part(row + d, HD - d) : (vf){0};
    return v * splat(factor);
}

/* VL units of a row */
INLINE vf load_units(int bf16, const float *row, int unit, int HD, float factor)
{
    if (!bf16)
        return load_features(row, unit, HD, factor);
    return NEIGHBOURS(load_features(row, 2 * unit, HD, factor),
                      load_features(row, 2 * unit + VL, HD, factor));
}

/* rows times factor, packed for sums over features; up to whole fours zeros follow */
INLINE void att_pack(int bf16, float *to, const struct att_sizes *z, const float *const *rows,
                     int n, float factor)
{
    for (int r = 0; r < (n + 3) / 4 * 4; r++)
        for (int u = 0; u < z->units; u += VL)
            store(to + u / VL * z->step + r * VL,
                  r < n ? load_units(bf16, rows[r], u, z->HD, factor) : (vf){0});
}

/* rows times factor, packed for sums over rows */
INLINE void att_pack_sum(int bf16, float *to, const struct att_sizes *z, const float *const *rows,
                         int n, float factor)
{
    if (!bf16) {
        att_pack(0, to, z, rows, n, factor);
        return;
    }
    for (int r = 0; r < n; r += 2)
        for (int d = 0; d < z->features; d += VL) {
            const vf a = load_features(rows[r], d, z->HD, factor);
            const vf b = r + 1 < n ? load_features(rows[r + 1], d, z->HD, factor) : (vf){0};
            (void)b;
            store(to + d / VL * z->sum_step + r / 2 * VL, PAIRED(a, b));
        }
}

/* rows, transposed; up to a whole vector of rows zeros follow */
INLINE void att_transpose(int bf16, float *to, const struct att_sizes *z, const float *const *rows,
                          int n)
{
    for (int r = 0; r < n; r += VL)
        for (int u = 0; u < z->units; u += VL) {
            vf x[VL];
            for (int i = 0; i < VL; i++)
                x[i] = r + i < n ? load_units(bf16, rows[r + i], u, z->HD, 1.0f) : (vf){0};
            transpose(x);
            for (int i = 0; i < VL; i++)
                store(to + (size_t)r * z->units + (size_t)(u + i) * VL, x[i]);
        }
}

/* s[key][lane] of `keys` packed keys and the transposed lanes */
INLINE void att_scores(int bf16, float *s, const struct att_sizes *z, const float *packed, int keys,
                       const float *transposed, int lanes)
{
    const int used = bf16 ? (z->HD + 1) / 2 : z->HD; /* units that are not all padding */
    att_product(bf16, 0, s, LD, keys, packed, VL, 1, z->step, transposed, (size_t)z->units * VL,
                (lanes + VL - 1) / VL, used < VL ? 1 : z->units / VL, used < VL ? used : VL);
}

/* out[lane][feature] (+)= sum over keys of p[key][lane] * packed[key]. Where pairs are multiplied,
 * p is followed by room for them. */
INLINE void att_add_keys(int bf16, int add, float *out, const struct att_sizes *z, float *p,
                         const float *packed, int keys, int lanes)
{
    float *from = p;
    if (bf16) {
        from = p + LD * ATT_BLOCK;
        for (int j = 0; j < keys; j += 2)
            for (int i = 0; i < lanes; i += VL)
                store(from + j / 2 * LD + i,
                      PAIRED(load(p + j * LD + i), load(p + (j + 1) * LD + i)));
    }
    att_product(bf16, add, out, (size_t)z->features, lanes, from, 1, LD, 0, packed, z->sum_step,
                (z->HD + VL - 1) / VL, 1, bf16 ? (keys + 1) / 2 : keys);
}

/* out[key][feature] += sum over lanes of p[key][lane] * packed[lane] */
INLINE void att_add_lanes(int bf16, float *out, const struct att_sizes *z, float *p,
                          const float *packed, int keys, int lanes)
{
    const float *from = p;
    if (bf16) {
        float *to = p + LD * ATT_BLOCK;
        from = to;
        for (int j = 0; j < (keys + 3) / 4 * 4; j++)
            for (int i = 0; i < lanes; i += 2 * VL)
                store(to + j * (LD / 2) + i / 2,
                      NEIGHBOURS(load(p + j * LD + i), load(p + j * LD + i + VL)));
    }
    att_product(bf16, 1, out, (size_t)z->features, keys, from, bf16 ? LD / 2 : LD, 1, 0, packed,
                z->sum_step, (z->HD + VL - 1) / VL, 1, bf16 ? (lanes + 1) / 2 : lanes);
}

INLINE vi lanes_see(const int32_t *seen, int j) { return *(const vi *)seen > (vi){0} + j; }

/* A panel of lanes: `count` of them from lane `first` of the segment on. */
struct att_lanes {
    int first, count;
    int32_t seen[ATT_BLOCK]; /* keys that each sees; some up to the first, none past the last */
    const float *rows[ATT_BLOCK];
};

/* Lanes of the vectors that hold so many. */
INLINE int whole_lanes(int count) { return (count + VL - 1) / VL * VL; }

INLINE void att_set_lanes(struct att_lanes *l, const struct glm_segment *s, int group, int first,
                          int block)
{
    const int left = s->count * group - first;
    l->first = first;
    l->count = left < block ? left : block;
    for (int i = 0; i < whole_lanes(l->count); i++)
        l->seen[i] = i < l->count ? last_visible(s, (first + i) / group) : 0;
}

/* Where the queries (of rows `width` apart) of the lanes lie. */
INLINE const float *lane_row(const float *base, size_t width, const struct glm_segment *s,
                             struct glm_heads heads, int g, int lane)
{
    const int group = heads.NH / heads.KVH;
    return base + (size_t)(s->begin + lane / group) * width +
           (size_t)(g * group + lane % group) * heads.HD;
}

/* Scores of `keys` keys from key j0 on become weights; top and sum run on, keep is what the sums so
 * far are multiplied by. The first `all` keys are seen by every lane. */
INLINE void att_softmax(float *s, int keys, int all, int j0, const struct att_lanes *l, float *top,
                        float *sum, float *keep)
{
    for (int i = 0; i < l->count; i += VL) {
        const vf before = load(top + i), hidden = splat(-INFINITY);
        vf most = before, total = {0};
        int j = 0;
        for (; j < all; j++)
            most = VMAX(load(s + j * LD + i), most);
        for (; j < keys; j++)
            most = VMAX(select_lanes(lanes_see(l->seen + i, j0 + j), load(s + j * LD + i), hidden),
                        most);
        for (j = 0; j < all; j++) {
            const vf e = exp2_vector(load(s + j * LD + i) - most);
            store(s + j * LD + i, e);
            total += e;
        }
        for (; j < keys; j++) {
            const vf e = select_lanes(lanes_see(l->seen + i, j0 + j),
                                      exp2_vector(load(s + j * LD + i) - most), (vf){0});
            store(s + j * LD + i, e);
            total += e;
        }
        if (keys % 2) /* the other half of a pair */
            store(s + keys * LD + i, (vf){0});
        const vf k = exp2_vector(before - most);
        store(keep + i, k);
        store(top + i, most);
        store(sum + i, load(sum + i) * k + total);
    }
}

INLINE int all_finite(const float *x, int n)
{
    vf s = {0};
    int i = 0;
    for (; i + VL <= n; i += VL)
        s += load(x + i) * splat(0.0f);
    s += load_part(x + i, n - i) * splat(0.0f);
    return lane_sum(s) == 0;
}

#include "tmpl_attention_one.h"

INLINE void attention_forward_part(int bf16, const struct att_args *a, int task, char *scratch)
{
    const int NH = a->heads.NH, KVH = a->heads.KVH, HD = a->heads.HD, group = NH / KVH;
    const size_t width = (size_t)(NH + 2 * KVH) * HD;
    const struct att_sizes z = att_sizes_of(HD, bf16);
    const struct glm_segment *s = a->segments;
    while (task >= att_parts(s, a->heads) * KVH)
        task -= att_parts(s++, a->heads) * KVH;
    const int part = att_parts(s, a->heads) - 1 - task / KVH, g = task % KVH; /* most first */
    if (!bf16 && is_one_token(s, a->heads)) {
        attention_one(a, s, g, (float *)scratch);
        return;
    }

    struct att_lanes lanes[ATT_PANELS];
    float top[ATT_PANELS][ATT_BLOCK], sum[ATT_PANELS][ATT_BLOCK], keep[ATT_BLOCK];
    const size_t panel = (size_t)z.block * z.features;
    float *kb = (float *)scratch, *vb = kb + panel, *score = vb + panel;
    float *transposed = score + 2 * LD * ATT_BLOCK, *out = transposed + ATT_PANELS * panel;
    static const float zeros[1024];
    int panels = 0, seen = 0;
    for (; panels < ATT_PANELS; panels++) {
        const int first = (part * ATT_PANELS + panels) * z.block;
        struct att_lanes *l = lanes + panels;
        if (first >= s->count * group)
            break;
        att_set_lanes(l, s, group, first, z.block);
        for (int i = 0; i < l->count; i++)
            l->rows[i] = lane_row(a->qkv, width, s, a->heads, g, first + i);
        att_transpose(bf16, transposed + panels * panel, &z, l->rows, l->count);
        for (int i = 0; i < whole_lanes(l->count); i++) {
            top[panels][i] = -INFINITY;
            sum[panels][i] = 0;
        }
        seen = l->seen[l->count - 1];
    }

    for (int j0 = 0; j0 < seen; j0 += z.block) {
        const int block = seen - j0 < z.block ? seen - j0 : z.block;
        const float *keys[ATT_BLOCK], *values[ATT_BLOCK];
        /* 0 * NaN would reach lanes that do not see the NaN: such values are added apart */
        const float *apart[ATT_BLOCK];
        int any_apart = 0;
        for (int j = 0; j < block; j++) {
            keys[j] = visible(a, s, j0 + j, g, 0);
            values[j] = visible(a, s, j0 + j, g, 1);
            apart[j] = NULL;
            if (j0 + j >= lanes[0].seen[0] && !all_finite(values[j], HD)) {
                apart[j] = values[j];
                values[j] = zeros;
                any_apart = 1;
            }
        }
        att_pack(bf16, kb, &z, keys, block, LOG2E / sqrtf((float)HD));
        att_pack_sum(bf16, vb, &z, values, block, 1.0f);
        for (int p = 0; p < panels; p++) {
            const struct att_lanes *l = lanes + p;
            float *o = out + p * panel;
            int n = l->seen[l->count - 1] - j0, all = l->seen[0] - j0;
            n = n < block ? n : block;
            all = all < 0 ? 0 : all < n ? all : n;
            if (n <= 0)
                continue;
            att_scores(bf16, score, &z, kb, n, transposed + p * panel, l->count);
            att_softmax(score, n, all, j0, l, top[p], sum[p], keep);
            for (int i = 0; j0 && i < l->count; i++)
                for (int d = 0; keep[i] != 1.0f && d < HD; d += VL)
                    store(o + (size_t)i * z.features + d,
                          load(o + (size_t)i * z.features + d) * splat(keep[i]));
            att_add_keys(bf16, j0 > 0, o, &z, score, vb, n, l->count);
            for (int j = 0; any_apart && j < n; j++)
                for (int i = 0; apart[j] && i < l->count; i++)
                    for (int d = 0; l->seen[i] > j0 + j && d < HD; d++)
                        o[(size_t)i * z.features + d] += score[j * LD + i] * apart[j][d];
        }
    }

    for (int p = 0; p < panels; p++)
        for (int i = 0; i < lanes[p].count; i++) {
            const int lane = lanes[p].first + i;
            const size_t at = (size_t)(s->begin + lane / group) * NH + g * group + lane % group;
            const float *o = out + p * panel + (size_t)i * z.features;
            const vf inverse = splat(1.0f / sum[p][i]);
            for (int d = 0; d < HD; d += VL) {
                if (HD - d >= VL)
                    store(a->out + at * HD + d, load(o + d) * inverse);
                else
                    store_part(a->out + at * HD + d, load(o + d) * inverse, HD - d);
            }
            a->lse[at] = top[p][i] * LN2 + logf(sum[p][i]);
        }
}

/* From scores and the products of dout and values: weights, and the scores' gradients times ln 2 */
INLINE void att_score_gradient(float *s, float *ds, int keys, int all, int j0,
                               const struct att_lanes *l, const float *lse, const float *D)
{
    for (int j = 0; j < (keys + 3) / 4 * 4; j++)
        for (int i = 0; i < l->count; i += VL) {
            vf e = exp2_vector(load(s + j * LD + i) - load(lse + i));
            vf d = e * (load(ds + j * LD + i) - load(D + i)) * splat(LN2);
            if (j >= all) {
                const vi see = lanes_see(l->seen + i, j0 + j);
                e = select_lanes(see, e, (vf){0});
                d = select_lanes(see, d, (vf){0});
            }
            store(s + j * LD + i, e);
            store(ds + j * LD + i, d);
        }
}

/* One key head of one segment. Blocks of keys outermost; dq adds up over them in order. Keys and
 * queries are scaled by log2 e / sqrt(HD): with scores' gradients times ln 2 that gives 1 /
 * sqrt(HD) in dq and dk. */
INLINE void attention_backward_segment(int bf16, const struct att_args *a,
                                       const struct glm_segment *s, int g, char *scratch)
{
    const int NH = a->heads.NH, KVH = a->heads.KVH, HD = a->heads.HD, group = NH / KVH,
              KV = KVH * HD;
    const size_t width = (size_t)(NH + 2 * KVH) * HD;
    const struct att_sizes z = att_sizes_of(HD, bf16);
    const int before = s->shared_count + s->past_count, seen = before + s->count;
    const float scale = LOG2E / sqrtf((float)HD);
    const size_t panel = (size_t)z.block * z.features;
    float *kb = (float *)scratch, *vb = kb + panel, *dk = vb + panel, *dv = dk + panel;
    float *q = dv + panel, *dout = q + panel, *transposed = dout + panel, *dq = transposed + panel;
    float *p = dq + panel, *ds = p + 2 * LD * ATT_BLOCK;
    float *ks = bf16 ? kb + panel / 2 : kb; /* keys, packed for sums over them */
    struct att_lanes l;
    for (int j0 = 0; j0 < seen; j0 += z.block) {
        const int block = seen - j0 < z.block ? seen - j0 : z.block;
        const float *rows[ATT_BLOCK];
        for (int j = 0; j < block; j++)
            rows[j] = visible(a, s, j0 + j, g, 0);
        att_pack(bf16, kb, &z, rows, block, scale);
        if (bf16)
            att_pack_sum(bf16, ks, &z, rows, block, scale);
        for (int j = 0; j < block; j++)
            rows[j] = visible(a, s, j0 + j, g, 1);
        att_pack(bf16, vb, &z, rows, block, 1.0f);
        memset(dk, 0, 2 * panel * 4);
        /* causal: queries before the block's first own key see none of it */
        const int t0 = j0 <= before || s->context > j0 - before ? 0 : j0 - before;
        for (int first = t0 * group; first < s->count * group; first += z.block) {
            float lse[ATT_BLOCK], D[ATT_BLOCK];
            const float *douts[ATT_BLOCK];
            att_set_lanes(&l, s, group, first, z.block);
            for (int i = 0; i < l.count; i++) {
                const int lane = first + i;
                const size_t at = (size_t)(s->begin + lane / group) * NH + g * group + lane % group;
                l.rows[i] = lane_row(a->qkv, width, s, a->heads, g, lane);
                douts[i] = a->dout + at * HD;
                D[i] = dot_row(douts[i], a->out + at * HD, HD);
                lse[i] = a->lse[at] * LOG2E;
            }
            for (int i = l.count; i < whole_lanes(l.count); i++)
                D[i] = lse[i] = 0;
            int n = l.seen[l.count - 1] - j0, all = l.seen[0] - j0;
            n = n < block ? n : block;
            all = all < 0 ? 0 : all < n ? all : n;
            att_transpose(bf16, transposed, &z, l.rows, l.count);
            att_scores(bf16, p, &z, kb, n, transposed, l.count);
            att_transpose(bf16, transposed, &z, douts, l.count);
            att_scores(bf16, ds, &z, vb, n, transposed, l.count);
            att_score_gradient(p, ds, n, all, j0, &l, lse, D);

            for (int i = 0; j0 && i < l.count; i++)
                memcpy(dq + (size_t)i * z.features,
                       lane_row(a->dqkv, width, s, a->heads, g, first + i), (size_t)HD * 4);
            att_add_keys(bf16, j0 > 0, dq, &z, ds, ks, n, l.count);
            for (int i = 0; i < l.count; i++)
                memcpy((float *)lane_row(a->dqkv, width, s, a->heads, g, first + i),
                       dq + (size_t)i * z.features, (size_t)HD * 4);
            att_pack_sum(bf16, dout, &z, douts, l.count, 1.0f);
            att_add_lanes(bf16, dv, &z, p, dout, n, l.count);
            att_pack_sum(bf16, q, &z, l.rows, l.count, scale);
            att_add_lanes(bf16, dk, &z, ds, q, n, l.count);
        }
        for (int j = 0; j < block; j++) {
            const int row = j0 + j;
            const float *from_k = dk + (size_t)j * z.features,
                        *from_v = dv + (size_t)j * z.features;
            float *to_k, *to_v;
            if (row >= before) {
                to_k = a->dqkv + (size_t)(s->begin + row - before) * width + (size_t)(NH + g) * HD;
                to_v = to_k + KV;
                memcpy(to_k, from_k, (size_t)HD * 4);
                memcpy(to_v, from_v, (size_t)HD * 4);
            } else if (row < s->shared_count && a->dcache.k) {
                to_k = (float *)a->dcache.k + (size_t)(s->shared_begin + row) * KV + (size_t)g * HD;
                to_v = (float *)a->dcache.v + (size_t)(s->shared_begin + row) * KV + (size_t)g * HD;
                for (int d = 0; d < HD; d++) {
                    to_k[d] += from_k[d];
                    to_v[d] += from_v[d];
                }
            }
        }
    }
}

/* A task is one key head of one segment (of all segments where gradients of shared rows add up): no
 * two tasks write the same row. */
INLINE void attention_backward_part(int bf16, const struct att_args *a, int task, char *scratch)
{
    const int KVH = a->heads.KVH, all = a->dcache.k != NULL;
    for (int i = all ? 0 : task / KVH; i < (all ? a->n_segments : task / KVH + 1); i++)
        attention_backward_segment(bf16, a, a->segments + i, task % KVH, scratch);
}

static void attention_forward_task(const void *arg, int task, char *scratch)
{
    attention_forward_part(0, arg, task, scratch);
}

static void attention_backward_task(const void *arg, int task, char *scratch)
{
    attention_backward_part(0, arg, task, scratch);
}

#ifdef DOT_BF16
static void attention_forward_bf16_task(const void *arg, int task, char *scratch)
{
    attention_forward_part(1, arg, task, scratch);
}

static void attention_backward_bf16_task(const void *arg, int task, char *scratch)
{
    attention_backward_part(1, arg, task, scratch);
}
#define TASK_OF(cpu, op) ((cpu)->compute == GLM_F32 ? op##_task : op##_bf16_task)
#else
#define TASK_OF(cpu, op) op##_task
#endif

/* Of the queries of all segments with all keys that they may see, about. */
static size_t attention_ns(const struct glm_segment *segments, int n, struct glm_heads heads)
{
    size_t pairs = 0;
    for (int i = 0; i < n; i++) {
        const struct glm_segment *s = &segments[i];
        pairs += (size_t)s->count * heads.NH *
                 ((size_t)s->shared_count + s->past_count + s->count / 2 + 1);
    }
    return pairs + products_ns(pairs * 2 * heads.HD);
}

static void attention_forward(void *cx, void *out, void *lse, const void *qkv, struct glm_kv cache,
                              const struct glm_segment *segments, int n_segments,
                              struct glm_heads heads)
{
    struct cpu *cpu = cx;
    const struct att_args a = {.out = out,
                               .lse = lse,
                               .qkv = qkv,
                               .cache = cache,
                               .segments = segments,
                               .n_segments = n_segments,
                               .heads = heads};
    int tasks = 0;
    for (int i = 0; i < n_segments; i++)
        tasks += att_parts(&segments[i], heads) * heads.KVH;
    glm_pool_run(cpu->pool, tasks, attention_ns(segments, n_segments, heads),
                 TASK_OF(cpu, attention_forward), &a);
}

static void attention_backward(void *cx, void *dqkv, struct glm_kv dcache, const void *dout,
                               const void *out, const void *lse, const void *qkv,
                               struct glm_kv cache, const struct glm_segment *segments,
                               int n_segments, struct glm_heads heads)
{
    struct cpu *cpu = cx;
    const struct att_args a = {.out = (float *)out,
                               .lse = (float *)lse,
                               .dqkv = dqkv,
                               .dout = dout,
                               .qkv = qkv,
                               .cache = cache,
                               .dcache = dcache,
                               .segments = segments,
                               .n_segments = n_segments,
                               .heads = heads};
    glm_pool_run(cpu->pool, dcache.k ? heads.KVH : n_segments * heads.KVH,
                 3 * attention_ns(segments, n_segments, heads), TASK_OF(cpu, attention_backward),
                 &a);
}
