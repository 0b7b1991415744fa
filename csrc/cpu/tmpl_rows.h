/* Whatever goes row by row or element by element: norms, rotary, activations, dropout, loss,
 * optimiser. */

/* ---- norms */

static void rmsnorm_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C;
    const float *weight = a->b;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *x = (const float *)a->a + (size_t)n * C;
        float *out = (float *)a->out + (size_t)n * C;
        const float rstd = 1.0f / sqrtf(dot_row(x, x, C) / (float)C + (float)a->eps);
        ((float *)a->extra)[n] = rstd;
        for (int i = 0; i < C; i++)
            out[i] = x[i] * rstd * weight[i];
    }
}

/* out = dinp, a = dout, b = inp, c = weight, d = rstd */
static void rmsnorm_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C;
    const float *weight = a->c;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *dout = (const float *)a->a + (size_t)n * C,
                    *x = (const float *)a->b + (size_t)n * C;
        float *dinp = (float *)a->out + (size_t)n * C;
        const float rstd = ((const float *)a->d)[n];
        vf s = {0};
        int i = 0;
        for (; i + VL <= C; i += VL)
            s += load(dout + i) * load(weight + i) * load(x + i);
        if (i < C)
            s +=
                load_part(dout + i, C - i) * load_part(weight + i, C - i) * load_part(x + i, C - i);
        const float mean = lane_sum(s) / (float)C * rstd * rstd * rstd;
        for (i = 0; i < C; i++)
            dinp[i] += rstd * dout[i] * weight[i] - x[i] * mean;
    }
}

/* a task is a run of columns: the sum over rows is never split */
static void rmsnorm_dweight_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int C = a->C, begin = task * 64, end = begin + 64 < C ? begin + 64 : C;
    float *sum = (float *)scratch, *dweight = a->out;
    for (int i = begin; i < end; i++)
        sum[i - begin] = 0;
    for (int n = 0; n < a->N; n++) {
        const float *dout = (const float *)a->a + (size_t)n * C,
                    *x = (const float *)a->b + (size_t)n * C;
        const float rstd = ((const float *)a->d)[n];
        for (int i = begin; i < end; i++)
            sum[i - begin] += dout[i] * x[i] * rstd;
    }
    for (int i = begin; i < end; i++)
        dweight[i] += sum[i - begin];
}

static void rope_task(const void *arg, int task, char *scratch)
{
    const struct rope_args *r = arg;
    const int pairs = r->rotary_dim / 2;
    (void)scratch;
    for (int n = task * r->rows; n < r->N && n < (task + 1) * r->rows; n++) {
        const float *angle = r->table + (size_t)r->position[n] * r->rotary_dim;
        for (int h = 0; h < r->heads; h++) {
            float *x = r->x + (size_t)n * r->stride + (size_t)h * r->HD;
            for (int j = 0; j < pairs; j++) {
                const float c = angle[2 * j], s = r->sign * angle[2 * j + 1], x0 = x[2 * j],
                            x1 = x[2 * j + 1];
                x[2 * j] = x0 * c - x1 * s;
                x[2 * j + 1] = x1 * c + x0 * s;
            }
        }
    }
}

/* ---- activations, dropout */

static void swiglu_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int F = a->C;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *gate = (const float *)a->a + (size_t)n * 2 * F, *up = gate + F;
        float *out = (float *)a->out + (size_t)n * F;
        for (int i = 0; i < F; i += VL) {
            const int part = F - i < VL ? F - i : VL;
            const vf g = part == VL ? load(gate + i) : load_part(gate + i, part);
            const vf u = part == VL ? load(up + i) : load_part(up + i, part);
            const vf y = g * sigmoid(g) * u;
            if (part == VL)
                store(out + i, y);
            else
                store_part(out + i, y, part);
        }
    }
}

INLINE void swiglu_gradient(vf *dgate, vf *dup, vf d, vf gate, vf up)
{
    const vf y = sigmoid(gate), silu = gate * y;
    *dgate = d * up * (y + silu * (splat(1.0f) - y));
    *dup = d * silu;
}

/* out = dinp (may be the input), a = dout, b = inp */
static void swiglu_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int F = a->C;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *dout = (const float *)a->a + (size_t)n * F,
                    *gate = (const float *)a->b + (size_t)n * 2 * F;
        float *dgate = (float *)a->out + (size_t)n * 2 * F;
        int i = 0;
        vf dg, du;
        for (; i + VL <= F; i += VL) {
            swiglu_gradient(&dg, &du, load(dout + i), load(gate + i), load(gate + F + i));
            store(dgate + i, dg);
            store(dgate + F + i, du);
        }
        if (i < F) {
            const int part = F - i;
            swiglu_gradient(&dg, &du, load_part(dout + i, part), load_part(gate + i, part),
                            load_part(gate + F + i, part));
            store_part(dgate + i, dg, part);
            store_part(dgate + F + i, du, part);
        }
    }
}

/* High and low halves of the products of 32-bit lanes with m. */
INLINE void multiply_wide(vu *high, vu *low, vu x, uint32_t m)
{
    const vw even = MULTIPLY_EVEN((vw)x, m), odd = MULTIPLY_EVEN((vw)x >> 32, m);
    const vw lower = (vw){0} + 0xffffffffu;
    *high = (vu)(even >> 32 | (odd & ~lower));
    *low = (vu)((even & lower) | odd << 32);
}

/* Which of the 4 * VL elements from `first` (a multiple of 4) on the mask of row n drops: -1 or 0.
 * Philox4x32-10 (Salmon et al. 2011) on VL counters at once. */
INLINE void dropped(vi *drop, const struct glm_dropout *d, int n, uint32_t first)
{
    const uint64_t threshold = (uint64_t)(d->p * 4294967296.0);
    const uint32_t high_bit = 0x80000000u; /* compared as signed numbers */
    uint32_t k0 = (uint32_t)d->seed, k1 = (uint32_t)(d->seed >> 32) ^ d->step;
    uint32_t counter[VL];
    vu x[4];
    for (int i = 0; i < VL; i++)
        counter[i] = first / 4 + (uint32_t)i;
    memcpy(&x[0], counter, sizeof counter);
    x[1] = (vu){0} + (uint32_t)d->position[n];
    x[2] = (vu){0} + (uint32_t)d->stream[n];
    x[3] = (vu){0} + d->site;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        vu high0, low0, high1, low1;
        multiply_wide(&high0, &low0, x[0], 0xD2511F53u);
        multiply_wide(&high1, &low1, x[2], 0xCD9E8D57u);
        x[0] = high1 ^ x[1] ^ k0;
        x[2] = high0 ^ x[3] ^ k1;
        x[1] = low1;
        x[3] = low0;
    }
    for (int w = 0; w < 4; w++)
        x[w] = (vu)((vi)(x[w] ^ high_bit) < (vi)((vu){0} + ((uint32_t)threshold ^ high_bit)));
    const vf a = LOW((vf)x[0], (vf)x[2]), b = LOW((vf)x[1], (vf)x[3]);
    const vf c = HIGH((vf)x[0], (vf)x[2]), e = HIGH((vf)x[1], (vf)x[3]);
    drop[0] = (vi)LOW(a, b);
    drop[1] = (vi)HIGH(a, b);
    drop[2] = (vi)LOW(c, e);
    drop[3] = (vi)HIGH(c, e);
    if (threshold >> 32)
        for (int w = 0; w < 4; w++)
            drop[w] = ~(vi){0};
}

INLINE void dropout_rows(const struct row_args *a, int task, int backward)
{
    const vf keep = splat((float)(1.0 / (1.0 - a->dropout->p)));
    const int C = a->C;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *inp = (const float *)a->a + (size_t)n * C;
        float *out = (float *)a->out + (size_t)n * C;
        for (int i = 0; i < C; i += 4 * VL) {
            vi drop[4];
            dropped(drop, a->dropout, n, (uint32_t)i);
            for (int w = 0, at = i; w < 4 && at < C; w++, at += VL) {
                const int part = C - at;
                if (part >= VL) {
                    const vf y = choose(drop[w], (vf){0}, load(inp + at) * keep);
                    store(out + at, backward ? load(out + at) + y : y);
                } else {
                    const vf y = choose(drop[w], (vf){0}, load_part(inp + at, part) * keep);
                    store_part(out + at, backward ? load_part(out + at, part) + y : y, part);
                }
            }
        }
    }
}

/* x[i] = x[i] * mask of element `first` + i of row n, in place */
static void drop_part(float *x, const struct glm_dropout *d, int n, int first, int count)
{
    const float keep = (float)(1.0 / (1.0 - d->p));
    int32_t drop[4 * VL];
    for (int i = -(first % 4); i < count; i += 4 * VL) {
        vi v[4];
        dropped(v, d, n, (uint32_t)(first + i));
        memcpy(drop, v, sizeof drop);
        for (int at = i < 0 ? 0 : i; at < count && at < i + 4 * VL; at++)
            x[at] = drop[at - i] ? 0 : x[at] * keep;
    }
}

static void add_row(float *to, const float *from, int n)
{
    for (int i = 0; i < n; i++)
        to[i] += from[i];
}

static void dropout_forward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 0);
}

static void dropout_backward_task(const void *arg, int task, char *scratch)
{
    (void)scratch;
    dropout_rows(arg, task, 1);
}

/* out (J, copies * P, KV) and inp (P, J, KV), or dinp and dout; a task is `rows` rows of out
 * forward, of dinp backward. */
static void prefix_forward_task(const void *arg, int task, char *scratch)
{
    const struct prefix_args *a = arg;
    const int rows = a->copies * a->P;
    (void)scratch;
    for (int at = task * a->rows; at < a->J * rows && at < (task + 1) * a->rows; at++) {
        const int j = at / rows, n = at % rows;
        float *to = a->to + (size_t)at * a->KV;
        memcpy(to, a->from + ((size_t)(n % a->P) * a->J + j) * a->KV, (size_t)a->KV * 4);
        if (a->dropout)
            drop_part(to, a->dropout, n, j * a->KV, a->KV);
    }
}

static void prefix_backward_task(const void *arg, int task, char *scratch)
{
    const struct prefix_args *a = arg;
    const int KV = a->KV;
    float *part = (float *)scratch;
    for (int at = task * a->rows; at < a->P * a->J && at < (task + 1) * a->rows; at++) {
        const int p = at / a->J, j = at % a->J;
        float *to = a->to + (size_t)at * KV;
        for (int b = 0; b < a->copies; b++) {
            const int n = b * a->P + p;
            const float *from = a->from + ((size_t)j * a->copies * a->P + n) * KV;
            for (int begin = 0; begin < KV; begin += PIECE) {
                const int count = KV - begin < PIECE ? KV - begin : PIECE;
                memcpy(part, from + begin, (size_t)count * 4);
                if (a->dropout)
                    drop_part(part, a->dropout, n, j * KV + begin, count);
                add_row(to + begin, part, count);
            }
        }
    }
}

static void tanh_forward_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        ((float *)f->p[0])[i] = tanhf(((const float *)f->q[0])[i]);
}

static void tanh_backward_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *dout = f->q[0], *out = f->q[1];
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        ((float *)f->p[0])[i] = dout[i] * (1.0f - out[i] * out[i]);
}

/* ---- loss, optimiser, sums */

/* out = loss, extra = lse, a = logits, index = target; a task is `rows` rows */
static void cross_entropy_forward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int V = a->C;
    (void)scratch;
    for (int m = task * a->rows; m < a->N && m < (task + 1) * a->rows; m++) {
        const float *x = (const float *)a->a + (size_t)m * V;
        vf most[4] = {splat(x[0]), splat(x[0]), splat(x[0]), splat(x[0])};
        int first = 0;
        for (; first + 4 * VL <= V; first += 4 * VL) /* a NaN is passed over; the sum shows it */
            for (int v = 0; v < 4; v++)
                most[v] = VMAX(load(x + first + v * VL), most[v]);
        most[0] = VMAX(VMAX(most[0], most[1]), VMAX(most[2], most[3]));
        float top = most[0][0];
        for (int i = 1; i < VL; i++)
            top = most[0][i] > top ? most[0][i] : top;
        for (int i = first; i < V; i++)
            top = x[i] > top ? x[i] : top;
        double sum = 0;
        for (int i0 = 0; i0 < V; i0 += 64 * VL) { /* short float sums, then double */
            vf s = {0};
            const int end = V - i0 < 64 * VL ? V : i0 + 64 * VL;
            int i = i0;
            for (; i + VL <= end; i += VL)
                s += exp_vector(load(x + i) - splat(top));
            sum += lane_sum(s);
            for (; i < end; i++)
                sum += expf(x[i] - top);
        }
        const float lse = (float)((double)top + log(sum));
        ((float *)a->extra)[m] = lse;
        ((float *)a->out)[m] = (float)((double)top + log(sum) - x[a->index[m]]);
    }
}

/* out = logits, a = lse, index = target, eps = scale */
static void cross_entropy_backward_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int V = a->C;
    const float scale = (float)a->eps;
    (void)scratch;
    for (int m = task * a->rows; m < a->N && m < (task + 1) * a->rows; m++) {
        float *x = (float *)a->out + (size_t)m * V;
        const float lse = ((const float *)a->a)[m];
        for (int i = 0; i < V; i += VL) {
            const int part = V - i < VL ? V - i : VL;
            const vf p =
                splat(scale) *
                exp_vector((part == VL ? load(x + i) : load_part(x + i, part)) - splat(lse));
            if (part == VL)
                store(x + i, p);
            else
                store_part(x + i, p, part);
        }
        x[a->index[m]] -= scale;
    }
}

static void add_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *x = f->q[0], *y = f->q[1];
    float *out = f->p[0];
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++)
        out[i] = x[i] + y[i];
}

/* p[0][task] = sum of squares of piece `task` */
static void sum_squares_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    const float *x = f->q[0];
    const size_t begin = (size_t)task * PIECE, end = begin + PIECE < f->n ? begin + PIECE : f->n;
    double s[8] = {0};
    (void)scratch;
    for (size_t i = begin; i < end; i++)
        s[(i - begin) % 8] += (double)x[i] * x[i];
    ((double *)f->p[0])[task] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* p: value, m, v; q[0]: gradient; k: lr, b1, b2, eps, lr * wd, 1 / (1 - b1^t), 1 / (1 - b2^t),
 * gscale */
static void adamw_task(const void *arg, int task, char *scratch)
{
    const struct flat_args *f = arg;
    float *p = f->p[0], *m = f->p[1], *v = f->p[2];
    const float *grad = f->q[0];
    const float lr = (float)f->k[0], b1 = (float)f->k[1], b2 = (float)f->k[2], eps = (float)f->k[3];
    const float decay = (float)f->k[4], c1 = (float)f->k[5], c2 = (float)f->k[6],
                gscale = (float)f->k[7];
    const float a1 = (float)(1 - f->k[1]), a2 = (float)(1 - f->k[2]);
    (void)scratch;
    for (size_t i = task * f->piece; i < f->n && i < (task + 1) * f->piece; i++) {
        const float g = grad[i] * gscale;
        m[i] = b1 * m[i] + a1 * g;
        v[i] = b2 * v[i] + a2 * g * g;
        const float x = p[i] - decay * p[i];
        p[i] = x - lr * (m[i] * c1) / (sqrtf(v[i] * c2) + eps);
    }
}

/* out[task] = first non-finite row of its run of rows, or -1 */
static void nonfinite_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    (void)scratch;
    ((int *)a->out)[task] = -1;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const uint32_t *x = (const uint32_t *)a->a + (size_t)n * a->C;
        uint32_t bad = 0;
        for (int i = 0; i < a->C; i++)
            bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
        if (bad) {
            ((int *)a->out)[task] = n;
            return;
        }
    }
}

/* out[n] = the first of the largest elements of row n, or -1 where one is not finite */
static void argmax_task(const void *arg, int task, char *scratch)
{
    const struct row_args *a = arg;
    const int V = a->C;
    (void)scratch;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *x = (const float *)a->a + (size_t)n * V;
        int best = 0, v = 0, finite = 1;
        if (V >=
            VL) { /* lane by lane: the first of its largest, and 0 * x, which is NaN at times */
            vf most = load(x), bad = most * splat(0.0f);
            vi at = {0}, from = {0};
            for (v = VL; v + VL <= V; v += VL) {
                const vf y = load(x + v);
                const vi more = y > most;
                from += VL;
                most = choose(more, y, most);
                at = (more & from) | (~more & at);
                bad += y * splat(0.0f);
            }
            finite = lane_sum(bad) == 0;
            best = at[0];
            for (int i = 1; i < VL; i++) {
                const int other = at[i] + i;
                if (x[other] > x[best] || (x[other] == x[best] && other < best))
                    best = other;
            }
        }
        for (; v < V; v++) {
            finite &= x[v] * 0.0f == 0;
            best = x[v] > x[best] ? v : best;
        }
        ((int32_t *)a->out)[n] = finite ? best : -1;
    }
}
