/* Adapters come and go: LoRA on linears, merged if asked, and P-Tuning v2's prefix encoder. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

/* ---- LoRA */

static void empty(struct glm_model *m, struct glm_weight *w)
{
    glm_weight_release(m, w);
    w->present = 0;
    w->rows = w->cols = 0;
    m->version++;
}

/* Takes the trainables of a kind out of the trainable set before their weights go. */
static void forget_trainables(struct glm_model *m, enum glm_weight_kind kind)
{
    for (int i = 0; i < m->n_trainable; i++)
        if (m->weights[m->trainable[i]].kind == kind) {
            struct glm_error ignored; /* [] allocates only for weights that stay */
            glm_model_set_trainable(m, NULL, 0, &ignored);
            return;
        }
}

static struct glm_linear *find_linear(struct glm_model *m, const char *module)
{
    char name[GLM_MAX_NAME];
    snprintf(name, sizeof name, "%s.lora_A.weight", module);
    for (int i = 0; i < glm_n_linears(m); i++) {
        struct glm_linear *lin = glm_linear_at(m, i);
        if (lin->weight && strcmp(lin->A->name, name) == 0)
            return lin;
    }
    return NULL;
}

/* An owned copy of (rows, cols); nothing where values are NULL. */
static glm_status take(struct glm_model *m, struct glm_weight *w, const void *values, int rows,
                       int cols, struct glm_error *err)
{
    w->rows = rows;
    w->cols = cols;
    w->present = values != NULL;
    return values ? glm_weight_own(m, w, values, m->be->real, err) : GLM_OK;
}

/* Room for what is derived, and the one behind it. */
static glm_status take_derived(struct glm_model *m, struct glm_linear *lin, struct glm_error *err)
{
    const size_t n = (size_t)lin->weight->rows + 1;
    double *values = calloc(n, sizeof *values);
    if (!values)
        return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken", lin->derived->name,
                        n * sizeof *values);
    values[n - 1] = 1;
    lin->derived->rows = (int)n;
    lin->derived->cols = lin->derived->present = 1;
    const glm_status status = glm_weight_own(m, lin->derived, values, GLM_F64, err);
    free(values);
    return status;
}

glm_status glm_model_add_lora(struct glm_model *m, const char *module, const struct glm_lora *lora,
                              struct glm_error *err)
{
    struct glm_linear *lin = find_linear(m, module);
    const int R = lora->A_rows;
    if (!lin)
        return glm_fail(err, GLM_EVALUE, "module: %s is no linear layer of this model", module);
    const int O = lin->weight->rows, I = lin->weight->cols;
    if (R < 1 || lora->A_cols != I || lora->B_rows != O || lora->B_cols != R)
        return glm_fail(err, GLM_EVALUE,
                        "%s: expected lora_A (r, %d) and lora_B (%d, r), got (%d, %d) and (%d, %d)",
                        module, I, O, R, lora->A_cols, lora->B_rows, lora->B_cols);
    if (!isfinite(lora->scale) || !(lora->dropout >= 0 && lora->dropout < 1))
        return glm_fail(err, GLM_EVALUE, "%s: scale %g must be finite and dropout %g in [0, 1)",
                        module, lora->scale, lora->dropout);
    if (lora->B_bias && lora->magnitude)
        return glm_fail(err, GLM_EVALUE, "%s: has a magnitude and a bias of lora_B, expected one",
                        module);
    struct glm_weight *slots = lin->A;
    for (int i = 0; i < GLM_LORA_SLOTS; i++)
        GLM_TRY(glm_refuse_trainable(&slots[i], err));
    for (int i = 2; i < GLM_LORA_SLOTS; i++)
        empty(m, &slots[i]);
    glm_status status = take(m, lin->A, lora->A, R, I, err);
    if (status == GLM_OK)
        status = take(m, lin->B, lora->B, O, R, err);
    if (status == GLM_OK)
        status = take(m, lin->B_bias, lora->B_bias, O, 1, err);
    if (status == GLM_OK)
        status = take(m, lin->magnitude, lora->magnitude, O, 1, err);
    if (status == GLM_OK && (lora->B_bias || lora->magnitude))
        status = take_derived(m, lin, err);
    for (int i = 0; status != GLM_OK && i < GLM_LORA_SLOTS; i++)
        empty(m, &slots[i]);
    lin->scale = lora->scale;
    lin->dropout = lora->dropout;
    return status;
}

void glm_model_remove_lora(struct glm_model *m)
{
    forget_trainables(m, GLM_LORA);
    for (int i = m->n_base; i < m->n_weights; i++)
        if (m->weights[i].kind != GLM_PREFIX && m->weights[i].present)
            empty(m, &m->weights[i]);
}

void glm_model_enable_lora(struct glm_model *m, int on)
{
    m->lora_on = on;
    m->version++;
}

static glm_status refuse_merge(struct glm_model *m, struct glm_error *err)
{
    for (int i = 0; i < glm_n_linears(m); i++) {
        const struct glm_linear *lin = glm_linear_at(m, i);
        if (!glm_present(lin->A))
            continue;
        GLM_TRY(glm_refuse_quantized(lin->weight,
                                     "merged into: keep the adapter beside it, or merge it into "
                                     "the float weights",
                                     err));
        if (glm_present(lin->B_bias) && !lin->bias)
            return glm_fail(err, GLM_ESTATE,
                            "%s cannot be merged: %s has no bias; keep the adapter beside it",
                            lin->B_bias->name, lin->weight->name);
        if (lin == m->head && m->arch.tied_head)
            return glm_fail(err, GLM_ESTATE,
                            "%s belongs to the output layer alone, which shares %s with the "
                            "embeddings: keep the adapter beside it",
                            lin->B->name, lin->weight->name);
    }
    return GLM_OK;
}

glm_status glm_model_merge_lora(struct glm_model *m, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    GLM_TRY(glm_weights_complete(m, err));
    GLM_TRY(refuse_merge(m, err));
    glm_adapters_derive(m);
    /* every copy first: a merge that runs out of memory leaves the model as it was */
    const size_t n = (size_t)m->arch.layers * GLM_LINEARS + 1;
    void **copies = calloc(n, sizeof *copies);
    glm_status status = copies
                            ? GLM_OK
                            : glm_fail(err, GLM_EMEMORY, "merge_lora: %zu bytes could not be taken",
                                       n * sizeof *copies);
    for (int i = 0; status == GLM_OK && i < (int)n; i++) {
        struct glm_linear *lin = glm_linear_at(m, i);
        struct glm_weight *w = lin->weight;
        if (!glm_present(lin->A) || w->owned || w->grad)
            continue;
        const size_t bytes = glm_bytes(w->mat.dtype, glm_count(w));
        copies[i] = be->alloc(be, bytes);
        if (!copies[i])
            status = glm_fail(err, GLM_EMEMORY, "merge_lora: %s: %zu bytes could not be taken",
                              w->name, bytes);
        else
            be->upload(be, copies[i], w->mat.data, bytes);
    }
    for (int i = 0; copies && i < (int)n; i++) {
        struct glm_linear *lin = glm_linear_at(m, i);
        struct glm_weight *w = lin->weight;
        if (status != GLM_OK) {
            be->free(be, copies[i]);
            continue;
        }
        if (!glm_present(lin->A))
            continue;
        if (copies[i])
            w->mat.data = w->owned = copies[i];
        const int dora = glm_present(lin->magnitude);
        be->ops->merge(be->cx, (void *)w->mat.data, w->mat.dtype, lin->B->mat.data,
                       lin->A->mat.data, dora ? lin->magnitude->mat.data : NULL,
                       dora ? lin->derived->mat.data : NULL, w->rows, w->cols, lin->A->rows,
                       lin->scale);
        if (glm_present(lin->B_bias))
            be->copy(be, (void *)lin->bias->mat.data, lin->derived->mat.data,
                     (size_t)w->rows * be->real_size);
    }
    free(copies);
    if (status == GLM_OK)
        glm_model_remove_lora(m);
    return status;
}

/* ---- P-Tuning v2 */

glm_status glm_model_set_prefix(struct glm_model *m, int P, const void *embedding, const void *w0,
                                const void *b0, const void *w2, const void *b2, double dropout,
                                struct glm_error *err)
{
    const int kv = 2 * m->arch.layers * m->arch.kv_heads * m->arch.head_dim;
    const int H = m->arch.hidden, projection = w0 != NULL;
    const int width = projection ? m->arch.prefix_input : kv;
    const void *values[GLM_PREFIX_WEIGHTS] = {embedding, w0, b0, w2, b2};
    const int rows[GLM_PREFIX_WEIGHTS] = {P, H, H, kv, kv},
              cols[GLM_PREFIX_WEIGHTS] = {width, width, 1, H, 1};
    if (P < 1 || P > 1 << 16)
        return glm_fail(err, GLM_EVALUE, "pre_seq_len: expected 1 to 65536, got %d", P);
    if (projection != (b0 != NULL) || projection != (w2 != NULL) || projection != (b2 != NULL))
        return glm_fail(err, GLM_EVALUE,
                        "prefix: with projection all of trans.0 and trans.2 are needed");
    if (!(dropout >= 0 && dropout < 1))
        return glm_fail(err, GLM_EVALUE, "prefix dropout: expected 0 <= p < 1, got %g", dropout);
    glm_model_remove_prefix(m);
    for (int i = 0; i < (projection ? GLM_PREFIX_WEIGHTS : 1); i++) {
        m->prefix[i].rows = rows[i];
        m->prefix[i].cols = cols[i];
        glm_status status = glm_weight_own(m, &m->prefix[i], values[i], m->be->real, err);
        if (status != GLM_OK) {
            glm_model_remove_prefix(m);
            return status;
        }
        m->prefix[i].present = 1;
    }
    m->prefix_length = P;
    m->prefix_dropout = dropout;
    return GLM_OK;
}

void glm_model_remove_prefix(struct glm_model *m)
{
    forget_trainables(m, GLM_PREFIX);
    for (int i = 0; i < GLM_PREFIX_WEIGHTS; i++)
        empty(m, &m->prefix[i]);
    m->prefix_length = 0;
}
