/* Whatever goes element by element: GELU, tanh, sums, the optimiser. */

struct gelu_args {
    struct elements elements;
    const float *inp, *dout;
    float *out, *dinp;
};

/* 2 u: (1 + tanh u) / 2 is its logistic function */
INLINE vf gelu_argument(vf x)
{
    return x * (splat(1.5957691216057f) + splat(0.0713548162726f) * x * x);
}

INLINE vf gelu_of(vf x) { return x * sigmoid(gelu_argument(x)); }

INLINE vf gelu_slope(vf x)
{
    const vf e = exp_vector(-gelu_argument(x));
    const vf y = splat(1.0f) / (splat(1.0f) + e); /* and e y = 1 - y, without cancelling */
    const vf slope = splat(1.5957691216057f) + splat(0.2140644488178f) * x * x;
    return y * (splat(1.0f) + x * slope * (e * y));
}

static void gelu_forward_task(const void *arg, int task, char *scratch)
{
    const struct gelu_args *a = arg;
    const size_t end = end_element(a->elements, task);
    size_t i = first_element(a->elements, task);
    (void)scratch;
    for (; i + VL <= end; i += VL)
        store(a->out + i, gelu_of(load(a->inp + i)));
    if (i < end)
        store_part(a->out + i, gelu_of(load_part(a->inp + i, (int)(end - i))), (int)(end - i));
}

static void gelu_forward(void *cx, void *out, const void *inp, size_t n)
{
    const struct gelu_args a = {.elements = elements_of(n), .inp = inp, .out = out};
    run_elements(cx, gelu_forward_task, &a, a.elements);
}

static void gelu_backward_task(const void *arg, int task, char *scratch)
{
    const struct gelu_args *a = arg;
    const size_t end = end_element(a->elements, task);
    size_t i = first_element(a->elements, task);
    (void)scratch;
    for (; i + VL <= end; i += VL)
        store(a->dinp + i, load(a->dout + i) * gelu_slope(load(a->inp + i)));
    if (i < end) {
        const int part = (int)(end - i);
        const vf slope = gelu_slope(load_part(a->inp + i, part));
        store_part(a->dinp + i, load_part(a->dout + i, part) * slope, part);
    }
}

static void gelu_backward(void *cx, void *dinp, const void *dout, const void *inp, size_t n)
{
    const struct gelu_args a = {elements_of(n), .dout = dout, .inp = inp, .dinp = dinp};
    run_elements(cx, gelu_backward_task, &a, a.elements);
}

struct tanh_args {
    struct elements elements;
    const float *inp, *dout;
    float *out, *dinp;
};

static void tanh_forward_task(const void *arg, int task, char *scratch)
{
    const struct tanh_args *a = arg;
    (void)scratch;
    for (size_t i = first_element(a->elements, task); i < end_element(a->elements, task); i++)
        a->out[i] = tanhf(a->inp[i]);
}

static void tanh_forward(void *cx, void *out, const void *inp, size_t n)
{
    const struct tanh_args a = {.elements = elements_of(n), .inp = inp, .out = out};
    run_elements(cx, tanh_forward_task, &a, a.elements);
}

static void tanh_backward_task(const void *arg, int task, char *scratch)
{
    const struct tanh_args *a = arg;
    const float *dout = a->dout, *out = a->out;
    (void)scratch;
    for (size_t i = first_element(a->elements, task); i < end_element(a->elements, task); i++)
        a->dinp[i] = dout[i] * (1.0f - out[i] * out[i]);
}

static void tanh_backward(void *cx, void *dinp, const void *dout, const void *out, size_t n)
{
    const struct tanh_args a = {elements_of(n), .dout = dout, .out = (float *)out, .dinp = dinp};
    run_elements(cx, tanh_backward_task, &a, a.elements);
}

struct add_args {
    struct elements elements;
    float *out;
    const float *a, *b;
};

static void add_task(const void *arg, int task, char *scratch)
{
    const struct add_args *s = arg;
    const float *a = s->a, *b = s->b;
    float *out = s->out;
    (void)scratch;
    for (size_t i = first_element(s->elements, task); i < end_element(s->elements, task); i++)
        out[i] = a[i] + b[i];
}

static void add(void *cx, void *out, const void *a, const void *b, size_t n)
{
    const struct add_args s = {elements_of(n), out, a, b};
    run_elements(cx, add_task, &s, s.elements);
}

struct scaled_add_args {
    struct elements elements;
    float *out;
    const float *a, *b;
    float scale;
};

static void scaled_add_task(const void *arg, int task, char *scratch)
{
    const struct scaled_add_args *s = arg;
    const float *a = s->a, *b = s->b, scale = s->scale;
    float *out = s->out;
    (void)scratch;
    for (size_t i = first_element(s->elements, task); i < end_element(s->elements, task); i++)
        out[i] = scale * a[i] + b[i];
}

static void scaled_add(void *cx, void *out, const void *a, const void *b, size_t n, double scale)
{
    const struct scaled_add_args s = {elements_of(n), out, a, b, (float)scale};
    run_elements(cx, scaled_add_task, &s, s.elements);
}

struct sum_args {
    double *partial; /* of block after block */
    const float *x;
    size_t n;
};

static void sum_squares_task(const void *arg, int task, char *scratch)
{
    const struct sum_args *a = arg;
    const float *x = a->x;
    const size_t begin = (size_t)task * BLOCK, end = begin + BLOCK < a->n ? begin + BLOCK : a->n;
    double s[8] = {0};
    (void)scratch;
    for (size_t i = begin; i < end; i++)
        s[(i - begin) % 8] += (double)x[i] * x[i];
    a->partial[task] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

static void sum_squares(void *cx, double *out, const void *x, size_t n)
{
    struct cpu *cpu = cx;
    const size_t most = (size_t)PARTIALS * BLOCK;
    *out = 0;
    for (size_t begin = 0; begin < n; begin += most) {
        const size_t count = n - begin < most ? n - begin : most;
        const int blocks = ceil_div(count, BLOCK);
        const struct sum_args a = {cpu->partial, (const float *)x + begin, count};
        run(cpu, blocks, count, sum_squares_task, &a);
        for (int i = 0; i < blocks; i++)
            *out += cpu->partial[i];
    }
}

struct adamw_args {
    struct elements elements;
    float *p, *m, *v;
    const float *grad;
    double lr, b1, b2, eps, decay, gscale; /* decay: lr wd */
    double unbias1, unbias2;               /* 1 / (1 - b1^t), 1 / (1 - b2^t) */
};

static void adamw_task(const void *arg, int task, char *scratch)
{
    const struct adamw_args *a = arg;
    float *p = a->p, *m = a->m, *v = a->v;
    const float *grad = a->grad;
    const float lr = (float)a->lr, b1 = (float)a->b1, b2 = (float)a->b2, eps = (float)a->eps;
    const float decay = (float)a->decay, gscale = (float)a->gscale;
    const float unbias1 = (float)a->unbias1, unbias2 = (float)a->unbias2;
    const float rest1 = (float)(1 - a->b1), rest2 = (float)(1 - a->b2);
    (void)scratch;
    for (size_t i = first_element(a->elements, task); i < end_element(a->elements, task); i++) {
        const float g = grad[i] * gscale;
        m[i] = b1 * m[i] + rest1 * g;
        v[i] = b2 * v[i] + rest2 * g * g;
        const float x = p[i] - decay * p[i];
        p[i] = x - lr * (m[i] * unbias1) / (sqrtf(v[i] * unbias2) + eps);
    }
}

static void adamw(void *cx, void *p, const void *grad, void *m, void *v, size_t n, double lr,
                  double b1, double b2, double eps, double wd, int t, double gscale)
{
    const struct adamw_args a = {.elements = elements_of(n),
                                 .p = p,
                                 .m = m,
                                 .v = v,
                                 .grad = grad,
                                 .lr = lr,
                                 .b1 = b1,
                                 .b2 = b2,
                                 .eps = eps,
                                 .decay = lr * wd,
                                 .gscale = gscale,
                                 .unbias1 = 1 / (1 - pow(b1, t)),
                                 .unbias2 = 1 / (1 - pow(b2, t))};
    run_elements(cx, adamw_task, &a, a.elements);
}
