/* The ragged batch of a step: checked, laid out on the host, filled in and uploaded. Nothing here
 * knows what a layer is. */
#include <string.h>

#include "state.h"

glm_status glm_batch_check(const struct glm_model *m, const struct glm_input *in,
                           struct glm_error *err)
{
    const int V = m->arch.vocab;
    int64_t sum = 0;
    if (in->N < 1 || in->S < 1)
        return glm_fail(err, GLM_EVALUE, "ids: the batch is empty (%d tokens, %d segments)", in->N,
                        in->S);
    for (int s = 0; s < in->S; s++) {
        if (in->lengths[s] < 1)
            return glm_fail(err, GLM_EVALUE, "lengths[%d]: expected at least 1 token, got %d", s,
                            in->lengths[s]);
        if (in->numbers && in->numbers[s] < 0)
            return glm_fail(err, GLM_EVALUE, "numbers[%d]: expected 0 or more, got %d", s,
                            in->numbers[s]);
        sum += in->lengths[s];
    }
    if (in->positions && m->arch.rope_2d)
        return glm_fail(err, GLM_EVALUE,
                        "positions: this model's follow from the ids: leave them out");
    if (sum != in->N)
        return glm_fail(err, GLM_EVALUE, "lengths: sum is %lld but there are %d ids",
                        (long long)sum, in->N);
    for (int n = 0; n < in->N; n++) {
        if (in->ids[n] < 0 || in->ids[n] >= V)
            return glm_fail(err, GLM_EVALUE, "ids[%d]: token id %d is outside the vocabulary of %d",
                            n, in->ids[n], V);
        if (in->positions && (in->positions[n] < 0 || in->positions[n] >= m->arch.max_positions))
            return glm_fail(err, GLM_EVALUE, "positions[%d]: %d is outside 0 .. %d (seq_length)", n,
                            in->positions[n], m->arch.max_positions - 1);
    }
    for (int i = 0; in->rows && i < in->M; i++) {
        if (in->rows[i] < 0 || in->rows[i] >= in->N || (i && in->rows[i] <= in->rows[i - 1]))
            return glm_fail(err, GLM_EVALUE,
                            "rows[%d]: expected ascending indices of the %d tokens, got %d", i,
                            in->N, in->rows[i]);
        if (in->targets && (in->targets[i] < 0 || in->targets[i] >= V))
            return glm_fail(err, GLM_EVALUE,
                            "targets[%d]: label %d is outside the vocabulary of %d", i,
                            in->targets[i], V);
    }
    return GLM_OK;
}

void glm_results_layout(struct glm_arena *arena, double **squares, void **losses, size_t M,
                        size_t real_size)
{
    char *both = glm_arena_push(arena, sizeof **squares + M * real_size, 1);
    *squares = (double *)(void *)both;
    *losses = both ? both + sizeof **squares : NULL;
}

void glm_staging_layout(const struct glm_model *m, struct glm_arena *host, struct glm_step *s)
{
    struct glm_staging *h = &s->host;
    const size_t V = m->arch.vocab, draws = s->call.sampling != NULL;
    h->prefix.n = s->prefix.n;
#define PUSH(name, elements) h->name = glm_arena_push(host, (size_t)(elements), sizeof *h->name);
    BATCH(PUSH)
#undef PUSH
    glm_results_layout(host, &h->squares, &h->losses, s->M, m->be->real_size);
    h->touched = glm_arena_push(host, s->touched_room, sizeof *h->touched);
    h->seen = glm_arena_push(host, draws * V, sizeof *h->seen);
}

/* Of sequence i of this call: its number in the update. */
static int32_t sequence_number(const struct glm_model *m, const struct glm_input *in, int i)
{
    if (in->numbers)
        return in->numbers[i];
    return (int32_t)((uint64_t)(m->progress.rows + i) & 0x7fffffff);
}

/* Segment i, whose `count` tokens begin at flat index `begin`. What it continues is its past: its
 * row of the cache, or the prefix that all rows share. */
static struct glm_segment segment_of(const struct glm_model *m, int i, int begin, int count)
{
    const struct glm_step *s = &m->step;
    const struct glm_cache *c = s->call.cache;
    struct glm_segment segment = {.begin = begin, .count = count};
    if (c && s->call.cache_rows) {
        const int row = s->call.cache_rows[i];
        segment.shared_count = c->prefix_length + c->shared_length;
        segment.past_begin = c->prefix_length + c->shared_capacity + row * c->capacity;
        segment.past_count = c->lengths[row];
    } else if (c) {
        segment.shared_count = c->prefix_length;
        segment.past_begin = c->prefix_length;
        segment.past_count = c->shared_length;
    } else {
        segment.shared_begin = s->prefix_copies > 1 ? i * m->prefix_length : 0;
        segment.shared_count = m->prefix_length;
    }
    return segment;
}

/* A row's context, of `count` tokens: how many there are, and the position of what follows (glm_arch,
 * rope_2d). Where nothing follows, all of a row is its context, but in generation. */
static glm_status find_context(const struct glm_arch *a, const int32_t *ids, int count, int i,
                               int generates, int32_t *context, int32_t *mask,
                               struct glm_error *err)
{
    int32_t sop = -1, gmask = -1, other = -1;
    for (int32_t t = count - 1; t >= 0; t--) {
        sop = ids[t] == a->sop ? t : sop;
        gmask = ids[t] == a->gmask ? t : gmask;
        other = ids[t] == a->mask ? t : other;
    }
    *context = count;
    *mask = 0;
    if (sop < 0 && !generates)
        return GLM_OK;
    if (sop < 0)
        return glm_fail(err, GLM_EVALUE,
                        "ids: row %d has no id %d (<sop>), which ends what is read in both "
                        "directions; a row begins with all of that in one call",
                        i, a->sop);
    if (gmask < 0 && other < 0)
        return glm_fail(err, GLM_EVALUE,
                        "ids: row %d has neither id %d ([gMASK]) nor %d ([MASK]), where the answer "
                        "stands",
                        i, a->gmask, a->mask);
    *context = sop;
    *mask = gmask < 0 ? other : gmask;
    return GLM_OK;
}

/* The two positions of the tokens of segment i, of which `before` are in the cache; its context. */
static glm_status stage_blocks(struct glm_model *m, const int32_t *ids, int i,
                               struct glm_segment *segment, int before, int64_t *end,
                               struct glm_error *err)
{
    const struct glm_arch *a = &m->arch;
    const struct glm_step *s = &m->step;
    const struct glm_staging *h = &s->host;
    const struct glm_cache *c = s->call.cache;
    const int row = c ? s->call.cache_rows[i] : 0;
    int32_t context, mask;
    if (before) {
        context = c->contexts[row];
        mask = c->masks[row];
    } else {
        GLM_TRY(find_context(a, ids, segment->count, i, c != NULL, &context, &mask, err));
        segment->context = context;
        if (c) { /* of no meaning until it holds the tokens */
            c->contexts[row] = context;
            c->masks[row] = mask;
        }
    }
    for (int t = 0; t < segment->count; t++) {
        const int place = before + t, n = segment->begin + t;
        const int in_place = place < context || (place == context && a->sop_in_place && !before &&
                                                 ids[mask] == a->gmask);
        h->at[n] = in_place ? place : mask;
        h->block[n] = place < context ? 0 : place - context + 1;
        *end = h->at[n] >= *end ? (int64_t)h->at[n] + 1 : *end;
        *end = h->block[n] >= *end ? (int64_t)h->block[n] + 1 : *end;
    }
    return GLM_OK;
}

/* Segments, positions, sequences and cache slots of all tokens; *end: one more than the largest
 * position. */
static glm_status stage_tokens(struct glm_model *m, const struct glm_input *in, int64_t *end,
                               struct glm_error *err)
{
    struct glm_step *s = &m->step;
    const struct glm_staging *h = &s->host;
    const struct glm_cache *c = s->call.cache;
    s->longest = s->shortest = 0;
    *end = 0;
    for (int i = 0, n = 0; i < s->S; i++) {
        const int count = in->lengths[i];
        const struct glm_segment segment = h->segments[i] = segment_of(m, i, n, count);
        const int start = segment.past_count + (s->call.cache_rows ? c->shared_length : 0);
        if (!in->positions && (int64_t)start + count > m->arch.max_positions)
            return glm_fail(
                err, GLM_EVALUE,
                "segment %d: %d tokens from position %d on are longer than the model's %d "
                "positions (seq_length)",
                i, count, start, m->arch.max_positions);
        s->longest = count > s->longest ? count : s->longest;
        s->shortest = !i || count < s->shortest ? count : s->shortest;
        for (int t = 0; t < count; t++, n++) {
            h->all.position[n] = in->positions ? in->positions[n] : start + t;
            h->all.sequence[n] = sequence_number(m, in, i);
            if (c)
                h->slot[n] = segment.past_begin + segment.past_count + t;
            *end = h->all.position[n] >= *end ? (int64_t)h->all.position[n] + 1 : *end;
        }
        if (s->in_blocks)
            GLM_TRY(stage_blocks(m, in->ids + n - count, i, &h->segments[i], start, end, err));
    }
    return GLM_OK;
}

/* The rows that are read: those asked for, else all; in generation the last of each segment,
 * which follows from the lengths, so no array is passed around. */
static void stage_read(struct glm_model *m, const struct glm_input *in)
{
    const struct glm_step *s = &m->step;
    const struct glm_staging *h = &s->host;
    for (int i = 0; i < s->M; i++) {
        int n = in->rows ? in->rows[i] : i;
        if (s->call.cache)
            n = h->segments[i].begin + h->segments[i].count - 1;
        h->gather[i] = n;
        h->read.position[i] = h->all.position[n];
        h->read.sequence[i] = h->all.sequence[n];
    }
}

static void stage_prefix(struct glm_model *m, const struct glm_input *in)
{
    const struct glm_rows *rows = &m->step.host.prefix;
    for (int i = 0; i < rows->n; i++) {
        rows->position[i] = i % m->prefix_length;
        rows->sequence[i] = sequence_number(m, in, i / m->prefix_length);
    }
}

/* How each row's next token is chosen, and the ids whose scores change; returns how many. */
static size_t stage_choices(struct glm_model *m)
{
    const struct glm_step *s = &m->step;
    const struct glm_staging *h = &s->host;
    const struct glm_sampling *how = s->call.sampling;
    const int32_t *context = how->context;
    int32_t n = 0;
    for (int i = 0; i < s->M; i++) {
        const uint64_t *draw = how->draws + 3 * (size_t)i;
        const int length = context ? how->context_lengths[i] : 0;
        struct glm_choice *c = &h->choices[i];
        *c = (struct glm_choice){.top_p = how->top_p,
                                 .seed = draw[0],
                                 .stream = (uint32_t)draw[1],
                                 .index = (uint32_t)draw[2],
                                 .temperature = (float)how->temperature,
                                 .penalty = (float)how->repetition_penalty,
                                 .top_k = how->top_k,
                                 .first = n};
        if (context)
            glm_touched_ids(h->touched + n, &c->penalised, &c->banned, m->arch.vocab, context,
                            length, how->repetition_penalty, how->no_repeat_ngram, how->suppress,
                            length < how->min_length ? how->n_suppress : 0, h->seen);
        n += c->penalised + c->banned;
        context = context ? context + length : NULL;
    }
    return (size_t)n;
}

glm_status glm_batch_upload(struct glm_model *m, const struct glm_input *in, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const struct glm_step *s = &m->step;
    const struct glm_staging *h = &s->host;
    int64_t end;
    GLM_TRY(stage_tokens(m, in, &end, err));
    stage_read(m, in);
    stage_prefix(m, in);
    GLM_TRY(glm_rope_reach(m, end, err));
    memcpy(h->ids, in->ids, (size_t)s->N * sizeof *h->ids);
    if (in->targets)
        memcpy(h->target, in->targets, (size_t)s->M * sizeof *h->target);
    const size_t touched = s->call.sampling ? stage_choices(m) : 0;
    const int32_t *last = h->target + (in->targets ? s->M : 0);
    be->upload(be, s->segments, h->segments,
               (size_t)((const char *)last - (const char *)h->segments));
    be->upload(be, s->touched, h->touched, touched * sizeof *s->touched);
    return GLM_OK;
}
