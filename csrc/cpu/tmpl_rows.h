/* Whatever goes row by row: norms, rotary, SwiGLU, the loss, searches. */

/* ---- norms */

struct norm_args { /* bias, mean, dbias: LayerNorm's alone */
    struct rows rows;
    const float *inp, *weight, *bias, *dout;
    float *out, *mean, *rstd, *dinp, *dweight, *dbias;
    int C;
    float eps;
};

static void rmsnorm_forward_task(const void *arg, int task, char *scratch)
{
    const struct norm_args *a = arg;
    const int C = a->C;
    const float *weight = a->weight;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *x = a->inp + (size_t)n * C;
        float *out = a->out + (size_t)n * C;
        const float rstd = 1.0f / sqrtf(dot_row(x, x, C) / (float)C + a->eps);
        a->rstd[n] = rstd;
        for (int i = 0; i < C; i++)
            out[i] = x[i] * rstd * weight[i];
    }
}

static void rmsnorm_forward(void *cx, void *out, void *rstd, const void *inp, const void *weight,
                            int N, int C, double eps)
{
    const struct norm_args a = {.rows = rows_of(N, (size_t)C),
                                .inp = inp,
                                .weight = weight,
                                .out = out,
                                .rstd = rstd,
                                .C = C,
                                .eps = (float)eps};
    run_rows(cx, rmsnorm_forward_task, &a, a.rows);
}

static void add_rmsnorm_forward(void *cx, void *out, void *rstd, void *sum, const void *a,
                                const void *b, const void *weight, int N, int C, double eps)
{
    add(cx, sum, a, b, (size_t)N * C);
    rmsnorm_forward(cx, out, rstd, sum, weight, N, C, eps);
}

static void rmsnorm_backward_task(const void *arg, int task, char *scratch)
{
    const struct norm_args *a = arg;
    const int C = a->C;
    const float *weight = a->weight;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *dout = a->dout + (size_t)n * C, *x = a->inp + (size_t)n * C;
        float *dinp = a->dinp + (size_t)n * C;
        const float rstd = a->rstd[n];
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
    const struct norm_args *a = arg;
    const int C = a->C, begin = task * 64, end = begin + 64 < C ? begin + 64 : C;
    float *sum = (float *)scratch, *dweight = a->dweight;
    for (int i = begin; i < end; i++)
        sum[i - begin] = 0;
    for (int n = 0; n < a->rows.N; n++) {
        const float *dout = a->dout + (size_t)n * C, *x = a->inp + (size_t)n * C;
        const float rstd = a->rstd[n];
        for (int i = begin; i < end; i++)
            sum[i - begin] += dout[i] * x[i] * rstd;
    }
    for (int i = begin; i < end; i++)
        dweight[i] += sum[i - begin];
}

static void rmsnorm_backward(void *cx, void *dinp, void *dweight, const void *dout, const void *inp,
                             const void *weight, const void *rstd, int N, int C)
{
    const struct norm_args a = {.rows = rows_of(N, (size_t)C),
                                .inp = inp,
                                .weight = weight,
                                .dout = dout,
                                .rstd = (float *)rstd,
                                .dinp = dinp,
                                .dweight = dweight,
                                .C = C};
    run_rows(cx, rmsnorm_backward_task, &a, a.rows);
    if (dweight)
        run(cx, ceil_div((size_t)C, 64), (size_t)N * C, rmsnorm_dweight_task, &a);
}

/* The squares are those of what the mean leaves: the difference of two large sums would cancel. */
static void layernorm_forward_task(const void *arg, int task, char *scratch)
{
    const struct norm_args *a = arg;
    const int C = a->C;
    const float *weight = a->weight, *bias = a->bias;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *x = a->inp + (size_t)n * C;
        float *out = a->out + (size_t)n * C;
        const float mean = sum_row(x, C) / (float)C;
        for (int i = 0; i < C; i++)
            out[i] = x[i] - mean;
        const float rstd = 1.0f / sqrtf(dot_row(out, out, C) / (float)C + a->eps);
        a->mean[n] = mean;
        a->rstd[n] = rstd;
        for (int i = 0; i < C; i++)
            out[i] = out[i] * rstd * weight[i] + bias[i];
    }
}

static void layernorm_forward(void *cx, void *out, void *mean, void *rstd, const void *inp,
                              const void *weight, const void *bias, int N, int C, double eps)
{
    const struct norm_args a = {.rows = rows_of(N, (size_t)2 * C),
                                .inp = inp,
                                .weight = weight,
                                .bias = bias,
                                .out = out,
                                .mean = mean,
                                .rstd = rstd,
                                .C = C,
                                .eps = (float)eps};
    run_rows(cx, layernorm_forward_task, &a, a.rows);
}

static void layernorm_backward_task(const void *arg, int task, char *scratch)
{
    const struct norm_args *a = arg;
    const int C = a->C;
    const float *weight = a->weight;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *dout = a->dout + (size_t)n * C, *x = a->inp + (size_t)n * C;
        float *dinp = a->dinp + (size_t)n * C;
        const float mean = a->mean[n], rstd = a->rstd[n];
        vf along_1 = {0}, along_x = {0};
        int i = 0;
        for (; i + VL <= C; i += VL) {
            const vf g = load(dout + i) * load(weight + i);
            along_1 += g;
            along_x += g * (load(x + i) - splat(mean));
        }
        if (i < C) {
            const vf g = load_part(dout + i, C - i) * load_part(weight + i, C - i);
            along_1 += g;
            along_x += g * (load_part(x + i, C - i) - splat(mean));
        }
        const float g_mean = lane_sum(along_1) / (float)C;
        const float x_mean = lane_sum(along_x) / (float)C * rstd * rstd;
        for (i = 0; i < C; i++)
            dinp[i] += rstd * (dout[i] * weight[i] - g_mean - (x[i] - mean) * x_mean);
    }
}

/* a task is a run of columns: the sum over rows is never split */
static void layernorm_dweight_task(const void *arg, int task, char *scratch)
{
    const struct norm_args *a = arg;
    const int C = a->C, begin = task * 64, end = begin + 64 < C ? begin + 64 : C;
    float *sum = (float *)scratch, *along_xhat = sum + 64;
    for (int i = 0; i < end - begin; i++)
        sum[i] = along_xhat[i] = 0;
    for (int n = 0; n < a->rows.N; n++) {
        const float *dout = a->dout + (size_t)n * C + begin, *x = a->inp + (size_t)n * C + begin;
        const float mean = a->mean[n], rstd = a->rstd[n];
        for (int i = 0; i < end - begin; i++) {
            sum[i] += dout[i];
            along_xhat[i] += dout[i] * (x[i] - mean) * rstd;
        }
    }
    if (a->dweight)
        add_row(a->dweight + begin, along_xhat, end - begin);
    if (a->dbias)
        add_row(a->dbias + begin, sum, end - begin);
}

static void layernorm_backward(void *cx, void *dinp, void *dweight, void *dbias, const void *dout,
                               const void *inp, const void *weight, const void *mean,
                               const void *rstd, int N, int C)
{
    const struct norm_args a = {.rows = rows_of(N, (size_t)2 * C),
                                .inp = inp,
                                .weight = weight,
                                .dout = dout,
                                .mean = (float *)mean,
                                .rstd = (float *)rstd,
                                .dinp = dinp,
                                .dweight = dweight,
                                .dbias = dbias,
                                .C = C};
    run_rows(cx, layernorm_backward_task, &a, a.rows);
    if (dweight || dbias)
        run(cx, ceil_div((size_t)C, 64), (size_t)2 * N * C, layernorm_dweight_task, &a);
}

/* ---- rotary embedding */

struct rope_args {
    struct rows rows;
    float *x;
    const float *table;
    const int32_t *position;
    int heads, HD, stride, rotary_dim;
    float sign;
};

static void rope_task(const void *arg, int task, char *scratch)
{
    const struct rope_args *r = arg;
    const int pairs = r->rotary_dim / 2;
    (void)scratch;
    for (int n = first_row(r->rows, task); n < end_row(r->rows, task); n++) {
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

static void rope(void *cx, void *x, const void *table, const int32_t *position, int N, int heads,
                 int HD, int stride, int rotary_dim, float sign)
{
    const struct rope_args r = {.rows = rows_of(N, (size_t)heads * rotary_dim * 2),
                                .x = x,
                                .table = table,
                                .position = position,
                                .heads = heads,
                                .HD = HD,
                                .stride = stride,
                                .rotary_dim = rotary_dim,
                                .sign = sign};
    run_rows(cx, rope_task, &r, r.rows);
}

static void rope_forward(void *cx, void *x, const void *table, const int32_t *position, int N,
                         int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, x, table, position, N, heads, HD, stride, rotary_dim, 1);
}

static void rope_backward(void *cx, void *dx, const void *table, const int32_t *position, int N,
                          int heads, int HD, int stride, int rotary_dim)
{
    rope(cx, dx, table, position, N, heads, HD, stride, rotary_dim, -1);
}

struct rope_2d_args {
    struct rows rows;
    float *x;
    const float *table;
    const int32_t *position, *block;
    int heads, HD, stride;
    float sign;
};

static void rope_2d_task(const void *arg, int task, char *scratch)
{
    const struct rope_2d_args *r = arg;
    const int quarter = r->HD / 4;
    (void)scratch;
    for (int n = first_row(r->rows, task); n < end_row(r->rows, task); n++) {
        for (int h = 0; h < 2 * r->heads; h++) { /* halves of heads */
            const size_t at = h % 2 ? r->block[n] : r->position[n];
            const float *angle = r->table + at * 2 * quarter;
            float *x = r->x + (size_t)n * r->stride + (size_t)h * 2 * quarter;
            for (int j = 0; j < quarter; j++) {
                const float c = angle[2 * j], s = r->sign * angle[2 * j + 1], x0 = x[j],
                            x1 = x[quarter + j];
                x[j] = x0 * c - x1 * s;
                x[quarter + j] = x1 * c + x0 * s;
            }
        }
    }
}

static void rope_2d(void *cx, void *x, const void *table, const int32_t *position,
                    const int32_t *block, int N, int heads, int HD, int stride, float sign)
{
    const struct rope_2d_args r = {.rows = rows_of(N, (size_t)2 * heads * HD),
                                   .x = x,
                                   .table = table,
                                   .position = position,
                                   .block = block,
                                   .heads = heads,
                                   .HD = HD,
                                   .stride = stride,
                                   .sign = sign};
    run_rows(cx, rope_2d_task, &r, r.rows);
}

static void rope_2d_forward(void *cx, void *x, const void *table, const int32_t *position,
                            const int32_t *block, int N, int heads, int HD, int stride)
{
    rope_2d(cx, x, table, position, block, N, heads, HD, stride, 1);
}

static void rope_2d_backward(void *cx, void *dx, const void *table, const int32_t *position,
                             const int32_t *block, int N, int heads, int HD, int stride)
{
    rope_2d(cx, dx, table, position, block, N, heads, HD, stride, -1);
}

/* ---- SwiGLU */

struct swiglu_args {
    struct rows rows;
    const float *inp, *dout;
    float *out, *dinp;
    int F;
};

static void swiglu_forward_task(const void *arg, int task, char *scratch)
{
    const struct swiglu_args *a = arg;
    const int F = a->F;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *gate = a->inp + (size_t)n * 2 * F, *up = gate + F;
        float *out = a->out + (size_t)n * F;
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

static void swiglu_forward(void *cx, void *out, const void *inp, int N, int F)
{
    const struct swiglu_args a = {rows_of(N, (size_t)2 * F), .inp = inp, .out = out, .F = F};
    run_rows(cx, swiglu_forward_task, &a, a.rows);
}

INLINE void swiglu_gradient(vf *dgate, vf *dup, vf d, vf gate, vf up)
{
    const vf y = sigmoid(gate), silu = gate * y;
    *dgate = d * up * (y + silu * (splat(1.0f) - y));
    *dup = d * silu;
}

/* dinp may be inp */
static void swiglu_backward_task(const void *arg, int task, char *scratch)
{
    const struct swiglu_args *a = arg;
    const int F = a->F;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *dout = a->dout + (size_t)n * F, *gate = a->inp + (size_t)n * 2 * F;
        float *dgate = a->dinp + (size_t)n * 2 * F;
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

static void swiglu_backward(void *cx, void *dinp, const void *dout, const void *inp, int N, int F)
{
    const struct swiglu_args a = {rows_of(N, (size_t)2 * F), .inp = inp, .dout = dout, .dinp = dinp,
                                  .F = F};
    run_rows(cx, swiglu_backward_task, &a, a.rows);
}

/* ---- the loss */

struct cross_entropy_args {
    struct rows rows;
    float *logits, *loss, *lse;
    const int32_t *target;
    int V;
    float scale;
};

static void cross_entropy_forward_task(const void *arg, int task, char *scratch)
{
    const struct cross_entropy_args *a = arg;
    const int V = a->V;
    (void)scratch;
    for (int m = first_row(a->rows, task); m < end_row(a->rows, task); m++) {
        const float *x = a->logits + (size_t)m * V;
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
        a->lse[m] = lse;
        a->loss[m] = (float)((double)top + log(sum) - x[a->target[m]]);
    }
}

static void cross_entropy_forward(void *cx, void *loss, void *lse, const void *logits,
                                  const int32_t *target, int M, int V)
{
    const struct cross_entropy_args a = {.rows = rows_of(M, (size_t)4 * V),
                                         .logits = (float *)logits,
                                         .loss = loss,
                                         .lse = lse,
                                         .target = target,
                                         .V = V};
    run_rows(cx, cross_entropy_forward_task, &a, a.rows);
}

static void cross_entropy_backward_task(const void *arg, int task, char *scratch)
{
    const struct cross_entropy_args *a = arg;
    const int V = a->V;
    const float scale = a->scale;
    (void)scratch;
    for (int m = first_row(a->rows, task); m < end_row(a->rows, task); m++) {
        float *x = a->logits + (size_t)m * V;
        const float lse = a->lse[m];
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
        x[a->target[m]] -= scale;
    }
}

static void cross_entropy_backward(void *cx, void *logits, const void *lse, const int32_t *target,
                                   int M, int V, double scale)
{
    const struct cross_entropy_args a = {.rows = rows_of(M, (size_t)4 * V),
                                         .logits = logits,
                                         .lse = (float *)lse,
                                         .target = target,
                                         .V = V,
                                         .scale = (float)scale};
    run_rows(cx, cross_entropy_backward_task, &a, a.rows);
}

/* ---- searches */

struct search_args {
    struct rows rows;
    const float *x;
    int width;
    int *found; /* a row of a task, or a column of a row */
};

/* found[task] = first non-finite row of its run of rows, or -1 */
static void nonfinite_task(const void *arg, int task, char *scratch)
{
    const struct search_args *a = arg;
    (void)scratch;
    a->found[task] = -1;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const uint32_t *x = (const uint32_t *)a->x + (size_t)n * a->width;
        uint32_t bad = 0;
        for (int i = 0; i < a->width; i++)
            bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
        if (bad) {
            a->found[task] = n;
            return;
        }
    }
}

static void first_nonfinite(void *cx, int *row, const void *x, int N, int C)
{
    struct cpu *cpu = cx;
    const struct rows rows = {N, ceil_div((size_t)N, FINDERS), (size_t)C};
    const struct search_args a = {rows, x, C, cpu->found};
    const int tasks = N ? ceil_div((size_t)N, (size_t)rows.each) : 0;
    run(cpu, tasks, (size_t)N * C, nonfinite_task, &a);
    *row = -1;
    for (int i = 0; i < tasks && *row < 0; i++)
        *row = cpu->found[i];
}

/* found[n] = the first of the largest elements of row n, or -1 where one is not finite */
static void argmax_task(const void *arg, int task, char *scratch)
{
    const struct search_args *a = arg;
    const int V = a->width;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *x = a->x + (size_t)n * V;
        int best = 0, v = 0, finite = 1;
        if (V >= VL) {
            /* lane by lane: the first of its largest, and 0 * x, which is NaN at times */
            vf most = load(x), bad = most * splat(0.0f);
            vi at = {0}, from = {0};
            for (v = VL; v + VL <= V; v += VL) {
                const vf y = load(x + v);
                const vi more = y > most;
                from += VL;
                most = select_lanes(more, y, most);
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
        a->found[n] = finite ? best : -1;
    }
}

static void choose(void *cx, int32_t *id, void *x, int M, int V, const struct glm_choice *choices,
                   const int32_t *touched)
{
    struct cpu *cpu = cx;
    if (choices) {
        const struct choose_args a = {id, x, V, choices, touched};
        glm_pool_run(cpu->pool, M, ns_of((size_t)8 * M * V), glm_choose_task, &a);
        return;
    }
    const struct search_args a = {rows_of(M, (size_t)V), x, V, id};
    run_rows(cpu, argmax_task, &a, a.rows);
}
