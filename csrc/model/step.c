/* The memory of one call, and its beginning: every buffer is laid out twice, first to count bytes,
 * then to hand out addresses. Nothing is allocated here once a call of at least the same size was
 * made (or reserved). */
#include "state.h"

/* Logits are computed in chunks of rows of about this size. */
#define LOGITS_BYTES ((size_t)32 << 20)

/* Rows of generation up to which a norm is not in the memory of the activation that is made of it,
 * so that the product between them and the activation are one op. */
enum { APART = 64 };

int glm_lowest_layer(const struct glm_model *m)
{
    if (glm_trains(m->word_embeddings))
        return 0;
    for (int i = 0; i < (m->prefix_length ? 5 : 0); i++)
        if (glm_trains(&m->prefix[i]))
            return 0;
    for (int l = 0; l < m->arch.layers; l++) {
        const struct glm_layer *layer = &m->layers[l];
        int trains = glm_norm_trains(&layer->input_layernorm) ||
                     glm_norm_trains(&layer->post_attention_layernorm);
        for (int b = 0; b < GLM_BRANCHES; b++)
            trains |= glm_norm_trains(&layer->branch_norm[b]);
        for (int which = 0; which < GLM_LINEARS; which++) {
            const struct glm_linear *lin = &layer->linear[which];
            trains |= glm_trains(lin->weight) || glm_trains(lin->bias);
            trains |= m->lora_on && (glm_trains(lin->A) || glm_trains(lin->B) ||
                                     glm_trains(lin->B_bias) || glm_trains(lin->magnitude));
        }
        if (trains)
            return l;
    }
    return m->arch.layers;
}

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

/* Rows of reals for qkv and att, and for h */
struct rooms {
    size_t attention, mlp;
};

/* What layer l needs, and those below `below`, which run in its place when they run again. */
static struct rooms rooms_of(const struct glm_model *m, const struct glm_step *s, int l, int below,
                             int N, int NR)
{
    struct rooms r = {glm_attention_room(m, s, l, N), glm_mlp_room(m, s, l, NR)};
    for (int i = 0; i < below; i++) {
        r.attention = largest(r.attention, glm_attention_room(m, s, i, N));
        r.mlp = largest(r.mlp, glm_mlp_room(m, s, i, N));
    }
    return r;
}

static void layout_acts(const struct glm_model *m, struct glm_arena *arena,
                        struct glm_block_acts *a, size_t N, size_t NR, const size_t *rank,
                        struct rooms rooms, size_t h_size)
{
    const struct glm_arch *arch = &m->arch;
    const size_t C = arch->hidden, NH = arch->heads, AO = NH * arch->head_dim;
    const size_t QKV = AO + (size_t)2 * arch->kv_heads * arch->head_dim;
    const size_t NB = arch->branch_norms ? NR : 0, means = arch->layer_norm ? 1 : 0;
    const size_t NA = rooms.attention, NM = means * N, NRM = means * NR, NBM = means * NB;
#define PUSH(name, elements) a->name = glm_arena_push(arena, elements, m->be->real_size);
    BLOCK_ACTS(PUSH)
#undef PUSH
    const size_t rows = h_size == m->be->real_size ? rooms.mlp : NR;
    a->h = h_size ? glm_arena_push(arena, rows * glm_up_columns(arch), h_size) : NULL;
}

/* LoRA ranks: the largest of each linear over all layers, the head's, and of all; widest: the input
 * of an adapted linear; dora, dora_head: the output of one with a magnitude. */
struct ranks {
    size_t of[GLM_LINEARS], head, most, widest, dora, dora_head;
};

static struct ranks lora_ranks(const struct glm_model *m)
{
    struct ranks r = {0};
    for (int j = 0; j < glm_n_linears(m) * (m->n_kept + 1); j++) {
        const int i = j % glm_n_linears(m);
        const struct glm_linear *own = glm_linear_at(m, i),
                                *lin = glm_kept_linear(m, own, j / glm_n_linears(m));
        const struct glm_weight *A = lin->A;
        if (!glm_present(A))
            continue;
        size_t *rank = own == m->head ? &r.head : &r.of[i % GLM_LINEARS];
        *rank = largest(*rank, (size_t)A->rows);
        r.most = largest(r.most, (size_t)A->rows);
        r.widest = largest(r.widest, (size_t)A->cols);
        if (glm_present(lin->magnitude) && own == m->head)
            r.dora_head = (size_t)lin->weight->rows;
        else if (glm_present(lin->magnitude))
            r.dora = largest(r.dora, (size_t)lin->weight->rows);
    }
    return r;
}

/* The layers' inputs, and what each layer keeps. */
static void layout_layers(const struct glm_model *m, struct glm_arena *arena, struct glm_step *s,
                          const size_t *rank)
{
    const int L = m->arch.layers, training = s->call.training, first_kept = L - s->kept_layers;
    const int lowest = training ? glm_lowest_layer(m) : L;
    const int narrow = training && m->be->kept != GLM_F32;
    const size_t real = m->be->real_size, N = s->N, M = s->M, C = m->arch.hidden;
    const size_t MR = s->gathered ? M : N;
    /* The first layer's input is looked up again in backward, so the second's may take its place.
     */
    void *shared_x = glm_arena_push(arena, N * C, real);
    for (int l = 0; l < L; l++) {
        /* the first layer that is kept has its input to itself until the others run again */
        const int passes = l <= (lowest ? lowest : 1) || (narrow && l <= first_kept);
        s->x[l] = passes ? shared_x : glm_arena_push(arena, N * C, real);
        s->saved[l] =
            narrow && l && l >= lowest && l < first_kept ? glm_arena_push(arena, N * C, 2) : NULL;
    }
    s->x[L] = training || s->gathered ? glm_arena_push(arena, MR * C, real) : shared_x;
    s->final = glm_arena_push(arena, MR * C, real);
    s->final_mean = glm_arena_push(arena, m->arch.layer_norm ? MR : 0, real);
    s->final_rstd = glm_arena_push(arena, MR, real);

    const size_t NR = s->gathered && first_kept == 0 ? M : N;
    /* Where h is rounded the last layer and those recomputed have it in the one of its size. */
    const int rounds = training && m->be->kept_h != GLM_F32;
    s->h = rounds ? glm_arena_push(arena, N * glm_up_columns(&m->arch), real) : NULL;
    layout_acts(m, arena, &s->acts[L - 1], N, NR, rank,
                rooms_of(m, s, L - 1, first_kept, s->N, (int)NR), rounds ? 0 : real);
    for (int l = 0; l < L - 1; l++)
        if (l < first_kept)
            s->acts[l] = s->acts[L - 1];
        else
            layout_acts(m, arena, &s->acts[l], N, N, rank, rooms_of(m, s, l, 0, s->N, s->N),
                        rounds ? 2 : real);
}

/* What the layer at work needs, and the final norm's gradient before the layers. Most of it is in
 * one buffer, `act`, over time from top to bottom:
 *
 *     elements   0 ..      max(C, AO) ..   + QKV ..                   read by
 *     forward    ln        (q, k, v)       [lora_x]                   query_key_value
 *                ln                        [lora_x]                   dense_h_to_4h
 *                act, N F elements         [lora_x has its own]       dense_4h_to_h
 *     backward   dnorm                                                the final norm
 *                act, then dact            [lora_x has its own]       dense_4h_to_h, swiglu
 *                ln, then dnorm            [lora_x]                   dense_h_to_4h, norm
 *                datt                      [lora_x]                   attention
 *                datt         dqkv                                    rope
 *                ln, dnorm    dqkv         [lora_x]                   query_key_value, norm
 *                ln           dln1, (q, k, v)  [lora_x]               where q, k, v are apart
 *
 * (dense reads att, not ln; q, k, v: where they are three products or come head by head; lora_x:
 * where there is LoRA dropout, of which lora_x is the outcome; with a residual_scale branches are
 * added to ln, which then has memory of its own, as it has where a product and its activation are
 * one op). An input's gradient is written in its place, once it was read. */
static void layout_work(const struct glm_model *m, struct glm_arena *arena, struct glm_step *s,
                        const struct ranks *ranks)
{
    const size_t real = m->be->real_size, N = s->N, C = m->arch.hidden, F = m->arch.ffn;
    const size_t AO = (size_t)m->arch.heads * m->arch.head_dim;
    const size_t QKV = AO + (size_t)2 * m->arch.kv_heads * m->arch.head_dim;
    const size_t gathered = s->gathered ? s->M : 0, back = s->call.training ? 1 : 0;
    const size_t unit = 64 / real;
    const size_t ln = (N * largest(AO, C) + unit - 1) / unit * unit;
    /* Apart: q, k, v lie behind dqkv, and of three dln1, a sum, lies where that was. */
    const int three = m->arch.split_qkv;
    const size_t apart = three || m->arch.qkv_by_head ? N * QKV : 0;
    const size_t sum = back * N * (three ? largest(QKV, C) : QKV);
    const size_t parts = ln + (sum + unit - 1) / unit * unit;
    const size_t dqkv = parts + (apart + unit - 1) / unit * unit;
    const size_t dropped = s->call.dropout ? back * N * ranks->widest : 0;
    const int lora_x_apart = ranks->of[GLM_4H_TO_H] > 0;
    s->att_rows = s->datt_rows = glm_arena_push(arena, gathered * AO, real);
    s->x_rows = s->dx_rows = glm_arena_push(arena, gathered * C, real);
    s->act = glm_arena_push(arena, largest(N * F, dqkv + (lora_x_apart ? 0 : dropped)), real);
    s->dnorm = s->datt = s->dact = s->act;
    const int ln_apart = s->fused_swiglu || m->arch.residual_scale;
    s->ln = ln_apart ? glm_arena_push(arena, ln, real) : s->act;
    s->dqkv = s->act ? glm_at(m, s->act, ln) : NULL;
    s->dln1 = three ? s->dqkv : s->dnorm;
    s->q = s->act ? glm_at(m, s->act, parts) : NULL;
    s->k = s->act ? glm_at(m, s->q, N * AO) : NULL;
    s->v = s->act ? glm_at(m, s->k, apart ? (apart - N * AO) / 2 : 0) : NULL;
    s->lora_x = s->act ? glm_at(m, s->act, dqkv) : NULL;
    if (lora_x_apart)
        s->lora_x = glm_arena_push(arena, dropped, real);
    s->dx = glm_arena_push(arena, back * N * C, real);
    s->dbranch = glm_arena_push(arena, m->arch.branch_norms ? back * N * C : 0, real);
    s->lora_u = glm_arena_push(arena, back * N * ranks->most, real);
}

/* The prefix encoder's; in generation its output is in the cache. */
static void layout_prefix(const struct glm_model *m, struct glm_arena *arena, struct glm_step *s)
{
    const size_t real = m->be->real_size, C = m->arch.hidden, J = 2 * (size_t)m->arch.layers;
    const size_t KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
    const size_t rows = s->prefix.n, P = rows ? m->prefix_length : 0;
    const size_t encoded = m->prefix[1].present ? P : 0; /* by a projection */
    const size_t trains =
        s->call.training && (glm_trains(&m->prefix[0]) || glm_trains(&m->prefix[1]));
    s->prefix_hidden = glm_arena_push(arena, encoded * C, real);
    s->prefix_rows = glm_arena_push(arena, encoded * J * KV, real);
    s->prefix_kv = glm_arena_push(arena, rows * J * KV, real);
    s->dprefix_kv = glm_arena_push(arena, trains * rows * J * KV, real);
    s->dprefix_rows = glm_arena_push(arena, trains * encoded * J * KV, real);
    s->dprefix_hidden = glm_arena_push(arena, trains * encoded * C, real);
    if (!rows)
        s->prefix_kv = NULL;
    if (!rows || !trains)
        s->dprefix_kv = NULL;
}

/* Every buffer of a step of s->N, S, M; the same order whether it plans or hands out addresses. */
static void layout(const struct glm_model *m, struct glm_arena *arena, struct glm_step *s)
{
    const size_t real = m->be->real_size, M = s->M, V = m->arch.vocab;
    const struct ranks ranks = lora_ranks(m);

#define PUSH(name, elements) s->name = glm_arena_push(arena, (size_t)(elements), sizeof *s->name);
    BATCH(PUSH)
#undef PUSH

    layout_layers(m, arena, s, ranks.of);
    layout_work(m, arena, s, &ranks);

    const size_t chunk = largest(16, LOGITS_BYTES / (V * real));
    s->logits_rows = (int)(M < chunk ? M : chunk);
    s->logits = glm_arena_push(arena, s->logits_rows * V, real);
    s->head_xa = glm_arena_push(arena, s->logits_rows * ranks.head, real);
    s->dora = glm_arena_push(
        arena,
        s->call.training ? largest((size_t)s->N * ranks.dora, s->logits_rows * ranks.dora_head) : 0,
        real);
    glm_results_layout(arena, &s->squares, &s->losses, M, real);
    s->chosen = glm_arena_push(arena, s->call.cache ? M : 0, sizeof *s->chosen);
    s->lse = glm_arena_push(arena, M, real);

    layout_prefix(m, arena, s);
    s->touched = glm_arena_push(arena, s->touched_room,
                                sizeof *s->touched); /* last: what grows moves nothing */
}

/* Layers to keep: as many of the last ones as the budget allows, so that the fewest are recomputed;
 * the last one costs nothing. */
static size_t plan_activations(const struct glm_model *m, struct glm_step *s, size_t budget)
{
    const int L = m->arch.layers, lowest = s->call.training ? glm_lowest_layer(m) : L;
    const int fewest = 1, most = L - lowest > fewest ? L - lowest : fewest;
    for (s->kept_layers = s->call.training ? most : fewest;; s->kept_layers--) {
        struct glm_arena plan = {0};
        layout(m, &plan, s);
        if (plan.peak <= (budget ? budget : GLM_DEFAULT_BUDGET) || s->kept_layers == fewest)
            return plan.peak;
    }
}

static size_t plan_staging(const struct glm_model *m, struct glm_step *s)
{
    struct glm_arena plan = {0};
    glm_staging_layout(m, &plan, s);
    return plan.peak;
}

/* Ids whose scores change, at most; in steps, so that a recording lasts for many of them. */
static size_t touched_room(const struct glm_sampling *how, int M)
{
    const size_t unit = 4096;
    size_t room = 0;
    for (int i = 0; how && how->context && i < M; i++)
        room += 2 * (size_t)how->context_lengths[i] + (size_t)how->n_suppress;
    return (room + unit - 1) / unit * unit;
}

static void set_sizes(const struct glm_model *m, struct glm_step *s, int N, int S, int M,
                      const struct glm_call *call)
{
    s->N = N;
    s->S = S;
    s->M = M;
    s->call = *call;
    s->gathered = call->gather && M < N;
    s->in_blocks = m->arch.rope_2d;
    s->fused_swiglu = call->cache && N <= APART && !m->arch.gelu;
    s->prefix_copies = call->dropout && m->prefix_dropout > 0 ? S : 1;
    s->all.n = N;
    s->read.n = M;
    s->prefix.n = call->cache ? 0 : s->prefix_copies * m->prefix_length;
    s->touched_room = touched_room(call->sampling, M);
    s->several = glm_several_adapters(s);
}

/* Memory for the step that `s` describes; kept where it suffices. */
static glm_status take_memory(struct glm_model *m, struct glm_step *s, size_t budget,
                              struct glm_error *err)
{
    const size_t bytes = plan_activations(m, s, budget), staging = plan_staging(m, s);
    GLM_TRY(glm_arena_commit(&m->arena, bytes, m->be, "activations of one step", err));
    GLM_TRY(glm_arena_commit(&m->host, staging, m->be, "batch", err));
    layout(m, &m->arena, s);
    glm_staging_layout(m, &m->host, s);
    return GLM_OK;
}

glm_status glm_model_plan(struct glm_model *m, int N, int S, int M, int training, size_t budget,
                          struct glm_plan *plan, struct glm_error *err)
{
    if (N < 1 || S < 1 || S > N || M < 0 || M > N)
        return glm_fail(
            err, GLM_EVALUE,
            "plan: expected 1 <= n_segments <= n_tokens and n_rows <= n_tokens, got %d, %d, %d", S,
            N, M);
    const struct glm_call call = {.training = training, .gather = 1, .dropout = training};
    /* x and acts are written while planning; the next step lays them out anew */
    struct glm_step s = m->step;
    *plan = (struct glm_plan){0};
    plan->owned = (size_t)m->arch.max_positions * m->arch.rotary_dim * m->be->real_size;
    for (int i = 0; i < m->n_weights; i++) {
        const struct glm_weight *w = &m->weights[i];
        if (!w->mat.data || w->grad)
            continue;
        *(w->owned ? &plan->owned : &plan->weights) += glm_mat_bytes(&w->mat);
    }
    plan->trainable = 4 * m->block_size * m->be->real_size;
    set_sizes(m, &s, N, S, M, &call);
    plan->activations = plan_activations(m, &s, budget) + plan_staging(m, &s);
    plan->held = m->arena.capacity;
    plan->kept_layers = s.kept_layers;
    plan->total = plan->weights + plan->owned + plan->trainable + plan->activations;
    return GLM_OK;
}

glm_status glm_model_reserve(struct glm_model *m, int N, int S, int M, int training, size_t budget,
                             struct glm_error *err)
{
    struct glm_plan plan;
    const struct glm_call call = {.training = training, .gather = 1, .dropout = training};
    struct glm_step *s = &m->step;
    GLM_TRY(glm_model_plan(m, N, S, M, training, budget, &plan, err));
    set_sizes(m, s, N, S, M, &call);
    GLM_TRY(glm_rope_reach(m, N - S + 1, err)); /* no segment is longer */
    GLM_TRY(take_memory(m, s, budget, err));
    if (training) { /* a smaller batch keeps more layers, but not beyond what was taken */
        const int all = s->kept_layers >= m->arch.layers - glm_lowest_layer(m);
        m->budget = all ? budget : m->arena.peak;
    }
    return GLM_OK;
}

glm_status glm_step_begin(struct glm_model *m, const struct glm_input *in,
                          const struct glm_call *call, struct glm_error *err)
{
    GLM_TRY(glm_weights_complete(m, err));
    GLM_TRY(glm_batch_check(m, in, err));
    set_sizes(m, &m->step, in->N, in->S, in->rows || call->cache ? in->M : in->N, call);
    GLM_TRY(take_memory(m, &m->step, m->budget, err));
    glm_adapters_derive(m);
    return glm_batch_upload(m, in, err);
}
