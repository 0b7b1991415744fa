/* The norms, of either kind, and the residual that they stand in: before a branch as almost
 * everywhere, or at its beginning, so that the branch is added to what they yield (ChatGLM-6B). */
#include "state.h"

int glm_norm_trains(const struct glm_norm *norm)
{
    return glm_trains(norm->weight) || glm_trains(norm->bias);
}

void glm_norm_forward(struct glm_model *m, const struct glm_norm *norm, void *out, void *mean,
                      void *rstd, const void *inp, int N)
{
    const struct glm_ops *op = m->be->ops;
    const int C = m->arch.hidden;
    if (norm->bias)
        op->layernorm_forward(m->be->cx, out, mean, rstd, inp, norm->weight->mat.data,
                              norm->bias->mat.data, N, C, m->arch.eps);
    else
        op->rmsnorm_forward(m->be->cx, out, rstd, inp, norm->weight->mat.data, N, C, m->arch.eps);
}

void glm_norm_backward(struct glm_model *m, const struct glm_norm *norm, void *dinp,
                       const void *dout, const void *inp, const void *mean, const void *rstd, int N)
{
    const struct glm_ops *op = m->be->ops;
    const int C = m->arch.hidden;
    if (norm->bias)
        op->layernorm_backward(m->be->cx, dinp, norm->weight->grad, norm->bias->grad, dout, inp,
                               norm->weight->mat.data, mean, rstd, N, C);
    else
        op->rmsnorm_backward(m->be->cx, dinp, norm->weight->grad, dout, inp, norm->weight->mat.data,
                             rstd, N, C);
}

void glm_residual_forward(struct glm_model *m, const struct glm_norm *norm, void *out, void *mean,
                          void *rstd, void *sum, const void *residual, int N)
{
    const struct glm_ops *op = m->be->ops;
    const double scale = m->arch.residual_scale;
    const size_t n = (size_t)N * m->arch.hidden;
    if (!norm->bias && !scale) {
        op->add_rmsnorm_forward(m->be->cx, out, rstd, sum, sum, residual, norm->weight->mat.data, N,
                                m->arch.hidden, m->arch.eps);
        return;
    }
    op->scaled_add(m->be->cx, sum, residual, sum, n, scale ? scale : 1);
    glm_norm_forward(m, norm, out, mean, rstd, sum, N);
}

void glm_residual_backward(struct glm_model *m, const struct glm_norm *norm, void *dout,
                           void *dnorm, const void *inp, const void *mean, const void *rstd, int N)
{
    const size_t n = (size_t)N * m->arch.hidden;
    if (m->arch.residual_scale) {
        m->be->ops->scaled_add(m->be->cx, dnorm, dout, dnorm, n, m->arch.residual_scale);
        m->be->zero(m->be, dout, n * m->be->real_size);
    }
    glm_norm_backward(m, norm, dout, dnorm, inp, mean, rstd, N);
}
