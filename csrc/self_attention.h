/* The half of a layer before MLP, made of other ops: as every backend makes it that has no better way.
 * To be included once behind those ops. ON(op) is the function of an op, MADE(op) that of one here. */

static void MADE(self_attention_norm)(void *cx, void *ln, void *rstd, void *sum, const void *b,
                                      const struct glm_self_attention *of, int N)
{
    const int C = of->qkv->cols;
    if (b)
        ON(add_rmsnorm_forward)(cx, ln, rstd, sum, sum, b, of->norm, N, C, of->eps);
    else
        ON(rmsnorm_forward)(cx, ln, rstd, sum, of->norm, N, C, of->eps);
}

static void MADE(self_attention_forward)(void *cx, void *out, void *att, void *lse, void *qkv,
                                         void *xa, const void *ln,
                                         const struct glm_self_attention *of, int N)
{
    const struct glm_heads h = of->heads;
    const int drops = of->A && of->dropout.p > 0;
    if (drops)
        ON(dropout_forward)(cx, of->dropped, ln, N, of->qkv->cols, &of->dropout);
    if (of->A) {
        ON(linear_forward)(cx, xa, drops ? of->dropped : ln, of->A, NULL, N, 1, 0);
        ON(adapted_forward)(cx, qkv, ln, of->qkv, of->qkv_bias, xa, of->B, N, of->scale);
    } else {
        ON(linear_forward)(cx, qkv, ln, of->qkv, of->qkv_bias, N, 1, 0);
    }
    if (of->slot)
        ON(rope_append)(cx, of->cache, qkv, of->table, of->position, of->slot, N, h,
                        of->rotary_dim);
    else
        ON(rope_forward)(cx, qkv, of->table, of->position, N, h.NH + h.KVH, h.HD,
                         (h.NH + 2 * h.KVH) * h.HD, of->rotary_dim);
    ON(attention_forward)(cx, att, lse, qkv, of->cache, of->segments, of->n_segments, h);
    ON(linear_forward)(cx, out, att, of->dense, of->dense_bias, N, 1, 0);
}

static void MADE(self_attention_backward)(void *cx, void *dinp, void *dA, void *dB, void *work,
                                          void *dqkv, void *u, void *rstd, const void *dout,
                                          const void *att, const void *lse, const void *qkv,
                                          const void *xa, const void *x,
                                          const struct glm_self_attention *of, int N)
{
    const struct glm_heads h = of->heads;
    const int C = of->qkv->cols, O = of->qkv->rows, drops = of->A && of->dropout.p > 0;
    void *dropped = of->dropped;
    ON(linear_backward_input)(cx, work, dout, of->dense, N, 1, 0);
    ON(attention_backward)(cx, dqkv, of->dcache, work, att, lse, qkv, of->cache, of->segments,
                           of->n_segments, h);
    ON(rope_backward)(cx, dqkv, of->table, of->position, N, h.NH + h.KVH, h.HD, O, of->rotary_dim);
    if (dA)
        ON(rmsnorm_forward)(cx, work, rstd, x, of->norm, N, C, of->eps);
    if (dB)
        ON(linear_backward_weight)(cx, dB, NULL, dqkv, xa, N, O, of->A->rows, of->scale);
    if (of->A && (dinp || dA))
        ON(linear_backward_input)(cx, u, dqkv, of->B, N, of->scale, 0);
    if (dA && drops)
        ON(dropout_forward)(cx, dropped, work, N, C, &of->dropout);
    if (dA)
        ON(linear_backward_weight)(cx, dA, NULL, u, drops ? dropped : work, N, of->A->rows, C, 1);
    if (!dinp)
        return;
    ON(linear_backward_input)(cx, dinp, dqkv, of->qkv, N, 1, 0);
    if (drops) {
        ON(linear_backward_input)(cx, dropped, u, of->A, N, 1, 0);
        ON(dropout_backward)(cx, dinp, dropped, N, C, &of->dropout);
    } else if (of->A) {
        ON(linear_backward_input)(cx, dinp, u, of->A, N, 1, 1);
    }
}
