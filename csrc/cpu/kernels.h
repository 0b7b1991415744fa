/* What differs by instruction set: for each op a task over a piece of its output. kernels_tmpl.h is
 * compiled once per set; the table of the best one is picked when the backend is created. */
#ifndef GLM_CPU_KERNELS_H
#define GLM_CPU_KERNELS_H

#include "backend.h"
#include "pool.h"

/* Tiles of the matrix products. Reductions are cut in fixed blocks that do not depend on N, so that
 * an element has the same bits whatever batch it is in. */
enum {
    NT_RUN_BYTES = 3072,    /* linear_forward sums runs of packed rows of x and W of this size, */
    SHORT_RUN_BYTES = 2048, /* of bytes, where each run of x has a scale, and of 4 bits of this; */
    NT_COLS = 128,          /* its tasks have this many rows of W .. */
    NT_ROWS = 1024,         /* .. times at most this many of x, */
    NT_ROWS_ADDED = 384,    /* fewer where the output is added to */
    GEMM_ROWS = 2048,       /* largest task of the backward products: rows .. */
    GEMM_COLS = 256,        /* .. times columns; */
    GEMM_UNITS = 512,       /* a panel of B has so many units; of bytes that is a run of x */
    ROW_GROUP = 12,         /* rows that are packed together: a multiple of every kernel's */
    OUTLIERS = 4,           /* of a run of x */
    ATT_BLOCK = 96,         /* keys of a block, and query rows (lanes) of a panel, at most; */
    ATT_PANELS = 2,         /* panels of an attention task */
    PIECE = 4096,           /* elements of a piece of sum_squares */
};

/* A run of a row of x as bytes: their sum and scale, and what is kept apart. */
struct x_run {
    int32_t sum, count;
    float scale;
    int32_t column[OUTLIERS]; /* in the run */
    float value[OUTLIERS];
};

/* Runs of a row of K columns as bytes. */
static inline int glm_byte_runs(int K) { return (K + SHORT_RUN_BYTES - 1) / SHORT_RUN_BYTES; }

/* Terms that a lane multiplies at once in the products of a kind. */
static inline int glm_per_unit(enum glm_dtype kind)
{
    return kind == GLM_I8 ? 4 : kind == GLM_BF16 ? 2 : 1;
}

struct pack_args { /* rows of x (N, K), or of A with strides am, ak, for the products of a kind */
    char *to;
    struct x_run *runs; /* kind GLM_I8: (N, runs of a row) */
    const float *x;
    int N, K, R;                /* R rows together */
    enum glm_dtype kind, dtype; /* dtype of W, whose columns' order x follows */
    size_t am, ak;
    const uint16_t *factor; /* float16 factors of the K terms, or NULL */
    float scale;
};

struct nt_args { /* out[n * ldo + o * ldc] = scale * x W^T + bias (+ out) */
    float *out;
    size_t ldo, ldc;
    const char *x; /* packed, R rows together */
    const struct x_run *runs;
    const float *bias;
    const struct glm_mat *w;
    enum glm_dtype kind;
    int N, accumulate, rows, R; /* rows of a task */
    float scale;
};

struct gemm_args { /* C (M, N) = A B (+ C) */
    float *c;
    const float *a; /* packed */
    const struct x_run *runs;
    const struct glm_mat *b;
    enum glm_dtype kind;
    int M, accumulate, rows; /* rows of a task */
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

struct prefix_args {
    float *to;
    const float *from;
    int P, J, KV, copies, rows; /* rows of a task */
    const struct glm_dropout *dropout;
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
    glm_task pack_x, nt, nt_in_place, pack_a, gemm;
    int x_rows, in_place_rows[2], a_rows; /* packed together; in place: R1 or R2 */
    int most_in_place, in_place_cols, vector_bytes;
    int (*packed_vectors)(enum glm_dtype kind, enum glm_dtype dtype, int columns);
    int fast; /* has the kinds GLM_BF16 and GLM_I8 */
    glm_task rmsnorm_forward, rmsnorm_backward, rmsnorm_dweight;
    glm_task rope, attention_forward, attention_backward;
    glm_task attention_forward_bf16, attention_backward_bf16; /* NULL without such instructions */
    glm_task swiglu_forward, swiglu_backward, dropout_forward, dropout_backward;
    glm_task prefix_forward, prefix_backward;
    glm_task cross_entropy_forward, cross_entropy_backward;
    glm_task add, sum_squares, adamw, tanh_forward, tanh_backward, convert, merge, nonfinite,
        argmax, quantize;
    void (*load_row)(float *out, const void *row, enum glm_dtype dtype,
                     int n); /* n elements as float */
    void (*add_row)(float *to, const float *from, int n);
};

extern const struct glm_cpu_kernels glm_cpu_kernels_generic, glm_cpu_kernels_avx2,
    glm_cpu_kernels_avx512, glm_cpu_kernels_avx512bf16;

/* choose.c: a row of the op `choose` a task; struct choose_args */
struct choose_args {
    int32_t *id;
    float *x;
    int V;
    const struct glm_choice *choices;
    const int32_t *touched;
};
void glm_choose_task(const void *arg, int task, char *scratch);

/* Rows of an attention panel: fewer where heads are wide, so that nine panels fit the scratch. */
static inline int att_block(int HD)
{
    return HD <= 256 ? ATT_BLOCK : ATT_BLOCK * 256 / ((HD + 15) / 16 * 16) / 16 * 16;
}

/* Parts that the query rows of a key head of a segment are cut into; attention_forward has a task
 * for each of them and each key head. */
static inline int att_parts(const struct glm_segment *s, struct glm_heads heads)
{
    const int64_t rows = (int64_t)s->count * (heads.NH / heads.KVH),
                  most = (int64_t)ATT_PANELS * att_block(heads.HD);
    return (int)((rows + most - 1) / most);
}

#endif
