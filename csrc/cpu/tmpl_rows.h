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
        for (int i = 0; i < F; i += VL) {
            const int part = F - i < VL ? F - i : VL;
            const vf g = load_part(gate + i, part), u = load_part(gate + F + i, part),
                     d = load_part(dout + i, part);
            const vf y = sigmoid(g), silu = g * y;
            store_part(dgate + i, d * u * (y + silu * (splat(1.0f) - y)), part);
            store_part(dgate + F + i, d * silu, part);
        }
    }
}

INLINE void dropout_rows(const struct row_args *a, int task, int backward)
{
    const struct glm_dropout *drop = a->dropout;
    const uint64_t threshold = (uint64_t)(drop->p * 4294967296.0);
    const float keep = (float)(1.0 / (1.0 - drop->p));
    const int C = a->C;
    for (int n = task * a->rows; n < a->N && n < (task + 1) * a->rows; n++) {
        const float *inp = (const float *)a->a + (size_t)n * C;
        float *out = (float *)a->out + (size_t)n * C;
        for (int i = 0; i < C; i += 4) {
            uint32_t word[4] = {(uint32_t)i / 4, (uint32_t)drop->position[n],
                                (uint32_t)drop->stream[n], drop->site};
            glm_philox(word, (uint32_t)drop->seed, (uint32_t)(drop->seed >> 32) ^ drop->step);
            for (int j = 0; j < 4 && i + j < C; j++) {
                const float y = word[j] < threshold ? 0.0f : inp[i + j] * keep;
                out[i + j] = backward ? out[i + j] + y : y;
            }
        }
    }
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
        float top = x[0];
        for (int i = 1; i < V; i++)
            top = x[i] > top || x[i] != x[i] ? x[i] : top;
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
