/* One call into the model: check the batch, lay out and take the memory, run forward. Nothing is
 * allocated here once a call of at least the same size was made (or reserved). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define LOGITS_BYTES \
    ((size_t)32 << 20) /* logits are computed in pieces of rows of about this size */

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
        int trains =
            glm_trains(layer->input_layernorm) || glm_trains(layer->post_attention_layernorm);
        for (int which = 0; which < GLM_LINEARS; which++) {
            const struct glm_linear *lin = &layer->linear[which];
            trains |= glm_trains(lin->weight) || glm_trains(lin->bias);
            trains |= m->lora_on && (glm_trains(lin->A) || glm_trains(lin->B));
        }
        if (trains)
            return l;
    }
    return m->arch.layers;
}

static void layout_acts(const struct glm_model *m, struct glm_arena *arena,
                        struct glm_block_acts *a, size_t N, size_t NR, const size_t *rank,
                        size_t h_size)
{
    const struct glm_arch *arch = &m->arch;
    const size_t C = arch->hidden, F = arch->ffn, NH = arch->heads, AO = NH * arch->head_dim;
    const size_t QKV = AO + (size_t)2 * arch->kv_heads * arch->head_dim;
#define PUSH(name, elements) a->name = glm_arena_push(arena, elements, m->be->real_size);
    BLOCK_ACTS(PUSH)
#undef PUSH
    a->h = h_size ? glm_arena_push(arena, NR * 2 * F, h_size) : NULL;
}

/* Largest LoRA rank of each linear (over all layers) and over everything; widest: input of an
 * adapted linear. */
static size_t lora_ranks(const struct glm_model *m, size_t *rank, size_t *widest)
{
    size_t largest = 0;
    *widest = 0;
    for (int which = 0; which < GLM_LINEARS; which++) {
        rank[which] = 0;
        for (int l = 0; l < m->arch.layers; l++) {
            const struct glm_weight *A = m->layers[l].linear[which].A;
            if (!A->present)
                continue;
            rank[which] = (size_t)A->rows > rank[which] ? (size_t)A->rows : rank[which];
            *widest = (size_t)A->cols > *widest ? (size_t)A->cols : *widest;
        }
        largest = rank[which] > largest ? rank[which] : largest;
    }
    return largest;
}

/* Every buffer of a step of s->N, S, M; the same order whether it plans or hands out addresses. */
static void layout(const struct glm_model *m, struct glm_arena *arena, struct glm_step *s)
{
    const struct glm_arch *arch = &m->arch;
    const int L = arch->layers, lowest = s->training ? glm_lowest_layer(m) : L;
    const size_t real = m->be->real_size, N = s->N, M = s->M, C = arch->hidden, F = arch->ffn;
    const size_t AO = (size_t)arch->heads * arch->head_dim,
                 KV = (size_t)arch->kv_heads * arch->head_dim;
    const size_t QKV = AO + 2 * KV, V = arch->vocab, MR = s->gathered ? M : N;
    size_t rank[GLM_LINEARS];
    size_t widest;
    const size_t R = lora_ranks(m, rank, &widest);

    s->ids = glm_arena_push(arena, N, 4);
    s->position = glm_arena_push(arena, N, 4);
    s->stream = glm_arena_push(arena, N, 4);
    s->slot = glm_arena_push(arena, s->cache ? N : 0, 4);
    s->rows = glm_arena_push(arena, M, 4);
    s->target = glm_arena_push(arena, M, 4);
    s->row_position = glm_arena_push(arena, M, 4);
    s->row_stream = glm_arena_push(arena, M, 4);
    s->segments = glm_arena_push(arena, s->S, sizeof *s->segments);

    /* The first layer's input is looked up again in backward, so the second's may take its place.
     */
    const int first_kept = L - s->kept_layers, narrow = s->training && m->be->kept != GLM_F32;
    void *shared_x = glm_arena_push(arena, N * C, real);
    for (int l = 0; l < L; l++) {
        /* the first layer that is kept has its input to itself until the others run again */
        const int passes = l <= (lowest ? lowest : 1) || (narrow && l <= first_kept);
        s->x[l] = passes ? shared_x : glm_arena_push(arena, N * C, real);
        s->saved[l] =
            narrow && l && l >= lowest && l < first_kept ? glm_arena_push(arena, N * C, 2) : NULL;
    }
    s->x[L] = s->training || s->gathered ? glm_arena_push(arena, MR * C, real) : shared_x;
    s->final = glm_arena_push(arena, MR * C, real);
    s->final_rstd = glm_arena_push(arena, MR, real);

    const size_t NR = s->gathered && first_kept == 0 ? M : N;
    /* Where h is rounded the last layer and those computed twice have it in the one of its size. */
    const int rounds = s->training && m->be->kept_h != GLM_F32;
    s->h = rounds ? glm_arena_push(arena, N * 2 * F, real) : NULL;
    layout_acts(m, arena, &s->acts[L - 1], N, NR, rank, rounds ? 0 : real);
    for (int l = 0; l < L - 1; l++)
        if (l < first_kept)
            s->acts[l] = s->acts[L - 1];
        else
            layout_acts(m, arena, &s->acts[l], N, N, rank, rounds ? 2 : real);

    s->att_rows = glm_arena_push(arena, s->gathered ? M * AO : 0, real);
    s->x_rows = glm_arena_push(arena, s->gathered ? M * C : 0, real);
    const size_t back = s->training ? 1 : 0, unit = 64 / real;
    const size_t ln = (N * (AO > C ? AO : C) + unit - 1) / unit * unit;
    const size_t dqkv = ln + (back * N * QKV + unit - 1) / unit * unit;
    const size_t dropped = s->use_dropout ? back * N * widest : 0;
    const size_t inside = dqkv + (rank[GLM_4H_TO_H] ? 0 : dropped);
    s->act = glm_arena_push(arena, N * F > inside ? N * F : inside, real);
    s->ln = s->dnorm = s->datt = s->dact = s->act;
    if (s->cache && N <= APART)
        s->ln = glm_arena_push(arena, ln, real);
    s->dqkv = s->act ? glm_at(m, s->act, ln) : NULL;
    s->lora_x = s->act ? glm_at(m, s->act, dqkv) : NULL;
    if (rank[GLM_4H_TO_H])
        s->lora_x = glm_arena_push(arena, dropped, real);
    s->datt_rows = s->att_rows;
    s->dx_rows = s->x_rows;
    s->dx = glm_arena_push(arena, back * N * C, real);
    s->lora_u = glm_arena_push(arena, back * N * R, real);

    const size_t piece = LOGITS_BYTES / (V * real) < 16 ? 16 : LOGITS_BYTES / (V * real);
    s->logits_rows = (int)(M < piece ? M : piece);
    s->logits = glm_arena_push(arena, s->logits_rows * V, real);
    s->losses = glm_arena_push(arena, M, real);
    s->squares = glm_arena_push(arena, 1, sizeof *s->squares);
    s->chosen = glm_arena_push(arena, s->cache ? M : 0, 4);
    s->lse = glm_arena_push(arena, M, real);

    s->prefix_hidden = s->prefix_rows = s->prefix_kv = NULL;
    if (m->prefix_length && !s->cache) {
        const size_t P = m->prefix_length, J = 2 * (size_t)L, copies = s->prefix_copies;
        const int projection = m->prefix[1].present;
        s->prefix_position = glm_arena_push(arena, copies * P, 4);
        s->prefix_stream = glm_arena_push(arena, copies * P, 4);
        s->prefix_hidden = glm_arena_push(arena, projection ? P * C : 0, real);
        s->prefix_rows = glm_arena_push(arena, projection ? P * J * KV : 0, real);
        s->prefix_kv = glm_arena_push(arena, copies * P * J * KV, real);
        const size_t trains =
            s->training && (glm_trains(&m->prefix[0]) || glm_trains(&m->prefix[1]));
        s->dprefix_kv = glm_arena_push(arena, trains * copies * P * J * KV, real);
        s->dprefix_rows = glm_arena_push(arena, projection ? trains * P * J * KV : 0, real);
        s->dprefix_hidden = glm_arena_push(arena, projection ? trains * P * C : 0, real);
        if (!trains)
            s->dprefix_kv = NULL;
    }
    s->choices = glm_arena_push(arena, s->how ? M : 0, sizeof *s->choices);
    s->touched = glm_arena_push(arena, s->touched_room, 4); /* last: what grows moves nothing */
}

/* Layers to keep: as many of the last ones as the budget allows, so that the fewest are computed
 * twice; the last one costs nothing. */
static size_t plan_activations(const struct glm_model *m, struct glm_step *s, size_t budget)
{
    const int L = m->arch.layers, lowest = s->training ? glm_lowest_layer(m) : L;
    const int fewest = 1, most = L - lowest > fewest ? L - lowest : fewest;
    for (s->kept_layers = s->training ? most : fewest;; s->kept_layers--) {
        struct glm_arena plan = {0};
        layout(m, &plan, s);
        if (plan.peak <= (budget ? budget : GLM_DEFAULT_BUDGET) || s->kept_layers == fewest)
            return plan.peak;
    }
}

static void set_sizes(const struct glm_model *m, struct glm_step *s, int N, int S, int M,
                      int training, int gather, int dropout, struct glm_cache *cache)
{
    s->N = N;
    s->S = S;
    s->M = M;
    s->training = training;
    s->gathered = gather && M < N;
    s->use_dropout = dropout;
    s->cache = cache;
    s->how = NULL;
    s->touched_room = 0;
    s->prefix_copies = training && dropout && m->prefix_dropout > 0 ? S : 1;
}

/* What the choice of the next ids takes; room in steps, so that a recording lasts for many of them.
 */
static void set_choices(struct glm_step *s, const struct glm_sampling *how)
{
    const size_t unit = 4096;
    size_t room = 0;
    s->how = how;
    for (int i = 0; how && how->context && i < s->M; i++)
        room += 2 * (size_t)how->context_lengths[i] + (size_t)how->n_suppress;
    s->touched_room = (room + unit - 1) / unit * unit;
}

/* Memory for the step that `s` describes; kept where it suffices. */
static glm_status take_memory(struct glm_model *m, struct glm_step *s, size_t budget,
                              struct glm_error *err)
{
    const size_t bytes = plan_activations(m, s, budget);
    GLM_TRY(glm_arena_commit(&m->arena, bytes, m->be, "activations of one step", err));
    const size_t host = glm_host_bytes(m, s);
    if (host > m->host_size) {
        free(m->host);
        m->host = calloc(1, host);
        m->host_size = m->host ? host : 0;
        m->be->allocated++;
        if (!m->host)
            return glm_fail(err, GLM_EMEMORY, "batch: %zu bytes could not be taken", host);
    }
    m->arena.used = 0;
    layout(m, &m->arena, s);
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
    struct glm_step s =
        m->step; /* x and acts are written while planning; the next step lays them out anew */
    *plan = (struct glm_plan){0};
    plan->owned = (size_t)m->arch.max_positions * m->arch.rotary_dim * m->be->real_size;
    for (int i = 0; i < m->n_weights; i++) {
        const struct glm_weight *w = &m->weights[i];
        if (!w->mat.data || w->grad)
            continue;
        *(w->owned ? &plan->owned : &plan->weights) += glm_mat_bytes(&w->mat);
    }
    plan->trainable = 4 * m->block_size * m->be->real_size;
    set_sizes(m, &s, N, S, M, training, 1, training, NULL);
    plan->activations = plan_activations(m, &s, budget) + glm_host_bytes(m, &s);
    plan->held = m->arena.capacity;
    plan->kept_layers = s.kept_layers;
    plan->total = plan->weights + plan->owned + plan->trainable + plan->activations;
    return GLM_OK;
}

glm_status glm_model_reserve(struct glm_model *m, int N, int S, int M, int training, size_t budget,
                             struct glm_error *err)
{
    struct glm_plan plan;
    struct glm_step *s = &m->step;
    GLM_TRY(glm_model_plan(m, N, S, M, training, budget, &plan, err));
    set_sizes(m, s, N, S, M, training, 1, training, NULL);
    GLM_TRY(glm_rope_reach(m, N - S + 1, err)); /* no segment is longer */
    GLM_TRY(take_memory(m, s, budget, err));
    if (training) { /* a smaller batch keeps more layers, but not beyond what was taken */
        const int all = s->kept_layers >= m->arch.layers - glm_lowest_layer(m);
        m->budget = all ? budget : m->arena.peak;
    }
    return GLM_OK;
}

glm_status glm_step_begin(struct glm_model *m, const struct glm_input *in, int training, int gather,
                          const struct glm_place *place, struct glm_error *err)
{
    GLM_TRY(glm_weights_complete(m, err));
    GLM_TRY(glm_check_input(m, in, err));
    struct glm_step *s = &m->step;
    set_sizes(m, s, in->N, in->S, in->rows || place ? in->M : in->N, training, gather,
              training && s->use_dropout, place ? place->cache : NULL);
    set_choices(s, place ? place->how : NULL);
    GLM_TRY(take_memory(m, s, m->budget, err));
    GLM_TRY(glm_upload_batch(m, in, place, err));
    if (s->how) {
        const size_t at = (uintptr_t)s->host_losses + (size_t)s->M * 8 + 128;
        glm_upload_choices(m, (char *)((at + 7) / 8 * 8));
    }
    return GLM_OK;
}

struct glm_kv glm_step_kv(const struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const size_t KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
    char *base = s->cache ? s->cache->kv : s->prefix_kv;
    const size_t slots =
        s->cache ? (size_t)s->cache->slots : (size_t)s->prefix_copies * m->prefix_length;
    if (!base)
        return (struct glm_kv){NULL, NULL};
    return (struct glm_kv){glm_at(m, base, 2 * l * slots * KV),
                           glm_at(m, base, (2 * l + 1) * slots * KV)};
}

struct glm_kv glm_step_dkv(const struct glm_model *m, int l)
{
    const struct glm_step *s = &m->step;
    const size_t KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
    const size_t slots = (size_t)s->prefix_copies * m->prefix_length;
    if (!s->dprefix_kv || !m->prefix_length)
        return (struct glm_kv){NULL, NULL};
    return (struct glm_kv){glm_at(m, s->dprefix_kv, 2 * l * slots * KV),
                           glm_at(m, s->dprefix_kv, (2 * l + 1) * slots * KV)};
}
