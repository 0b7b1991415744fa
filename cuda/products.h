/* How a product is cut, for the library that does it and the plan that counts it: which operands
 * are converted, and how much of a matrix at a time;
 * and what attention converts. */
#ifndef GLM_CUDA_PRODUCTS_H
#define GLM_CUDA_PRODUCTS_H

#include "backend.h"
#include "decode.h"

enum {
    GLM_FEW = 8,            /* rows that one kernel of ours takes, reading the weights once .. */
    GLM_FEW_TURNED = 4,     /* .. with a rotation after it, where weights are floats .. */
    GLM_FEW_QUANTIZED = 64, /* .. and with quantized weights and operands in 16 bits */
    GLM_SWIGLU_ROW = 16384, /* elements of a row that a block holds */
    GLM_THIN = 256,         /* float matrices with a side up to this are multiplied in float */
    GLM_RANK = 64,          /* and up to this by kernels of ours (adapter.cu) */
    GLM_THIN_ROWS = 256,    /* rows of one part of its gradient */
    /* The adapter's gradients in 16 bits (adapter_backward.cu): columns of a tile, its rows, and how
     * many strips of columns and chunks of rows there may be */
    GLM_ADAPTER_STRIP = 128,
    GLM_ADAPTER_ROWS = 128,
    GLM_ADAPTER_STRIPS = 1024,
    GLM_ADAPTER_CHUNKS = 8192,
};
/* Elements of an operand that are converted at a time. */
#define GLM_PIECE ((size_t)1 << 24)
/* Bytes of struct glm_small (device.h). */
#define GLM_CUDA_SMALL ((size_t)53264)

/* The type of both operands of a product with a matrix of rows by cols elements of a dtype. */
static inline enum glm_dtype glm_product_type(enum glm_dtype compute, enum glm_dtype dtype,
                                              int rows, int cols)
{
    const int thin = rows < cols ? rows : cols;
    return dtype == GLM_F32 && thin <= GLM_THIN ? GLM_F32 : compute;
}

/* Integers are multiplied in 16 bits, without being widened in memory. */
static inline int glm_few_quantized(enum glm_dtype compute, const struct glm_mat *W)
{
    return compute != GLM_F32 && (W->dtype == GLM_I8 || W->dtype == GLM_I4);
}

/* The most rows of a product with W that one kernel of ours makes; those past GLM_FEW are converted
 * first. */
static inline int glm_few_rows(enum glm_dtype compute, const struct glm_mat *W)
{
    return glm_few_quantized(compute, W) ? GLM_FEW_QUANTIZED : W->dtype == GLM_F64 ? 0 : GLM_FEW;
}

/* Whether a kernel of few rows turns heads, too, and puts them into the cache: a warp has both of a
 * pair. Of quantized weights it has no registers left. */
static inline int glm_few_turns(enum glm_dtype compute, const struct glm_mat *W, int N,
                                struct glm_heads heads)
{
    return N <= GLM_FEW_TURNED && N <= glm_few_rows(compute, W) && heads.HD % 2 == 0 &&
           !glm_is_quantized(W->dtype);
}

/* Whether a product of so many rows norms them itself. */
static inline int glm_few_norms(enum glm_dtype compute, const struct glm_mat *W, int N)
{
    return N <= GLM_FEW_TURNED && N <= glm_few_rows(compute, W) && !glm_is_quantized(W->dtype);
}

/* Whether it is a product of an adapter. */
static inline int glm_is_adapter(enum glm_dtype dtype, int rows, int cols)
{
    return dtype == GLM_F32 && (rows <= GLM_RANK || cols <= GLM_RANK);
}

static inline int glm_thin_parts(int N) { return (N + GLM_THIN_ROWS - 1) / GLM_THIN_ROWS; }

/* Scratch: of the gradient of an adapter's matrix, a tile a part, eight ranks at a time; of the one of
 * what it multiplied, a strip a part */
static inline size_t glm_adapter_parts(int wide, int R, int N)
{
    const size_t strips = ((size_t)wide + GLM_ADAPTER_STRIP - 1) / GLM_ADAPTER_STRIP,
                 chunks = ((size_t)N + GLM_ADAPTER_ROWS - 1) / GLM_ADAPTER_ROWS;
    return strips * chunks * (((size_t)R + 7) / 8) * 8 * GLM_ADAPTER_STRIP * sizeof(float);
}
static inline size_t glm_adapter_parts_u(int wide, int R, int N)
{
    return ((size_t)wide + GLM_ADAPTER_STRIP - 1) / GLM_ADAPTER_STRIP * (size_t)N * (size_t)R *
           sizeof(float);
}

/* Rows of W (rows, cols) that make one product of `type`: all where nothing has to be converted.
 * width: elements that are converted for each of them, beside or in place of the row itself. */
static inline int glm_piece_rows(size_t piece, int rows, size_t width)
{
    const size_t fit = width ? piece / width / 64 * 64 : (size_t)rows;
    return fit >= (size_t)rows ? rows : fit ? (int)fit : 64 < rows ? 64 : rows;
}

/* Forward: a row of W is widened unless it is stored in `type`. */
static inline int glm_forward_rows(size_t piece, const struct glm_mat *W, enum glm_dtype type)
{
    return glm_piece_rows(piece, W->rows, W->dtype == type ? 0 : (size_t)W->cols);
}

/* Whether swiglu writes the operand of a product of `type` itself, F elements in 16 bits; and its
 * gradient, where a block has a row, that of the one before. */
static inline int glm_swiglu_narrows(enum glm_dtype type, int F)
{
    return type != GLM_F32 && F % 8 == 0;
}
static inline int glm_swiglu_backward_narrows(enum glm_dtype type, int F)
{
    return glm_swiglu_narrows(type, F) && F <= GLM_SWIGLU_ROW;
}

/* The type in which swiglu_mlp_forward keeps h of N rows: that of its products, or float. */
static inline enum glm_dtype glm_mlp_type(enum glm_dtype compute, const struct glm_mat *up,
                                          const struct glm_mat *down, int N)
{
    const enum glm_dtype type = glm_product_type(compute, up->dtype, up->rows, up->cols),
                         after = glm_product_type(compute, down->dtype, down->rows, down->cols);
    const int many = N > glm_few_rows(compute, up) && N > glm_few_rows(compute, down);
    return many && type == after && up->cols % 8 == 0 && down->cols % 8 == 0 ? type : GLM_F32;
}

/* The type in which ln, qkv and att of struct glm_self_attention are, of N tokens: that of its
 * products, or float. Tiles have all its tokens, so there are no kernels of few of them. */
static inline enum glm_dtype glm_self_attention_type(enum glm_dtype compute,
                                                     const struct glm_self_attention *of, int N)
{
    const struct glm_mat *in = of->qkv, *out = of->dense;
    const enum glm_dtype type = glm_product_type(compute, in->dtype, in->rows, in->cols),
                         after = glm_product_type(compute, out->dtype, out->rows, out->cols);
    const int most = GLM_ADAPTER_STRIP * GLM_ADAPTER_STRIPS,
              fits = N <= GLM_ADAPTER_ROWS * GLM_ADAPTER_CHUNKS && in->cols <= most &&
                     in->rows <= most,
              many = N > glm_few_rows(compute, in) && N > glm_few_rows(compute, out),
              words = in->cols % 8 == 0 && of->heads.HD % 8 == 0 && of->heads.HD <= 128,
              thin = !of->A || (glm_is_adapter(of->B->dtype, of->B->rows, of->B->cols) &&
                                of->A->rows < of->A->cols && of->B->cols < of->B->rows && fits),
              tiles = !of->slot || of->heads.shortest > GLM_DECODE_TOKENS;
    return type == after && many && words && thin && tiles ? type : GLM_F32;
}

/* Rows of floats that hold h of N rows and of fewer, and likewise qkv and att: half as many where 16
 * bits are kept of them, but few rows are floats. */
static inline size_t glm_halved(int few, int N)
{
    const int half = N / 2 + N % 2;
    return (size_t)(half > few ? half : few < N ? few : N);
}
static inline size_t glm_mlp_rows(enum glm_dtype compute, const struct glm_mat *up,
                                  const struct glm_mat *down, int N)
{
    const int a = glm_few_rows(compute, up), b = glm_few_rows(compute, down);
    return glm_mlp_type(compute, up, down, N) == GLM_F32 ? (size_t)N : glm_halved(a > b ? a : b, N);
}
static inline size_t glm_self_attention_rows(enum glm_dtype compute,
                                             const struct glm_self_attention *of, int N)
{
    const int a = glm_few_rows(compute, of->qkv), b = glm_few_rows(compute, of->dense);
    return glm_self_attention_type(compute, of, N) == GLM_F32 ? (size_t)N
                                                              : glm_halved(a > b ? a : b, N);
}

/* Gradient of the input: for each row of W a column of the N gradients is narrowed, too. */
static inline int glm_backward_rows(size_t piece, const struct glm_mat *W, enum glm_dtype type,
                                    int N)
{
    const size_t widened = W->dtype == type ? 0 : (size_t)W->cols,
                 narrowed = type == GLM_F32 ? 0 : (size_t)N;
    return glm_piece_rows(piece, W->rows, widened > narrowed ? widened : narrowed);
}

/* ---- attention's gradients in 16 bits: heads up to 128, in rows of 64 or 128 elements */

static inline int glm_backward_narrows(enum glm_dtype compute, struct glm_heads h)
{
    return compute != GLM_F32 && h.HD <= 128;
}

static inline int glm_head_width(struct glm_heads h) { return h.HD <= 64 ? 64 : 128; }

/* Query heads of a key head whose shares of its gradients are summed together, so that there are
 * about 16 shares of a key, which enough blocks can work on. */
static inline int glm_backward_share(struct glm_heads h)
{
    const int group = h.NH / h.KVH, shares = h.KVH < 16 ? 16 / h.KVH : 1;
    return (group + shares - 1) / shares;
}

static inline int glm_backward_shares(struct glm_heads h)
{
    const int group = h.NH / h.KVH, share = glm_backward_share(h);
    return (group + share - 1) / share;
}

/* Scratch: queries, gradients of the output, keys and values in 16 bits; 16 bytes a token and head;
 * the shares of the gradients of keys and values. */
static inline size_t glm_backward_scratch(struct glm_heads h)
{
    const size_t width = (size_t)glm_head_width(h), tokens = (size_t)h.tokens,
                 slots = tokens + (size_t)h.rows, NH = (size_t)h.NH, KVH = (size_t)h.KVH;
    return (4 * width + 16) * tokens * NH +
           (4 + 8 * (size_t)glm_backward_shares(h)) * width * slots * KVH;
}

/* 16-bit copies of keys and values that tiles of attention read: heads are 64 or 128 wide there. */
static inline size_t glm_pairs_bytes(int rows, int KVH, int HD)
{
    return (size_t)rows * KVH * 2 * (HD > 64 ? 128 : 64) * 2;
}

#endif
