/* Weights in slots: listed, found by name, bound to the caller's arrays or owned. */
#include <string.h>

#include "state.h"

void glm_weight_release(struct glm_model *m, struct glm_weight *w)
{
    m->be->free(m->be, w->owned);
    w->owned = NULL;
    w->mat.data = NULL;
    w->grad = NULL;
}

int glm_model_weight(struct glm_model *m, int i, struct glm_weight_info *info)
{
    if (i < 0 || i >= m->n_weights)
        return 0;
    const struct glm_weight *w = &m->weights[i];
    if (!w->present || w->kind == GLM_DERIVED)
        return -1;
    *info = (struct glm_weight_info){
        w->name,     w->kind,     w->rows, w->cols, w->rank, w->mat.dtype, w->mat.data != NULL,
        w->mat.data, w->mat.scale};
    return 1;
}

int glm_model_find(struct glm_model *m, const char *name)
{
    for (int i = 0; i < m->n_weights; i++)
        if (m->weights[i].present && m->weights[i].kind != GLM_DERIVED &&
            strcmp(m->weights[i].name, name) == 0)
            return i;
    return -1;
}

void glm_weight_set(struct glm_weight *w, const void *data, enum glm_dtype dtype)
{
    w->mat = (struct glm_mat){.data = data, .dtype = dtype, .rows = w->rows, .cols = w->cols};
}

/* An owned real copy of n host elements of a dtype. */
glm_status glm_weight_own(struct glm_model *m, struct glm_weight *w, const void *host,
                          enum glm_dtype dtype, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const size_t n = glm_count(w);
    void *value = be->alloc(be, n * be->real_size);
    void *raw = dtype == be->real ? NULL : be->alloc(be, glm_bytes(dtype, n));
    if (!value || (dtype != be->real && !raw)) {
        be->free(be, value);
        be->free(be, raw);
        return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken", w->name,
                        n * be->real_size);
    }
    be->upload(be, raw ? raw : value, host, glm_bytes(dtype, n));
    if (raw)
        be->ops->convert(be->cx, value, be->real, raw, dtype, n);
    be->free(be, raw);
    be->free(be, w->owned);
    w->owned = value;
    glm_weight_set(w, value, be->real);
    m->version++;
    return GLM_OK;
}

glm_status glm_refuse_trainable(const struct glm_weight *w, struct glm_error *err)
{
    if (w->grad)
        return glm_fail(err, GLM_ESTATE,
                        "%s is being trained: end training first (set_trainable([]))", w->name);
    return GLM_OK;
}

glm_status glm_refuse_quantized(const struct glm_weight *w, const char *what, struct glm_error *err)
{
    if (glm_is_quantized(w->mat.dtype))
        return glm_fail(err, GLM_ESTATE, "%s is quantized and cannot be %s", w->name, what);
    return GLM_OK;
}

static glm_status check_quantized(struct glm_model *m, const struct glm_weight *w,
                                  const struct glm_mat *mat, struct glm_error *err)
{
    int linear = 0;
    for (int i = 0; i < m->arch.layers * GLM_LINEARS; i++)
        linear |= glm_linear_at(m, i)->weight == w;
    if (!linear)
        return glm_fail(err, GLM_EVALUE, "%s: only linear layers can be quantized", w->name);
    if (!mat->scale)
        return glm_fail(err, GLM_EVALUE, "%s: integers without scales", w->name);
    if (mat->group && (mat->dtype != GLM_I4 || mat->group < 32 || mat->group % 32))
        return glm_fail(err, GLM_EVALUE,
                        "%s: group: expected a multiple of 32 with I4, or 0, got %d", w->name,
                        mat->group);
    if (mat->dtype == GLM_I4 && w->cols % 2)
        return glm_fail(err, GLM_EVALUE, "%s: 4 bits need an even number of columns, got %d",
                        w->name, w->cols);
    return GLM_OK;
}

/* An owned copy of a host matrix in its stored dtype, its scales behind its elements. */
static glm_status upload_mat(struct glm_model *m, struct glm_weight *w, const struct glm_mat *mat,
                             struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const size_t elements = glm_bytes(mat->dtype, glm_count(w)), all = glm_mat_bytes(mat);
    const size_t start = (elements + 63) / 64 * 64;
    char *copy = be->alloc(be, start + all - elements);
    if (!copy)
        return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken on %s", w->name, all,
                        be->name);
    be->upload(be, copy, mat->data, elements);
    if (mat->scale)
        be->upload(be, copy + start, mat->scale, all - elements);
    be->free(be, w->owned);
    w->owned = copy;
    w->mat = *mat;
    w->mat.data = copy;
    w->mat.scale = mat->scale ? (const uint16_t *)(copy + start) : NULL;
    m->version++;
    return GLM_OK;
}

glm_status glm_model_bind(struct glm_model *m, const char *name, const struct glm_mat *mat,
                          int rank, struct glm_error *err)
{
    const int rows = mat->rows, cols = mat->cols;
    int i = glm_model_find(m, name);
    if (i < 0 || m->weights[i].kind != GLM_BASE)
        return glm_fail(err, GLM_EVALUE, "%s: this model has no weight of that name", name);
    struct glm_weight *w = &m->weights[i];
    if (rank != w->rank || rows != w->rows || cols != w->cols) {
        if (w->rank == 1)
            return glm_fail(err, GLM_EVALUE, "%s: expected shape (%d,), got rank %d, (%d, %d)",
                            name, w->rows, rank, rows, cols);
        return glm_fail(err, GLM_EVALUE, "%s: expected shape (%d, %d), got rank %d, (%d, %d)", name,
                        w->rows, w->cols, rank, rows, cols);
    }
    GLM_TRY(glm_refuse_trainable(w, err));
    if (glm_is_quantized(mat->dtype))
        GLM_TRY(check_quantized(m, w, mat, err));
    if (w->rank == 1)
        return glm_weight_own(m, w, mat->data, mat->dtype, err);
    if (m->be->device_memory)
        return upload_mat(m, w, mat, err);
    m->be->free(m->be, w->owned);
    w->owned = NULL;
    w->mat = *mat;
    m->version++;
    return GLM_OK;
}

glm_status glm_weights_complete(struct glm_model *m, struct glm_error *err)
{
    int missing = 0;
    const char *first = NULL;
    for (int i = 0; i < m->n_base; i++)
        if (!m->weights[i].mat.data) {
            missing++;
            first = first ? first : m->weights[i].name;
        }
    if (missing)
        return glm_fail(err, GLM_ESTATE, "%d weights are not bound, the first is %s", missing,
                        first);
    return GLM_OK;
}
