/* A linear layer with its adapter: the only LoRA algebra in the project (Hu et al. 2021, eq. 3).
 *
 * y = x W^T + b + s (x A^T) B^T     x (N, in)  W (out, in)  A (R, in)  B (out, R)
 * With u = s * dy B (N, R):   dx = dy W + u A    dA += u^T x    dB += s * dy^T (x A^T)
 * With LoRA dropout the x beside A is the dropped one, and u A passes the same mask. W may be
 * frozen and 16 bit; xa = x A^T (N, R) is kept, x is the block's own input.
 *
 * DoRA (Liu et al. 2024, eq. 5, sec. 4.3): y = b + m / |W + s B A| z,  z = x W^T + s (x A^T) B^T.
 * Backward computes z again for dm, and goes on with the gradient of z in place of dy. */
#include "state.h"

static int adapted(const struct glm_model *m, const struct glm_linear *lin)
{
    return m->lora_on && lin->A->present;
}

int glm_adapted(const struct glm_model *m, const struct glm_linear *lin)
{
    int found = adapted(m, lin);
    for (int k = 1; m->step.several && k <= m->n_kept; k++)
        found |= adapted(m, glm_kept_linear(m, lin, k));
    return found;
}

struct glm_dropout glm_mask_of(const struct glm_model *m, const struct glm_linear *lin,
                               const struct glm_rows *rows)
{
    const struct glm_call *call = &m->step.call;
    return (struct glm_dropout){
        .seed = call->dropout_seed,
        .step = (uint32_t)m->progress.steps,
        .site = lin->site,
        .p = call->dropout ? lin->dropout : 0,
        .stream = rows->sequence,
        .position = rows->position,
    };
}

void glm_adapter_forward(struct glm_model *m, const struct glm_linear *lin, const void *inp,
                         void *xa, const struct glm_rows *rows)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    if (!adapted(m, lin))
        return;
    const struct glm_dropout mask = glm_mask_of(m, lin, rows);
    if (mask.p > 0) {
        op->dropout_forward(cx, m->step.lora_x, inp, rows->n, lin->weight->cols, &mask);
        inp = m->step.lora_x;
    }
    op->linear_forward(cx, xa, inp, &lin->A->mat, NULL, rows->n, 1.0, 0);
}

/* Rows of one adapter */
static void one_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                        const void *inp, void *xa, const struct glm_rows *rows)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const void *bias = lin->bias ? lin->bias->mat.data : NULL;
    if (!adapted(m, lin)) {
        op->linear_forward(cx, out, inp, &lin->weight->mat, bias, rows->n, 1.0, 0);
        return;
    }
    glm_adapter_forward(m, lin, inp, xa, rows);
    const int dora = glm_present(lin->magnitude);
    const void *added = glm_present(lin->B_bias) ? lin->derived->mat.data : bias;
    op->adapted_forward(cx, out, inp, &lin->weight->mat, dora ? NULL : added, xa, &lin->B->mat,
                        rows->n, lin->scale);
    if (dora)
        op->dora_forward(cx, out, out, lin->magnitude->mat.data, lin->derived->mat.data, bias,
                         rows->n, lin->weight->rows);
}

/* Rows of several: x W^T + b once, as adapted_forward begins, then what each adds. One that changes
 * more than that (DoRA, lora_bias) has all of its rows' products to itself. */
static void several_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                            const void *inp, void *xa, const struct glm_rows *rows)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const size_t I = (size_t)lin->weight->cols, O = (size_t)lin->weight->rows;
    int plain = 1;
    for (struct glm_run_of_rows r = {0}; glm_next_run(m, rows, &r);) {
        const struct glm_linear *of = glm_kept_linear(m, lin, r.adapter);
        plain &= !glm_present(of->magnitude) && !glm_present(of->B_bias);
    }
    if (plain)
        op->linear_forward(cx, out, inp, &lin->weight->mat, lin->bias ? lin->bias->mat.data : NULL,
                           rows->n, 1.0, 0);
    for (struct glm_run_of_rows r = {0}; glm_next_run(m, rows, &r);) {
        const struct glm_linear *of = glm_kept_linear(m, lin, r.adapter);
        const void *x = glm_at(m, inp, (size_t)r.begin * I);
        void *y = glm_at(m, out, (size_t)r.begin * O);
        if (!plain) {
            one_forward(m, of, y, x, xa, &(struct glm_rows){.n = r.count});
        } else if (adapted(m, of)) {
            op->linear_forward(cx, xa, x, &of->A->mat, NULL, r.count, 1.0, 0);
            op->linear_forward(cx, y, xa, &of->B->mat, NULL, r.count, of->scale, 1);
        }
    }
}

void glm_linear_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                        const void *inp, void *xa, const struct glm_rows *rows)
{
    (m->step.several ? several_forward : one_forward)(m, lin, out, inp, xa, rows);
}

static void derive(struct glm_model *m, const struct glm_linear *lin)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_weight *W = lin->weight;
    if (!W || !glm_present(lin->derived))
        return;
    void *derived = (void *)lin->derived->mat.data;
    if (glm_present(lin->magnitude)) {
        op->dora_norm(cx, derived, &W->mat, lin->B->mat.data, lin->A->mat.data, lin->A->rows,
                      lin->scale);
    } else { /* a vector is a matrix of one column, and this the product with a one */
        op->linear_forward(cx, derived, glm_at(m, derived, (size_t)W->rows), &lin->B_bias->mat,
                           lin->bias ? lin->bias->mat.data : NULL, 1, lin->scale, 0);
    }
}

void glm_adapters_derive(struct glm_model *m)
{
    for (int i = 0; i < glm_n_linears(m) && m->derived_version != m->version; i++)
        for (int k = 0; k <= m->n_kept; k++)
            derive(m, glm_kept_linear(m, glm_linear_at(m, i), k));
    m->derived_version = m->version;
}

/* Whether backward reads the layer's input: for a frozen weight without a trained adapter it does
 * not. */
int glm_reads_input(const struct glm_model *m, const struct glm_linear *lin)
{
    return glm_trains(lin->weight) ||
           (glm_adapted(m, lin) && (glm_trains(lin->A) || glm_trains(lin->magnitude)));
}

int glm_is_frozen(const struct glm_model *m, const struct glm_linear *lin)
{
    return !glm_adapted(m, lin) && !glm_trains(lin->weight) && !glm_trains(lin->bias);
}

int glm_reads_xa(const struct glm_linear *lin)
{
    return glm_trains(lin->B) || glm_trains(lin->magnitude);
}

/* The gradient of z (see the head of this file) in step.dora, and the magnitude's. */
static const void *dora_backward(struct glm_model *m, const struct glm_linear *lin,
                                 const void *dout, const void *inp, const void *xa, int N)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx, *z = m->step.dora;
    if (glm_trains(lin->magnitude))
        op->adapted_forward(cx, z, inp, &lin->weight->mat, NULL, xa, &lin->B->mat, N, lin->scale);
    op->dora_backward(cx, z, lin->magnitude->grad, dout, z, lin->magnitude->mat.data,
                      lin->derived->mat.data, N, lin->weight->rows);
    return z;
}

/* dinp is overwritten, or added to (accumulate), or NULL where nothing below trains; it may be inp
 * itself, which is read before. */
void glm_linear_backward(struct glm_model *m, const struct glm_linear *lin, void *dinp,
                         const void *dout, const void *inp, const void *xa,
                         const struct glm_rows *rows, int accumulate)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const struct glm_weight *W = lin->weight;
    const int N = rows->n, trains = glm_trains(lin->A) || glm_reads_xa(lin);
    const int adapter = glm_adapted(m, lin) && (dinp || trains || glm_trains(lin->B_bias));
    const struct glm_dropout mask = glm_mask_of(m, lin, rows);
    void *u = m->step.lora_u, *x = m->step.lora_x, *dbias = lin->bias ? lin->bias->grad : NULL;
    if (glm_adapted(m, lin) && glm_present(lin->magnitude)) {
        if (dbias)
            op->linear_backward_weight(cx, NULL, dbias, dout, inp, N, W->rows, W->cols, 1.0);
        dbias = NULL;
        dout = dora_backward(m, lin, dout, inp, xa, N);
    }
    if (glm_trains(W) || dbias)
        op->linear_backward_weight(cx, W->grad, dbias, dout, inp, N, W->rows, W->cols, 1.0);
    if (adapter) {
        if (glm_trains(lin->B) || glm_trains(lin->B_bias))
            op->linear_backward_weight(cx, lin->B->grad, lin->B_bias->grad, dout, xa, N, W->rows,
                                       lin->A->rows, lin->scale);
        op->linear_backward_input(cx, u, dout, &lin->B->mat, N, lin->scale, 0);
        if (glm_trains(lin->A)) {
            if (mask.p > 0)
                op->dropout_forward(cx, x, inp, N, W->cols, &mask);
            op->linear_backward_weight(cx, lin->A->grad, NULL, u, mask.p > 0 ? x : inp, N,
                                       lin->A->rows, W->cols, 1.0);
        }
    }
    if (!dinp)
        return;
    op->linear_backward_input(cx, dinp, dout, &W->mat, N, 1.0, accumulate);
    if (adapter && mask.p > 0) {
        op->linear_backward_input(cx, x, u, &lin->A->mat, N, 1.0, 0);
        op->dropout_backward(cx, dinp, x, N, W->cols, &mask);
    } else if (adapter) {
        op->linear_backward_input(cx, dinp, u, &lin->A->mat, N, 1.0, 1);
    }
}
