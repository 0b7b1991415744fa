#include "state.h"

size_t glm_host_bytes(const struct glm_model *m, const struct glm_step *s)
{
    const size_t prefix = (size_t)s->prefix_copies * m->prefix_length;
    return ((size_t)s->N * 4 + (size_t)s->M * 4 + prefix * 2) * 4 +
           (size_t)s->S * sizeof *s->segments + (size_t)s->M * 8 + 256 +
           (s->how ? s->M * sizeof *s->choices + s->touched_room * 4 + (size_t)m->arch.vocab : 0);
}

glm_status glm_check_input(const struct glm_model *m, const struct glm_input *in,
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
        sum += in->lengths[s];
    }
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

/* Host copy of the index arrays, uploaded array by array. rows NULL: all tokens; in generation the
 * last token of each segment. */
glm_status glm_upload_batch(struct glm_model *m, const struct glm_input *in,
                            const struct glm_place *place, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    struct glm_step *s = &m->step;
    struct glm_cache *c = place ? place->cache : NULL;
    const int P = m->prefix_length, N = s->N, M = s->M, fresh = !c;
    struct glm_segment *segments = (struct glm_segment *)m->host;
    int32_t *position = (int32_t *)(segments + s->S), *stream = position + N, *slot = stream + N,
            *rows = slot + N;
    int32_t *row_position = rows + M, *row_stream = row_position + M;
    int32_t *prefix_position = row_stream + M,
            *prefix_stream = prefix_position + (size_t)s->prefix_copies * P;
    s->host_losses =
        (void *)(((uintptr_t)(prefix_stream + (size_t)s->prefix_copies * P) + 7) / 8 * 8);
    s->longest = 0;
    int farthest = 0;
    for (int i = 0, n = 0; i < s->S; i++) {
        const int count = in->lengths[i], row = place && place->rows ? place->rows[i] : -1;
        const int past = row >= 0 ? c->lengths[row] : c ? c->shared_length : 0;
        const int first = row >= 0 ? c->prefix_length + c->shared_capacity + row * c->capacity
                          : c      ? c->prefix_length
                                   : 0;
        int start = past + (row >= 0 ? c->shared_length : 0);
        s->longest = count > s->longest ? count : s->longest;
        segments[i] = (struct glm_segment){.begin = n, .count = count};
        if (fresh && P) {
            segments[i].shared_begin = s->prefix_copies > 1 ? i * P : 0;
            segments[i].shared_count = P;
        } else if (c) {
            segments[i].shared_count = c->prefix_length + (row >= 0 ? c->shared_length : 0);
            segments[i].past_begin = first;
            segments[i].past_count = past;
        }
        if (!in->positions && (int64_t)start + count > m->arch.max_positions)
            return glm_fail(
                err, GLM_EVALUE,
                "segment %d: %d tokens from position %d on are longer than the model's %d "
                "positions (seq_length)",
                i, count, start, m->arch.max_positions);
        for (int t = 0; t < count; t++, n++) {
            position[n] = in->positions ? in->positions[n] : start + t;
            farthest = position[n] > farthest ? position[n] : farthest;
            stream[n] = (int32_t)(uint32_t)((m->progress.rows + i) & 0x7fffffff);
            slot[n] = first + past + t;
        }
    }
    for (int b = 0; b < s->prefix_copies && fresh; b++)
        for (int p = 0; p < P; p++) {
            prefix_position[b * P + p] = p;
            prefix_stream[b * P + p] = (int32_t)(uint32_t)((m->progress.rows + b) & 0x7fffffff);
        }
    for (int i = 0; i < M; i++) {
        rows[i] = in->rows ? in->rows[i] : place ? segments[i].begin + segments[i].count - 1 : i;
        row_position[i] = position[rows[i]];
        row_stream[i] = stream[rows[i]];
    }
    GLM_TRY(glm_rope_reach(m, (int64_t)farthest + 1, err));
    be->upload(be, s->segments, segments, (size_t)s->S * sizeof *segments);
    be->upload(be, s->ids, in->ids, (size_t)N * 4);
    be->upload(be, s->position, position, (size_t)N * 4);
    be->upload(be, s->stream, stream, (size_t)N * 4);
    if (c)
        be->upload(be, s->slot, slot, (size_t)N * 4);
    be->upload(be, s->rows, rows, (size_t)M * 4);
    be->upload(be, s->row_position, row_position, (size_t)M * 4);
    be->upload(be, s->row_stream, row_stream, (size_t)M * 4);
    if (in->targets)
        be->upload(be, s->target, in->targets, (size_t)M * 4);
    if (fresh && P) {
        be->upload(be, s->prefix_position, prefix_position, (size_t)s->prefix_copies * P * 4);
        be->upload(be, s->prefix_stream, prefix_stream, (size_t)s->prefix_copies * P * 4);
    }
    return GLM_OK;
}

/* `staging` has room for all of it (host_bytes). */
void glm_upload_choices(struct glm_model *m, char *staging)
{
    struct glm_step *s = &m->step;
    const struct glm_sampling *how = s->how;
    const int32_t *context = how->context;
    struct glm_choice *choices = (struct glm_choice *)staging;
    int32_t *touched = (int32_t *)(choices + s->M), n = 0;
    unsigned char *seen = (unsigned char *)(touched + s->touched_room);
    for (int i = 0; i < s->M; i++) {
        const uint64_t *draw = how->draws + 3 * (size_t)i;
        const int length = context ? how->context_lengths[i] : 0;
        struct glm_choice *c = &choices[i];
        *c = (struct glm_choice){.top_p = how->top_p,
                                 .seed = draw[0],
                                 .stream = (uint32_t)draw[1],
                                 .index = (uint32_t)draw[2],
                                 .temperature = (float)how->temperature,
                                 .penalty = (float)how->repetition_penalty,
                                 .top_k = how->top_k,
                                 .first = n};
        if (context)
            glm_touched_ids(touched + n, &c->penalised, &c->banned, m->arch.vocab, context, length,
                            how->repetition_penalty, how->no_repeat_ngram, how->suppress,
                            length < how->min_length ? how->n_suppress : 0, seen);
        n += c->penalised + c->banned;
        context = context ? context + length : NULL;
    }
    m->be->upload(m->be, s->choices, choices, (size_t)s->M * sizeof *choices);
    m->be->upload(m->be, s->touched, touched, (size_t)n * 4);
}
