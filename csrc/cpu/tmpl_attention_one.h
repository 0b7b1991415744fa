/* attention_forward of a segment of one token, where few queries share a key head: its lanes would
 * leave most of a vector empty. Here vectors run along the keys in scores and weights, and along the
 * features in what is added up. The order of every sum is that of tmpl_attention.h: features of a
 * score, keys of a row, block by block; so the bits are the same. */

enum { FEW_QUERIES = VL / 2 };

INLINE int is_one_token(const struct glm_segment *s, struct glm_heads heads)
{
    return s->count == 1 && heads.NH / heads.KVH <= FEW_QUERIES && heads.HD % VL == 0;
}

/* scores[r * ATT_BLOCK + j] of n keys with the R queries; -infinity up to a whole vector of keys */
INLINE void one_scores(float *scores, const float *q, int R, int HD, const float *const *keys,
                       int n)
{
    const vf factor = splat(LOG2E / sqrtf((float)HD));
    for (int j = 0; j < n; j += VL)
        for (int d = 0; d < HD; d += VL) {
            vf x[VL];
            for (int i = 0; i < VL; i++)
                x[i] = j + i < n ? load(keys[j + i] + d) * factor : (vf){0};
            transpose(x);
            for (int r = 0; r < R; r++) {
                float *s = scores + r * ATT_BLOCK + j;
                vf acc = d ? load(s) : (vf){0};
                for (int i = 0; i < VL; i++)
                    acc = MADD(x[i], splat(q[r * HD + d + i]), acc);
                store(s, acc);
            }
        }
    for (int r = 0; r < R; r++)
        for (int j = n; j < (n + VL - 1) / VL * VL; j++)
            scores[r * ATT_BLOCK + j] = -INFINITY;
}

/* Scores become weights; top and sum run on. Returns what the sums so far are multiplied by. */
INLINE float one_softmax(float *s, int n, float *top, float *sum)
{
    vf most = splat(-INFINITY);
    float before = *top, total = 0;
    for (int j = 0; j < n; j += VL)
        most = VMAX(load(s + j), most);
    for (int i = 0; i < VL; i++)
        *top = most[i] > *top ? most[i] : *top;
    for (int j = 0; j < n; j += VL)
        store(s + j, exp2_vector(load(s + j) - splat(*top)));
    for (int j = 0; j < n; j++)
        total += s[j];
    const float keep = exp2_vector(splat(before - *top))[0];
    *sum = *sum * keep + total;
    return keep;
}

INLINE void attention_one(const struct att_args *a, const struct glm_segment *s, int g,
                          float *scratch)
{
    const int NH = a->heads.NH, KVH = a->heads.KVH, HD = a->heads.HD, R = NH / KVH;
    const int seen = last_visible(s, 0), block = att_block(HD);
    const float *q = a->qkv + (size_t)s->begin * (NH + 2 * KVH) * HD + (size_t)g * R * HD;
    const size_t at = (size_t)s->begin * NH + (size_t)g * R;
    float *out = a->out + at * HD, *p = scratch, top[FEW_QUERIES], sum[FEW_QUERIES];
    for (int r = 0; r < R; r++) {
        top[r] = -INFINITY;
        sum[r] = 0;
    }
    for (int j0 = 0; j0 < seen; j0 += block) {
        const int n = seen - j0 < block ? seen - j0 : block;
        const float *keys[ATT_BLOCK], *values[ATT_BLOCK];
        for (int j = 0; j < n; j++) {
            keys[j] = visible(a, s, j0 + j, g, 0);
            values[j] = visible(a, s, j0 + j, g, 1);
        }
        one_scores(p, q, R, HD, keys, n);
        for (int r = 0; r < R; r++) {
            const float *weight = p + r * ATT_BLOCK;
            const float keep = one_softmax(p + r * ATT_BLOCK, n, &top[r], &sum[r]);
            for (int d = 0; d < HD; d += VL) {
                vf o = {0};
                if (j0)
                    o = keep != 1.0f ? load(out + r * HD + d) * splat(keep)
                                     : load(out + r * HD + d);
                for (int j = 0; j < n; j++)
                    o = MADD(splat(weight[j]), load(values[j] + d), o);
                store(out + r * HD + d, o);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int d = 0; d < HD; d += VL)
            store(out + r * HD + d, load(out + r * HD + d) * splat(1.0f / sum[r]));
        a->lse[at + r] = top[r] * LN2 + logf(sum[r]);
    }
}
