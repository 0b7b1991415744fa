/* A whole model: made and freed, and the three ways to run it: logits, losses, and losses with
 * gradients. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

glm_status glm_model_create(struct glm_model **out, const struct glm_arch *arch,
                            const struct glm_names *names, struct glm_backend *be,
                            struct glm_error *err)
{
    *out = NULL;
    GLM_TRY(glm_arch_check(arch, names, err));
    struct glm_model *m = calloc(1, sizeof *m);
    if (!m)
        return glm_fail(err, GLM_EMEMORY, "model: %zu bytes could not be taken", sizeof *m);
    m->arch = *arch;
    m->be = be;
    m->lora_on = 1;
    m->host.on_host = 1;
    const size_t slots = glm_arch_slots(arch);
    m->layers = calloc((size_t)arch->layers + 1, sizeof *m->layers);
    m->weights = calloc(slots, sizeof *m->weights);
    m->trainable = calloc(slots, sizeof *m->trainable);
    m->step.x = calloc((size_t)arch->layers + 1, sizeof *m->step.x);
    m->step.acts = calloc((size_t)arch->layers, sizeof *m->step.acts);
    m->step.saved = calloc((size_t)arch->layers, sizeof *m->step.saved);
    glm_status status = GLM_OK;
    if (!m->layers || !m->weights || !m->trainable || !m->step.x || !m->step.acts || !m->step.saved)
        status = glm_fail(err, GLM_EMEMORY,
                          "model: %zu bytes for the tables of %zu weights could not be taken",
                          slots * (sizeof *m->weights + sizeof *m->trainable) +
                              (size_t)arch->layers * sizeof *m->layers,
                          slots);
    if (status == GLM_OK) {
        glm_arch_add_weights(m, names);
        status = glm_rope_create(m, err);
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
    glm_arena_free(&m->host, m->be);
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
const char *glm_model_prefix_name(const struct glm_model *m, int i) { return m->prefix[i].name; }

static glm_status interrupted(struct glm_model *m, struct glm_error *err)
{
    if (m->be->stopped(m->be))
        return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    return GLM_OK;
}

/* ---- forward */

/* Says where x (rows, C) stops being finite; gathered: its rows are those that are read. */
static glm_status check_finite(struct glm_model *m, const void *x, int rows, int gathered,
                               const char *where, int l, struct glm_error *err)
{
    const struct glm_segment *segments = m->step.host.segments;
    int row, segment = 0;
    m->be->ops->first_nonfinite(m->be->cx, &row, x, rows, m->arch.hidden);
    if (row < 0)
        return GLM_OK;
    const int token = gathered ? m->step.host.gather[row] : row;
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

/* Hidden states that a caller still waits for: the inputs of the layers `layers`, ascending (NULL:
 * of all); `arch.layers` stands for the output of the last. */
struct wanted {
    const int32_t *layers;
    int n;
    char *out; /* host (n, N, C) */
};

/* Hands out the input of layer l where it is wanted; returns whether anyone waits for more. */
static int hand_out(struct glm_model *m, struct wanted *w, int l)
{
    const size_t bytes = (size_t)m->step.N * m->arch.hidden * m->be->real_size;
    if (w->n && (!w->layers || *w->layers == l)) {
        m->be->download(m->be, w->out, m->step.x[l], bytes);
        w->layers += w->layers != NULL;
        w->n--;
        w->out += bytes;
    }
    return w->n > 0;
}

/* Embeddings into x[0]; in training with noise each token's gets some of size alpha / sqrt(L C), L
 * the tokens of its sequence (NEFTune, Jain et al. 2023). */
static void embed(struct glm_model *m)
{
    const struct glm_step *s = &m->step;
    const int C = m->arch.hidden;
    m->be->ops->embedding_forward(m->be->cx, s->x[0], &m->word_embeddings->mat, s->ids, s->N);
    for (int i = 0; i < s->S && s->call.noise > 0; i++) {
        const struct glm_segment *of = &s->host.segments[i];
        const struct glm_dropout draw = {
            .seed = s->call.dropout_seed,
            .step = (uint32_t)m->progress.steps,
            .site = (uint32_t)GLM_NOISE_SITE,
            .stream = s->all.sequence + of->begin,
            .position = s->all.position + of->begin,
        };
        m->be->ops->noise(m->be->cx, glm_at(m, s->x[0], (size_t)of->begin * C), of->count, C,
                          s->call.noise / sqrt((double)of->count * C), &draw);
    }
}

/* Without `wanted` all layers, else those up to the last that is wanted. */

static glm_status run_layers(struct glm_model *m, struct wanted *wanted, int diagnose,
                             struct glm_error *err)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    const int L = m->arch.layers, C = m->arch.hidden, MR = s->gathered ? s->M : s->N;
    if (s->prefix.n)
        glm_prefix_forward(m);
    embed(m);
    for (int l = 0; l < L; l++) {
        if (wanted && !hand_out(m, wanted, l))
            return GLM_OK;
        if (diagnose)
            GLM_TRY(check_finite(m, s->x[l], s->N, 0, l ? "layer" : "the embedding", l - 1, err));
        if (s->saved[l])
            op->convert(cx, s->saved[l], m->be->kept, s->x[l], m->be->real, (size_t)s->N * C);
        glm_block_forward(m, l);
        GLM_TRY(interrupted(m, err));
    }
    if (wanted)
        hand_out(m, wanted, L);
    if (diagnose)
        GLM_TRY(check_finite(m, s->x[L], MR, s->gathered, "layer", L - 1, err));
    return GLM_OK;
}

glm_status glm_layers_forward(struct glm_model *m, struct glm_error *err)
{
    return run_layers(m, NULL, 0, err);
}

glm_status glm_layers_diagnose(struct glm_model *m, struct glm_error *err)
{
    GLM_TRY(run_layers(m, NULL, 1, err));
    return glm_fail(err, GLM_ENUMERIC, "the output layer yields NaN or infinity");
}

/* The rows of a chunk of logits. */
static struct glm_rows rows_of_chunk(const struct glm_step *s, int begin, int count)
{
    return (struct glm_rows){count, s->read.position + begin, s->read.sequence + begin};
}

void glm_logits_forward(struct glm_model *m, int begin, int count)
{
    const struct glm_step *s = &m->step;
    const struct glm_rows rows = rows_of_chunk(s, begin, count);
    glm_linear_forward(m, m->head, s->logits, glm_at(m, s->final, (size_t)begin * m->arch.hidden),
                       s->head_xa, &rows);
}

glm_status glm_model_forward(struct glm_model *m, const struct glm_input *in, void *logits,
                             void *hidden, struct glm_error *err)
{
    struct glm_step *s = &m->step;
    const size_t V = (size_t)m->arch.vocab;
    GLM_TRY(glm_step_begin(m, in, &(struct glm_call){.gather = !hidden}, err));
    struct wanted all = {NULL, m->arch.layers + 1, hidden};
    GLM_TRY(run_layers(m, hidden ? &all : NULL, 0, err));
    for (int begin = 0; begin < s->M; begin += s->logits_rows) {
        const int count = s->M - begin < s->logits_rows ? s->M - begin : s->logits_rows;
        glm_logits_forward(m, begin, count);
        m->be->download(m->be, glm_at(m, logits, begin * V), s->logits,
                        count * V * m->be->real_size);
        GLM_TRY(interrupted(m, err));
    }
    return GLM_OK;
}

glm_status glm_model_hidden_states(struct glm_model *m, const struct glm_input *in,
                                   const int32_t *layers, int n, void *out, struct glm_error *err)
{
    const int32_t first = 0;
    struct glm_input one = *in; /* row of logits, which no one reads */
    one.rows = &first;
    one.M = 1;
    for (int i = 0; i < n; i++)
        if (layers[i] < 0 || layers[i] > m->arch.layers || (i && layers[i] <= layers[i - 1]))
            return glm_fail(err, GLM_EVALUE,
                            "layers[%d]: expected ascending numbers from 0 to %d, got %d", i,
                            m->arch.layers, layers[i]);
    struct wanted wanted = {layers, n, out};
    GLM_TRY(glm_step_begin(m, &one, &(struct glm_call){0}, err));
    return run_layers(m, &wanted, 0, err);
}

/* ---- losses and gradients */

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
        glm_logits_forward(m, begin, count);
        op->cross_entropy_forward(cx, glm_at(m, s->losses, begin), lse, s->logits,
                                  s->target + begin, count, V);
        if (training) {
            op->cross_entropy_backward(cx, s->logits, lse, s->target + begin, count, V, 1.0);
            const struct glm_rows rows = rows_of_chunk(s, begin, count);
            glm_linear_backward(m, m->head, glm_at(m, s->dnorm, (size_t)begin * C), s->logits,
                                final, s->head_xa, &rows, 0);
        }
        GLM_TRY(interrupted(m, err));
    }
    return GLM_OK;
}

static double host_loss(const struct glm_model *m, int i)
{
    const void *losses = m->step.host.losses;
    return m->be->real == GLM_F64 ? ((const double *)losses)[i] : ((const float *)losses)[i];
}

/* Losses, and the sum of squares where it was made, to the host in one download. */
static glm_status fetch_results(struct glm_model *m, int squares, struct glm_error *err)
{
    const struct glm_step *s = &m->step;
    const size_t bytes = (size_t)s->M * m->be->real_size;
    if (squares)
        m->be->download(m->be, s->host.squares, s->squares, sizeof *s->squares + bytes);
    else
        m->be->download(m->be, s->host.losses, s->losses, bytes);
    GLM_TRY(interrupted(m, err));
    for (int i = 0; i < s->M; i++)
        if (!isfinite(host_loss(m, i)))
            return glm_layers_diagnose(m, err);
    return GLM_OK;
}

/* The step's rows are all its tokens' unless it gathers; losses need exactly the M rows asked for.
 */
static glm_status begin_losses(struct glm_model *m, const struct glm_input *in,
                               const struct glm_call *call, struct glm_error *err)
{
    if (!in->rows || !in->targets || in->M < 1)
        return glm_fail(err, GLM_EVALUE,
                        "rows: no label is left to train on or score (all are masked)");
    GLM_TRY(glm_step_begin(m, in, call, err));
    return glm_layers_forward(m, err);
}

glm_status glm_model_loss(struct glm_model *m, const struct glm_input *in, void *losses,
                          struct glm_error *err)
{
    GLM_TRY(begin_losses(m, in, &(struct glm_call){.gather = 1}, err));
    GLM_TRY(losses_of(m, 0, err));
    GLM_TRY(fetch_results(m, 0, err));
    memcpy(losses, m->step.host.losses, (size_t)m->step.M * m->be->real_size);
    return GLM_OK;
}

/* From d(sum of losses)/d(final) in step.dnorm down to the lowest layer that trains. */
static glm_status layers_backward(struct glm_model *m, struct glm_error *err)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    const int L = m->arch.layers, C = m->arch.hidden, lowest = glm_lowest_layer(m);
    const int MR = s->gathered ? s->M : s->N, through = glm_trains(m->word_embeddings);
    const int below = lowest < L || through;
    void *dx = s->gathered ? s->dx_rows : s->dx;
    m->be->zero(m->be, dx, (size_t)MR * C * m->be->real_size);
    glm_norm_backward(m, &m->final_layernorm, dx, s->dnorm, s->x[L], s->final_mean, s->final_rstd,
                      MR);
    if (s->dprefix_kv) {
        const size_t KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
        m->be->zero(m->be, s->dprefix_kv, 2 * L * KV * s->prefix.n * m->be->real_size);
    }
    for (int l = L - 1; below && l >= lowest; l--) {
        if (l == 0) /* what followed took its place */
            embed(m);
        if (s->saved[l])
            op->convert(cx, s->x[l], m->be->real, s->saved[l], m->be->kept, (size_t)s->N * C);
        if (l < L - s->kept_layers)
            glm_block_recompute(m, l);
        glm_block_backward(m, l, l > lowest || through);
        GLM_TRY(interrupted(m, err));
    }
    if (through)
        op->embedding_backward(cx, m->word_embeddings->grad, s->dx, s->ids, s->N, C);
    if (s->dprefix_kv)
        glm_prefix_backward(m);
    return GLM_OK;
}

glm_status glm_model_backward(struct glm_model *m, const struct glm_input *in,
                              uint64_t dropout_seed, int dropout, double noise, double *mean_loss,
                              struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const struct glm_step *s = &m->step;
    const struct glm_call call = {.training = 1,
                                  .gather = 1,
                                  .dropout = dropout,
                                  .dropout_seed = dropout_seed,
                                  .noise = noise};
    if (!(noise >= 0 && isfinite(noise)))
        return glm_fail(err, GLM_EVALUE, "noise: expected 0 (none) or a positive number, got %g",
                        noise);
    if (!m->n_trainable)
        return glm_fail(err, GLM_ESTATE,
                        "nothing is trainable: add an adapter or call requires_grad_(True) first");
    m->squares_known = 0;
    GLM_TRY(begin_losses(m, in, &call, err));
    GLM_TRY(losses_of(m, 1, err));
    if (!be->device_memory) /* it costs nothing to look now */
        GLM_TRY(fetch_results(m, 0, err));
    GLM_TRY(layers_backward(m, err));
    if (be->device_memory) { /* the host waits once, and step() needs not wait again */
        be->ops->sum_squares(be->cx, s->squares, m->block + m->block_size * be->real_size,
                             m->block_size);
        GLM_TRY(fetch_results(m, 1, err));
        m->squares = *s->host.squares;
        m->squares_known = 1;
    }
    double sum = 0;
    for (int i = 0; i < s->M; i++)
        sum += host_loss(m, i);
    *mean_loss = sum / s->M;
    m->progress.tokens += s->M;
    m->progress.rows += s->S;
    return GLM_OK;
}
