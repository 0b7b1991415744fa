/* Dropout masks, dropout, and the rows of the P-Tuning prefix, which are dropped while they are
 * copied. */

/* High and low halves of the products of 32-bit lanes with m. */
INLINE void multiply_wide(vu *high, vu *low, vu x, uint32_t m)
{
    const vw even = MULTIPLY_EVEN((vw)x, m), odd = MULTIPLY_EVEN((vw)x >> 32, m);
    const vw lower = (vw){0} + 0xffffffffu;
    *high = (vu)(even >> 32 | (odd & ~lower));
    *low = (vu)((even & lower) | odd << 32);
}

/* Words x[b] of the 4 * VL elements from `first` (a multiple of 4) on of B rows from row n on: of
 * each counter the four, one in each vector. Philox4x32-10 (Salmon et al. 2011) on VL counters at
 * once; a round waits for the one before, and another row's does not. */
INLINE void philox(vu (*x)[4], int B, const struct glm_dropout *d, int n, uint32_t first)
{
    uint32_t k0 = (uint32_t)d->seed, k1 = (uint32_t)(d->seed >> 32) ^ d->step;
    uint32_t counter[VL];
    for (int i = 0; i < VL; i++)
        counter[i] = first / 4 + (uint32_t)i;
    for (int b = 0; b < B; b++) {
        memcpy(&x[b][0], counter, sizeof counter);
        x[b][1] = (vu){0} + (uint32_t)d->position[n + b];
        x[b][2] = (vu){0} + (uint32_t)d->stream[n + b];
        x[b][3] = (vu){0} + d->site;
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) {
            vu high0, low0, high1, low1;
            multiply_wide(&high0, &low0, x[b][0], 0xD2511F53u);
            multiply_wide(&high1, &low1, x[b][2], 0xCD9E8D57u);
            x[b][0] = high1 ^ x[b][1] ^ k0;
            x[b][2] = high0 ^ x[b][3] ^ k1;
            x[b][1] = low1;
            x[b][3] = low0;
        }
}

/* Of four vectors that have one of each counter's four: in the order of the elements. */
INLINE void in_order(vi *to, const vu *x)
{
    const vf a = LOW((vf)x[0], (vf)x[2]), b = LOW((vf)x[1], (vf)x[3]);
    const vf c = HIGH((vf)x[0], (vf)x[2]), e = HIGH((vf)x[1], (vf)x[3]);
    to[0] = (vi)LOW(a, b);
    to[1] = (vi)HIGH(a, b);
    to[2] = (vi)LOW(c, e);
    to[3] = (vi)HIGH(c, e);
}

/* Which of these elements of B rows the mask drops: -1 or 0. */
INLINE void dropped(vi (*drop)[4], int B, const struct glm_dropout *d, int n, uint32_t first)
{
    const uint64_t threshold = (uint64_t)(d->p * 4294967296.0);
    const uint32_t high_bit = 0x80000000u; /* compared as signed numbers */
    vu x[2][4];
    philox(x, B, d, n, first);
    for (int b = 0; b < B; b++) {
        for (int w = 0; w < 4; w++)
            x[b][w] =
                (vu)((vi)(x[b][w] ^ high_bit) < (vi)((vu){0} + ((uint32_t)threshold ^ high_bit)));
        in_order(drop[b], x[b]);
        for (int w = 0; threshold >> 32 && w < 4; w++)
            drop[b][w] = ~(vi){0};
    }
}

struct dropout_args {
    struct rows rows;
    float *out;
    const float *inp;
    const struct glm_dropout *dropout;
    int C;
};

/* B rows: out = inp * mask (+ out when add) */
INLINE void dropout_together(const struct dropout_args *a, int n, int B, int add)
{
    const vf keep = splat((float)(1.0 / (1.0 - a->dropout->p)));
    const int C = a->C;
    for (int i = 0; i < C; i += 4 * VL) {
        vi drop[2][4];
        dropped(drop, B, a->dropout, n, (uint32_t)i);
        for (int b = 0; b < B; b++) {
            const float *inp = a->inp + (size_t)(n + b) * C;
            float *out = a->out + (size_t)(n + b) * C;
            for (int w = 0, at = i; w < 4 && at < C; w++, at += VL) {
                const int part = C - at;
                if (part >= VL) {
                    const vf y = select_lanes(drop[b][w], (vf){0}, load(inp + at) * keep);
                    store(out + at, add ? load(out + at) + y : y);
                } else {
                    const vf y =
                        select_lanes(drop[b][w], (vf){0}, load_part(inp + at, part) * keep);
                    store_part(out + at, add ? load_part(out + at, part) + y : y, part);
                }
            }
        }
    }
}

INLINE void dropout_rows(const struct dropout_args *a, int task, int add)
{
    int n = first_row(a->rows, task);
    for (; n + 2 <= end_row(a->rows, task); n += 2)
        dropout_together(a, n, 2, add);
    for (; n < end_row(a->rows, task); n++)
        dropout_together(a, n, 1, add);
}

static void dropout_forward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 0);
}

static void dropout_forward(void *cx, void *out, const void *inp, int N, int C,
                            const struct glm_dropout *dropout)
{
    const struct dropout_args a = {rows_of(N, (size_t)4 * C), out, inp, dropout, C};
    run_rows(cx, dropout_forward_task, &a, a.rows);
}

static void dropout_backward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 1);
}

static void dropout_backward(void *cx, void *dinp, const void *dout, int N, int C,
                             const struct glm_dropout *dropout)
{
    const struct dropout_args a = {rows_of(N, (size_t)4 * C), dinp, dout, dropout, C};
    run_rows(cx, dropout_backward_task, &a, a.rows);
}

struct noise_args {
    struct rows rows;
    float *x;
    const struct glm_dropout *draw;
    int C;
    float size;
};

static void noise_task(const void *arg, int task, char *scratch)
{
    const struct noise_args *a = arg;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        float *x = a->x + (size_t)n * a->C;
        for (int i = 0; i < a->C; i += 4 * VL) {
            vu words[1][4];
            vi word[4];
            philox(words, 1, a->draw, n, (uint32_t)i);
            in_order(word, words[0]);
            for (int w = 0, at = i; w < 4 && at < a->C; w++, at += VL) {
                const int part = a->C - at < VL ? a->C - at : VL;
                const vf above = __builtin_convertvector((vi)((vu)word[w] >> 8), vf);
                const vf noise = above * splat(0x1p-23f) - splat(1.0f);
                store_part(x + at, load_part(x + at, part) + splat(a->size) * noise, part);
            }
        }
    }
}

static void noise(void *cx, void *x, int N, int C, double size, const struct glm_dropout *draw)
{
    const struct noise_args a = {rows_of(N, (size_t)4 * C), x, draw, C, (float)size};
    run_rows(cx, noise_task, &a, a.rows);
}

/* x[i] = x[i] * mask of element `first` + i of row n, in place */
static void drop_part(float *x, const struct glm_dropout *d, int n, int first, int count)
{
    const float keep = (float)(1.0 / (1.0 - d->p));
    int32_t drop[4 * VL];
    for (int i = -(first % 4); i < count; i += 4 * VL) {
        vi v[1][4];
        dropped(v, 1, d, n, (uint32_t)(first + i));
        memcpy(drop, v, sizeof drop);
        for (int at = i < 0 ? 0 : i; at < count && at < i + 4 * VL; at++)
            x[at] = drop[at - i] ? 0 : x[at] * keep;
    }
}

struct prefix_args { /* rows: of out forward, of dinp backward */
    struct rows rows;
    float *to;
    const float *from;
    int P, J, KV, copies;
    const struct glm_dropout *dropout;
};

static void prefix_forward_task(const void *arg, int task, char *scratch)
{
    const struct prefix_args *a = arg;
    const int in_layer = a->copies * a->P;
    (void)scratch;
    for (int at = first_row(a->rows, task); at < end_row(a->rows, task); at++) {
        const int j = at / in_layer, n = at % in_layer;
        float *to = a->to + (size_t)at * a->KV;
        memcpy(to, a->from + ((size_t)(n % a->P) * a->J + j) * a->KV, (size_t)a->KV * 4);
        if (a->dropout)
            drop_part(to, a->dropout, n, j * a->KV, a->KV);
    }
}

static void prefix_forward(void *cx, void *out, const void *inp, int P, int J, int KV, int copies,
                           const struct glm_dropout *dropout)
{
    const struct prefix_args a = {
        rows_of(J * copies * P, (size_t)KV), out, inp, P, J, KV, copies, dropout};
    run_rows(cx, prefix_forward_task, &a, a.rows);
}

static void prefix_backward_task(const void *arg, int task, char *scratch)
{
    const struct prefix_args *a = arg;
    const int KV = a->KV;
    float *part = (float *)scratch;
    for (int at = first_row(a->rows, task); at < end_row(a->rows, task); at++) {
        const int p = at / a->J, j = at % a->J;
        float *to = a->to + (size_t)at * KV;
        for (int b = 0; b < a->copies; b++) {
            const int n = b * a->P + p;
            const float *from = a->from + ((size_t)j * a->copies * a->P + n) * KV;
            for (int begin = 0; begin < KV; begin += BLOCK) {
                const int count = KV - begin < BLOCK ? KV - begin : BLOCK;
                memcpy(part, from + begin, (size_t)count * 4);
                if (a->dropout)
                    drop_part(part, a->dropout, n, j * KV + begin, count);
                add_row(to + begin, part, count);
            }
        }
    }
}

static void prefix_backward(void *cx, void *dinp, const void *dout, int P, int J, int KV,
                            int copies, const struct glm_dropout *dropout)
{
    const struct prefix_args a = {
        rows_of(P * J, (size_t)KV * copies), dinp, dout, P, J, KV, copies, dropout};
    run_rows(cx, prefix_backward_task, &a, a.rows);
}
