/* The half of a layer before MLP. In 16 bits, with more rows than kernels of few rows take: the norm
 * writes its product's operand, the product writes 16 bits, to which the rotation adds bias and adapter
 * in float, attention reads and writes them, and its output is the operand of the next product. In
 * bfloat16 gradients go the same way back; float16 has no room for what was not scaled to it. */
#include "attention.cuh"
#include "products.h"

#ifdef GLM_HOST
#define ON(op) glm_cuda_##op
#define MADE(op) in_float_##op
#include "self_attention.h"

static enum glm_dtype type_of(const struct cuda *cuda, const struct glm_self_attention *of, int N)
{
    return glm_self_attention_type(cuda->compute, of, N);
}

/* NULL where nothing is dropped. */
static const struct glm_dropout *drop_of(const struct glm_self_attention *of)
{
    return of->dropout.p > 0 ? &of->dropout : NULL;
}

/* Attention of all segments by tiles, over what is in 16 bits */
static attention narrow_attention(const void *att, const void *lse, const void *qkv,
                                  const struct glm_self_attention *of)
{
    attention a = attention_of(NULL, of->cache, of->segments, of->n_segments, of->heads);
    a.qkv_16 = (const unsigned short *)qkv;
    a.out_16 = (unsigned short *)att;
    a.lse = (float *)lse;
    a.fewest = 0;
    return a;
}

extern "C" void glm_cuda_self_attention_norm(void *cx, void *ln, void *rstd, void *sum,
                                             const void *b, const struct glm_self_attention *of,
                                             int N)
{
    struct cuda *cuda = cuda_of(cx);
    const enum glm_dtype type = type_of(cuda, of, N);
    if (type == GLM_F32)
        in_float_self_attention_norm(cx, ln, rstd, sum, b, of, N);
    else if (glm_cuda_begin(cuda))
        glm_cuda_add_rmsnorm_narrow(cuda, "self_attention_norm", ln, type, rstd, sum, b, of->norm,
                                    N, of->qkv->cols, of->eps);
}

extern "C" void glm_cuda_self_attention_forward(void *cx, void *out, void *att, void *lse,
                                                void *qkv, void *xa, const void *ln,
                                                const struct glm_self_attention *of, int N)
{
    struct cuda *cuda = cuda_of(cx);
    const enum glm_dtype type = type_of(cuda, of, N);
    if (type == GLM_F32) {
        in_float_self_attention_forward(cx, out, att, lse, qkv, xa, ln, of, N);
        return;
    }
    if (!glm_cuda_begin(cuda))
        return;
    if (of->A)
        glm_cuda_thin(cuda, "self_attention_forward", xa, ln, type, of->A, NULL, N, 1, 0, 0,
                      drop_of(of));
    if (!glm_cuda_product(cuda, qkv, type, ln, of->qkv, NULL, type, N))
        return;
    glm_cuda_turn(cuda, qkv, type, xa, of, N);
    glm_cuda_attention_forward_16(cuda, narrow_attention(att, lse, qkv, of), of->heads);
    glm_cuda_product(cuda, out, GLM_F32, att, of->dense, of->dense_bias, type, N);
}

extern "C" void glm_cuda_self_attention_backward(void *cx, void *dinp, void *dA, void *dB,
                                                 void *work, void *dqkv, void *u, void *rstd,
                                                 const void *dout, const void *att, const void *lse,
                                                 const void *qkv, const void *xa, const void *x,
                                                 const struct glm_self_attention *of, int N)
{
    struct cuda *cuda = cuda_of(cx);
    const int C = of->qkv->cols, O = of->qkv->rows;
    const enum glm_dtype type = type_of(cuda, of, N), back = type == GLM_BF16 ? type : GLM_F32;
    if (type == GLM_F32) {
        in_float_self_attention_backward(cx, dinp, dA, dB, work, dqkv, u, rstd, dout, att, lse, qkv,
                                         xa, x, of, N);
        return;
    }
    if (!glm_cuda_begin(cuda))
        return;
    attention a = narrow_attention(att, lse, qkv, of);
    const int whole = glm_backward_rows(cuda->piece, of->dense, type, N) >= C;
    glm_cuda_input_gradient(cuda, work, whole ? back : GLM_F32, dout, of->dense, N, 1, 0);
    if (whole && back != GLM_F32)
        a.dout_16 = (const unsigned short *)work;
    else
        a.dout = (const float *)work;
    if (back != GLM_F32)
        a.dqkv_16 = (unsigned short *)dqkv;
    else
        a.dqkv = (float *)dqkv;
    a.dcache_k = (float *)of->dcache.k;
    a.dcache_v = (float *)of->dcache.v;
    glm_cuda_attention_backward_16(cuda, a, of->heads);
    if (back != GLM_F32)
        glm_cuda_turn_back(cuda, dqkv, back, of, N);
    else
        glm_cuda_rope_backward(cx, dqkv, of->table, of->position, N, of->heads.NH + of->heads.KVH,
                               of->heads.HD, O, of->rotary_dim);
    if (of->A && (dinp || dA || dB))
        glm_cuda_adapter_b(cuda, dB, u, dqkv, back, xa, of, N);
    if (of->A && (dinp || dA) && !glm_cuda_adapter_a(cuda, dA, dinp, u, x, rstd, type, of, N))
        return;
    if (!dinp) /* the product adds to what came by way of A */
        return;
    if (back != GLM_F32)
        glm_cuda_product_back(cuda, dinp, dqkv, of->qkv, type, N, of->A != NULL);
    else
        glm_cuda_input_gradient(cuda, dinp, GLM_F32, dqkv, of->qkv, N, 1, of->A != NULL);
}
#endif
