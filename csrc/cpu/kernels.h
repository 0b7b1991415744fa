/* What the op tables of the instruction sets share. kernels_tmpl.h is compiled once per set; the
 * table of the best one is picked when the backend is created. An op cuts its work into tasks that
 * the pool runs: a task makes a part of the output that no other task writes. */
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
    BLOCK = 4096,           /* columns, or elements of a sum, that are taken together */
    ELEMENTS = 1 << 12,     /* elements of a task, at least */
    PARTIALS = 1024,        /* sums of runs that sum_squares adds up at a time */
    FINDERS = 64,           /* tasks of first_nonfinite, at most */
};
#define PACKED ((size_t)32 << 20) /* bytes of an operand that are packed at a time */

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

/* The first row of a group where N rows are cut into groups that differ by a row at most. */
static inline int first_of_group(int N, int groups, int group)
{
    const int more = N % groups;
    return group * (N / groups) + (group < more ? group : more);
}

struct pack_args { /* rows of x (N, K), or of A with strides am, ak, for the products of a kind */
    char *to;
    struct x_run *runs; /* kind GLM_I8: (N, runs of a row) */
    const float *x;
    int N, K, R, groups;        /* R rows together; or, if not 0, see first_of_group */
    enum glm_dtype kind, dtype; /* dtype of W, whose columns' order x follows */
    size_t am, ak;
    const uint16_t *factor; /* float16 factors of the K terms, or NULL */
    float scale;
    float *word_scale; /* of runs of x as integers, and their `less`: tmpl_words.h */
    int32_t *word_less;
    int grouped, pairs;
};

/* The first row that a task packs; the next task's is where its own end. */
static inline int first_packed(const struct pack_args *p, int task)
{
    return p->groups ? first_of_group(p->N, p->groups, task) : task * p->R;
}

struct nt_args { /* out[n * ldo + o * ldc] = scale * x W^T + bias (+ out) */
    float *out;
    size_t ldo, ldc;
    const char *x; /* packed, R rows together */
    const struct x_run *runs;
    const float *word_scale; /* as in pack_args */
    const int32_t *word_less;
    const float *bias;
    const struct glm_mat *w;
    enum glm_dtype kind;
    int N, accumulate, rows, R, groups; /* rows of a task */
    float scale;
};

struct gemm_args { /* C (M, N) = A B (+ C) */
    float *c;
    const float *a;     /* packed */
    const float *lying; /* rows of A as they lie; then of the packed are those after the last MR */
    const struct x_run *runs;
    const struct glm_mat *b;
    enum glm_dtype kind;
    int M, accumulate, rows; /* rows of a task */
};

/* Weak: the address is NULL where the compiler lacked the set and setup.py left its file out. */
extern const struct glm_ops glm_cpu_ops_generic;
extern const struct glm_ops glm_cpu_ops_avx2 __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_avxvnni __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_avx512 __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_avx512vnni __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_avx512bf16 __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_amx __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_neon __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_neon_dotprod __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_neon_i8mm __attribute__((weak));
extern const struct glm_ops glm_cpu_ops_neon_bf16 __attribute__((weak));

struct cpu {
    struct glm_backend be;
    struct glm_pool *pool;
    enum glm_dtype compute; /* of the large products */
    int words;              /* linear_forward: float32's over 8 and 4 bits take 16-bit integers */
    char *packed;           /* (PACKED), touched where it is used */
    char name[64];
    double partial[PARTIALS];
    int found[FINDERS];
};

static inline int ceil_div(size_t n, size_t by) { return (int)((n + by - 1) / by); }

/* About how long one thread takes, in ns: for so many elements, each as much work as an addition;
 * for so many multiplications. */
static inline size_t ns_of(size_t elements) { return elements / 4; }
static inline size_t products_ns(size_t n) { return n / 32; }

/* Runs fn over `tasks` parts of so many elements. */
static inline void run(struct cpu *cpu, int tasks, size_t elements, glm_task fn, const void *args)
{
    glm_pool_run(cpu->pool, tasks, ns_of(elements), fn, args);
}

/* Rows for one task, so that a task has some work to do. */
static inline int rows_for(size_t width)
{
    return width >= ELEMENTS ? 1 : (int)(ELEMENTS / (width ? width : 1));
}

/* N rows, `each` of them a task; width: elements of a row, or additions that cost as much. */
struct rows {
    int N, each;
    size_t width;
};

static inline struct rows rows_of(int N, size_t width)
{
    return (struct rows){N, rows_for(width), width};
}
static inline int first_row(struct rows rows, int task) { return task * rows.each; }
static inline int end_row(struct rows rows, int task)
{
    return rows.N < (task + 1) * rows.each ? rows.N : (task + 1) * rows.each;
}
static inline void run_rows(struct cpu *cpu, glm_task fn, const void *args, struct rows rows)
{
    run(cpu, ceil_div((size_t)rows.N, (size_t)rows.each), rows.N * rows.width, fn, args);
}

/* n elements, `each` of them a task. */
struct elements {
    size_t n, each;
};

static inline struct elements elements_of(size_t n)
{
    return (struct elements){n, n / ELEMENTS > 1 << 20 ? n >> 20 : ELEMENTS};
}
static inline size_t first_element(struct elements e, int task) { return (size_t)task * e.each; }
static inline size_t end_element(struct elements e, int task)
{
    const size_t end = ((size_t)task + 1) * e.each;
    return e.n < end ? e.n : end;
}
static inline void run_elements(struct cpu *cpu, glm_task fn, const void *args, struct elements e)
{
    run(cpu, ceil_div(e.n, e.each), e.n, fn, args);
}

/* choose.c: a row of the op `choose` a task; struct choose_args */
struct choose_args {
    int32_t *id;
    float *x;
    int V;
    const struct glm_choice *choices;
    const int32_t *touched;
};
void glm_choose_task(const void *arg, int task, char *scratch);

#endif
