/* A model to another backend: every weight that the core owns goes by way of the host, in chunks.
 * Weights that the caller names are left unbound there, since it has them. */
#include <stdlib.h>
#include <string.h>

#include "state.h"

enum { BOUNCE = 1 << 24 };

struct moved {
    void *from, *to;
    size_t bytes;
};

static glm_status carry(struct moved *x, struct glm_backend *from, struct glm_backend *to,
                        char *bounce, const char *what, struct glm_error *err)
{
    x->to = to->alloc(to, x->bytes);
    if (!x->to)
        return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken on %s", what, x->bytes,
                        to->name);
    for (size_t at = 0; at < x->bytes; at += BOUNCE) {
        const size_t n = x->bytes - at < BOUNCE ? x->bytes - at : BOUNCE;
        from->download(from, bounce, (char *)x->from + at, n);
        to->upload(to, (char *)x->to + at, bounce, n);
    }
    if (from->error && from->error(from))
        return glm_fail(err, GLM_ESTATE, "%s cannot be read back: %s", what, from->error(from));
    return GLM_OK;
}

/* Bytes of what w owns: elements, and scales behind them (weights.c: upload_mat) */
static size_t owned_bytes(const struct glm_weight *w)
{
    const size_t elements = glm_bytes(w->mat.dtype, glm_count(w)), all = glm_mat_bytes(&w->mat);
    return all == elements ? elements : (elements + 63) / 64 * 64 + all - elements;
}

/* A pointer into memory that moved */
static const void *shifted(const void *p, const struct moved *x)
{
    return p ? (const char *)x->to + ((const char *)p - (const char *)x->from) : NULL;
}

glm_status glm_model_move(struct glm_model *m, struct glm_backend *to, const int *left, int n_left,
                          struct glm_error *err)
{
    struct glm_backend *from = m->be;
    const size_t size = from->real_size;
    if (to == from)
        return GLM_OK;
    if (to->real != from->real)
        return glm_fail(err, GLM_EVALUE, "move: %s and %s do not compute in the same type",
                        from->name, to->name);
    /* one for each weight, the trainable block, the rotary table */
    const int n = m->n_weights + 2;
    struct moved *all = calloc((size_t)n, sizeof *all), *block = all + m->n_weights,
                 *table = block + 1;
    char *bounce = malloc(BOUNCE), *leaves = calloc((size_t)m->n_weights, 1);
    glm_status status = GLM_OK;
    if (!all || !bounce || !leaves)
        status = glm_fail(err, GLM_EMEMORY, "move: %d bytes could not be taken", BOUNCE);
    for (int i = 0; status == GLM_OK && i < n_left; i++) {
        if (left[i] < 0 || left[i] >= m->n_weights || m->weights[left[i]].grad)
            status = glm_fail(err, GLM_ESTATE, "move: weight %d is trained, so the core has it",
                              left[i]);
        else
            leaves[left[i]] = 1;
    }
    for (int i = 0; status == GLM_OK && i < m->n_weights; i++) {
        const struct glm_weight *w = &m->weights[i];
        if (!w->present || !w->mat.data || w->grad || leaves[i])
            continue;
        if (!w->owned) {
            status = glm_fail(err, GLM_ESTATE, "move: %s lies with its caller, who must say so",
                              w->name);
            break;
        }
        all[i].from = w->owned;
        all[i].bytes = owned_bytes(w);
        status = carry(&all[i], from, to, bounce, w->name, err);
    }
    if (status == GLM_OK && m->block) {
        block->from = m->block;
        block->bytes = 4 * m->block_size * size + sizeof(double);
        status = carry(block, from, to, bounce, "parameters, gradients and moments", err);
    }
    if (status == GLM_OK) { /* filled again where it is read */
        table->bytes = (size_t)m->arch.max_positions * m->arch.rotary_dim * size;
        table->to = to->alloc(to, table->bytes);
        if (!table->to)
            status = glm_fail(err, GLM_EMEMORY, "rotary table: %zu bytes could not be taken on %s",
                              table->bytes, to->name);
    }
    if (status == GLM_OK && to->stopped(to))
        status = glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    for (int i = 0; all && status != GLM_OK && i < n; i++)
        to->free(to, all[i].to);
    if (status == GLM_OK) {
        for (int i = 0; i < m->n_weights; i++) {
            struct glm_weight *w = &m->weights[i];
            if (w->grad) {
                w->grad = (void *)shifted(w->grad, block);
                w->mat.data = shifted(w->mat.data, block);
                continue;
            }
            from->free(from, w->owned);
            w->owned = all[i].to;
            w->mat.data = all[i].to;
            w->mat.scale = all[i].to ? shifted(w->mat.scale, &all[i]) : NULL;
        }
        from->free(from, m->block);
        from->free(from, m->rope_table);
        glm_arena_free(&m->arena, from);
        m->block = block->to;
        m->rope_table = table->to;
        m->rope_rows = 0;
        m->be = to;
        m->version++;
    }
    free(all);
    free(bounce);
    free(leaves);
    return status;
}
