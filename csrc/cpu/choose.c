/* The op `choose`: radix selection over keys, so that nothing is sorted and nothing is stored. */
#include <math.h>
#include <string.h>

#include "choice.h"
#include "kernels.h"

enum { DIGIT = 11 };

/* A row of scores whose columns stay while their (score, -column) is at least (least, -last). */
struct row {
    float *x;
    int V, last;
    float top;
    uint32_t least;
};

/* Bits that are ordered as the scores are. */
static uint32_t ordered(float score)
{
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static float score_of(uint32_t key)
{
    const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float score;
    memcpy(&score, &bits, 4);
    return score;
}

static uint64_t mass_of(const struct row *r, float score)
{
    return (uint64_t)(expf(score - r->top) * 0x1p40f);
}

static int stays(const struct row *r, uint32_t key, int v)
{
    return key > r->least || (key == r->least && v <= r->last);
}

/* The largest key such that the columns that stay from it up weigh at least `need`: 1 each, or
 * their masses. *above: what those beyond it weigh. */
static uint32_t descend(const struct row *r, int masses, uint64_t need, uint64_t *above)
{
    uint64_t weight[1 << DIGIT];
    uint32_t place = 0;
    *above = 0;
    for (int shift = 32; shift > 0;) {
        const int before = shift, digit = shift < DIGIT ? shift : DIGIT;
        shift -= digit;
        memset(weight, 0, sizeof weight);
        for (int v = 0; v < r->V; v++) {
            const float score = r->x[v];
            const uint32_t key = ordered(score);
            if ((uint64_t)key >> before == (uint64_t)place >> before && stays(r, key, v))
                weight[key >> shift & ((1u << digit) - 1)] += masses ? mass_of(r, score) : 1;
        }
        uint32_t at = (1u << digit) - 1;
        for (; at && *above + weight[at] < need; at--)
            *above += weight[at];
        place |= at << shift;
    }
    return place;
}

/* What the columns that stay weigh up to and including the first where that is more than `over`,
 * which is left in *column. */
static uint64_t masses_until(const struct row *r, uint64_t over, int *column)
{
    uint64_t sum = 0;
    for (int v = 0; v < r->V; v++) {
        const float score = r->x[v];
        if (!stays(r, ordered(score), v))
            continue;
        sum += mass_of(r, score);
        *column = v;
        if (sum > over)
            break;
    }
    return sum;
}

static int draw(struct row *r, const struct glm_choice *c)
{
    uint64_t above;
    int column = 0;
    if (c->top_k > 0 && c->top_k < r->V)
        r->least = descend(r, 0, (uint64_t)c->top_k, &above);
    uint64_t total = masses_until(r, UINT64_MAX, &column);
    if (c->top_p < 1) {
        const uint64_t rest = (uint64_t)((1 - c->top_p) * (double)total);
        const uint64_t need = rest < total ? total - rest : 1;
        r->least = descend(r, 1, need, &above);
        const uint64_t each = mass_of(r, score_of(r->least));
        uint64_t equal = (need - above + each - 1) / each; /* that stay */
        for (int v = 0; v < r->V && equal; v++)
            if (ordered(r->x[v]) == r->least) {
                r->last = v;
                equal--;
            }
        total = masses_until(r, UINT64_MAX, &column);
    }
    const double u = glm_fraction(c->seed, c->stream, c->index);
    masses_until(r, (uint64_t)(u * (double)total), &column);
    return column;
}

/* The first largest of a row, and whether all are finite */
static int argmax(const float *x, int V, int *finite)
{
    int best = 0, other = 0;
    float most = x[0];
    for (int v = 0; v < V; v++)
        other |= !isfinite(x[v]);
    for (int v = 1; v < V; v++)
        if (x[v] > most) {
            most = x[v];
            best = v;
        }
    *finite = !other;
    return best;
}

static int choose_of(float *x, int V, const struct glm_choice *c, const int32_t *touched)
{
    int finite, best = argmax(x, V, &finite);
    if (!finite)
        return -1;
    glm_adjust_logits(x, touched + c->first, c->penalised, c->banned, c->penalty);
    if (c->penalised + c->banned)
        best = argmax(x, V, &finite);
    if (!isfinite(x[best]))
        return -2;
    struct row r = {.x = x, .V = V, .last = V, .top = x[best] / c->temperature + 0.0f};
    if (c->temperature == 0 || !isfinite(r.top))
        return best;
    for (int v = 0; v < V; v++)
        x[v] = x[v] / c->temperature + 0.0f; /* -0 as 0 */
    return draw(&r, c);
}

void glm_choose_task(const void *arg, int task, char *scratch)
{
    const struct choose_args *a = arg;
    (void)scratch;
    a->id[task] = choose_of(a->x + (size_t)task * a->V, a->V, a->choices + task, a->touched);
}
