#include <math.h>
#include <stdio.h>

#include "state.h"

static const char *const LINEAR_NAMES[GLM_LINEARS] = {
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
};

static const char *const PREFIX_NAMES[GLM_PREFIX_WEIGHTS] = {
    "embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias",
};

#define LAYER_NAME "transformer.encoder.layers.%d.%s"

glm_status glm_arch_check(const struct glm_arch *a, struct glm_error *err)
{
    const struct {
        const char *name;
        int value, low, high;
    } ranges[] = {
        {"layers", a->layers, 1, 1000},
        {"hidden", a->hidden, 1, 1 << 20},
        {"ffn", a->ffn, 1, 1 << 22},
        {"heads", a->heads, 1, 1 << 12},
        {"kv_heads", a->kv_heads, 1, a->heads},
        {"head_dim", a->head_dim, 2, 1 << 10},
        {"vocab", a->vocab, 2, 1 << 24},
        {"max_positions", a->max_positions, 1, 1 << 24},
        {"rotary_dim", a->rotary_dim, 2, a->head_dim},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++)
        if (ranges[i].value < ranges[i].low || ranges[i].value > ranges[i].high)
            return glm_fail(err, GLM_EVALUE, "arch %s: expected %d to %d, got %d", ranges[i].name,
                            ranges[i].low, ranges[i].high, ranges[i].value);
    if (a->heads % a->kv_heads)
        return glm_fail(err, GLM_EVALUE, "arch heads: %d is not a multiple of kv_heads %d",
                        a->heads, a->kv_heads);
    if (a->rotary_dim % 2)
        return glm_fail(err, GLM_EVALUE, "arch rotary_dim: expected an even number, got %d",
                        a->rotary_dim);
    if (!(a->eps > 0) || !(a->rope_base > 0) || !(a->rope_divisor > 0) || !isfinite(a->rope_base) ||
        !isfinite(a->rope_divisor) || !isfinite(a->eps))
        return glm_fail(
            err, GLM_EVALUE,
            "arch: eps %g, rope_base %g and rope_divisor %g must be positive and finite", a->eps,
            a->rope_base, a->rope_divisor);
    return GLM_OK;
}

static struct glm_weight *add_base(struct glm_model *m, int rank, int rows, int cols,
                                   const char *name)
{
    struct glm_weight *w = &m->weights[m->n_base++];
    snprintf(w->name, sizeof w->name, "%s", name);
    w->kind = GLM_BASE;
    w->rank = rank;
    w->rows = rows;
    w->cols = cols;
    w->present = 1;
    return w;
}

static struct glm_weight *add_layer_base(struct glm_model *m, int l, int rank, int rows, int cols,
                                         const char *tail)
{
    char name[112];
    snprintf(name, sizeof name, LAYER_NAME, l, tail);
    return add_base(m, rank, rows, cols, name);
}

static struct glm_weight *add_linear(struct glm_model *m, int l, int which, int out, int in)
{
    char tail[64];
    snprintf(tail, sizeof tail, "%s.weight", LINEAR_NAMES[which]);
    struct glm_linear *lin = &m->layers[l].linear[which];
    lin->weight = add_layer_base(m, l, 2, out, in, tail);
    lin->site = (uint32_t)(l * GLM_LINEARS + which);
    return lin->weight;
}

size_t glm_arch_slots(const struct glm_arch *a)
{
    const int base = 2 + GLM_LINEARS + 1; /* of a layer: norms, matrices, a bias */
    return 3 + (size_t)a->layers * (base + 2 * GLM_LINEARS) + GLM_PREFIX_WEIGHTS;
}

void glm_arch_add_weights(struct glm_model *m)
{
    const struct glm_arch *a = &m->arch;
    const int AO = a->heads * a->head_dim, QKV = (a->heads + 2 * a->kv_heads) * a->head_dim;
    m->word_embeddings =
        add_base(m, 2, a->vocab, a->hidden, "transformer.embedding.word_embeddings.weight");
    for (int l = 0; l < a->layers; l++) {
        struct glm_layer *layer = &m->layers[l];
        layer->input_layernorm = add_layer_base(m, l, 1, a->hidden, 1, "input_layernorm.weight");
        add_linear(m, l, GLM_QKV, QKV, a->hidden);
        if (a->qkv_bias)
            layer->linear[GLM_QKV].bias =
                add_layer_base(m, l, 1, QKV, 1, "self_attention.query_key_value.bias");
        add_linear(m, l, GLM_DENSE, a->hidden, AO);
        layer->post_attention_layernorm =
            add_layer_base(m, l, 1, a->hidden, 1, "post_attention_layernorm.weight");
        add_linear(m, l, GLM_H_TO_4H, 2 * a->ffn, a->hidden);
        add_linear(m, l, GLM_4H_TO_H, a->hidden, a->ffn);
    }
    m->final_layernorm = add_base(m, 1, a->hidden, 1, "transformer.encoder.final_layernorm.weight");
    m->output_layer = add_base(m, 2, a->vocab, a->hidden, "transformer.output_layer.weight");

    struct glm_weight *w = m->weights + m->n_base;
    for (int l = 0; l < a->layers; l++)
        for (int which = 0; which < GLM_LINEARS; which++)
            for (int b = 0; b < 2; b++, w++) {
                snprintf(w->name, sizeof w->name, LAYER_NAME ".lora_%c.weight", l,
                         LINEAR_NAMES[which], "AB"[b]);
                w->kind = GLM_LORA;
                w->rank = 2;
                *(b ? &m->layers[l].linear[which].B : &m->layers[l].linear[which].A) = w;
            }
    m->prefix = w;
    for (int i = 0; i < GLM_PREFIX_WEIGHTS; i++, w++) {
        snprintf(w->name, sizeof w->name, "transformer.prefix_encoder.%s", PREFIX_NAMES[i]);
        w->kind = GLM_PREFIX;
        w->rank = i == 2 || i == 4 ? 1 : 2;
    }
    m->n_weights = (int)(w - m->weights);
}
