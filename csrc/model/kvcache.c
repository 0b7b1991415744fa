/* Keys and values of a conversation, or of many: append, rewind, shared prefix.
 * Slots of one layer: the P-Tuning prefix, the prompt prefix shared by all rows, then `capacity`
 * slots for each row. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "platform.h"
#include "state.h"

/* step.prefix_kv from the present weights */
static glm_status run_prefix(struct glm_model *m, struct glm_error *err)
{
    /* the smallest step lays out the encoder's buffers */
    GLM_TRY(glm_model_reserve(m, 1, 1, 1, 0, m->budget, err));
    glm_prefix_forward(m);
    return GLM_OK;
}

/* The P-Tuning prefix of the present weights into the first slots of every layer. */
static glm_status fill_prefix(struct glm_cache *c, struct glm_error *err)
{
    struct glm_model *m = c->model;
    struct glm_backend *be = m->be;
    const int P = m->prefix_length, J = 2 * m->arch.layers,
              KV = m->arch.kv_heads * m->arch.head_dim;
    if (P != c->prefix_length)
        return glm_fail(err, GLM_ESTATE,
                        "the cache was made for a prefix of %d, the model has one of %d",
                        c->prefix_length, P);
    if (P) {
        const size_t row = (size_t)P * KV * be->real_size;
        GLM_TRY(run_prefix(m, err));
        for (int j = 0; j < J; j++)
            be->copy(be, c->kv + (size_t)j * c->slots * KV * be->real_size,
                     (const char *)m->step.prefix_kv + j * row, row);
    }
    c->version = m->version;
    return GLM_OK;
}

glm_status glm_model_prefix_kv(struct glm_model *m, void *out, struct glm_error *err)
{
    const size_t J = 2 * (size_t)m->arch.layers, KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
    if (!m->prefix_length)
        return glm_fail(err, GLM_ESTATE, "this model has no P-Tuning prefix");
    GLM_TRY(run_prefix(m, err));
    m->be->download(m->be, out, m->step.prefix_kv, J * m->prefix_length * KV * m->be->real_size);
    return GLM_OK;
}

glm_status glm_cache_create(struct glm_cache **out, struct glm_model *m, int rows, int capacity,
                            int shared_capacity, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const size_t J = 2 * (size_t)m->arch.layers, KV = (size_t)m->arch.kv_heads * m->arch.head_dim;
    *out = NULL;
    if (rows < 1 || capacity < 1 || shared_capacity < 0 || capacity > m->arch.max_positions ||
        shared_capacity > m->arch.max_positions)
        return glm_fail(err, GLM_EVALUE,
                        "cache: expected rows >= 1 and capacities within the model's %d positions, "
                        "got %d rows of %d "
                        "after %d shared",
                        m->arch.max_positions, rows, capacity, shared_capacity);
    GLM_TRY(glm_weights_complete(m, err));
    GLM_TRY(glm_rope_reach(m, (int64_t)shared_capacity + capacity, err));
    struct glm_cache *c = calloc(1, sizeof *c);
    int32_t *lengths = calloc(4 * (size_t)rows, sizeof *lengths); /* contexts, masks, adapters */
    const int64_t slots = (int64_t)m->prefix_length + shared_capacity + (int64_t)rows * capacity;
    size_t bytes = 0;
    int fits =
        slots < INT32_MAX && !__builtin_mul_overflow(J * KV * be->real_size, (size_t)slots, &bytes);
    if (!c || !lengths || !fits || !(c->kv = be->alloc(be, bytes))) {
        free(c);
        free(lengths);
        return glm_fail(err, GLM_EMEMORY,
                        "cache: %d rows of %d tokens need %zu bytes: ask for fewer or shorter rows",
                        rows, capacity, bytes);
    }
    c->model = m;
    c->be = be;
    c->rows = rows;
    c->capacity = capacity;
    c->shared_capacity = shared_capacity;
    c->prefix_length = m->prefix_length;
    c->lengths = lengths;
    c->contexts = lengths + rows;
    c->masks = lengths + 2 * (size_t)rows;
    c->adapters = lengths + 3 * (size_t)rows;
    c->slots = (int)slots;
    c->bytes = bytes;
    glm_status status = fill_prefix(c, err);
    if (status != GLM_OK) {
        glm_cache_free(c);
        return status;
    }
    *out = c;
    return GLM_OK;
}

void glm_cache_free(struct glm_cache *c)
{
    if (!c)
        return;
    c->be->free(c->be, c->kv);
    free(c->lengths);
    free(c);
}

void glm_cache_get(struct glm_cache *c, struct glm_cache_info *info)
{
    *info = (struct glm_cache_info){
        c->rows,    c->capacity, c->shared_length,
        c->lengths, c->bytes,    c->version == c->model->version && c->be == c->model->be};
}

struct glm_backend *glm_cache_backend(const struct glm_cache *c) { return c->be; }

glm_status glm_cache_rewind(struct glm_cache *c, int row, int length, struct glm_error *err)
{
    if (row < 0 || row >= c->rows)
        return glm_fail(err, GLM_EVALUE, "row: expected 0 to %d, got %d", c->rows - 1, row);
    if (length < 0 || length > c->lengths[row])
        return glm_fail(err, GLM_EVALUE, "length: row %d holds %d tokens, cannot rewind to %d", row,
                        c->lengths[row], length);
    if (c->model->arch.rope_2d && length && length <= c->contexts[row])
        return glm_fail(
            err, GLM_EVALUE,
            "length: the first %d tokens of row %d, its context and <sop>, stay together "
            "or go together, cannot rewind to %d",
            c->contexts[row] + 1, row, length);
    c->lengths[row] = length;
    return GLM_OK;
}

glm_status glm_cache_copy(struct glm_cache *c, int from, int to, int length, struct glm_error *err)
{
    struct glm_backend *be = c->be;
    const size_t slot = (size_t)c->model->arch.kv_heads * c->model->arch.head_dim * be->real_size;
    const int J = 2 * c->model->arch.layers, first = c->prefix_length + c->shared_capacity;
    if (from < 0 || from >= c->rows || to < 0 || to >= c->rows || from == to)
        return glm_fail(err, GLM_EVALUE, "copy: expected two of the %d rows, got %d and %d",
                        c->rows, from, to);
    if (length < 0 || length > c->lengths[from])
        return glm_fail(err, GLM_EVALUE, "length: row %d holds %d tokens, cannot copy %d", from,
                        c->lengths[from], length);
    if (c->adapters[from] != c->adapters[to])
        return glm_fail(err, GLM_ESTATE, "copy: row %d has adapter %d, row %d has %d", from,
                        c->adapters[from], to, c->adapters[to]);
    if (c->model->arch.rope_2d)
        return glm_fail(err, GLM_ESTATE,
                        "copy: this model reads a prompt in both directions: nothing of it is "
                        "another one's");
    for (int j = 0; j < J; j++) {
        char *kv = c->kv + ((size_t)j * c->slots + first) * slot;
        be->copy(be, kv + (size_t)to * c->capacity * slot, kv + (size_t)from * c->capacity * slot,
                 (size_t)length * slot);
    }
    c->lengths[to] = length;
    return GLM_OK;
}

glm_status glm_cache_adapt(struct glm_cache *c, int row, int number, struct glm_error *err)
{
    if (row < -1 || row >= c->rows)
        return glm_fail(err, GLM_EVALUE, "row: expected 0 to %d, or -1 for all, got %d",
                        c->rows - 1, row);
    if (number < 0 || number > c->model->n_kept)
        return glm_fail(err, GLM_EVALUE, "adapter: expected 0 to %d, those that are kept, got %d",
                        c->model->n_kept, number);
    if (c->shared_length && number != c->shared_adapter)
        return glm_fail(err, GLM_ESTATE, "adapter: the shared prefix was made with number %d",
                        c->shared_adapter);
    for (int i = 0; i < c->rows; i++)
        if ((row < 0 || row == i) && c->lengths[i])
            return glm_fail(err, GLM_ESTATE, "adapter: row %d already holds %d tokens", i,
                            c->lengths[i]);
    for (int i = 0; i < c->rows; i++)
        if (row < 0 || row == i)
            c->adapters[i] = number;
    c->shared_adapter = row < 0 ? number : c->shared_adapter;
    return GLM_OK;
}

glm_status glm_cache_reorder(struct glm_cache *c, const int32_t *parents, struct glm_error *err)
{
    struct glm_backend *be = c->be;
    const size_t slot = (size_t)c->model->arch.kv_heads * c->model->arch.head_dim * be->real_size;
    const int J = 2 * c->model->arch.layers, first = c->prefix_length + c->shared_capacity;
    int longest = 0;
    for (int i = 0; i < c->rows; i++) {
        if (parents[i] < 0 || parents[i] >= c->rows)
            return glm_fail(err, GLM_EVALUE, "parents[%d]: expected 0 to %d, got %d", i,
                            c->rows - 1, parents[i]);
        longest = c->lengths[i] > longest ? c->lengths[i] : longest;
    }
    /* one layer's rows aside at a time: parents may point anywhere */
    const size_t row = (size_t)longest * slot;
    char *aside = be->alloc(be, row * c->rows + 1);
    const size_t numbers = 4 * (size_t)c->rows * sizeof *c->lengths;
    int32_t *lengths = malloc(numbers);
    if (!aside || !lengths) {
        be->free(be, aside);
        free(lengths);
        return glm_fail(err, GLM_EMEMORY, "reorder: %zu bytes could not be taken", row * c->rows);
    }
    for (int j = 0; j < J; j++) {
        char *kv = c->kv + ((size_t)j * c->slots + first) * slot;
        for (int i = 0; i < c->rows; i++)
            be->copy(be, aside + i * row, kv + (size_t)parents[i] * c->capacity * slot,
                     (size_t)c->lengths[parents[i]] * slot);
        for (int i = 0; i < c->rows; i++)
            be->copy(be, kv + (size_t)i * c->capacity * slot, aside + i * row,
                     (size_t)c->lengths[parents[i]] * slot);
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < c->rows; i++)
            lengths[k * c->rows + i] = c->lengths[k * c->rows + parents[i]];
    memcpy(c->lengths, lengths, numbers);
    free(lengths);
    be->free(be, aside);
    return GLM_OK;
}

glm_status glm_cache_grow(struct glm_cache *c, int capacity, struct glm_error *err)
{
    struct glm_backend *be = c->be;
    const size_t J = 2 * (size_t)c->model->arch.layers;
    const size_t slot = (size_t)c->model->arch.kv_heads * c->model->arch.head_dim * be->real_size;
    if (capacity <= c->capacity)
        return GLM_OK;
    if (capacity > c->model->arch.max_positions)
        return glm_fail(err, GLM_EVALUE,
                        "capacity: expected at most the model's %d positions, got %d",
                        c->model->arch.max_positions, capacity);
    if (c->be == c->model->be) /* else it is refused where it is used */
        GLM_TRY(glm_rope_reach(c->model, (int64_t)c->shared_capacity + capacity, err));
    const int first = c->prefix_length + c->shared_capacity;
    const int64_t slots = first + (int64_t)c->rows * capacity;
    size_t bytes = 0;
    char *kv = NULL;
    if (slots >= INT32_MAX || __builtin_mul_overflow(J * slot, (size_t)slots, &bytes) ||
        !(kv = be->alloc(be, bytes)))
        return glm_fail(err, GLM_EMEMORY,
                        "cache: %d rows of %d tokens need %zu bytes: ask for fewer or shorter rows",
                        c->rows, capacity, bytes);
    for (size_t j = 0; j < J; j++) {
        const char *from = c->kv + j * (size_t)c->slots * slot;
        char *to = kv + j * (size_t)slots * slot;
        be->copy(be, to, from, (size_t)(c->prefix_length + c->shared_length) * slot);
        for (int i = 0; i < c->rows; i++)
            be->copy(be, to + ((size_t)first + (size_t)i * capacity) * slot,
                     from + ((size_t)first + (size_t)i * c->capacity) * slot,
                     (size_t)c->lengths[i] * slot);
    }
    be->free(be, c->kv);
    c->kv = kv;
    c->capacity = capacity;
    c->slots = (int)slots;
    c->bytes = bytes;
    return GLM_OK;
}

/* Refreshes an empty cache after the weights changed; one that holds tokens of the old weights is
 * refused. */
static glm_status check_version(struct glm_cache *c, struct glm_error *err)
{
    if (c->be != c->model->be)
        return glm_fail(err, GLM_ESTATE,
                        "the model moved to %s since this cache was made: start a new one",
                        c->model->be->name);
    if (c->version == c->model->version)
        return GLM_OK;
    int held = c->shared_length;
    for (int i = 0; i < c->rows; i++)
        held += c->lengths[i];
    if (held)
        return glm_fail(err, GLM_ESTATE,
                        "the model's weights changed since this cache was filled: start a new one");
    return fill_prefix(c, err);
}

/* Checks, memory and uploads of a step that continues n rows. */
static glm_status begin(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                        const int32_t *lengths, const struct glm_sampling *how,
                        struct glm_error *err)
{
    struct glm_model *m = c->model;
    int64_t N = 0;
    for (int i = 0; i < n; i++)
        N += lengths[i] > 0 ? lengths[i] : 0;
    if (n < 1 || N > INT32_MAX / 4)
        return glm_fail(err, GLM_EVALUE,
                        "ids: expected at least one token, got %d segments of %lld tokens", n,
                        (long long)N);
    GLM_TRY(check_version(c, err));
    const struct glm_input in = {.ids = ids, .lengths = lengths, .N = (int)N, .S = n, .M = n};
    const struct glm_call call = {.gather = 1, .cache = c, .cache_rows = rows, .sampling = how};
    return glm_step_begin(m, &in, &call, err);
}

/* Each of the n rows, distinct, has room for its tokens. */
static glm_status check_rows(const struct glm_cache *c, const int32_t *rows, int n,
                             const int32_t *lengths, struct glm_error *err)
{
    for (int i = 0; i < n; i++) {
        if (rows[i] < 0 || rows[i] >= c->rows)
            return glm_fail(err, GLM_EVALUE, "rows[%d]: expected 0 to %d, got %d", i, c->rows - 1,
                            rows[i]);
        for (int j = 0; j < i; j++)
            if (rows[j] == rows[i])
                return glm_fail(err, GLM_EVALUE, "rows: row %d is named twice", rows[i]);
        if (lengths[i] < 1 || lengths[i] > c->capacity - c->lengths[rows[i]])
            return glm_fail(err, GLM_EVALUE, "row %d: %d more tokens do not fit: it holds %d of %d",
                            rows[i], lengths[i], c->lengths[rows[i]], c->capacity);
    }
    return GLM_OK;
}

glm_status glm_cache_extend(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                            const int32_t *lengths, void *logits, struct glm_error *err)
{
    struct glm_model *m = c->model;
    const size_t V = (size_t)m->arch.vocab;
    GLM_TRY(check_rows(c, rows, n, lengths, err));
    GLM_TRY(begin(c, rows, n, ids, lengths, NULL, err));
    GLM_TRY(glm_layers_forward(m, err));
    struct glm_step *s = &m->step;
    for (int first = 0; first < n; first += s->logits_rows) {
        const int count = n - first < s->logits_rows ? n - first : s->logits_rows;
        int bad;
        glm_logits_forward(m, first, count);
        m->be->ops->first_nonfinite(m->be->cx, &bad, s->logits, count, m->arch.vocab);
        if (m->be->stopped(m->be))
            return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
        if (bad >= 0)
            return glm_layers_diagnose(m, err);
        m->be->download(m->be, glm_at(m, logits, first * V), s->logits,
                        count * V * m->be->real_size);
    }
    for (int i = 0; i < n; i++)
        c->lengths[rows[i]] += lengths[i];
    return GLM_OK;
}

/* From the embedding to the chosen ids, which stay on the device. */
static glm_status run_to_ids(struct glm_model *m, int n, struct glm_error *err)
{
    const struct glm_step *s = &m->step;
    GLM_TRY(glm_layers_forward(m, err));
    for (int first = 0; first < n; first += s->logits_rows) {
        const int count = n - first < s->logits_rows ? n - first : s->logits_rows;
        glm_logits_forward(m, first, count);
        m->be->ops->choose(m->be->cx, s->chosen + first, s->logits, count, m->arch.vocab,
                           s->call.sampling ? s->choices + first : NULL, s->touched);
    }
    return GLM_OK;
}

/* One token a row is the same sequence of ops again and again: where the batch lies and what it
 * reads changes, which addresses the ops get does not. */
static glm_status replay_to_ids(struct glm_model *m, int n, struct glm_error *err)
{
    struct glm_backend *be = m->be;
    const struct glm_step *s = &m->step;
    const struct glm_key key = {{(uintptr_t)m, m->version, (uintptr_t)m->arena.base,
                                 (uintptr_t)s->call.cache->kv, (uint64_t)s->call.cache->slots,
                                 (uint64_t)s->N, (uint64_t)n,
                                 (uint64_t)s->kept_layers << 1 | (s->call.sampling != NULL)}};
    if (!be->replay || s->longest > 1 || s->several)
        return run_to_ids(m, n, err);
    if (be->replay(be, &key))
        return GLM_OK;
    const glm_status status = run_to_ids(m, n, err);
    be->recorded(be);
    return status;
}

static glm_status check_sampling(const struct glm_sampling *how, struct glm_error *err)
{
    const float temperature = (float)how->temperature, penalty = (float)how->repetition_penalty;
    if (!(temperature >= 0 && isfinite(temperature)))
        return glm_fail(err, GLM_EVALUE, "temperature: expected 0 (greedy) or more, got %g",
                        how->temperature);
    if (how->top_k < 0)
        return glm_fail(err, GLM_EVALUE, "top_k: expected 0 (off) or a positive number, got %d",
                        how->top_k);
    if (!(how->top_p >= 0 && how->top_p <= 1))
        return glm_fail(err, GLM_EVALUE, "top_p: expected 0 to 1, got %g", how->top_p);
    if (!(penalty > 0 && isfinite(penalty)))
        return glm_fail(err, GLM_EVALUE, "repetition_penalty: expected a positive number, got %g",
                        how->repetition_penalty);
    return GLM_OK;
}

glm_status glm_cache_next(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                          const int32_t *lengths, const struct glm_sampling *how, int32_t *next,
                          struct glm_error *err)
{
    struct glm_model *m = c->model;
    if (how)
        GLM_TRY(check_sampling(how, err));
    GLM_TRY(check_rows(c, rows, n, lengths, err));
    GLM_TRY(begin(c, rows, n, ids, lengths, how, err));
    GLM_TRY(replay_to_ids(m, n, err));
    m->be->download(m->be, next, m->step.chosen, (size_t)n * sizeof *next);
    if (m->be->stopped(m->be))
        return glm_fail(err, GLM_EINTERRUPTED, "interrupted");
    for (int i = 0; i < n; i++)
        if (next[i] == -1)
            return glm_layers_diagnose(m, err);
    for (int i = 0; i < n; i++)
        if (next[i] < 0)
            return glm_fail(err, GLM_EVALUE,
                            "row %d: no token is allowed after %d: all are suppressed, or the "
                            "penalty makes scores infinite",
                            rows[i], c->lengths[rows[i]] + lengths[i]);
    for (int i = 0; i < n; i++)
        c->lengths[rows[i]] += lengths[i];
    return GLM_OK;
}

static int contains(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id)
            return 1;
    return 0;
}

glm_status glm_cache_go_on(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                           const int32_t *ones, int most, const int32_t *ends, int n_ends,
                           int32_t *next, int *count, struct glm_error *err)
{
    const int64_t begun = glm_milliseconds(); /* its clock moves every few of them */
    for (int ended = 0; !ended; ids = next, next += n) {
        GLM_TRY(glm_cache_next(c, rows, n, ids, ones, NULL, next, err));
        ended = ++*count >= most || glm_milliseconds() != begun;
        for (int i = 0; i < n; i++)
            ended |= contains(ends, n_ends, next[i]);
    }
    return GLM_OK;
}

glm_status glm_cache_extend_shared(struct glm_cache *c, const int32_t *ids, int n,
                                   struct glm_error *err)
{
    const int32_t lengths = n;
    if (c->model->arch.rope_2d)
        return glm_fail(
            err, GLM_ESTATE,
            "shared prefix: this model reads a prompt in both directions, so what comes "
            "later changes what came before: nothing can be shared");
    for (int i = 0; i < c->rows; i++)
        if (c->lengths[i])
            return glm_fail(err, GLM_ESTATE, "shared prefix: row %d already holds %d tokens", i,
                            c->lengths[i]);
    if (n < 1 || n > c->shared_capacity - c->shared_length)
        return glm_fail(err, GLM_EVALUE,
                        "shared prefix: %d more tokens do not fit: it holds %d of %d", n,
                        c->shared_length, c->shared_capacity);
    GLM_TRY(begin(c, NULL, 1, ids, &lengths, NULL, err));
    GLM_TRY(glm_layers_forward(c->model, err));
    c->shared_length += n;
    return GLM_OK;
}
