/* Clipping, AdamW and the learning-rate schedules. Gradients are kept as sums over labelled tokens;
 * the division by their number happens here, once, so that 8x1, 4x2 and 1x8 rows give one update.
 */
#include <math.h>
#include <string.h>

#include "model.h"

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

glm_status glm_model_step(struct glm_model *m, const struct glm_adamw *opt, double *norm,
                          struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const size_t size = be->real_size;
    GLM_TRY(glm_model_grad_norm(m, norm, err));
    double gscale = 1.0 / (double)m->progress.tokens;
    if (opt->max_grad_norm > 0 && opt->max_grad_norm / (*norm + 1e-6) < 1)
        gscale *= opt->max_grad_norm / (*norm + 1e-6);
    const size_t bounds[] = {0, m->decaying, m->block_size};
    for (int part = 0; part < 2; part++) { /* biases and norm weights do not decay */
        char *at = m->block + bounds[part] * size;
        const size_t n = bounds[part + 1] - bounds[part];
        if (n)
            be->ops->adamw(be->cx, at, at + m->block_size * size, at + 2 * m->block_size * size,
                           at + 3 * m->block_size * size, n, opt->lr, opt->beta1, opt->beta2,
                           opt->eps, part ? 0 : opt->weight_decay, m->progress.steps + 1, gscale);
    }
    m->progress.steps++;
    m->version++;
    glm_model_zero_grad(m);
    return GLM_OK;
}

double glm_lr_factor(const char *kind, int k, int warmup, int total, double learning_rate)
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
