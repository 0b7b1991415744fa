/* P-Tuning v2's prefix encoder (Liu et al. 2021): P learned rows, through a small MLP if there is a
 * projection, become keys and values of every layer. The keys are not rotated and the prefix has no
 * positions. */
#include "state.h"

static struct glm_dropout prefix_mask(const struct glm_model *m)
{
    const struct glm_step *s = &m->step;
    return (struct glm_dropout){
        .seed = s->call.dropout_seed,
        .step = (uint32_t)m->progress.steps,
        .site = glm_prefix_site(&m->arch),
        .p = s->call.dropout ? m->prefix_dropout : 0,
        .stream = s->prefix.sequence,
        .position = s->prefix.position,
    };
}

/* step.prefix_kv from the encoder; step.prefix_rows, prefix_hidden kept for backward */
void glm_prefix_forward(struct glm_model *m)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    struct glm_weight *w =
        m->prefix; /* embedding, trans.0 weight and bias, trans.2 weight and bias */
    const int P = m->prefix_length, J = 2 * m->arch.layers,
              KV = m->arch.kv_heads * m->arch.head_dim;
    const struct glm_dropout mask = prefix_mask(m);
    const void *rows = w[0].mat.data;
    if (w[1].present) {
        op->linear_forward(cx, s->prefix_hidden, rows, &w[1].mat, w[2].mat.data, P, 1.0, 0);
        op->tanh_forward(cx, s->prefix_hidden, s->prefix_hidden, (size_t)P * w[1].rows);
        op->linear_forward(cx, s->prefix_rows, s->prefix_hidden, &w[3].mat, w[4].mat.data, P, 1.0,
                           0);
        rows = s->prefix_rows;
    }
    op->prefix_forward(cx, s->prefix_kv, rows, P, J, KV, s->prefix_copies,
                       mask.p > 0 ? &mask : NULL);
}

void glm_prefix_backward(struct glm_model *m)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    struct glm_step *s = &m->step;
    struct glm_weight *w = m->prefix;
    const int P = m->prefix_length, J = 2 * m->arch.layers,
              KV = m->arch.kv_heads * m->arch.head_dim;
    const struct glm_dropout mask = prefix_mask(m);
    const struct glm_dropout *dropout = mask.p > 0 ? &mask : NULL;
    if (!w[1].present) {
        if (w[0].grad)
            op->prefix_backward(cx, w[0].grad, s->dprefix_kv, P, J, KV, s->prefix_copies, dropout);
        return;
    }
    const int H = w[1].rows, width = w[1].cols;
    m->be->zero(m->be, s->dprefix_rows, (size_t)P * J * KV * m->be->real_size);
    op->prefix_backward(cx, s->dprefix_rows, s->dprefix_kv, P, J, KV, s->prefix_copies, dropout);
    op->linear_backward_weight(cx, w[3].grad, w[4].grad, s->dprefix_rows, s->prefix_hidden, P,
                               J * KV, H, 1.0);
    op->linear_backward_input(cx, s->dprefix_hidden, s->dprefix_rows, &w[3].mat, P, 1.0, 0);
    op->tanh_backward(cx, s->dprefix_hidden, s->dprefix_hidden, s->prefix_hidden, (size_t)P * H);
    op->linear_backward_weight(cx, w[1].grad, w[2].grad, s->dprefix_hidden, w[0].mat.data, P, H,
                               width, 1.0);
    if (w[0].grad) { /* the embedding's rows are the layer's input, so its gradient adds up in place
                      */
        op->linear_backward_input(cx, w[0].grad, s->dprefix_hidden, &w[1].mat, P, 1.0, 1);
    }
}
