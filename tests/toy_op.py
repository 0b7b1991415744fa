"""An op with its gradient, as somebody would add one: {file: [(the line it goes before, text)]}.

It is not part of the project: tests/test_toy_op.py adds it to a copy."""

PLACES = {
    "csrc/ops.h": [
        (
            "/* ---- rows that someone reads, and their loss */",
            """\
/* out = factor * inp, n elements; in place allowed */
OP(scale_forward, n,
   void *out, const void *inp, size_t n, double factor)
/* dinp += factor * dout */
OP(scale_backward, n,
   void *dinp, const void *dout, size_t n, double factor)

""",
        )
    ],
    "csrc/ref/ref_tmpl.h": [
        (
            "/* ---- cross entropy ---- */",
            """\
static void scale_forward(void *cx, void *out_, const void *inp_, size_t n, double factor)
{
    real *out = out_;
    const real *inp = inp_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        out[i] = (real)(factor * inp[i]);
}

static void scale_backward(void *cx, void *dinp_, const void *dout_, size_t n, double factor)
{
    real *dinp = dinp_;
    const real *dout = dout_;
    if (stop(cx))
        return;
    for (size_t i = 0; i < n; i++)
        dinp[i] = (real)(dinp[i] + factor * dout[i]);
}

""",
        )
    ],
    "csrc/cpu/tmpl_elements.h": [
        (
            "struct sum_args {",
            """\
struct scale_args {
    struct elements elements;
    float *to;
    const float *from;
    float factor;
};

static void scale_forward_task(const void *arg, int task, char *scratch)
{
    const struct scale_args *a = arg;
    (void)scratch;
    for (size_t i = first_element(a->elements, task); i < end_element(a->elements, task); i++)
        a->to[i] = a->factor * a->from[i];
}

static void scale_forward(void *cx, void *out, const void *inp, size_t n, double factor)
{
    const struct scale_args a = {elements_of(n), out, inp, (float)factor};
    run_elements(cx, scale_forward_task, &a, a.elements);
}

static void scale_backward_task(const void *arg, int task, char *scratch)
{
    const struct scale_args *a = arg;
    (void)scratch;
    for (size_t i = first_element(a->elements, task); i < end_element(a->elements, task); i++)
        a->to[i] += a->factor * a->from[i];
}

static void scale_backward(void *cx, void *dinp, const void *dout, size_t n, double factor)
{
    const struct scale_args a = {elements_of(n), dinp, dout, (float)factor};
    run_elements(cx, scale_backward_task, &a, a.elements);
}

""",
        )
    ],
    "cuda/elementwise.cu": [
        (
            "#ifdef GLM_HOST",
            """\
/* out = (add ? out : 0) + factor * inp */
GLM_KERNEL(256) k_scale(float *out, const float *inp, size_t n, float factor, int add)
{
    const size_t i = flat4();
    if (i >= n)
        return;
    f4 x = load4(inp, i, n), y;
    y.v[0] = y.v[1] = y.v[2] = y.v[3] = 0;
    if (add)
        y = load4(out, i, n);
#pragma unroll
    for (int j = 0; j < 4; j++)
        x.v[j] = y.v[j] + factor * x.v[j];
    store4(out, i, n, x);
}

""",
        ),
        (
            'extern "C" void glm_cuda_add(',
            """\
extern "C" void glm_cuda_scale_forward(void *cx, void *out, const void *inp, size_t n,
                                       double factor)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "scale_forward", k_scale, ceil_div(n, 1024), 256, 0, (float *)out,
                   (const float *)inp, n, (float)factor, 0);
}

extern "C" void glm_cuda_scale_backward(void *cx, void *dinp, const void *dout, size_t n,
                                        double factor)
{
    struct cuda *cuda = cuda_of(cx);
    if (glm_cuda_begin(cuda))
        GLM_LAUNCH(cuda, "scale_backward", k_scale, ceil_div(n, 1024), 256, 0, (float *)dinp,
                   (const float *)dout, n, (float)factor, 1);
}

""",
        ),
    ],
    "glmlora/tools/op_cases.py": [
        (
            '@_over({f"stored ',
            """\
@_over({f"scale {n}": (n,) for n in (1, 99, 4420)})
def _scale(n: int) -> Case:
    def case(o: Ops, rng: np.random.Generator) -> list[np.ndarray]:
        x, dy, y, dx = (_normal(o, rng, n) for _ in range(4))
        o.scale_forward(y, x, n, 0.3)
        o.scale_backward(dx, dy, n, 0.3)
        return [y, dx]

    return case


""",
        )
    ],
    "tests/test_ops.py": [
        (
            '@over((n, into) for n in LENGTHS for into in ("a", "b", "out"))',
            """\
def test_scale_gradient(rng: np.random.Generator) -> None:
    x, dout, out, start = (rng.normal(size=11) for _ in range(4))

    def f() -> np.ndarray:
        REF.scale_forward(out, x, 11, 0.3)
        return out

    dinp = start.copy()
    REF.scale_backward(dinp, dout, 11, 0.3)
    assert_gradient(dinp - start, numeric(f, x, dout))


@over((n, in_place) for n in LENGTHS for in_place in (False, True))
def scale_forward(m: Maker, n: int, in_place: bool):
    inp = m.normal(n)
    out = inp if in_place else m.out(n)
    m.ops.scale_forward(out, inp, n, 0.3)
    return {"out": (out, 2 * EPS * np.abs(out))}


@over((n,) for n in LENGTHS)
def scale_backward(m: Maker, n: int):
    dinp, dout = m.normal(n), m.normal(n)
    tolerance = 4 * EPS * (np.abs(dinp) + np.abs(dout))
    m.ops.scale_backward(dinp, dout, n, 0.3)
    return {"dinp": (dinp, tolerance)}


""",
        )
    ],
}
