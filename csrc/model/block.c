/* One layer: h += dense(attention(norm1 h)); h += mlp(norm2 h), and the way back. Where branches have
 * norms, what is added was normed again; what it is added to is norm.c's.
 * In the last layer nothing after attention is computed for tokens whose logits no one reads
 * (step.gathered). */
#include "state.h"

/* Layer l of kv (2 * layers, slots, KV); NULL where there is none */
static struct glm_kv layer_of(const struct glm_model *m, const void *kv, int slots, int l)
{
    const size_t size = (size_t)slots * m->arch.kv_heads * m->arch.head_dim;
    if (!kv)
        return (struct glm_kv){NULL, NULL};
    return (struct glm_kv){glm_at(m, kv, 2 * l * size), glm_at(m, kv, (2 * l + 1) * size)};
}

/* Keys and values that layer l reads besides its own tokens', and in training their gradients. */
static struct glm_kv kv_of(const struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const struct glm_cache *c = s->call.cache;
    return c ? layer_of(m, c->kv, c->slots, l) : layer_of(m, s->prefix_kv, s->prefix.n, l);
}
static struct glm_kv dkv_of(const struct glm_model *m, int l)
{
    return layer_of(m, m->step.dprefix_kv, m->step.prefix.n, l);
}

static struct glm_heads heads_of(const struct glm_model *m)
{
    const struct glm_step *s = &m->step;
    const struct glm_cache *c = s->call.cache;
    const int before = m->prefix_length + (c ? c->shared_capacity + c->capacity : 0);
    return (struct glm_heads){.NH = m->arch.heads,
                              .KVH = m->arch.kv_heads,
                              .HD = m->arch.head_dim,
                              .longest = s->longest,
                              .tokens = s->all.n,
                              .rows = c ? c->slots : s->prefix.n,
                              .before = before,
                              .shortest = s->shortest};
}

static int step_gathers(const struct glm_model *m, const struct glm_step *s, int l)
{
    return s->gathered && l == m->arch.layers - 1;
}

static int gathers(const struct glm_model *m, int l) { return step_gathers(m, &m->step, l); }

/* After attention */
static const struct glm_rows *rows_of(const struct glm_model *m, int l)
{
    return gathers(m, l) ? &m->step.read : &m->step.all;
}

/* What dense_h_to_4h of the layer at work yields */
static void *h_of(const struct glm_model *m, int l)
{
    return m->step.h ? m->step.h : m->step.acts[l].h;
}

/* Whether the activation of h and dense_4h_to_h are one op. */
static int activates(const struct glm_model *m, int l)
{
    const struct glm_linear *linear = m->layers[l].linear;
    const int with_product = m->step.fused_swiglu && !glm_adapted(m, &linear[GLM_H_TO_4H]);
    return !m->arch.gelu && !with_product && !glm_adapted(m, &linear[GLM_4H_TO_H]);
}

/* Whether all from the second norm on is one op; its backward has no gradients but that of its input. */
static int step_mlp_is_one(const struct glm_model *m, const struct glm_step *s, int l)
{
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_linear *up = &layer->linear[GLM_H_TO_4H], *down = &layer->linear[GLM_4H_TO_H];
    return !m->arch.gelu && !s->fused_swiglu && !m->arch.residual_scale &&
           !layer->post_attention_layernorm.bias && !up->bias && glm_is_frozen(m, up) &&
           glm_is_frozen(m, down);
}

static int mlp_is_one(const struct glm_model *m, int l) { return step_mlp_is_one(m, &m->step, l); }

static const void *bias_of(const struct glm_linear *linear)
{
    return linear->bias ? linear->bias->mat.data : NULL;
}

/* Whether both branches are added to the layer's input, where it lies, by their last products: so a
 * token's norms have nothing to add, and the second is part of the product after it. */
static int adds_in_place(const struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_linear *linear = layer->linear;
    return s->fused_swiglu && !s->several && !step_gathers(m, s, l) && s->x[l] == s->x[l + 1] &&
           !m->arch.residual_scale && !m->arch.branch_norms &&
           !layer->post_attention_layernorm.bias && !glm_adapted(m, &linear[GLM_DENSE]) &&
           !glm_adapted(m, &linear[GLM_H_TO_4H]) && !glm_adapted(m, &linear[GLM_4H_TO_H]);
}

/* Whether all from the first norm's output to what attention adds is one op: what has adapters is
 * query_key_value alone, nothing else of it trains, and every row goes through it to the end. */
static int step_attention_is_one(const struct glm_model *m, const struct glm_step *s, int l)
{
    const struct glm_arch *arch = &m->arch;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_linear *qkv = &layer->linear[GLM_QKV];
    if (arch->split_qkv || arch->qkv_by_head || arch->rope_2d || arch->residual_scale ||
        layer->input_layernorm.bias || step_gathers(m, s, l) || s->several || s->fused_swiglu ||
        !glm_is_frozen(m, &layer->linear[GLM_DENSE]))
        return 0;
    return !glm_trains(qkv->weight) && !glm_trains(qkv->bias) &&
           !(glm_adapted(m, qkv) && (glm_present(qkv->magnitude) || glm_present(qkv->B_bias)));
}

static int attention_is_one(const struct glm_model *m, int l)
{
    return step_attention_is_one(m, &m->step, l);
}

static struct glm_self_attention self_attention_of(const struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_linear *qkv = &layer->linear[GLM_QKV], *dense = &layer->linear[GLM_DENSE];
    const int adapted = glm_adapted(m, qkv);
    return (struct glm_self_attention){.norm = layer->input_layernorm.weight->mat.data,
                                       .eps = m->arch.eps,
                                       .qkv = &qkv->weight->mat,
                                       .dense = &dense->weight->mat,
                                       .qkv_bias = bias_of(qkv),
                                       .dense_bias = bias_of(dense),
                                       .A = adapted ? &qkv->A->mat : NULL,
                                       .B = adapted ? &qkv->B->mat : NULL,
                                       .scale = qkv->scale,
                                       .dropout = glm_mask_of(m, qkv, &s->all),
                                       .dropped = s->lora_x,
                                       .table = m->rope_table,
                                       .position = s->all.position,
                                       .slot = s->call.cache ? s->slot : NULL,
                                       .rotary_dim = m->arch.rotary_dim,
                                       .n_segments = s->S,
                                       .segments = s->segments,
                                       .cache = kv_of(m, l),
                                       .dcache = dkv_of(m, l),
                                       .heads = heads_of(m)};
}

size_t glm_mlp_room(const struct glm_model *m, const struct glm_step *s, int l, int n)
{
    const struct glm_linear *linear = m->layers[l].linear;
    struct glm_backend *be = m->be;
    if (!s->call.training || !be->mlp_rows || !step_mlp_is_one(m, s, l))
        return (size_t)n;
    return be->mlp_rows(be, &linear[GLM_H_TO_4H].weight->mat, &linear[GLM_4H_TO_H].weight->mat, n);
}

size_t glm_attention_room(const struct glm_model *m, const struct glm_step *s, int l, int n)
{
    struct glm_backend *be = m->be;
    if (!s->call.training || !be->self_attention_rows || !step_attention_is_one(m, s, l))
        return (size_t)n;
    struct glm_self_attention of = self_attention_of(m, l);
    of.slot = NULL; /* the step before may have had a cache */
    return be->self_attention_rows(be, &of, n);
}

/* Where the last product of a branch puts what goes to out by way of the branch's norm, if there is
 * one */
static void *before_norm(const struct glm_model *m, int l, int branch, void *out)
{
    return m->layers[l].branch_norm[branch].weight ? m->step.acts[l].branch[branch] : out;
}

static void branch_norm_forward(struct glm_model *m, int l, int branch, void *out)
{
    const struct glm_block_acts *a = &m->step.acts[l];
    const struct glm_norm *norm = &m->layers[l].branch_norm[branch];
    if (norm->weight)
        glm_norm_forward(m, norm, out, a->branch_mean[branch], a->branch_rstd[branch],
                         a->branch[branch], rows_of(m, l)->n);
}

/* The last product of a branch, and its norm. h: not of inp but of the activation of h, for which
 * inp has room. */
static void branch_forward(struct glm_model *m, int l, int branch, int which, void *out, void *inp,
                           const void *h)
{
    const struct glm_block_acts *a = &m->step.acts[l];
    const struct glm_rows *rows = rows_of(m, l);
    const struct glm_linear *linear = &m->layers[l].linear[which];
    void *to = before_norm(m, l, branch, out);
    if (h)
        m->be->ops->swiglu_linear_forward(m->be->cx, to, inp, h, &linear->weight->mat,
                                          bias_of(linear), rows->n);
    else
        glm_linear_forward(m, linear, to, inp, a->xa[which], rows);
    branch_norm_forward(m, l, branch, out);
}

/* The gradient of that product, of `dout`, that of what the branch added. */
static const void *branch_backward(struct glm_model *m, int l, int branch, const void *dout)
{
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_norm *norm = &m->layers[l].branch_norm[branch];
    const int N = rows_of(m, l)->n, C = m->arch.hidden;
    if (!norm->weight)
        return dout;
    m->be->zero(m->be, s->dbranch, (size_t)N * C * m->be->real_size);
    glm_norm_backward(m, norm, s->dbranch, dout, a->branch[branch], a->branch_mean[branch],
                      a->branch_rstd[branch], N);
    return s->dbranch;
}

/* Whether query_key_value, the rotation and the cache are one op. */
static int appends(const struct glm_model *m, int l)
{
    return m->step.call.cache && !m->arch.split_qkv && !m->arch.qkv_by_head && !m->arch.rope_2d &&
           !glm_adapted(m, &m->layers[l].linear[GLM_QKV]);
}

/* Whether the first norm is part of that op, too. */
static int appends_norm(const struct glm_model *m, int l)
{
    return appends(m, l) && m->step.fused_swiglu && !m->arch.residual_scale &&
           !m->layers[l].input_layernorm.bias && (l == 0 || adds_in_place(m, l - 1));
}

/* Queries, keys and values of norm1, from one product or three. */
static void qkv_forward(struct glm_model *m, int l, struct glm_heads heads)
{
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_linear *linear = m->layers[l].linear;
    const struct glm_rows *all = &s->all;
    if (appends(m, l)) {
        m->be->ops->linear_rope_append(m->be->cx, kv_of(m, l), a->qkv, s->ln,
                                       &linear[GLM_QKV].weight->mat, bias_of(&linear[GLM_QKV]),
                                       m->rope_table, all->position, s->slot, all->n, heads,
                                       m->arch.rotary_dim);
        return;
    }
    if (!m->arch.split_qkv) {
        void *out = m->arch.qkv_by_head ? s->q : a->qkv;
        glm_linear_forward(m, &linear[GLM_QKV], out, s->ln, a->xa[GLM_QKV], all);
        if (m->arch.qkv_by_head)
            m->be->ops->qkv_by_head_forward(m->be->cx, a->qkv, s->q, all->n, heads);
        return;
    }
    glm_linear_forward(m, &linear[GLM_QKV], s->q, s->ln, a->xa[GLM_QKV], all);
    glm_linear_forward(m, &linear[GLM_K], s->k, s->ln, a->xa[GLM_K], all);
    glm_linear_forward(m, &linear[GLM_V], s->v, s->ln, a->xa[GLM_V], all);
    m->be->ops->qkv_forward(m->be->cx, a->qkv, s->q, s->k, s->v, all->n, heads);
}

/* Of dqkv into dln1, unless nothing below trains; ln holds what was read. */
static void qkv_backward(struct glm_model *m, int l, int need_dx, struct glm_heads heads)
{
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_linear *linear = m->layers[l].linear;
    const struct glm_rows *all = &s->all;
    void *dinp = need_dx ? s->dln1 : NULL;
    if (!m->arch.split_qkv) {
        const void *dout = m->arch.qkv_by_head ? s->q : s->dqkv;
        if (m->arch.qkv_by_head)
            m->be->ops->qkv_by_head_backward(m->be->cx, s->q, s->dqkv, all->n, heads);
        glm_linear_backward(m, &linear[GLM_QKV], dinp, dout, s->ln, a->xa[GLM_QKV], all, 0);
        return;
    }
    m->be->ops->qkv_backward(m->be->cx, s->q, s->k, s->v, s->dqkv, all->n, heads);
    glm_linear_backward(m, &linear[GLM_QKV], dinp, s->q, s->ln, a->xa[GLM_QKV], all, 0);
    glm_linear_backward(m, &linear[GLM_K], dinp, s->k, s->ln, a->xa[GLM_K], all, 1);
    glm_linear_backward(m, &linear[GLM_V], dinp, s->v, s->ln, a->xa[GLM_V], all, 1);
}

/* Whether backward reads the first norm's output. */
static int reads_norm1(const struct glm_model *m, const struct glm_linear *linear)
{
    return glm_reads_input(m, &linear[GLM_QKV]) ||
           (m->arch.split_qkv &&
            (glm_reads_input(m, &linear[GLM_K]) || glm_reads_input(m, &linear[GLM_V])));
}

/* Queries and keys of qkv are rotated; in generation they go into the cache with their values, in
 * rows that no segment of this call reads. */
static void rope_forward(struct glm_model *m, int l, struct glm_heads heads)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_step *s = &m->step;
    void *qkv = s->acts[l].qkv;
    const int32_t *position = s->all.position;
    const int N = s->N, rotated = heads.NH + heads.KVH;
    const int QKV = (heads.NH + 2 * heads.KVH) * heads.HD;
    if (appends(m, l))
        return; /* it was done with the product */
    if (m->arch.rope_2d) {
        op->rope_2d_forward(cx, qkv, m->rope_table, s->at, s->block, N, rotated, heads.HD, QKV);
        if (s->call.cache)
            op->kv_append(cx, kv_of(m, l), qkv, s->slot, N, heads);
    } else if (s->call.cache) {
        op->rope_append(cx, kv_of(m, l), qkv, m->rope_table, position, s->slot, N, heads,
                        m->arch.rotary_dim);
    } else {
        op->rope_forward(cx, qkv, m->rope_table, position, N, rotated, heads.HD, QKV,
                         m->arch.rotary_dim);
    }
}

static void rope_backward(struct glm_model *m, struct glm_heads heads)
{
    const struct glm_ops *op = m->be->ops;
    const struct glm_step *s = &m->step;
    const int rotated = heads.NH + heads.KVH, QKV = (heads.NH + 2 * heads.KVH) * heads.HD;
    if (m->arch.rope_2d)
        op->rope_2d_backward(m->be->cx, s->dqkv, m->rope_table, s->at, s->block, s->N, rotated,
                             heads.HD, QKV);
    else
        op->rope_backward(m->be->cx, s->dqkv, m->rope_table, s->all.position, s->N, rotated,
                          heads.HD, QKV, m->arch.rotary_dim);
}

static void activation_forward(struct glm_model *m, void *act, const void *h, int N)
{
    const int F = m->arch.ffn;
    if (m->arch.gelu)
        m->be->ops->gelu_forward(m->be->cx, act, h, (size_t)N * F);
    else
        m->be->ops->swiglu_forward(m->be->cx, act, h, N, F);
}

/* h becomes its gradient */
static void activation_backward(struct glm_model *m, void *h, const void *dact, int N)
{
    const int F = m->arch.ffn;
    if (m->arch.gelu)
        m->be->ops->gelu_backward(m->be->cx, h, dact, h, (size_t)N * F);
    else
        m->be->ops->swiglu_backward(m->be->cx, h, dact, h, N, F);
}

/* x[l + 1] += x1 and its norm where the next layer, or the output layer, looks for it, each unless it
 * was done or the next layer does */
static void finish(struct glm_model *m, int l, int N)
{
    const struct glm_step *s = &m->step;
    const void *residual = m->arch.residual_scale ? s->ln : s->acts[l].x1;
    const int last = l == m->arch.layers - 1;
    if (!last && appends_norm(m, l + 1))
        return;
    if (!last && attention_is_one(m, l + 1)) {
        const struct glm_self_attention next = self_attention_of(m, l + 1);
        m->be->ops->self_attention_norm(m->be->cx, s->ln, s->acts[l + 1].rstd1, s->x[l + 1],
                                        residual, &next, N);
        return;
    }
    const struct glm_norm *norm = last ? &m->final_layernorm : &m->layers[l + 1].input_layernorm;
    void *out = last ? s->final : s->ln, *mean = last ? s->final_mean : s->acts[l + 1].mean1,
         *rstd = last ? s->final_rstd : s->acts[l + 1].rstd1;
    if (adds_in_place(m, l))
        glm_norm_forward(m, norm, out, mean, rstd, s->x[l + 1], N);
    else
        glm_residual_forward(m, norm, out, mean, rstd, s->x[l + 1], residual, N);
}

/* h of ln, and the activation where `act` is set */
static void up_forward(struct glm_model *m, int l, void *h, int act)
{
    const struct glm_step *s = &m->step;
    const struct glm_rows *rows = rows_of(m, l);
    const struct glm_linear *up = &m->layers[l].linear[GLM_H_TO_4H];
    if (s->fused_swiglu && !glm_adapted(m, up)) {
        m->be->ops->linear_swiglu_forward(m->be->cx, s->act, h, s->ln, &up->weight->mat,
                                          bias_of(up), rows->n);
        return;
    }
    glm_linear_forward(m, up, h, s->ln, s->acts[l].xa[GLM_H_TO_4H], rows);
    if (act)
        activation_forward(m, s->act, h, rows->n);
}

/* Queries, keys and values, and attention of them, into att. norm1: as below. */
static void attend(struct glm_model *m, int l, int norm1)
{
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_heads heads = heads_of(m);
    if (appends_norm(m, l)) {
        const struct glm_linear *qkv = &m->layers[l].linear[GLM_QKV];
        m->be->ops->rmsnorm_rope_append(
            m->be->cx, kv_of(m, l), a->qkv, s->ln, a->rstd1, s->x[l],
            m->layers[l].input_layernorm.weight->mat.data, &qkv->weight->mat, bias_of(qkv),
            m->rope_table, s->all.position, s->slot, s->N, heads, m->arch.rotary_dim, m->arch.eps);
    } else {
        if (norm1)
            glm_norm_forward(m, &m->layers[l].input_layernorm, s->ln, a->mean1, a->rstd1, s->x[l],
                             s->N);
        qkv_forward(m, l, heads);
    }
    rope_forward(m, l, heads);
    m->be->ops->attention_forward(m->be->cx, a->att, a->lse, a->qkv, kv_of(m, l), s->segments, s->S,
                                  heads);
}

/* What attention adds, into x1, and the rows of the layer's input that it is added to, which are
 * returned. norm1: as below. */
static const void *attention_branch(struct glm_model *m, int l, int norm1)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_heads heads = heads_of(m);
    const int N = s->N, NR = rows_of(m, l)->n, C = m->arch.hidden;
    const void *residual = m->arch.residual_scale ? s->ln : s->x[l];
    void *att = a->att;
    if (attention_is_one(m, l)) {
        const struct glm_self_attention of = self_attention_of(m, l);
        if (norm1)
            op->self_attention_norm(cx, s->ln, a->rstd1, s->x[l], NULL, &of, N);
        op->self_attention_forward(cx, before_norm(m, l, GLM_ATTENTION, a->x1), att, a->lse, a->qkv,
                                   a->xa[GLM_QKV], s->ln, &of, N);
        branch_norm_forward(m, l, GLM_ATTENTION, a->x1);
        return residual;
    }
    attend(m, l, norm1);
    if (gathers(m, l)) {
        op->gather_forward(cx, s->att_rows, att, s->gather, NR, heads.NH * heads.HD);
        op->gather_forward(cx, s->x_rows, residual, s->gather, NR, C);
        att = s->att_rows;
        residual = s->x_rows;
    }
    branch_forward(m, l, GLM_ATTENTION, GLM_DENSE, a->x1, att, NULL);
    return residual;
}

/* The layer up to h, as both passes need it, with the activation where `act` is set, and where MLP is
 * one op with what it yields, unless out is NULL. norm1: its input's norm is not in ln yet. */
static void to_last_linear(struct glm_model *m, int l, int norm1, int act, void *out)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const int NR = rows_of(m, l)->n;
    const void *residual = attention_branch(m, l, norm1);
    void *h = h_of(m, l);
    const struct glm_linear *up = &layer->linear[GLM_H_TO_4H], *down = &layer->linear[GLM_4H_TO_H];
    if (mlp_is_one(m, l)) {
        op->swiglu_mlp_forward(cx, out, a->rstd2, a->x1, s->act, h, residual,
                               layer->post_attention_layernorm.weight->mat.data, &up->weight->mat,
                               &down->weight->mat, bias_of(down), NR, m->arch.eps);
    } else {
        glm_residual_forward(m, &layer->post_attention_layernorm, s->ln, a->mean2, a->rstd2, a->x1,
                             residual, NR);
        up_forward(m, l, h, act);
    }
    if (s->h && a->h)
        op->convert(cx, a->h, m->be->kept_h, h, m->be->real, (size_t)NR * glm_up_columns(&m->arch));
}

/* out += inp W^T + bias */
static void add_product(struct glm_model *m, void *out, const void *inp,
                        const struct glm_linear *linear, int N)
{
    m->be->ops->linear_forward(m->be->cx, out, inp, &linear->weight->mat, bias_of(linear), N, 1, 1);
}

static void in_place_forward(struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const struct glm_layer *layer = &m->layers[l];
    const struct glm_linear *up = &layer->linear[GLM_H_TO_4H];
    attend(m, l, l == 0);
    add_product(m, s->x[l], s->acts[l].att, &layer->linear[GLM_DENSE], s->N);
    m->be->ops->rmsnorm_swiglu_forward(m->be->cx, s->act, h_of(m, l), s->ln, s->acts[l].rstd2,
                                       s->x[l], layer->post_attention_layernorm.weight->mat.data,
                                       &up->weight->mat, bias_of(up), s->N, m->arch.eps);
    add_product(m, s->x[l], s->act, &layer->linear[GLM_4H_TO_H], s->N);
    finish(m, l, s->N);
}

void glm_block_forward(struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    if (adds_in_place(m, l)) {
        in_place_forward(m, l);
        return;
    }
    const void *h = activates(m, l) ? h_of(m, l) : NULL;
    void *out = s->x[l + 1];
    /* the other norms come with the layer before */
    to_last_linear(m, l, l == 0, !h, before_norm(m, l, GLM_MLP, out));
    if (mlp_is_one(m, l))
        branch_norm_forward(m, l, GLM_MLP, out);
    else
        branch_forward(m, l, GLM_MLP, GLM_4H_TO_H, out, s->act, h);
    finish(m, l, rows_of(m, l)->n);
}

/* Backward reads neither the last product, unless it is normed, nor, unless an adapter trains, its
 * input. */
void glm_block_recompute(struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const struct glm_rows *rows = rows_of(m, l);
    const struct glm_linear *last = &m->layers[l].linear[GLM_4H_TO_H];
    const int adapter = glm_reads_xa(last), normed = m->arch.branch_norms;
    const void *h = activates(m, l) ? h_of(m, l) : NULL;
    to_last_linear(m, l, 1, adapter || (normed && !h), before_norm(m, l, GLM_MLP, NULL));
    if (normed && mlp_is_one(m, l))
        branch_norm_forward(m, l, GLM_MLP, s->dbranch);
    else if (normed)
        branch_forward(m, l, GLM_MLP, GLM_4H_TO_H, s->dbranch, s->act, h);
    else if (adapter)
        glm_adapter_forward(m, last, s->act, s->acts[l].xa[GLM_4H_TO_H], rows);
}

/* Of what MLP yields, into dnorm; h becomes its gradient. */
static void mlp_backward(struct glm_model *m, int l, void *h, const void *dout)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_rows *rows = rows_of(m, l);
    const struct glm_linear *linear = m->layers[l].linear;
    const struct glm_linear *up = &linear[GLM_H_TO_4H], *down = &linear[GLM_4H_TO_H];
    if (mlp_is_one(m, l)) {
        op->swiglu_mlp_backward(cx, s->dnorm, h, dout, &up->weight->mat, &down->weight->mat,
                                rows->n);
        return;
    }
    if (glm_reads_input(m, down))
        activation_forward(m, s->act, h, rows->n);
    glm_linear_backward(m, down, s->dact, dout, s->act, a->xa[GLM_4H_TO_H], rows, 0);
    if (!m->arch.gelu && glm_is_frozen(m, up)) {
        op->swiglu_linear_backward(cx, s->dnorm, s->dact, h, &up->weight->mat, rows->n);
        return;
    }
    activation_backward(m, h, s->dact, rows->n);
    if (glm_reads_input(m, up))
        glm_norm_forward(m, &m->layers[l].post_attention_layernorm, s->ln, a->mean2, a->rstd2,
                         a->x1, rows->n);
    glm_linear_backward(m, up, s->dnorm, h, s->ln, a->xa[GLM_H_TO_4H], rows, 0);
}

/* Of dout, the gradient of what attention adds and of what it is added to, into that of the first
 * norm's output, if need_dx; where the layer gathers, dx is the latter one of all rows. */
static void attention_branch_backward(struct glm_model *m, int l, int need_dx, const void *dout)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_step *s = &m->step;
    const struct glm_block_acts *a = &s->acts[l];
    const struct glm_heads heads = heads_of(m);
    const int N = s->N, C = m->arch.hidden, AO = heads.NH * heads.HD;
    const struct glm_rows *rows = rows_of(m, l);
    const int gathered = gathers(m, l), NR = rows->n;
    const struct glm_linear *linear = m->layers[l].linear;
    const void *of_branch = branch_backward(m, l, GLM_ATTENTION, dout);
    void *datt = gathered ? s->datt_rows : s->datt;
    if (attention_is_one(m, l)) {
        const struct glm_self_attention of = self_attention_of(m, l);
        void *dA = of.A ? linear[GLM_QKV].A->grad : NULL,
             *dB = of.A ? linear[GLM_QKV].B->grad : NULL;
        op->self_attention_backward(cx, need_dx ? s->dln1 : NULL, dA, dB, datt, s->dqkv, s->lora_u,
                                    a->rstd1, of_branch, a->att, a->lse, a->qkv, a->xa[GLM_QKV],
                                    s->x[l], &of, N);
        return;
    }
    if (gathered && glm_reads_input(m, &linear[GLM_DENSE]))
        op->gather_forward(cx, s->att_rows, a->att, s->gather, NR, AO);
    glm_linear_backward(m, &linear[GLM_DENSE], datt, of_branch, gathered ? s->att_rows : a->att,
                        a->xa[GLM_DENSE], rows, 0);
    if (gathered) {
        m->be->zero(m->be, s->datt, (size_t)N * AO * m->be->real_size);
        op->gather_backward(cx, s->datt, datt, s->gather, NR, AO);
        m->be->zero(m->be, s->dx, (size_t)N * C * m->be->real_size);
        op->gather_backward(cx, s->dx, dout, s->gather, NR, C);
    }
    op->attention_backward(cx, s->dqkv, dkv_of(m, l), s->datt, a->att, a->lse, a->qkv, kv_of(m, l),
                           s->segments, s->S, heads);
    rope_backward(m, heads);
    if (reads_norm1(m, linear))
        glm_norm_forward(m, &m->layers[l].input_layernorm, s->ln, a->mean1, a->rstd1, s->x[l], N);
    qkv_backward(m, l, need_dx, heads);
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
    const int NR = rows_of(m, l)->n,
              through_norm = need_dx || glm_norm_trains(&layer->input_layernorm);
    void *dout = gathers(m, l) ? s->dx_rows : s->dx;
    void *h = h_of(m, l);

    if (s->h) { /* rounded, whether it was kept or recomputed: the same gradients */
        const size_t n = (size_t)NR * glm_up_columns(&m->arch);
        if (!a->h)
            op->convert(cx, s->act, m->be->kept_h, h, m->be->real, n);
        op->convert(cx, h, m->be->real, a->h ? a->h : s->act, m->be->kept_h, n);
    }
    mlp_backward(m, l, h, branch_backward(m, l, GLM_MLP, dout));
    glm_residual_backward(m, &layer->post_attention_layernorm, dout, s->dnorm, a->x1, a->mean2,
                          a->rstd2, NR);
    attention_branch_backward(m, l, through_norm, dout);
    if (through_norm)
        glm_residual_backward(m, &layer->input_layernorm, s->dx, s->dln1, s->x[l], a->mean1,
                              a->rstd1, s->N);
}
