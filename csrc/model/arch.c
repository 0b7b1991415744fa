/* A family as numbers and names: what they must be, and the weights that follow from them. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "state.h"

/* What stands for a layer's number in names.layer. A name is a text to be cut there, never a
 * format. */
#define NUMBER "{}"

static glm_status check_numbers(const struct glm_arch *a, struct glm_error *err)
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
        {"prefix_input", a->prefix_input, 1, INT32_MAX},
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
    if (a->qkv_by_head && (a->split_qkv || a->kv_heads != a->heads))
        return glm_fail(
            err, GLM_EVALUE,
            "arch qkv_by_head: needs one query_key_value and kv_heads %d equal to heads %d",
            a->kv_heads, a->heads);
    if (!(a->residual_scale >= 0) || !isfinite(a->residual_scale))
        return glm_fail(err, GLM_EVALUE, "arch residual_scale: %g must be finite and not negative",
                        a->residual_scale);
    if (!(a->eps > 0) || !(a->rope_base > 0) || !(a->rope_divisor > 0) || !isfinite(a->rope_base) ||
        !isfinite(a->rope_divisor) || !isfinite(a->eps))
        return glm_fail(
            err, GLM_EVALUE,
            "arch: eps %g, rope_base %g and rope_divisor %g must be positive and finite", a->eps,
            a->rope_base, a->rope_divisor);
    return GLM_OK;
}

/* What positions in two dimensions need. */
static glm_status check_rope_2d(const struct glm_arch *a, struct glm_error *err)
{
    const struct {
        const char *name;
        int id;
    } ids[] = {{"sop", a->sop}, {"gmask", a->gmask}, {"mask", a->mask}};
    if (!a->rope_2d)
        return GLM_OK;
    if (a->head_dim % 4 || a->rotary_dim != a->head_dim / 2)
        return glm_fail(
            err, GLM_EVALUE,
            "arch rope_2d: expected head_dim a multiple of 4 and rotary_dim half of it, "
            "got %d and %d",
            a->head_dim, a->rotary_dim);
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        if (ids[i].id < 0 || ids[i].id >= a->vocab)
            return glm_fail(err, GLM_EVALUE, "arch %s: id %d is outside the vocabulary of %d",
                            ids[i].name, ids[i].id, a->vocab);
        for (size_t k = 0; k < i; k++)
            if (ids[i].id == ids[k].id)
                return glm_fail(err, GLM_EVALUE, "arch %s and %s: both are id %d", ids[k].name,
                                ids[i].name, ids[i].id);
    }
    return GLM_OK;
}

/* The names of what only some models have are there or not, as the numbers say. */
static glm_status check_presence(const struct glm_arch *a, const struct glm_names *names,
                                 struct glm_error *err)
{
    const struct {
        const char *key, *name, *flag;
        int wanted;
    } all[] = {
        {"query_key_value", names->query_key_value, "split_qkv", !a->split_qkv},
        {"query", names->query, "split_qkv", a->split_qkv},
        {"key", names->key, "split_qkv", a->split_qkv},
        {"value", names->value, "split_qkv", a->split_qkv},
        {"post_self_attn_layernorm", names->post_self_attn_layernorm, "branch_norms",
         a->branch_norms},
        {"post_mlp_layernorm", names->post_mlp_layernorm, "branch_norms", a->branch_norms},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (!all[i].name != !all[i].wanted)
            return glm_fail(err, GLM_EVALUE, "names: key '%s' %s, which arch %s decides",
                            all[i].key, all[i].wanted ? "is missing" : "is one too many",
                            all[i].flag);
    return GLM_OK;
}

/* Each name that is there is short enough for what is made of it, and no other's. */
static glm_status check_names(const struct glm_names *names, struct glm_error *err)
{
    const struct {
        const char *key, *name;
    } all[] = {
        {"layer", names->layer}, /* first, as it stands before others */
        {"word_embeddings", names->word_embeddings},
        {"final_layernorm", names->final_layernorm},
        {"output_layer", names->output_layer},
        {"input_layernorm", names->input_layernorm},
        {"post_attention_layernorm", names->post_attention_layernorm},
        {"query_key_value", names->query_key_value},
        {"query", names->query},
        {"key", names->key},
        {"value", names->value},
        {"post_self_attn_layernorm", names->post_self_attn_layernorm},
        {"post_mlp_layernorm", names->post_mlp_layernorm},
        {"dense", names->dense},
        {"dense_h_to_4h", names->dense_h_to_4h},
        {"dense_4h_to_h", names->dense_4h_to_h},
        {"prefix_encoder", names->prefix_encoder},
    };
    const size_t n = sizeof all / sizeof all[0];
    const size_t room = GLM_MAX_NAME - 1 - strlen("1000..lora_magnitude_vector");
    const char *number = strstr(names->layer, NUMBER);
    if (!number || strstr(number + strlen(NUMBER), NUMBER))
        return glm_fail(err, GLM_EVALUE,
                        "names layer: expected one " NUMBER " for the layer's number, got '%.200s'",
                        names->layer);
    for (size_t i = 0; i < n; i++) {
        if (!all[i].name)
            continue;
        if (!*all[i].name)
            return glm_fail(err, GLM_EVALUE, "names %s: is empty", all[i].key);
        if (strlen(all[i].name) + (i ? strlen(names->layer) : 0) > room)
            return glm_fail(err, GLM_EVALUE,
                            "names %s: with layer it is longer than %zu bytes: '%.200s'",
                            all[i].key, room, all[i].name);
        for (size_t k = 0; k < i; k++)
            if (all[k].name && strcmp(all[i].name, all[k].name) == 0)
                return glm_fail(err, GLM_EVALUE, "names %s and %s: both are '%.200s'", all[k].key,
                                all[i].key, all[i].name);
    }
    return GLM_OK;
}

glm_status glm_arch_check(const struct glm_arch *a, const struct glm_names *names,
                          struct glm_error *err)
{
    GLM_TRY(check_numbers(a, err));
    GLM_TRY(check_rope_2d(a, err));
    GLM_TRY(check_presence(a, names, err));
    return check_names(names, err);
}

/* "module.tail", of layer l below names.layer where l >= 0 */
static void set_name(struct glm_weight *w, const struct glm_names *names, int l, const char *module,
                     const char *tail)
{
    const char *number = strstr(names->layer, NUMBER);
    if (l < 0)
        snprintf(w->name, sizeof w->name, "%s.%s", module, tail);
    else
        snprintf(w->name, sizeof w->name, "%.*s%d%s.%s.%s", (int)(number - names->layer),
                 names->layer, l, number + strlen(NUMBER), module, tail);
}

static struct glm_weight *add_base(struct glm_model *m, const struct glm_names *names, int l,
                                   const char *module, const char *tail, int rank, int rows,
                                   int cols)
{
    struct glm_weight *w = &m->weights[m->n_base++];
    set_name(w, names, l, module, tail);
    w->kind = GLM_BASE;
    w->rank = rank;
    w->rows = rows;
    w->cols = cols;
    w->present = 1;
    return w;
}

static struct glm_weight *add_vector(struct glm_model *m, const struct glm_names *names, int l,
                                     const char *module, const char *tail, int rows)
{
    return add_base(m, names, l, module, tail, 1, rows, 1);
}

static struct glm_weight *add_matrix(struct glm_model *m, const struct glm_names *names, int l,
                                     const char *module, int rows, int cols)
{
    return add_base(m, names, l, module, "weight", 2, rows, cols);
}

size_t glm_arch_slots(const struct glm_arch *a)
{
    const int base = 2 * (2 + GLM_BRANCHES + GLM_LINEARS); /* of a layer: norms and linears */
    const size_t linears = (size_t)a->layers * GLM_LINEARS + 1;
    return 4 + (size_t)a->layers * base + linears * GLM_LORA_SLOTS + GLM_PREFIX_WEIGHTS;
}

static struct glm_norm add_norm(struct glm_model *m, const struct glm_names *names, int l,
                                const char *module)
{
    const int C = m->arch.hidden;
    struct glm_norm norm = {.weight = add_vector(m, names, l, module, "weight", C)};
    if (m->arch.layer_norm)
        norm.bias = add_vector(m, names, l, module, "bias", C);
    return norm;
}

static void add_linear(struct glm_model *m, const struct glm_names *names, int l, int which,
                       const char *module, int rows, int cols, int bias)
{
    struct glm_linear *lin = &m->layers[l].linear[which];
    lin->weight = add_matrix(m, names, l, module, rows, cols);
    if (bias)
        lin->bias = add_vector(m, names, l, module, "bias", rows);
}

/* query_key_value, or a part of it */
static void add_qkv(struct glm_model *m, const struct glm_names *names, int l, int which,
                    const char *module, int rows)
{
    add_linear(m, names, l, which, module, rows, m->arch.hidden, m->arch.qkv_bias);
}

static void add_layer(struct glm_model *m, const struct glm_names *names, int l)
{
    const struct glm_arch *a = &m->arch;
    const int C = a->hidden, AO = a->heads * a->head_dim, KV = a->kv_heads * a->head_dim;
    struct glm_layer *layer = &m->layers[l];
    struct glm_linear *linear = layer->linear;
    layer->input_layernorm = add_norm(m, names, l, names->input_layernorm);
    if (a->split_qkv) {
        add_qkv(m, names, l, GLM_QKV, names->query, AO);
        add_qkv(m, names, l, GLM_K, names->key, KV);
        add_qkv(m, names, l, GLM_V, names->value, KV);
    } else {
        add_qkv(m, names, l, GLM_QKV, names->query_key_value, AO + 2 * KV);
    }
    add_linear(m, names, l, GLM_DENSE, names->dense, C, AO, a->linear_bias);
    if (a->branch_norms)
        layer->branch_norm[GLM_ATTENTION] = add_norm(m, names, l, names->post_self_attn_layernorm);
    layer->post_attention_layernorm = add_norm(m, names, l, names->post_attention_layernorm);
    add_linear(m, names, l, GLM_H_TO_4H, names->dense_h_to_4h, glm_up_columns(a), C,
               a->linear_bias);
    add_linear(m, names, l, GLM_4H_TO_H, names->dense_4h_to_h, C, a->ffn, a->linear_bias);
    if (a->branch_norms)
        layer->branch_norm[GLM_MLP] = add_norm(m, names, l, names->post_mlp_layernorm);
    for (int which = 0; which < GLM_LINEARS; which++)
        linear[which].site = glm_site(a, l, which);
}

/* The empty slots of adapters, and of the prefix encoder. */
static void add_slots(struct glm_model *m, const struct glm_names *names)
{
    static const char *const lora[GLM_LORA_SLOTS] = {
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "derived"};
    static const char *const prefix[GLM_PREFIX_WEIGHTS] = {
        "embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias",
    };
    const char *const linears[GLM_LINEARS] = {
        [GLM_QKV] = m->arch.split_qkv ? names->query : names->query_key_value,
        [GLM_K] = names->key,
        [GLM_V] = names->value,
        [GLM_DENSE] = names->dense,
        [GLM_H_TO_4H] = names->dense_h_to_4h,
        [GLM_4H_TO_H] = names->dense_4h_to_h,
    };
    struct glm_weight *w = m->weights + m->n_base;
    for (int i = 0; i < glm_n_linears(m); i++) {
        struct glm_linear *lin = glm_linear_at(m, i);
        const int l = lin == m->head ? -1 : i / GLM_LINEARS;
        const char *module = l < 0 ? names->output_layer : linears[i % GLM_LINEARS];
        if (!lin->weight)
            continue;
        for (int slot = 0; slot < GLM_LORA_SLOTS; slot++) {
            w[slot].kind = GLM_LORA;
            w[slot].rank = slot < 2 ? 2 : 1;
            set_name(&w[slot], names, l, module, lora[slot]);
        }
        w[4].kind = GLM_DERIVED;
        lin->A = w++;
        lin->B = w++;
        lin->B_bias = w++;
        lin->magnitude = w++;
        lin->derived = w++;
    }
    m->prefix = w;
    for (int i = 0; i < GLM_PREFIX_WEIGHTS; i++, w++) {
        set_name(w, names, -1, names->prefix_encoder, prefix[i]);
        w->kind = GLM_PREFIX;
        w->rank = i == 2 || i == 4 ? 1 : 2;
    }
    m->n_weights = (int)(w - m->weights);
}

void glm_arch_add_weights(struct glm_model *m, const struct glm_names *names)
{
    const int V = m->arch.vocab, C = m->arch.hidden;
    m->head = &m->layers[m->arch.layers].linear[0];
    m->word_embeddings = add_matrix(m, names, -1, names->word_embeddings, V, C);
    for (int l = 0; l < m->arch.layers; l++)
        add_layer(m, names, l);
    m->final_layernorm = add_norm(m, names, -1, names->final_layernorm);
    m->head->weight = m->arch.tied_head ? m->word_embeddings
                                        : add_matrix(m, names, -1, names->output_layer, V, C);
    m->head->site = glm_prefix_site(&m->arch) + 1;
    add_slots(m, names);
}
