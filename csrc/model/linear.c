/* A linear layer with its adapter: the only LoRA algebra in the project (Hu et al. 2021, eq. 3).
 *
 * y = x W^T + b + s (x A^T) B^T     x (N, in)  W (out, in)  A (R, in)  B (out, R)
 * With u = s * dy B (N, R):   dx = dy W + u A    dA += u^T x    dB += s * dy^T (x A^T)
 * With LoRA dropout the x beside A is the dropped one, and u A passes the same mask. W may be
 * frozen and 16 bit; xa = x A^T (N, R) is kept, x is the block's own input. */
#include "state.h"

int glm_adapted(const struct glm_model *m, const struct glm_linear *lin)
{
    return m->lora_on && lin->A->present;
}

static struct glm_dropout mask_of(const struct glm_model *m, const struct glm_linear *lin,
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
    if (!glm_adapted(m, lin))
        return;
    const struct glm_dropout mask = mask_of(m, lin, rows);
    if (mask.p > 0) {
        op->dropout_forward(cx, m->step.lora_x, inp, rows->n, lin->weight->cols, &mask);
        inp = m->step.lora_x;
    }
    op->linear_forward(cx, xa, inp, &lin->A->mat, NULL, rows->n, 1.0, 0);
}

void glm_linear_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                        const void *inp, void *xa, const struct glm_rows *rows)
{
    const struct glm_ops *op = m->be->ops;
    void *cx = m->be->cx;
    const void *bias = lin->bias ? lin->bias->mat.data : NULL;
    if (!glm_adapted(m, lin)) {
        op->linear_forward(cx, out, inp, &lin->weight->mat, bias, rows->n, 1.0, 0);
        return;
    }
    glm_adapter_forward(m, lin, inp, xa, rows);
    op->adapted_forward(cx, out, inp, &lin->weight->mat, bias, xa, &lin->B->mat, rows->n,
                        lin->scale);
}

/* Whether backward reads the layer's input: for a frozen weight without a trained adapter it does
 * not. */
int glm_reads_input(const struct glm_model *m, const struct glm_linear *lin)
{
    return glm_trains(lin->weight) || (glm_adapted(m, lin) && glm_trains(lin->A));
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
    const int N = rows->n, trains = glm_trains(lin->A) || glm_trains(lin->B);
    const int adapter = glm_adapted(m, lin) && (dinp || trains);
    const struct glm_dropout mask = mask_of(m, lin, rows);
    void *u = m->step.lora_u, *x = m->step.lora_x;
    if (glm_trains(W) || glm_trains(lin->bias))
        op->linear_backward_weight(cx, W->grad, lin->bias ? lin->bias->grad : NULL, dout, inp, N,
                                   W->rows, W->cols, 1.0);
    if (adapter) {
        if (glm_trains(lin->B))
            op->linear_backward_weight(cx, lin->B->grad, NULL, dout, xa, N, W->rows, lin->A->rows,
                                       lin->scale);
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
