/* What differs by instruction set: for each op a task over a piece of its output. kernels_tmpl.h is
 * compiled once per set; the table of the best one is picked when the backend is created. */
#ifndef GLM_CPU_KERNELS_H
#define GLM_CPU_KERNELS_H

#include "backend.h"
#include "pool.h"

/* Tiles of the matrix products. Reductions are cut in fixed blocks that do not depend on N, so that
 * an element has the same bits whatever batch it is in. */
enum {
    NT_ROWS = 384,    /* largest tile of linear_forward: rows of inp .. */
    NT_COLS = 128,    /* .. times rows of W; */
    NT_BLOCK = 512,   /* its reduction is summed in blocks of this many features */
    NT_WIDTH = 8192,  /* features that are packed at once where rows are few */
    GEMM_ROWS = 192,  /* largest tile of the backward products: rows .. */
    GEMM_COLS = 256,  /* .. times columns; */
    GEMM_BLOCK = 128, /* packed in blocks of this many terms */
    L1_ROWS = 12,     /* rows that are packed together: a multiple of every kernel's */
    ATT_ROWS = 48,    /* query rows of an attention task */
    ATT_KEYS = 48, /* keys are taken in blocks of this many, counted from the first visible one */
    MAX_HEAD = 512,
    PIECE = 4096, /* elements of a piece of sum_squares */
};

struct nt_args { /* out = scale * inp W^T + bias (+ out) */
    float *out;
    const float *inp, *bias;
    const struct glm_mat *w;
    int N, accumulate, rows; /* rows of a tile */
    float scale;
};

struct gemm_args { /* C (M, N) = scale * A B (+ C);  a(m, k) = A[m * am + k * ak],  B (K, N) */
    float *c;
    const float *a;
    size_t am, ak;
    const struct glm_mat *b;
    int M, accumulate, rows; /* rows of a tile */
    float scale;
};

struct quantize_args {
    uint8_t *data;
    uint16_t *scale;
    const void *inp;
    enum glm_dtype dtype, inp_dtype;
    int group, rows, cols, rows_a_task;
};

struct row_args { /* whatever goes row by row */
    void *out, *extra;
    const void *a, *b, *c, *d;
    const int32_t *index;
    const struct glm_dropout *dropout;
    int N, C, rows; /* rows of a task */
    double eps;
};

struct flat_args { /* whatever goes element by element */
    void *p[4];
    const void *q[2];
    size_t n, piece;
    double k[8];
    enum glm_dtype from, to;
};

struct rope_args {
    float *x;
    const float *table;
    const int32_t *position;
    int N, heads, HD, stride, rotary_dim, rows;
    float sign;
};

struct att_args {
    float *out, *lse, *dqkv;
    const float *dout, *qkv;
    struct glm_kv cache, dcache;
    const struct glm_segment *segments;
    int n_segments;
    struct glm_heads heads;
};

struct merge_args {
    void *data;
    enum glm_dtype dtype;
    const float *B, *A;
    int O, I, R, rows;
    float scale;
};

struct glm_cpu_kernels {
    const char *name;
    glm_task nt, gemm;
    glm_task rmsnorm_forward, rmsnorm_backward, rmsnorm_dweight;
    glm_task rope, attention_forward, attention_backward;
    glm_task swiglu_forward, swiglu_backward, dropout_forward, dropout_backward;
    glm_task cross_entropy_forward, cross_entropy_backward;
    glm_task add, sum_squares, adamw, tanh_forward, tanh_backward, convert, merge, nonfinite,
        quantize;
    void (*load_row)(float *out, const void *row, enum glm_dtype dtype,
                     int n); /* n elements as float */
};

extern const struct glm_cpu_kernels glm_cpu_kernels_generic, glm_cpu_kernels_avx2,
    glm_cpu_kernels_avx512;

/* Blocks of query rows of a segment; attention_forward has a task for each of them and each key
 * head. */
static inline int att_blocks(const struct glm_segment *s)
{
    return (s->count + ATT_ROWS - 1) / ATT_ROWS;
}

/* Philox4x32-10 (Salmon et al. 2011) */
static inline void glm_philox(uint32_t x[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * x[0], p1 = (uint64_t)0xCD9E8D57u * x[2];
        const uint32_t y0 = (uint32_t)(p1 >> 32) ^ x[1] ^ k0, y2 = (uint32_t)(p0 >> 32) ^ x[3] ^ k1;
        x[1] = (uint32_t)p1;
        x[3] = (uint32_t)p0;
        x[0] = y0;
        x[2] = y2;
    }
}

#endif
