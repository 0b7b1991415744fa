/* What a backend is: a table of ops (ops.h), and the memory and life around it. */
#ifndef GLM_BACKEND_H
#define GLM_BACKEND_H

#include "status.h"
#include "tensor.h"

/* A run of `count` tokens of the flat batch that attend to: `shared_count` cache rows from
 * shared_begin, then `past_count` cache rows from past_begin, then the tokens of the segment itself
 * up to their own (causal), where the first `context` tokens of the segment are visible to all of
 * them (ChatGLM v1; 0 elsewhere). */
struct glm_segment {
    int begin, count;
    int shared_begin, shared_count;
    int past_begin, past_count;
    int context;
};

/* Keys and values of one layer, each (rows, KVH*HD) real, keys rotated; NULL where no segment has
 * cache rows. */
struct glm_kv {
    void *k, *v;
};

/* Heads of one attention layer. A qkv row is [NH queries | KVH keys | KVH values], each HD wide;
 * query head h reads key head h / (NH / KVH). What follows HD is for attention alone, which sizes
 * its scratch and chooses kernels by it; no value depends on it. */
struct glm_heads {
    int NH, KVH, HD;
    int longest;      /* tokens of the longest segment, where the caller knows; 0: not known */
    int tokens, rows; /* of the batch, each in a segment, and of the cache */
    int before;       /* cache rows that a segment sees, at most */
    int shortest;     /* tokens of the shortest segment; 0: not known */
};

/* What a dropout mask is a function of, so that it does not depend on how rows are packed:
 * Philox4x32-10 of
 *   key      (seed low, seed high ^ step)
 *   counter  (element / 4, position[n], stream[n], site)
 * Word element % 4 of the result, as a fraction u of 2^32, drops the element when u < p; kept ones
 * are scaled by 1 / (1 - p). */
struct glm_dropout {
    uint64_t seed;
    uint32_t step, site;
    double p;
    const int32_t *stream, *position; /* (N) each, >= 0 */
};

/* The half of a layer up to what attention adds to the residual stream: of a norm, the product that
 * yields queries, keys and values, with its adapter if there is one, and that of attention's output.
 * Its ops hand ln, qkv and att to each other as a backend likes them, in memory for reals. */
struct glm_self_attention {
    const void *norm; /* (C) */
    double eps;
    const struct glm_mat *qkv, *dense;
    const void *qkv_bias, *dense_bias; /* or NULL */
    const struct glm_mat *A, *B;       /* of qkv, real; NULL, both: none */
    double scale;                      /* of the adapter */
    struct glm_dropout dropout;        /* of what A reads; p 0: none */
    void *dropped;                     /* (N, C) where there is some: its contents are undefined */
    const void *table;
    const int32_t *position, *slot; /* slot NULL: nothing goes into the cache */
    int rotary_dim, n_segments;
    const struct glm_segment *segments;
    struct glm_kv cache, dcache;
    struct glm_heads heads;
};

/* How a row's next token is chosen of its scores x (V).
 *
 * Of the columns touched[first ..], distinct in each of two runs, the first `penalised` get
 * x < 0 ? x * penalty : x / penalty, the next `banned` ones -infinity. Scores that are all
 * -infinity, or one of which is infinity or NaN, allow no choice. temperature 0, or so small that
 * the largest score overflows: the first largest is chosen. Otherwise, with s = x / temperature and
 * the mass of a column floor(2^40 exp(s - max s)):
 *
 *   top_k > 0   those below the top_k-th largest s are dropped, those equal to it stay
 *   top_p < 1   in the order of falling s, then rising column, the fewest stay whose mass is all
 *               but at most the fraction 1 - top_p, and at least one
 *   the draw    is the first column up to which those that stay have more than u of their mass,
 *               u = (r + 1/2) / 2^32, r the first word of Philox4x32-10 of
 *               key (seed low, seed high) and counter (index, stream, "samp", 0) */
struct glm_choice {
    double top_p;
    uint64_t seed;
    uint32_t stream, index;
    float temperature, penalty;
    int32_t top_k, first, penalised, banned;
};

/* Elements of a dtype that is given beside the pointer. */
typedef void glm_stored;

struct glm_ops {
#define OP(name, extent, ...) void (*name)(void *cx, __VA_ARGS__);
#include "ops.h"
};

enum glm_op {
#define OP(name, extent, ...) GLM_OP_##name,
#include "ops.h"
    GLM_N_OPS
};

/* What calls cost, counted by "plan" without doing them, and by CUDA devices. */
struct glm_counts {
    size_t live, peak;           /* bytes allocated */
    size_t scratch;              /* of these, what products keep for operands */
    size_t uploaded, downloaded; /* bytes */
    uint64_t uploads, downloads;
    uint64_t syncs;            /* times that the host waited for the device */
    uint64_t launches;         /* of our kernels; fills and copies are none */
    uint64_t products;         /* calls of cuBLAS */
    uint64_t graphs;           /* launches of a recorded sequence: what is in it is not counted */
    uint64_t calls[GLM_N_OPS]; /* "plan" only, as is flops */
    double flops;              /* of products and attention: 2 for a multiply-add */
};

/* Names a sequence of ops that comes again: all that their arguments follow from, beside the
 * contents of memory. */
struct glm_key {
    uint64_t of[8];
};

struct glm_backend {
    const char *name; /* "cpu:avx2", "cpu:generic", "plan", "ref_f32", "ref_f64" .. */
    const struct glm_ops *ops;
    void *cx; /* handed to every op: threads, scratch, poll; owned by the backend */
    size_t real_size;
    enum glm_dtype real; /* GLM_F32 or GLM_F64 */

    /* In which the inputs of layers that are recomputed are kept: a device that rounds operands to
     * 16 bits keeps no more of them; GLM_F32: as real. kept_h: the same for what dense_h_to_4h
     * yields, from which backward goes on. */
    enum glm_dtype kept, kept_h;

    /* Rows of reals that have room for h of swiglu_mlp_forward, or for qkv and att of
     * self_attention_forward, of N tokens and of fewer. NULL: N. */
    size_t (*mlp_rows)(struct glm_backend *be, const struct glm_mat *up, const struct glm_mat *down,
                       int N);
    size_t (*self_attention_rows)(struct glm_backend *be, const struct glm_self_attention *of,
                                  int N);

    /* Memory of the device, 64-byte aligned; NULL when there is none. refusal() is then the reason,
     * as a sentence; the function is NULL where there is no more to say. */
    void *(*alloc)(struct glm_backend *be, size_t bytes);
    const char *(*refusal)(struct glm_backend *be);
    void (*free)(struct glm_backend *be, void *p);
    void (*upload)(struct glm_backend *be, void *device, const void *host, size_t bytes);
    void (*download)(struct glm_backend *be, void *host, const void *device, size_t bytes);
    void (*copy)(struct glm_backend *be, void *to, const void *from, size_t bytes);
    void (*zero)(struct glm_backend *be, void *p, size_t bytes);

    void (*set_threads)(struct glm_backend *be, int threads);
    int (*threads)(struct glm_backend *be);

    /* Around a call of the model and around ops that no such call makes: leave(enter()) in one
     * thread. A GPU is the thread's current device in between, and the one that was is again
     * afterwards, for the sake of other libraries there. NULL: there is no such thing. The other
     * functions of this table need neither. */
    int (*enter)(struct glm_backend *be);
    void (*leave)(struct glm_backend *be, int before);

    /* poll(arg) is called from the thread that called the op, about every 50 ms while an op runs.
     * Once it returns non-zero the op skips its remaining work, its outputs are undefined, and
     * stopped() is 1 until set_poll. */
    void (*set_poll)(struct glm_backend *be, int (*poll)(void *arg), void *arg);
    int (*stopped)(struct glm_backend *be);
    void (*destroy)(struct glm_backend *be);

    uint64_t allocated; /* calls of alloc */
    int device_memory;  /* the host cannot read it: weights are uploaded, not used where they lie */

    /* The first error of the device as a sentence, or NULL; from then on ops do nothing and
     * stopped() is 1. The function is NULL where no such errors exist. */
    const char *(*error)(struct glm_backend *be);

    /* replay(key) returns 1 when it has queued what was recorded for an equal key, and the caller
     * leaves the ops out; otherwise the caller runs them and calls recorded(). Freeing memory
     * forgets every recording. NULL: there is no such thing. */
    int (*replay)(struct glm_backend *be, const struct glm_key *key);
    void (*recorded)(struct glm_backend *be);

    /* What was counted since the last call; NULL: this backend does not count. */
    void (*take_counts)(struct glm_backend *be, struct glm_counts *out);
};

/* Names of backends:
 *
 *   cpu[:ISA][/TYPE]    ISA: generic, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx, else the one
 *                       that the environment variable GLMLORA_ISA names, else the best
 *                       TYPE of the large products: float32; bfloat16 (avx512bf16, amx); int16 (of
 *                       activations that meet 8 and 4 bits forward, else float32); or int8 (over 8
 *                       and 4 bits, of groups forward alone; else bfloat16 where it is, or float32)
 *   cuda[:N][/TYPE]     device N; TYPE float32, float16 or bfloat16. From the library that the
 *                       environment variable GLMLORA_CUDA_LIBRARY names, or the one beside this
 *                       module
 *   emu[:N][/TYPE]      the same without a GPU
 *   plan[/TYPE]         computes nothing, counts what the cpu would do
 *   plan:cuda..         counts what a CUDA device would do
 *   ref_f32, ref_f64    slow and plain
 *
 * GLM_EVALUE when the name is unknown, this processor lacks the instructions or there is no such
 * library or device. */
glm_status glm_backend_create(struct glm_backend **out, const char *name, struct glm_error *err);

/* A device as its runtime describes it; count 0: there is none, and `why` says so. */
struct glm_device {
    int count; /* devices of this kind that the process may use */
    char name[64], why[192];
    int major, minor, multiprocessors; /* compute capability */
    int driver, runtime;               /* 1000 * major + 10 * minor of the CUDA version */
    size_t free_bytes, total_bytes;
};

/* Of "cuda[:N]" or "emu[:N]". GLM_EVALUE when there is no library for it, or no device N among
 * those that exist. */
glm_status glm_device_info(const char *name, struct glm_device *out, struct glm_error *err);

/* The library of "cuda" or "emu": its file, how it was built, and the cuBLAS that it finds. GLM_EVALUE
 * where there is none. */
struct glm_library {
    char path[4096], cublas[4200];
    const char *built;
};
glm_status glm_device_library(const char *name, struct glm_library *out, struct glm_error *err);

/* The whole name that a short one stands for, which is the name of the backend made from it. */
void glm_backend_name(char full[64], const char *name);

/* One constructor per folder; each returns a reason in err. name: whole, see glm_backend_name. */
glm_status glm_cpu_create(struct glm_backend **out, const char *name, struct glm_error *err);
glm_status glm_plan_create(struct glm_backend **out, const char *name, int cuda,
                           enum glm_dtype compute, struct glm_error *err);
glm_status glm_ref_f32_create(struct glm_backend **out, struct glm_error *err);
glm_status glm_ref_f64_create(struct glm_backend **out, struct glm_error *err);

/* Names of the cpu variants that are compiled and this processor runs, best first, into `out`, which
 * is returned: "avx2,generic". */
const char *glm_cpu_variants(char out[64]);
/* The i-th variant of all there are, best first; 0 past the last. */
struct glm_cpu_variant {
    const char *name;
    int compiled, runs; /* in this build; on this processor */
};
int glm_cpu_variant(int i, struct glm_cpu_variant *out);

#endif
