/* Scores to the next token, in float32 (spec: repetition penalty, bans, temperature, top-k, top-p,
 * softmax, draw). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "choice.h"
#include "glm.h"

void glm_touched_ids(int32_t *ids, int *penalised, int *banned, int n, const int32_t *context,
                     int n_context, double repetition_penalty, int no_repeat_ngram,
                     const int32_t *suppress, int n_suppress, unsigned char *seen)
{
    enum { PENALISED = 1, BANNED = 2 };
    const int32_t *first = ids;
    memset(seen, 0, (size_t)n);
    for (int i = 0; repetition_penalty != 1.0 && i < n_context; i++) {
        const int id = context[i];
        if (id < 0 || id >= n || seen[id])
            continue;
        seen[id] = PENALISED;
        *ids++ = id;
    }
    *penalised = (int)(ids - first);
    /* every id that would complete an n-gram seen before, then those that are suppressed */
    const int g = no_repeat_ngram, n_grams = g > 0 && n_context >= g ? n_context - g + 1 : 0;
    for (int i = 0; i < n_grams + n_suppress; i++) {
        const int id = i < n_grams ? context[i + g - 1] : suppress[i - n_grams];
        if (id < 0 || id >= n || seen[id] & BANNED)
            continue;
        if (i < n_grams && memcmp(context + i, context + n_context - (g - 1),
                                  (size_t)(g - 1) * sizeof *context) != 0)
            continue;
        seen[id] |= BANNED;
        *ids++ = id;
    }
    *banned = (int)(ids - first) - *penalised;
}

static int by_score(const void *a, const void *b)
{
    const struct glm_scored *x = a, *y = b;
    if (x->score != y->score)
        return x->score < y->score ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* The k-th largest of scratch (n), by quickselect on descending scores. */
static float kth_score(struct glm_scored *s, int n, int k)
{
    int low = 0, high = n - 1;
    while (low < high) {
        const float pivot = s[low + (high - low) / 2].score;
        int i = low, j = high;
        while (i <= j) {
            while (s[i].score > pivot)
                i++;
            while (s[j].score < pivot)
                j--;
            if (i <= j) {
                const struct glm_scored t = s[i];
                s[i++] = s[j];
                s[j--] = t;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            break;
    }
    return s[k - 1].score;
}

/* probs (n) of logits (n), scratch (n). Ties at the k-th score stay; top-p drops, from the least
 * likely up, what has cumulated mass <= 1 - top_p, and always keeps min_keep. */
void glm_warp_logits(float *probs, const float *logits, int n, double temperature, int top_k,
                     double top_p, int min_keep, struct glm_scored *scratch)
{
    const float T = (float)temperature;
    int kept = 0;
    for (int i = 0; i < n; i++)
        scratch[i] = (struct glm_scored){temperature == 1.0 ? logits[i] : logits[i] / T, i};
    if (top_k > 0 && top_k < n) {
        const float least = kth_score(scratch, n, top_k > min_keep ? top_k : min_keep);
        for (int i = 0; i < n; i++)
            if (scratch[i].score >= least)
                scratch[kept++] = scratch[i];
    } else {
        kept = n;
    }
    memset(probs, 0, (size_t)n * sizeof *probs);
    qsort(scratch, (size_t)kept, sizeof *scratch, by_score);
    double sum = 0;
    for (int i = 0; i < kept; i++)
        sum += exp((double)scratch[i].score - scratch[0].score);
    if (top_p < 1.0) {
        double tail = 0;
        while (kept > min_keep && kept > 1) {
            tail += exp((double)scratch[kept - 1].score - scratch[0].score) / sum;
            if (tail > 1.0 - top_p)
                break;
            kept--;
        }
        sum = 0;
        for (int i = 0; i < kept; i++)
            sum += exp((double)scratch[i].score - scratch[0].score);
    }
    for (int i = 0; i < kept; i++)
        probs[scratch[i].id] = (float)(exp((double)scratch[i].score - scratch[0].score) / sum);
}

/* The draw of (seed, stream, index): the same for any thread count, and for a row whatever the
 * other rows do. */
int glm_draw(const float *probs, int n, uint64_t seed, uint32_t stream, uint32_t index)
{
    const double u = glm_fraction(seed, stream, index);
    double sum = 0, total = 0;
    int last = 0;
    for (int i = 0; i < n; i++)
        total += probs[i];
    for (int i = 0; i < n; i++) {
        if (probs[i] <= 0)
            continue;
        sum += probs[i];
        last = i;
        if (sum > u * total)
            return i;
    }
    return last;
}

int glm_argmax(const float *logits, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}
