/* The three ways to run a whole model: logits, losses, and losses with gradients. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

glm_status glm_model_create(struct glm_model **out, const struct glm_arch *arch,
                            struct glm_backend *be, struct glm_error *err)
{
    *out = NULL;
    GLM_TRY(glm_check_arch(arch, err));
    struct glm_model *m = calloc(1, sizeof *m);
    if (!m)
        return glm_fail(err, GLM_EMEMORY, "model: %zu bytes", sizeof *m);
    m->arch = *arch;
    m->be = be;
    m->lora_on = 1;
    const size_t slots = 3 + (size_t)arch->layers * (7 + GLM_LORA_PER_LAYER) + GLM_PREFIX_WEIGHTS;
    m->layers = calloc((size_t)arch->layers, sizeof *m->layers);
    m->weights = calloc(slots, sizeof *m->weights);
    m->trainable = calloc(slots, sizeof *m->trainable);
    m->step.x = calloc((size_t)arch->layers + 1, sizeof *m->step.x);
    m->step.acts = calloc((size_t)arch->layers, sizeof *m->step.acts);
    m->step.saved = calloc((size_t)arch->layers, sizeof *m->step.saved);
    glm_status status = GLM_OK;
    if (!m->layers || !m->weights || !m->trainable || !m->step.x || !m->step.acts || !m->step.saved)
        status = glm_fail(err, GLM_EMEMORY, "model: tables of %d layers", arch->layers);
    if (status == GLM_OK) {
        glm_add_weights(m);
        status = glm_make_rope_table(m, err);
    }
    if (status != GLM_OK) {
        glm_model_free(m);
        return status;
    }
    *out = m;
    return GLM_OK;
}

void glm_model_free(struct glm_model *m)
{
    if (!m)
        return;
    for (int i = 0; m->weights && i < m->n_weights; i++)
        glm_weight_release(m, &m->weights[i]);
    m->be->free(m->be, m->rope_table);
    m->be->free(m->be, m->block);
    glm_arena_free(&m->arena, m->be);
    free(m->host);
    free(m->layers);
    free(m->weights);
    free(m->trainable);
    free(m->step.x);
    free(m->step.acts);
    free(m->step.saved);
    free(m);
}

struct glm_backend *glm_model_backend(struct glm_model *m) { return m->be; }
const struct glm_arch *glm_model_arch(const struct glm_model *m) { return &m->arch; }
struct glm_progress *glm_model_progress(struct glm_model *m) { return &m->progress; }
int glm_model_prefix_length(struct glm_model *m) { return m->prefix_length; }

static glm_status interrupted(struct glm_model *m, struct glm_error *err)
{
    if (m->be->stopped(m->be))
        return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    return GLM_OK;
}

/* names: say where x (rows, C) stops being finite; rows of a gathered layer are translated back to
 * tokens */
static glm_status check_finite(struct glm_model *m, const void *x, int rows, int gathered,
                               const char *where, int l, struct glm_error *err)
{
    int row;
    m->be->ops->first_nonfinite(m->be->cx, &row, x, rows, m->arch.hidden);
    if (row < 0)
        return GLM_OK;
    const struct glm_segment *segments =
        (const struct glm_segment *)m->host; /* upload_batch put them first */
    int token = gathered ? ((const int32_t *)(segments + m->step.S))[3 * m->step.N + row] : row,
        segment = 0;
    while (segment + 1 < m->step.S && segments[segment + 1].begin <= token)
        segment++;
    if (l < 0)
        return glm_fail(err, GLM_ENUMERIC,
                        "%s holds NaN or infinity: row %d of the batch, token %d", where, segment,
                        token - segments[segment].begin);
    return glm_fail(err, GLM_ENUMERIC,
                    "%s %d yields NaN or infinity: row %d of the batch, token %d", where, l,
                    segment, token - segments[segment].begin);
}

static glm_status run_layers(struct glm_model *m, void *hidden, int diagnose, struct glm_error *err)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    const int L = m->arch.layers, C = m->arch.hidden, MR = s->gathered ? s->M : s->N;
    const size_t bytes = (size_t)s->N * C * m->be->real_size;
    if (m->prefix_length && !s->cache)
        glm_prefix_forward(m);
    op->embedding_forward(cx, s->x[0], &m->word_embeddings->mat, s->ids, s->N);
    for (int l = 0; l < L; l++) {
        if (hidden)
            m->be->download(m->be, (char *)hidden + l * bytes, s->x[l], bytes);
        if (diagnose)
            GLM_TRY(check_finite(m, s->x[l], s->N, 0, l ? "layer" : "the embedding", l - 1, err));
        if (s->saved[l])
            op->convert(cx, s->saved[l], m->be->kept, s->x[l], m->be->real, (size_t)s->N * C);
        glm_block_forward(m, l, s->x[l + 1]);
        GLM_TRY(interrupted(m, err));
    }
    if (hidden)
        m->be->download(m->be, (char *)hidden + L * bytes, s->x[L], bytes);
    if (diagnose)
        GLM_TRY(check_finite(m, s->x[L], MR, s->gathered, "layer", L - 1, err));
    return GLM_OK;
}

glm_status glm_step_forward(struct glm_model *m, void *hidden, struct glm_error *err)
{
    return run_layers(m, hidden, 0, err);
}

glm_status glm_step_diagnose(struct glm_model *m, struct glm_error *err)
{
    GLM_TRY(run_layers(m, NULL, 1, err));
    return glm_fail(err, GLM_ENUMERIC, "the output layer yields NaN or infinity");
}

void glm_step_logits(struct glm_model *m, int begin, int count)
{
    const struct glm_step *s = &m->step;
    m->be->ops->linear_forward(m->be->cx, s->logits,
                               glm_at(m, s->final, (size_t)begin * m->arch.hidden),
                               &m->output_layer->mat, NULL, count, 1.0, 0);
}

static double host_real(const struct glm_model *m, const void *values, int i)
{
    return m->be->real == GLM_F64 ? ((const double *)values)[i] : ((const float *)values)[i];
}

glm_status glm_model_forward(struct glm_model *m, const struct glm_input *in, void *logits,
                             void *hidden, struct glm_error *err)
{
    struct glm_step *s = &m->step;
    const size_t V = (size_t)m->arch.vocab;
    GLM_TRY(glm_step_begin(m, in, 0, !hidden, NULL, err));
    GLM_TRY(glm_step_forward(m, hidden, err));
    for (int begin = 0; begin < s->M; begin += s->logits_rows) {
        const int count = s->M - begin < s->logits_rows ? s->M - begin : s->logits_rows;
        glm_step_logits(m, begin, count);
        m->be->download(m->be, glm_at(m, logits, begin * V), s->logits,
                        count * V * m->be->real_size);
        if (m->be->stopped(m->be))
            return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    }
    return GLM_OK;
}

/* Losses of all M rows; with gradients, d(sum of losses)/d(final) in step.dnorm. */
static glm_status losses_of(struct glm_model *m, int training, struct glm_error *err)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    const int C = m->arch.hidden, V = m->arch.vocab;
    for (int begin = 0; begin < s->M; begin += s->logits_rows) {
        const int count = s->M - begin < s->logits_rows ? s->M - begin : s->logits_rows;
        const void *final = glm_at(m, s->final, (size_t)begin * C);
        void *lse = glm_at(m, s->lse, begin);
        glm_step_logits(m, begin, count);
        op->cross_entropy_forward(cx, glm_at(m, s->losses, begin), lse, s->logits,
                                  s->target + begin, count, V);
        if (training) {
            op->cross_entropy_backward(cx, s->logits, lse, s->target + begin, count, V, 1.0);
            if (m->output_layer->grad)
                op->linear_backward_weight(cx, m->output_layer->grad, NULL, s->logits, final, count,
                                           V, C, 1.0);
            op->linear_backward_input(cx, glm_at(m, s->dnorm, (size_t)begin * C), s->logits,
                                      &m->output_layer->mat, count, 1.0, 0);
        }
        if (m->be->stopped(m->be))
            return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    }
    return GLM_OK;
}

/* The losses to the host, with what lies up to `end` on the device, in one download. */
static glm_status fetch_losses(struct glm_model *m, const void *end, struct glm_error *err)
{
    const struct glm_step *s = &m->step;
    m->be->download(m->be, s->host_losses, s->losses,
                    (size_t)((const char *)end - (const char *)s->losses));
    if (m->be->stopped(m->be))
        return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    for (int i = 0; i < s->M; i++)
        if (!isfinite(host_real(m, s->host_losses, i)))
            return glm_step_diagnose(m, err);
    return GLM_OK;
}

/* The step's rows are all its tokens' unless it gathers; losses need exactly the M rows asked for.
 */
static glm_status begin_losses(struct glm_model *m, const struct glm_input *in, int training,
                               struct glm_error *err)
{
    if (!in->rows || !in->targets || in->M < 1)
        return glm_fail(err, GLM_EVALUE,
                        "rows: no label is left to train on or score (all are masked)");
    GLM_TRY(glm_step_begin(m, in, training, 1, NULL, err));
    return glm_step_forward(m, NULL, err);
}

glm_status glm_model_loss(struct glm_model *m, const struct glm_input *in, void *losses,
                          struct glm_error *err)
{
    GLM_TRY(begin_losses(m, in, 0, err));
    GLM_TRY(losses_of(m, 0, err));
    GLM_TRY(fetch_losses(m, glm_at(m, m->step.losses, (size_t)m->step.M), err));
    memcpy(losses, m->step.host_losses, (size_t)m->step.M * m->be->real_size);
    return GLM_OK;
}

glm_status glm_model_backward(struct glm_model *m, const struct glm_input *in,
                              uint64_t dropout_seed, int dropout, double *mean_loss,
                              struct glm_error *err)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    const int L = m->arch.layers, C = m->arch.hidden, lowest = glm_lowest_layer(m);
    if (!m->n_trainable)
        return glm_fail(err, GLM_ESTATE,
                        "nothing is trainable: add an adapter or call requires_grad_(True) first");
    s->use_dropout = dropout;
    s->dropout_seed = dropout_seed;
    glm_status status = begin_losses(m, in, 1, err);
    if (status == GLM_OK)
        status = losses_of(m, 1, err);
    if (status == GLM_OK && !m->be->device_memory) /* it costs nothing to look now */
        status = fetch_losses(m, glm_at(m, s->losses, (size_t)s->M), err);
    m->squares_known = 0;
    if (status != GLM_OK) {
        s->use_dropout = 0;
        return status;
    }

    const int MR = s->gathered ? s->M : s->N;
    const int below = lowest < L || glm_trains(m->word_embeddings);
    void *dfinal = s->dnorm, *dx = s->gathered ? s->dx_rows : s->dx;
    m->be->zero(m->be, dx, (size_t)MR * C * m->be->real_size);
    op->rmsnorm_backward(cx, dx, m->final_layernorm->grad, dfinal, s->x[L],
                         m->final_layernorm->mat.data, s->final_rstd, MR, C);
    if (s->dprefix_kv && m->prefix_length) {
        const size_t KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
        m->be->zero(m->be, s->dprefix_kv,
                    2 * L * KV * s->prefix_copies * m->prefix_length * m->be->real_size);
    }
    const int through = glm_trains(m->word_embeddings);
    for (int l = L - 1; below && l >= lowest; l--) {
        if (l == 0) /* what followed took its place */
            op->embedding_forward(cx, s->x[0], &m->word_embeddings->mat, s->ids, s->N);
        if (s->saved[l])
            op->convert(cx, s->x[l], m->be->real, s->saved[l], m->be->kept, (size_t)s->N * C);
        if (l < L - s->kept_layers)
            glm_block_forward(m, l, NULL);
        glm_block_backward(m, l, l > lowest || through);
        if (m->be->stopped(m->be)) {
            s->use_dropout = 0;
            return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
        }
    }
    if (through)
        op->embedding_backward(cx, m->word_embeddings->grad, s->dx, s->ids, s->N, C);
    if (s->dprefix_kv && m->prefix_length)
        glm_prefix_backward(m);
    if (m->be->device_memory) { /* the host waits once, and step() needs not wait again */
        op->sum_squares(cx, s->squares, m->block + m->block_size * m->be->real_size, m->block_size);
        status = fetch_losses(m, s->squares + 1, err);
        s->use_dropout = 0;
        GLM_TRY(status);
        memcpy(&m->squares,
               (const char *)s->host_losses + ((const char *)s->squares - (const char *)s->losses),
               sizeof m->squares);
        m->squares_known = 1;
    }
    s->use_dropout = 0;

    double sum = 0;
    const void *host = s->host_losses;
    for (int i = 0; i < s->M; i++)
        sum += host_real(m, host, i);
    *mean_loss = sum / s->M;
    m->progress.tokens += s->M;
    m->progress.rows += s->S;
    return GLM_OK;
}
