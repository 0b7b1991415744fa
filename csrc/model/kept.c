/* Several adapters at once. One that was attached (adapter.c) can be kept aside under a number, and
 * each row of a cache says whose it is: a call then computes rows of all of them, W x once for all
 * (linear.c). A row has the same bits as in a call of its own. */
#include <stdlib.h>

#include "state.h"

static void release(struct glm_model *m, struct glm_kept *kept)
{
    for (int i = 0; kept->slots && i < glm_n_linears(m) * GLM_LORA_SLOTS; i++)
        glm_weight_release(m, &kept->slots[i]);
    free(kept->slots);
    free(kept->linears);
    *kept = (struct glm_kept){0};
}

void glm_kept_free(struct glm_model *m)
{
    for (int k = 0; k < m->n_kept; k++)
        release(m, &m->kept[k]);
    free(m->kept);
    m->kept = NULL;
    m->n_kept = 0;
}

/* Moves what is attached to a linear, the weights with their memory. */
static void take_over(const struct glm_linear *from, struct glm_linear *to,
                      struct glm_weight *slots)
{
    *to = *from;
    to->A = &slots[0];
    to->B = &slots[1];
    to->B_bias = &slots[2];
    to->magnitude = &slots[3];
    to->derived = &slots[4];
    for (int i = 0; i < GLM_LORA_SLOTS; i++) {
        struct glm_weight *slot = &from->A[i];
        slots[i] = *slot;
        slot->mat = (struct glm_mat){0};
        slot->owned = NULL;
        slot->present = slot->rows = slot->cols = 0;
    }
}

glm_status glm_model_keep_lora(struct glm_model *m, int *number, struct glm_error *err)
{
    const int n = glm_n_linears(m);
    int attached = 0;
    for (int i = 0; i < n; i++) {
        const struct glm_linear *lin = glm_linear_at(m, i);
        if (!lin->weight || !glm_present(lin->A))
            continue;
        attached++;
        for (int j = 0; j < GLM_LORA_SLOTS; j++)
            GLM_TRY(glm_refuse_trainable(&lin->A[j], err));
    }
    if (!attached)
        return glm_fail(err, GLM_ESTATE, "keep_lora: no adapter is attached");
    struct glm_kept kept = {.linears = calloc((size_t)n, sizeof *kept.linears),
                            .slots = calloc((size_t)n * GLM_LORA_SLOTS, sizeof *kept.slots)};
    struct glm_kept *all = realloc(m->kept, ((size_t)m->n_kept + 1) * sizeof *all);
    if (all)
        m->kept = all;
    if (!all || !kept.linears || !kept.slots) {
        release(m, &kept);
        return glm_fail(err, GLM_EMEMORY, "keep_lora: %zu bytes could not be taken",
                        (size_t)n * (sizeof *kept.linears + GLM_LORA_SLOTS * sizeof *kept.slots));
    }
    for (int i = 0; i < n; i++) {
        const struct glm_linear *lin = glm_linear_at(m, i);
        struct glm_weight *slots = &kept.slots[(size_t)i * GLM_LORA_SLOTS];
        if (lin->weight)
            take_over(lin, &kept.linears[i], slots);
        else
            kept.linears[i].A = slots; /* not present */
    }
    m->kept[m->n_kept++] = kept;
    m->version++;
    *number = m->n_kept;
    return GLM_OK;
}

const struct glm_linear *glm_kept_linear(const struct glm_model *m, const struct glm_linear *lin,
                                         int number)
{
    if (number == 0)
        return lin;
    const ptrdiff_t layer =
        ((const char *)lin - (const char *)m->layers) / (ptrdiff_t)sizeof *m->layers;
    return &m->kept[number - 1].linears[layer * GLM_LINEARS + (lin - m->layers[layer].linear)];
}

/* The adapter of segment i of this call */
static int adapter_of(const struct glm_step *s, int i)
{
    const struct glm_cache *c = s->call.cache;
    return s->call.cache_rows ? c->adapters[s->call.cache_rows[i]] : c->shared_adapter;
}

int glm_several_adapters(const struct glm_step *s)
{
    for (int i = 0; s->call.cache && i < s->S; i++)
        if (adapter_of(s, i))
            return 1;
    return 0;
}

int glm_next_run(const struct glm_model *m, const struct glm_rows *rows, struct glm_run_of_rows *r)
{
    const struct glm_step *s = &m->step;
    const int all = rows->position == s->all.position; /* else a segment has one row, its last */
    const int first = all ? 0 : (int)(rows->position - s->read.position);
    const int end = all ? s->S : first + rows->n;
    int i = r->next ? r->next : first;
    if (i >= end)
        return 0;
    r->begin += r->count;
    r->count = 0;
    r->adapter = adapter_of(s, i);
    for (; i < end && adapter_of(s, i) == r->adapter; i++)
        r->count += all ? s->host.segments[i].count : 1;
    r->next = i;
    return 1;
}
