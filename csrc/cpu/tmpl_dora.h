/* DoRA: norms of adapted rows of weights, and outputs by their magnitudes. */

struct dora_norm_args {
    struct rows rows;
    float *rnorm;
    const struct glm_mat *w;
    const float *B, *A;
    int R;
    float scale;
};

/* n elements of row o of w from `begin` on, with their scales */
INLINE void load_scaled(float *to, const struct glm_mat *w, int o, int begin, int n)
{
    const char *row = (const char *)w->data + glm_bytes(w->dtype, (size_t)o * w->cols);
    if (!glm_is_quantized(w->dtype)) {
        load_row(to, row + glm_bytes(w->dtype, (size_t)begin), w->dtype, n);
        return;
    }
    const uint16_t *scale = w->scale + (size_t)o * glm_scale_cols(w);
    for (int i = 0; i < n; i++)
        to[i] = load_one(row, w->dtype, (size_t)begin + i);
    for (int i = 0; i < n;) { /* columns of one scale */
        const int group = w->group ? w->group : w->cols, at = (begin + i) / group;
        const int end = (at + 1) * group - begin < n ? (at + 1) * group - begin : n;
        const float s = half_to_float(scale[at]);
        for (; i < end; i++)
            to[i] *= s;
    }
}

static void dora_norm_task(const void *arg, int task, char *scratch)
{
    const struct dora_norm_args *a = arg;
    enum { WIDTH = 4096 };
    float *row = (float *)scratch, *sum = row + WIDTH;
    const int I = a->w->cols;
    for (int o = first_row(a->rows, task); o < end_row(a->rows, task); o++) {
        float squares = 0;
        for (int begin = 0; begin < I; begin += WIDTH) {
            const int n = I - begin < WIDTH ? I - begin : WIDTH;
            load_scaled(row, a->w, o, begin, n);
            for (int i = 0; i < n; i++)
                sum[i] = 0;
            for (int r = 0; r < a->R; r++) {
                const float b = a->B[(size_t)o * a->R + r];
                const float *A = a->A + (size_t)r * I + begin;
                for (int i = 0; i < n; i++)
                    sum[i] += b * A[i];
            }
            for (int i = 0; i < n; i++)
                row[i] += a->scale * sum[i];
            squares += dot_row(row, row, n);
        }
        a->rnorm[o] = 1.0f / sqrtf(squares);
    }
}

static void dora_norm(void *cx, void *rnorm, const struct glm_mat *weight, const void *B,
                      const void *A, int R, double scale)
{
    const size_t width = (size_t)weight->cols * (R + 1);
    const struct dora_norm_args a = {
        rows_of(weight->rows, width), rnorm, weight, B, A, R, (float)scale};
    run_rows(cx, dora_norm_task, &a, a.rows);
}

struct dora_args {
    struct rows rows;
    float *to, *dmagnitude;
    const float *from, *inp, *magnitude, *rnorm, *bias;
    int N, O;
};

/* to = magnitude * rnorm * from (+ bias) */
static void dora_task(const void *arg, int task, char *scratch)
{
    const struct dora_args *a = arg;
    const float *magnitude = a->magnitude, *rnorm = a->rnorm, *bias = a->bias;
    (void)scratch;
    for (int n = first_row(a->rows, task); n < end_row(a->rows, task); n++) {
        const float *from = a->from + (size_t)n * a->O;
        float *to = a->to + (size_t)n * a->O;
        for (int o = 0; o < a->O; o++)
            to[o] = magnitude[o] * rnorm[o] * from[o];
        for (int o = 0; bias && o < a->O; o++)
            to[o] += bias[o];
    }
}

/* a task is a run of columns */
static void dora_dmagnitude_task(const void *arg, int task, char *scratch)
{
    const struct dora_args *a = arg;
    const int begin = task * 64, end = begin + 64 < a->O ? begin + 64 : a->O;
    float *sum = (float *)scratch;
    for (int o = begin; o < end; o++)
        sum[o - begin] = 0;
    for (int n = 0; n < a->N; n++)
        for (int o = begin; o < end; o++)
            sum[o - begin] += a->from[(size_t)n * a->O + o] * a->inp[(size_t)n * a->O + o];
    for (int o = begin; o < end; o++)
        a->dmagnitude[o] += a->rnorm[o] * sum[o - begin];
}

static void dora_forward(void *cx, void *out, const void *inp, const void *magnitude,
                         const void *rnorm, const void *bias, int N, int O)
{
    const struct dora_args a = {.rows = rows_of(N, (size_t)O),
                                .to = out,
                                .from = inp,
                                .magnitude = magnitude,
                                .rnorm = rnorm,
                                .bias = bias,
                                .O = O};
    run_rows(cx, dora_task, &a, a.rows);
}

static void dora_backward(void *cx, void *dinp, void *dmagnitude, const void *dout, const void *inp,
                          const void *magnitude, const void *rnorm, int N, int O)
{
    const struct dora_args a = {.rows = rows_of(N, (size_t)O),
                                .to = dinp,
                                .dmagnitude = dmagnitude,
                                .from = dout,
                                .inp = inp,
                                .magnitude = magnitude,
                                .rnorm = rnorm,
                                .N = N,
                                .O = O};
    if (dmagnitude) /* first: dinp may be inp */
        run(cx, ceil_div((size_t)O, 64), (size_t)N * O, dora_dmagnitude_task, &a);
    run_rows(cx, dora_task, &a, a.rows);
}
