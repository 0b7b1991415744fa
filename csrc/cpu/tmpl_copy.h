/* Rows that are copied: embedding, gather, queries, keys and values, the cache. */

struct embedding_args {
    struct rows rows;
    const struct glm_mat *weight;
    const int32_t *ids;
    float *out;
};

static void embedding_forward_task(const void *arg, int task, char *scratch)
{
    const struct embedding_args *a = arg;
    const struct glm_mat *w = a->weight;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++)
        load_row(a->out + (size_t)n * w->cols,
                 (const char *)w->data + glm_bytes(w->dtype, (size_t)a->ids[n] * w->cols), w->dtype,
                 w->cols);
}

static void embedding_forward(void *cx, void *out, const struct glm_mat *weight, const int32_t *ids,
                              int N)
{
    const struct embedding_args a = {rows_of(N, (size_t)weight->cols), weight, ids, out};
    run_rows(cx, embedding_forward_task, &a, a.rows);
}

struct embedding_backward_args {
    const float *dout;
    const int32_t *ids;
    float *dweight;
    int N, C;
};

/* ids repeat, so a task is a block of columns, and rows go in order */
static void embedding_backward_task(const void *arg, int task, char *scratch)
{
    const struct embedding_backward_args *a = arg;
    const int begin = task * BLOCK, left = a->C - begin, count = left < BLOCK ? left : BLOCK;
    (void)scratch;
    for (int n = 0; n < a->N; n++)
        add_row(a->dweight + (size_t)a->ids[n] * a->C + begin, a->dout + (size_t)n * a->C + begin,
                count);
}

static void embedding_backward(void *cx, void *dweight, const void *dout, const int32_t *ids, int N,
                               int C)
{
    const struct embedding_backward_args a = {dout, ids, dweight, N, C};
    run(cx, ceil_div((size_t)C, BLOCK), (size_t)N * C, embedding_backward_task, &a);
}

struct gather_args { /* forward: to[m] = from[at[m]];  backward: to[at[m]] += from[m] */
    struct rows rows;
    float *to;
    const float *from;
    const int32_t *at;
    int C;
};

static void gather_forward_task(const void *arg, int task, char *scratch)
{
    const struct gather_args *a = arg;
    const size_t C = (size_t)a->C;
    (void)scratch;
    for (int m = first_row(a->rows, task); m < end_row(a->rows, task); m++)
        memcpy(a->to + m * C, a->from + a->at[m] * C, C * 4);
}

static void gather_forward(void *cx, void *out, const void *inp, const int32_t *rows, int M, int C)
{
    const struct gather_args a = {rows_of(M, (size_t)C), out, inp, rows, C};
    run_rows(cx, gather_forward_task, &a, a.rows);
}

static void gather_backward_task(const void *arg, int task, char *scratch)
{
    const struct gather_args *a = arg;
    const size_t C = (size_t)a->C;
    (void)scratch;
    for (int m = first_row(a->rows, task); m < end_row(a->rows, task); m++)
        add_row(a->to + a->at[m] * C, a->from + m * C, a->C);
}

static void gather_backward(void *cx, void *dinp, const void *dout, const int32_t *rows, int M,
                            int C)
{
    const struct gather_args a = {rows_of(M, (size_t)C), dinp, dout, rows, C};
    run_rows(cx, gather_backward_task, &a, a.rows); /* the rows are distinct */
}

struct qkv_args { /* parts: q, k, v, the columns of qkv in this order */
    struct rows rows;
    char *part[3], *qkv;
    size_t bytes[3]; /* of a row */
    int backward;
};

static void qkv_task(const void *arg, int task, char *scratch)
{
    const struct qkv_args *a = arg;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        char *row = a->qkv + (size_t)n * (a->bytes[0] + a->bytes[1] + a->bytes[2]);
        for (int i = 0; i < 3; row += a->bytes[i++]) {
            char *part = a->part[i] + (size_t)n * a->bytes[i];
            memcpy(a->backward ? part : row, a->backward ? row : part, a->bytes[i]);
        }
    }
}

static struct qkv_args qkv_args_of(const void *q, const void *k, const void *v, const void *qkv,
                                   int N, struct glm_heads heads, int backward)
{
    const size_t Q = (size_t)heads.NH * heads.HD, KV = (size_t)heads.KVH * heads.HD;
    return (struct qkv_args){.rows = rows_of(N, Q + 2 * KV),
                             .part = {(char *)q, (char *)k, (char *)v},
                             .qkv = (char *)qkv,
                             .bytes = {Q * 4, KV * 4, KV * 4},
                             .backward = backward};
}

static void qkv_forward(void *cx, void *qkv, const void *q, const void *k, const void *v, int N,
                        struct glm_heads heads)
{
    const struct qkv_args a = qkv_args_of(q, k, v, qkv, N, heads, 0);
    run_rows(cx, qkv_task, &a, a.rows);
}

static void qkv_backward(void *cx, void *dq, void *dk, void *dv, const void *dqkv, int N,
                         struct glm_heads heads)
{
    const struct qkv_args a = qkv_args_of(dq, dk, dv, dqkv, N, heads, 1);
    run_rows(cx, qkv_task, &a, a.rows);
}

struct by_head_args {
    struct rows rows;
    char *grouped, *by_head; /* [all q | all k | all v] and [q | k | v] of each head */
    int NH, backward;
    size_t bytes; /* of a head */
};

static void qkv_by_head_task(const void *arg, int task, char *scratch)
{
    const struct by_head_args *a = arg;
    const size_t NH = (size_t)a->NH;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const size_t row = 3 * NH * n;
        for (size_t i = 0; i < 3 * NH; i++) {
            char *grouped = a->grouped + (row + i % 3 * NH + i / 3) * a->bytes;
            char *by_head = a->by_head + (row + i) * a->bytes;
            memcpy(a->backward ? by_head : grouped, a->backward ? grouped : by_head, a->bytes);
        }
    }
}

static void qkv_by_head_forward(void *cx, void *qkv, const void *inp, int N, struct glm_heads heads)
{
    const struct by_head_args a = {.rows = rows_of(N, (size_t)3 * heads.NH * heads.HD),
                                   .grouped = qkv,
                                   .by_head = (char *)inp,
                                   .NH = heads.NH,
                                   .bytes = (size_t)heads.HD * 4};
    run_rows(cx, qkv_by_head_task, &a, a.rows);
}

static void qkv_by_head_backward(void *cx, void *dinp, const void *dqkv, int N,
                                 struct glm_heads heads)
{
    const struct by_head_args a = {.rows = rows_of(N, (size_t)3 * heads.NH * heads.HD),
                                   .grouped = (char *)dqkv,
                                   .by_head = dinp,
                                   .NH = heads.NH,
                                   .backward = 1,
                                   .bytes = (size_t)heads.HD * 4};
    run_rows(cx, qkv_by_head_task, &a, a.rows);
}

struct append_args {
    struct rows rows;
    float *k, *v;
    const float *kv; /* keys, then values, of the first row of qkv */
    const int32_t *slot;
    size_t stride, KV; /* floats from a row of qkv to the next; of a key */
};

static void kv_append_task(const void *arg, int task, char *scratch)
{
    const struct append_args *a = arg;
    const size_t KV = a->KV;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *row = a->kv + (size_t)n * a->stride;
        memcpy(a->k + a->slot[n] * KV, row, KV * 4);
        memcpy(a->v + a->slot[n] * KV, row + KV, KV * 4);
    }
}

static void kv_append(void *cx, struct glm_kv cache, const void *qkv, const int32_t *slot, int N,
                      struct glm_heads heads)
{
    const size_t KV = (size_t)heads.KVH * heads.HD, q = (size_t)heads.NH * heads.HD;
    const struct append_args a = {.rows = rows_of(N, 2 * KV),
                                  .k = cache.k,
                                  .v = cache.v,
                                  .kv = (const float *)qkv + q,
                                  .slot = slot,
                                  .stride = q + 2 * KV,
                                  .KV = KV};
    run_rows(cx, kv_append_task, &a, a.rows);
}

static void rope_append(void *cx, struct glm_kv cache, void *qkv, const void *table,
                        const int32_t *position, const int32_t *slot, int N, struct glm_heads heads,
                        int rotary_dim)
{
    rope_forward(cx, qkv, table, position, N, heads.NH + heads.KVH, heads.HD,
                 (heads.NH + 2 * heads.KVH) * heads.HD, rotary_dim);
    kv_append(cx, cache, qkv, slot, N, heads);
}
