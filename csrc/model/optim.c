/* What trains, in one block, and its updates: clipping, AdamW and the learning-rate schedules.
 * Gradients are kept as sums over labelled tokens; the division by their number happens here, once,
 * so that 8x1, 4x2 and 1x8 rows give one update. */
#include <math.h>
#include <string.h>

#include "state.h"

/* ---- the trainable block: values, gradients, first and second moments, one after the other */

/* Undoes what set_trainable has begun; what was trained still is. */
static void give_up(struct glm_model *m, char *block)
{
    for (int i = 0; i < m->n_trainable; i++) { /* trained weights lie in the old block */
        struct glm_weight *w = &m->weights[m->trainable[i]];
        m->be->free(m->be, w->owned);
        w->owned = NULL;
    }
    m->be->free(m->be, block);
}

glm_status glm_model_set_trainable(struct glm_model *m, const int *weights, int n,
                                   struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const size_t size = be->real_size;
    size_t total = 0;
    for (int i = 0; i < n; i++) {
        if (weights[i] < 0 || weights[i] >= m->n_weights || !m->weights[weights[i]].present ||
            !m->weights[weights[i]].mat.data)
            return glm_fail(err, GLM_EVALUE, "names: weight %d is not there or not bound",
                            weights[i]);
        for (int j = 0; j < i; j++)
            if (weights[j] == weights[i])
                return glm_fail(err, GLM_EVALUE, "names: %s is named twice",
                                m->weights[weights[i]].name);
        GLM_TRY(
            glm_refuse_quantized(&m->weights[weights[i]], "trained: use lora or p_tuning", err));
        total +=
            (glm_count(&m->weights[weights[i]]) + 15) / 16 * 16; /* aligned; the gaps stay zero */
    }
    char *block = NULL;
    if (n) {
        if (total > SIZE_MAX / 4 / size - 1 ||
            !(block = be->alloc(be, 4 * total * size + sizeof(double))))
            return glm_fail(
                err, GLM_EMEMORY,
                "training needs %zu bytes for parameters, gradients and two moments (16 bytes for "
                "each of "
                "%zu parameters): train fewer weights (lora) or use a machine with more memory",
                4 * total * size, total);
    }
    /* weights that stop being trained keep their values in memory of their own */
    for (int i = 0; i < m->n_trainable; i++) {
        struct glm_weight *w = &m->weights[m->trainable[i]];
        int stays = 0;
        for (int j = 0; j < n; j++)
            stays |= weights[j] == m->trainable[i];
        if (stays)
            continue;
        w->owned = be->alloc(be, glm_count(w) * size);
        if (!w->owned) {
            give_up(m, block);
            return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken", w->name,
                            glm_count(w) * size);
        }
        be->copy(be, w->owned, w->mat.data, glm_count(w) * size);
    }
    /* Weight by weight, since taking many gigabytes lasts: values, and zeros for the rest. */
    size_t offset = 0;
    for (int rank = 2; rank >= 1; rank--) { /* matrices, which decay, then the others */
        for (int i = 0; i < n && !be->stopped(be); i++) {
            const struct glm_weight *w = &m->weights[weights[i]];
            const size_t room = (glm_count(w) + 15) / 16 * 16;
            if (w->rank != rank)
                continue;
            for (size_t part = 0; part < 4; part++)
                be->zero(be, block + (part * total + offset) * size, room * size);
            be->ops->convert(be->cx, block + offset * size, be->real, w->mat.data, w->mat.dtype,
                             glm_count(w));
            offset += room;
        }
    }
    if (be->stopped(be)) {
        give_up(m, block);
        return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    }
    offset = 0;
    for (int rank = 2; rank >= 1; rank--) {
        for (int i = 0; i < n; i++) {
            struct glm_weight *w = &m->weights[weights[i]];
            if (w->rank != rank)
                continue;
            w->offset = offset;
            offset += (glm_count(w) + 15) / 16 * 16;
        }
        if (rank == 2)
            m->decaying = offset;
    }
    for (int i = 0; i < m->n_trainable; i++) {
        struct glm_weight *w = &m->weights[m->trainable[i]];
        w->mat.data = w->owned;
        w->grad = NULL;
    }
    for (int i = 0; i < n; i++) {
        struct glm_weight *w = &m->weights[weights[i]];
        be->free(be, w->owned);
        w->owned = NULL;
        glm_weight_set(w, block + w->offset * size, be->real);
        w->grad = block + (total + w->offset) * size;
    }
    be->free(be, m->block);
    m->block = block;
    m->block_size = total;
    m->n_trainable = n;
    for (int i = 0; i < n; i++)
        m->trainable[i] = weights[i];
    m->progress = (struct glm_progress){0};
    m->squares_known = 0;
    m->version++;
    return GLM_OK;
}

int glm_model_trainable(struct glm_model *m, const int **weights)
{
    *weights = m->trainable;
    return m->n_trainable;
}

static glm_status part_of(struct glm_model *m, int weight, enum glm_part part,
                          struct glm_weight **out, void **data, struct glm_error *err)
{
    if (weight < 0 || weight >= m->n_weights || !m->weights[weight].present ||
        !m->weights[weight].mat.data)
        return glm_fail(err, GLM_EVALUE, "weight %d is not there or not bound", weight);
    struct glm_weight *w = *out = &m->weights[weight];
    *data = (void *)w->mat.data;
    if (part == GLM_VALUE)
        return GLM_OK;
    if (!w->grad)
        return glm_fail(err, GLM_ESTATE,
                        "%s is not being trained: it has no gradient and no moments", w->name);
    *data = m->block + ((size_t)part * m->block_size + w->offset) * m->be->real_size;
    return GLM_OK;
}

glm_status glm_model_read(struct glm_model *m, int weight, enum glm_part part, void *out,
                          struct glm_error *err)
{
    struct glm_backend *be = m->be;
    struct glm_weight *w;
    void *data;
    GLM_TRY(part_of(m, weight, part, &w, &data, err));
    GLM_TRY(glm_refuse_quantized(w, "read as numbers", err));
    const size_t n = glm_count(w);
    if (part == GLM_VALUE && w->mat.dtype != be->real) {
        void *wide = be->device_memory ? be->alloc(be, n * be->real_size) : out;
        if (!wide)
            return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken", w->name,
                            n * be->real_size);
        be->ops->convert(be->cx, wide, be->real, data, w->mat.dtype, n);
        if (be->device_memory) {
            be->download(be, out, wide, n * be->real_size);
            be->free(be, wide);
        }
        return GLM_OK;
    }
    be->download(be, out, data, n * be->real_size);
    if (part == GLM_GRAD &&
        m->progress.tokens > 0) { /* sums are kept; the token mean is what callers see */
        const double tokens = (double)m->progress.tokens;
        for (size_t i = 0; i < n; i++)
            if (be->real == GLM_F64)
                ((double *)out)[i] /= tokens;
            else
                ((float *)out)[i] = (float)(((float *)out)[i] / tokens);
    }
    return GLM_OK;
}

glm_status glm_model_write(struct glm_model *m, int weight, enum glm_part part, const void *values,
                           struct glm_error *err)
{
    struct glm_weight *w;
    void *data;
    if (part == GLM_GRAD)
        return glm_fail(err, GLM_EVALUE, "what: gradients cannot be written");
    GLM_TRY(part_of(m, weight, part, &w, &data, err));
    if (part == GLM_VALUE && !w->grad && !w->owned)
        return glm_fail(err, GLM_ESTATE, "%s is mapped and read-only: bind an array instead",
                        w->name);
    if (part == GLM_VALUE && w->mat.dtype != m->be->real)
        return glm_fail(err, GLM_ESTATE, "%s was merged in its stored dtype: bind an array instead",
                        w->name);
    m->be->upload(m->be, data, values, glm_count(w) * m->be->real_size);
    m->version++;
    return GLM_OK;
}

void glm_model_zero_grad(struct glm_model *m)
{
    const size_t bytes = m->block_size * m->be->real_size;
    if (m->block)
        m->be->zero(m->be, m->block + bytes, bytes);
    m->progress.tokens = m->progress.rows = 0;
    m->squares_known = 0;
}

/* Sum of squares of n elements of the device, on the host. */
static double squares_of(struct glm_model *m, const void *x, size_t n)
{
    struct glm_backend *be = m->be;
    double *place = (double *)(m->block + 4 * m->block_size * be->real_size), sum;
    be->ops->sum_squares(be->cx, place, x, n);
    be->download(be, &sum, place, sizeof sum);
    return sum;
}

static glm_status ready(struct glm_model *m, struct glm_error *err)
{
    if (!m->n_trainable)
        return glm_fail(err, GLM_ESTATE, "nothing is trainable: there is no gradient");
    if (m->progress.tokens == 0)
        return glm_fail(
            err, GLM_ESTATE,
            "no gradient has been accumulated since the last update: call backward first");
    return GLM_OK;
}

glm_status glm_model_grad_norm(struct glm_model *m, double *norm, struct glm_error *err)
{
    GLM_TRY(ready(m, err));
    if (!m->squares_known)
        m->squares = squares_of(m, m->block + m->block_size * m->be->real_size, m->block_size);
    m->squares_known = 1;
    *norm = sqrt(m->squares) / (double)m->progress.tokens;
    if (isfinite(*norm))
        return GLM_OK;
    for (int i = 0; i < m->n_trainable; i++) {
        const struct glm_weight *w = &m->weights[m->trainable[i]];
        if (!isfinite(squares_of(m, w->grad, glm_count(w))))
            return glm_fail(
                err, GLM_ENUMERIC,
                "the gradient of %s holds NaN or infinity in update %d (%lld rows, %lld tokens)",
                w->name, m->progress.steps + 1, (long long)m->progress.rows,
                (long long)m->progress.tokens);
    }
    return glm_fail(err, GLM_ENUMERIC, "the gradient norm overflows in update %d",
                    m->progress.steps + 1);
}

/* AdamW over n elements of the block from `from` on. */
static void update(struct glm_model *m, const struct glm_adamw *opt, size_t from, size_t n,
                   double lr, double gscale)
{
    const size_t part = m->block_size * m->be->real_size;
    char *at = m->block + from * m->be->real_size;
    const double decay = from < m->decaying ? opt->weight_decay : 0; /* no biases, norm weights */
    if (n)
        m->be->ops->adamw(m->be->cx, at, at + part, at + 2 * part, at + 3 * part, n, lr, opt->beta1,
                          opt->beta2, opt->eps, decay, m->progress.steps + 1, gscale);
}

/* B, and as in PEFT's optimiser the vectors beside it */
static int is_lora_B(const struct glm_model *m, const struct glm_weight *w)
{
    return w->kind == GLM_LORA && (w - m->weights - m->n_base) % GLM_LORA_SLOTS;
}

glm_status glm_model_step(struct glm_model *m, const struct glm_adamw *opt, double *norm,
                          struct glm_error *err)
{
    GLM_TRY(glm_model_grad_norm(m, norm, err));
    double gscale = 1.0 / (double)m->progress.tokens;
    if (opt->max_grad_norm > 0 && opt->max_grad_norm / (*norm + 1e-6) < 1)
        gscale *= opt->max_grad_norm / (*norm + 1e-6);
    if (opt->lora_B_ratio == 1) {
        update(m, opt, 0, m->decaying, opt->lr, gscale);
        update(m, opt, m->decaying, m->block_size - m->decaying, opt->lr, gscale);
    } else {
        for (int i = 0; i < m->n_trainable; i++) {
            const struct glm_weight *w = &m->weights[m->trainable[i]];
            const double ratio = is_lora_B(m, w) ? opt->lora_B_ratio : 1;
            update(m, opt, w->offset, glm_count(w), opt->lr * ratio, gscale);
        }
    }
    m->progress.steps++;
    m->version++;
    glm_model_zero_grad(m);
    return GLM_OK;
}

double glm_lr_factor(const char *kind, int64_t k, int64_t warmup, int64_t total,
                     double learning_rate)
{
    const double pi = 3.14159265358979323846;
    const int flat = strcmp(kind, "constant") == 0, inverse = strcmp(kind, "inverse_sqrt") == 0;
    const int known = flat || inverse || strcmp(kind, "linear") == 0 ||
                      strcmp(kind, "cosine") == 0 || strcmp(kind, "cosine_with_restarts") == 0 ||
                      strcmp(kind, "polynomial") == 0 || strcmp(kind, "constant_with_warmup") == 0;
    if (!known)
        return -1;
    if (flat)
        return 1;
    if (k < warmup)
        return (double)k / (warmup > 1 ? warmup : 1);
    if (strcmp(kind, "constant_with_warmup") == 0)
        return 1;
    if (inverse) {
        const double timescale = warmup > 0 ? warmup : 10000;
        return 1 / sqrt((k + timescale - warmup) / timescale);
    }
    const double p = (double)(k - warmup) / (total - warmup > 1 ? total - warmup : 1);
    if (strcmp(kind, "linear") == 0)
        return p < 1 ? 1 - p : 0;
    if (strcmp(kind, "cosine") == 0)
        return fmax(0, 0.5 * (1 + cos(pi * p)));
    if (strcmp(kind, "cosine_with_restarts") == 0)
        return p >= 1 ? 0 : fmax(0, 0.5 * (1 + cos(pi * fmod(p, 1))));
    const double end = 1e-7; /* polynomial, power 1 */
    if (!(learning_rate > 0) || k > total)
        return learning_rate > 0 ? end / learning_rate : 0;
    return ((learning_rate - end) * (1 - p) + end) / learning_rate;
}
