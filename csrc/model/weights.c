/* Named weights: the base ones of a checkpoint, LoRA and prefix ones that come and go, and the
 * trainable block. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

enum { LORA_PER_LAYER = 2 * GLM_LINEARS, PREFIX_WEIGHTS = 5 };

static const char *const LINEAR_NAMES[GLM_LINEARS] = {
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
};

static const char *const PREFIX_NAMES[PREFIX_WEIGHTS] = {
    "embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias",
};

#define LAYER_NAME "transformer.encoder.layers.%d.%s"

static struct glm_linear *linear_of(const struct glm_model *m, int i)
{
    return &m->layers[i / GLM_LINEARS].linear[i % GLM_LINEARS];
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

static void add_weights(struct glm_model *m)
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
    for (int i = 0; i < PREFIX_WEIGHTS; i++, w++) {
        snprintf(w->name, sizeof w->name, "transformer.prefix_encoder.%s", PREFIX_NAMES[i]);
        w->kind = GLM_PREFIX;
        w->rank = i == 2 || i == 4 ? 1 : 2;
    }
    m->n_weights = (int)(w - m->weights);
}

/* x rounded to float16, as an array */
static glm_status round_half(struct glm_backend *be, float *x, size_t n, struct glm_error *err)
{
    float *wide = be->alloc(be, n * 4);
    void *half = be->alloc(be, n * 2);
    if (wide && half) {
        be->upload(be, wide, x, n * 4);
        be->ops->convert(be->cx, half, GLM_F16, wide, GLM_F32, n);
        be->ops->convert(be->cx, wide, GLM_F32, half, GLM_F16, n);
        be->download(be, x, wide, n * 4);
    }
    glm_status status =
        wide && half ? GLM_OK : glm_fail(err, GLM_EMEMORY, "rotary table: %zu bytes", n * 6);
    be->free(be, wide);
    be->free(be, half);
    return status;
}

/* ChatGLM2's float16 code rounds exponent, power, reciprocal, position and product (golden
 * long/half_*). */
static glm_status half_angles(struct glm_model *m, float *angle, int first, int T,
                              struct glm_error *err)
{
    const int pairs = m->arch.rotary_dim / 2;
    float *inv = malloc((size_t)pairs * 4), *pos = malloc((size_t)T * 4);
    glm_status status =
        inv && pos ? GLM_OK : glm_fail(err, GLM_EMEMORY, "rotary table: %d positions", T);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = (float)(2 * j) / (float)m->arch.rotary_dim;
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = powf((float)m->arch.rope_base, inv[j]);
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int j = 0; status == GLM_OK && j < pairs; j++)
        inv[j] = 1.0f / inv[j];
    if (status == GLM_OK)
        status = round_half(m->be, inv, (size_t)pairs, err);
    for (int p = 0; status == GLM_OK && p < T; p++)
        pos[p] = (float)(first + p);
    if (status == GLM_OK)
        status = round_half(m->be, pos, (size_t)T, err);
    if (status == GLM_OK && m->arch.rope_divisor != 1.0) {
        for (int p = 0; p < T; p++)
            pos[p] /= (float)m->arch.rope_divisor;
        status = round_half(m->be, pos, (size_t)T, err);
    }
    for (int p = 0; status == GLM_OK && p < T; p++)
        for (int j = 0; j < pairs; j++)
            angle[(size_t)p * pairs + j] = pos[p] * inv[j];
    if (status == GLM_OK)
        status = round_half(m->be, angle, (size_t)T * pairs, err);
    free(inv);
    free(pos);
    return status;
}

/* Rows first .. first + T - 1: cos and sin of position / divisor * base^(-2j / rotary_dim), in the
 * precision of the backend. */
static glm_status fill_rope_table(struct glm_model *m, int first, int T, struct glm_error *err)
{
    const struct glm_arch *a = &m->arch;
    const int pairs = a->rotary_dim / 2;
    const size_t n = (size_t)T * pairs;
    struct glm_backend *be = m->be;
    char *table = malloc(2 * n * be->real_size);
    float *angle = a->half_rope_table ? malloc(n * 4) : NULL;
    if (!table || (a->half_rope_table && !angle)) {
        free(table);
        free(angle);
        return glm_fail(err, GLM_EMEMORY, "rotary table: %d positions, %zu bytes", T,
                        2 * n * be->real_size);
    }
    glm_status status = angle ? half_angles(m, angle, first, T, err) : GLM_OK;
    for (int j = 0; status == GLM_OK && j < pairs; j++) {
        const double wide = pow(a->rope_base, -2.0 * j / a->rotary_dim);
        const float inv = 1.0f / powf((float)a->rope_base, (float)(2 * j) / (float)a->rotary_dim);
        for (int p = 0; p < T; p++) {
            const size_t i = (size_t)p * pairs + j;
            if (be->real == GLM_F64 && !angle) {
                const double t = (first + p) / a->rope_divisor * wide;
                ((double *)table)[2 * i] = cos(t);
                ((double *)table)[2 * i + 1] = sin(t);
                continue;
            }
            const float t = angle ? angle[i] : (float)(first + p) / (float)a->rope_divisor * inv;
            if (be->real == GLM_F64) {
                ((double *)table)[2 * i] = cosf(t);
                ((double *)table)[2 * i + 1] = sinf(t);
            } else {
                ((float *)table)[2 * i] = cosf(t);
                ((float *)table)[2 * i + 1] = sinf(t);
            }
        }
    }
    if (status == GLM_OK && angle && be->real == GLM_F32)
        status = round_half(be, (float *)table, 2 * n, err);
    if (status == GLM_OK)
        be->upload(be, glm_at(m, m->rope_table, (size_t)first * a->rotary_dim), table,
                   2 * n * be->real_size);
    free(table);
    free(angle);
    return status;
}

glm_status glm_rope_reach(struct glm_model *m, int64_t positions, struct glm_error *err)
{
    enum { ROWS = 1024 }; /* at a time: all 32,768 of a large model take 12 ms */
    const int first = m->rope_rows, T = m->arch.max_positions;
    if (positions <= first || first == T)
        return GLM_OK;
    const int64_t whole = (positions + ROWS - 1) / ROWS * ROWS;
    const int end = whole < T ? (int)whole : T;
    GLM_TRY(fill_rope_table(m, first, end - first, err));
    m->rope_rows = end;
    return GLM_OK;
}

static glm_status make_rope_table(struct glm_model *m, struct glm_error *err)
{
    const size_t bytes = (size_t)m->arch.max_positions * m->arch.rotary_dim * m->be->real_size;
    m->rope_table = m->be->alloc(m->be, bytes);
    if (!m->rope_table)
        return glm_fail(err, GLM_EMEMORY, "rotary table: %d positions, %zu bytes",
                        m->arch.max_positions, bytes);
    return glm_rope_reach(m, 1, err);
}

static glm_status check_arch(const struct glm_arch *a, struct glm_error *err)
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

glm_status glm_model_create(struct glm_model **out, const struct glm_arch *arch,
                            struct glm_backend *be, struct glm_error *err)
{
    *out = NULL;
    GLM_TRY(check_arch(arch, err));
    struct glm_model *m = calloc(1, sizeof *m);
    if (!m)
        return glm_fail(err, GLM_EMEMORY, "model: %zu bytes", sizeof *m);
    m->arch = *arch;
    m->be = be;
    m->lora_on = 1;
    const size_t slots = 3 + (size_t)arch->layers * (7 + LORA_PER_LAYER) + PREFIX_WEIGHTS;
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
        add_weights(m);
        status = make_rope_table(m, err);
    }
    if (status != GLM_OK) {
        glm_model_free(m);
        return status;
    }
    *out = m;
    return GLM_OK;
}

static void release(struct glm_model *m, struct glm_weight *w)
{
    m->be->free(m->be, w->owned);
    w->owned = NULL;
    w->mat.data = NULL;
    w->grad = NULL;
}

void glm_model_free(struct glm_model *m)
{
    if (!m)
        return;
    for (int i = 0; m->weights && i < m->n_weights; i++)
        release(m, &m->weights[i]);
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

int glm_model_weight(struct glm_model *m, int i, struct glm_weight_info *info)
{
    if (i < 0 || i >= m->n_weights)
        return 0;
    const struct glm_weight *w = &m->weights[i];
    if (!w->present)
        return -1;
    *info = (struct glm_weight_info){
        w->name, w->kind, w->rows, w->cols, w->rank, w->mat.dtype, w->mat.data != NULL};
    return 1;
}

int glm_model_find(struct glm_model *m, const char *name)
{
    for (int i = 0; i < m->n_weights; i++)
        if (m->weights[i].present && strcmp(m->weights[i].name, name) == 0)
            return i;
    return -1;
}

static void set_mat(struct glm_weight *w, const void *data, enum glm_dtype dtype)
{
    w->mat = (struct glm_mat){.data = data, .dtype = dtype, .rows = w->rows, .cols = w->cols};
}

/* An owned real copy of n host elements of a dtype. */
static glm_status own(struct glm_model *m, struct glm_weight *w, const void *host,
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
    set_mat(w, value, be->real);
    m->version++;
    return GLM_OK;
}

static glm_status refuse_trainable(const struct glm_weight *w, struct glm_error *err)
{
    if (w->grad)
        return glm_fail(err, GLM_ESTATE,
                        "%s is being trained: end training first (set_trainable([]))", w->name);
    return GLM_OK;
}

static glm_status refuse_quantized(const struct glm_weight *w, const char *what,
                                   struct glm_error *err)
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
        linear |= linear_of(m, i)->weight == w;
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
    GLM_TRY(refuse_trainable(w, err));
    if (glm_is_quantized(mat->dtype))
        GLM_TRY(check_quantized(m, w, mat, err));
    if (w->rank == 1)
        return own(m, w, mat->data, mat->dtype, err);
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

/* ---- LoRA */

static void empty(struct glm_model *m, struct glm_weight *w)
{
    release(m, w);
    w->present = 0;
    w->rows = w->cols = 0;
    m->version++;
}

/* Takes the trainables of a kind out of the trainable set before their weights go. */
static void forget_trainables(struct glm_model *m, enum glm_weight_kind kind)
{
    for (int i = 0; i < m->n_trainable; i++)
        if (m->weights[m->trainable[i]].kind == kind) {
            struct glm_error ignored; /* [] allocates only for weights that stay */
            glm_model_set_trainable(m, NULL, 0, &ignored);
            return;
        }
}

glm_status glm_model_add_lora(struct glm_model *m, const char *module, const void *A, int A_rows,
                              int A_cols, const void *B, int B_rows, int B_cols, double scale,
                              double dropout, struct glm_error *err)
{
    struct glm_linear *lin = NULL;
    char name[112];
    snprintf(name, sizeof name, "%s.weight", module);
    for (int l = 0; l < m->arch.layers && !lin; l++)
        for (int which = 0; which < GLM_LINEARS; which++)
            if (strcmp(m->layers[l].linear[which].weight->name, name) == 0)
                lin = &m->layers[l].linear[which];
    if (!lin)
        return glm_fail(err, GLM_EVALUE, "module: %s is no linear layer of this model", module);
    if (A_rows < 1 || A_cols != lin->weight->cols || B_rows != lin->weight->rows ||
        B_cols != A_rows)
        return glm_fail(err, GLM_EVALUE,
                        "%s: expected lora_A (r, %d) and lora_B (%d, r), got (%d, %d) and (%d, %d)",
                        module, lin->weight->cols, lin->weight->rows, A_rows, A_cols, B_rows,
                        B_cols);
    if (!isfinite(scale) || !(dropout >= 0 && dropout < 1))
        return glm_fail(err, GLM_EVALUE, "%s: scale %g must be finite and dropout %g in [0, 1)",
                        module, scale, dropout);
    GLM_TRY(refuse_trainable(lin->A, err));
    GLM_TRY(refuse_trainable(lin->B, err));
    lin->A->rows = lin->B->cols = A_rows;
    lin->A->cols = A_cols;
    lin->B->rows = B_rows;
    glm_status status = own(m, lin->A, A, m->be->real, err);
    if (status == GLM_OK)
        status = own(m, lin->B, B, m->be->real, err);
    if (status != GLM_OK) {
        empty(m, lin->A);
        empty(m, lin->B);
        return status;
    }
    lin->A->present = lin->B->present = 1;
    lin->scale = scale;
    lin->dropout = dropout;
    return GLM_OK;
}

void glm_model_remove_lora(struct glm_model *m)
{
    forget_trainables(m, GLM_LORA);
    for (int i = m->n_base; i < m->n_weights; i++)
        if (m->weights[i].kind == GLM_LORA && m->weights[i].present)
            empty(m, &m->weights[i]);
}

void glm_model_enable_lora(struct glm_model *m, int on)
{
    m->lora_on = on;
    m->version++;
}

static glm_status refuse_merge(struct glm_model *m, struct glm_error *err)
{
    for (int i = 0; i < m->arch.layers * GLM_LINEARS; i++) {
        const struct glm_linear *lin = linear_of(m, i);
        if (lin->A->present)
            GLM_TRY(
                refuse_quantized(lin->weight,
                                 "merged into: keep the adapter beside it, or merge it into the "
                                 "float weights",
                                 err));
    }
    return GLM_OK;
}

glm_status glm_model_merge_lora(struct glm_model *m, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    GLM_TRY(glm_weights_complete(m, err));
    GLM_TRY(refuse_merge(m, err));
    /* every copy first: a merge that runs out of memory leaves the model as it was */
    const size_t n = (size_t)m->arch.layers * GLM_LINEARS;
    void **copies = calloc(n, sizeof *copies);
    glm_status status = copies ? GLM_OK : glm_fail(err, GLM_EMEMORY, "merge_lora: %zu pointers", n);
    for (int i = 0; status == GLM_OK && i < (int)n; i++) {
        struct glm_linear *lin = linear_of(m, i);
        struct glm_weight *w = lin->weight;
        if (!lin->A->present || w->owned || w->grad)
            continue;
        const size_t bytes = glm_bytes(w->mat.dtype, glm_count(w));
        copies[i] = be->alloc(be, bytes);
        if (!copies[i])
            status = glm_fail(err, GLM_EMEMORY, "merge_lora: %s: %zu bytes could not be taken",
                              w->name, bytes);
        else
            be->upload(be, copies[i], w->mat.data, bytes);
    }
    for (int i = 0; copies && i < (int)n; i++) {
        struct glm_linear *lin = linear_of(m, i);
        struct glm_weight *w = lin->weight;
        if (status != GLM_OK) {
            be->free(be, copies[i]);
            continue;
        }
        if (!lin->A->present)
            continue;
        if (copies[i])
            w->mat.data = w->owned = copies[i];
        be->ops->merge(be->cx, (void *)w->mat.data, w->mat.dtype, lin->B->mat.data,
                       lin->A->mat.data, w->rows, w->cols, lin->A->rows, lin->scale);
    }
    free(copies);
    if (status == GLM_OK)
        glm_model_remove_lora(m);
    return status;
}

/* ---- P-Tuning v2 */

glm_status glm_model_set_prefix(struct glm_model *m, int P, const void *embedding, const void *w0,
                                const void *b0, const void *w2, const void *b2, double dropout,
                                struct glm_error *err)
{
    const int width = 2 * m->arch.layers * m->arch.kv_heads * m->arch.head_dim;
    const int H = m->arch.hidden, projection = w0 != NULL;
    const void *values[PREFIX_WEIGHTS] = {embedding, w0, b0, w2, b2};
    const int rows[PREFIX_WEIGHTS] = {P, H, H, width, width},
              cols[PREFIX_WEIGHTS] = {width, width, 1, H, 1};
    if (P < 1 || P > 1 << 16)
        return glm_fail(err, GLM_EVALUE, "pre_seq_len: expected 1 to 65536, got %d", P);
    if (projection != (b0 != NULL) || projection != (w2 != NULL) || projection != (b2 != NULL))
        return glm_fail(err, GLM_EVALUE,
                        "prefix: with projection all of trans.0 and trans.2 are needed");
    if (!(dropout >= 0 && dropout < 1))
        return glm_fail(err, GLM_EVALUE, "prefix dropout: expected 0 <= p < 1, got %g", dropout);
    glm_model_remove_prefix(m);
    for (int i = 0; i < (projection ? PREFIX_WEIGHTS : 1); i++) {
        m->prefix[i].rows = rows[i];
        m->prefix[i].cols = cols[i];
        glm_status status = own(m, &m->prefix[i], values[i], m->be->real, err);
        if (status != GLM_OK) {
            glm_model_remove_prefix(m);
            return status;
        }
        m->prefix[i].present = 1;
    }
    m->prefix_length = P;
    m->prefix_dropout = dropout;
    return GLM_OK;
}

void glm_model_remove_prefix(struct glm_model *m)
{
    forget_trainables(m, GLM_PREFIX);
    for (int i = 0; i < PREFIX_WEIGHTS; i++)
        empty(m, &m->prefix[i]);
    m->prefix_length = 0;
}

/* ---- the trainable block: values, gradients, first and second moments, one after the other */

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
        GLM_TRY(refuse_quantized(&m->weights[weights[i]], "trained: use lora or p_tuning", err));
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
        be->zero(be, block, 4 * total * size);
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
            be->free(be, block);
            return glm_fail(err, GLM_EMEMORY, "%s: %zu bytes could not be taken", w->name,
                            glm_count(w) * size);
        }
        be->copy(be, w->owned, w->mat.data, glm_count(w) * size);
    }
    size_t offset = 0;
    for (int rank = 2; rank >= 1; rank--) { /* matrices, which decay, then the others */
        for (int i = 0; i < n; i++) {
            struct glm_weight *w = &m->weights[weights[i]];
            if (w->rank != rank)
                continue;
            be->ops->convert(be->cx, block + offset * size, be->real, w->mat.data, w->mat.dtype,
                             glm_count(w));
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
        set_mat(w, block + w->offset * size, be->real);
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
    GLM_TRY(refuse_quantized(w, "read as numbers", err));
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
