/* One layer: h += dense(attention(norm1 h)); h += mlp(norm2 h), and the way back.
 * In the last layer nothing after attention is computed for tokens whose logits no one reads
 * (step.gathered). */
#include "state.h"

static struct glm_heads heads_of(const struct glm_model *m)
{
    return (struct glm_heads){m->arch.heads, m->arch.kv_heads, m->arch.head_dim, m->step.longest};
}

static int gathers(const struct glm_model *m, int l)
{
    return m->step.gathered && l == m->arch.layers - 1;
}

/* x_out = x_out + x1, and its norm where the next layer, or the output layer, looks for it */
static void finish(struct glm_model *m, int l, void *x_out, const void *x1, int N)
{
    const struct glm_step *s = &m->step;
    const int last = l == m->arch.layers - 1;
    const struct glm_weight *norm = last ? m->final_layernorm : m->layers[l + 1].input_layernorm;
    m->be->ops->add_rmsnorm_forward(m->be->cx, last ? s->final : s->ln,
                                    last ? s->final_rstd : s->acts[l + 1].rstd1, x_out, x_out, x1,
                                    norm->mat.data, N, m->arch.hidden, m->arch.eps);
}

void glm_block_forward(struct glm_model *m, int l, void *x_out)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_heads heads = heads_of(m);
    const int N = s->N, C = m->arch.hidden, F = m->arch.ffn, AO = heads.NH * heads.HD;
    const int QKV = (heads.NH + 2 * heads.KVH) * heads.HD;
    const int rows = gathers(m, l), NR = rows ? s->M : N;
    const void *att = a->att, *x = s->x[l];
    void *h = s->h ? s->h : a->h;

    if (l == 0 || !x_out) /* else the layer before has done it */
        op->rmsnorm_forward(cx, s->ln, a->rstd1, x, layer->input_layernorm->mat.data, N, C,
                            m->arch.eps);
    glm_linear_forward(m, &layer->linear[GLM_QKV], a->qkv, s->ln, a->xa[GLM_QKV], N, 0);
    if (s->cache) /* rows of the cache that no segment of this call reads */
        op->rope_append(cx, glm_step_kv(m, l), a->qkv, m->rope_table, s->position, s->slot, N,
                        heads, m->arch.rotary_dim);
    else
        op->rope_forward(cx, a->qkv, m->rope_table, s->position, N, heads.NH + heads.KVH, heads.HD,
                         QKV, m->arch.rotary_dim);
    op->attention_forward(cx, a->att, a->lse, a->qkv, glm_step_kv(m, l), s->segments, s->S, heads);
    if (rows) {
        op->gather_forward(cx, s->att_rows, a->att, s->rows, NR, AO);
        op->gather_forward(cx, s->x_rows, x, s->rows, NR, C);
        att = s->att_rows;
        x = s->x_rows;
    }
    glm_linear_forward(m, &layer->linear[GLM_DENSE], a->x1, att, a->xa[GLM_DENSE], NR, rows);
    op->add_rmsnorm_forward(cx, s->ln, a->rstd2, a->x1, a->x1, x,
                            layer->post_attention_layernorm->mat.data, NR, C, m->arch.eps);
    const struct glm_linear *up = &layer->linear[GLM_H_TO_4H], *last = &layer->linear[GLM_4H_TO_H];
    if (s->ln != s->act && !glm_adapted(m, up)) {
        op->linear_swiglu_forward(cx, s->act, h, s->ln, &up->weight->mat,
                                  up->bias ? up->bias->mat.data : NULL, NR);
    } else {
        glm_linear_forward(m, up, h, s->ln, a->xa[GLM_H_TO_4H], NR, rows);
        if (x_out || glm_trains(last->B))
            op->swiglu_forward(cx, s->act, h, NR, F);
    }
    if (s->h && a->h)
        op->convert(cx, a->h, m->be->kept_h, h, m->be->real, (size_t)NR * 2 * F);
    if (!x_out) {
        if (glm_trains(last->B))
            glm_adapter_forward(m, last, s->act, a->xa[GLM_4H_TO_H], NR, rows);
        return;
    }
    glm_linear_forward(m, last, x_out, s->act, a->xa[GLM_4H_TO_H], NR, rows);
    finish(m, l, x_out, a->x1, NR);
}

/* step.dx holds the gradient of the layer's output (dx_rows in a gathering layer) and receives that
 * of its input; need_dx 0: only parameter gradients are wanted. */
void glm_block_backward(struct glm_model *m, int l, int need_dx)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_heads heads = heads_of(m);
    const int N = s->N, C = m->arch.hidden, F = m->arch.ffn, AO = heads.NH * heads.HD;
    const int QKV = (heads.NH + 2 * heads.KVH) * heads.HD;
    const int rows = gathers(m, l), NR = rows ? s->M : N;
    void *dout = rows ? s->dx_rows : s->dx;
    void *datt = rows ? s->datt_rows : s->datt;
    const struct glm_linear *linear = layer->linear;
    void *h = s->h ? s->h : a->h;

    if (s->h) { /* rounded, whether it was kept or is computed twice: the same gradients */
        const size_t n = (size_t)NR * 2 * F;
        if (!a->h)
            op->convert(cx, s->act, m->be->kept_h, h, m->be->real, n);
        op->convert(cx, h, m->be->real, a->h ? a->h : s->act, m->be->kept_h, n);
    }
    if (glm_reads_input(m, &linear[GLM_4H_TO_H]))
        op->swiglu_forward(cx, s->act, h, NR, F);
    glm_linear_backward(m, &linear[GLM_4H_TO_H], s->dact, dout, s->act, a->xa[GLM_4H_TO_H], NR,
                        rows);
    op->swiglu_backward(cx, h, s->dact, h, NR, F);
    if (glm_reads_input(m, &linear[GLM_H_TO_4H]))
        op->rmsnorm_forward(cx, s->ln, a->rstd2, a->x1, layer->post_attention_layernorm->mat.data,
                            NR, C, m->arch.eps);
    glm_linear_backward(m, &linear[GLM_H_TO_4H], s->dnorm, h, s->ln, a->xa[GLM_H_TO_4H], NR, rows);
    op->rmsnorm_backward(cx, dout, layer->post_attention_layernorm->grad, s->dnorm, a->x1,
                         layer->post_attention_layernorm->mat.data, a->rstd2, NR, C);
    if (rows && glm_reads_input(m, &linear[GLM_DENSE]))
        op->gather_forward(cx, s->att_rows, a->att, s->rows, NR, AO);
    glm_linear_backward(m, &linear[GLM_DENSE], datt, dout, rows ? s->att_rows : a->att,
                        a->xa[GLM_DENSE], NR, rows);
    if (rows) {
        m->be->zero(m->be, s->datt, (size_t)N * AO * m->be->real_size);
        op->gather_backward(cx, s->datt, datt, s->rows, NR, AO);
        m->be->zero(m->be, s->dx, (size_t)N * C * m->be->real_size);
        op->gather_backward(cx, s->dx, dout, s->rows, NR, C);
    }
    op->attention_backward(cx, s->dqkv, glm_step_dkv(m, l), s->datt, a->att, a->lse, a->qkv,
                           glm_step_kv(m, l), s->segments, s->S, heads);
    op->rope_backward(cx, s->dqkv, m->rope_table, s->position, N, heads.NH + heads.KVH, heads.HD,
                      QKV, m->arch.rotary_dim);
    const int through_norm = need_dx || glm_trains(layer->input_layernorm);
    if (glm_reads_input(m, &linear[GLM_QKV]))
        op->rmsnorm_forward(cx, s->ln, a->rstd1, s->x[l], layer->input_layernorm->mat.data, N, C,
                            m->arch.eps);
    glm_linear_backward(m, &linear[GLM_QKV], through_norm ? s->dnorm : NULL, s->dqkv, s->ln,
                        a->xa[GLM_QKV], N, 0);
    if (through_norm)
        op->rmsnorm_backward(cx, s->dx, layer->input_layernorm->grad, s->dnorm, s->x[l],
                             layer->input_layernorm->mat.data, a->rstd1, N, C);
}
