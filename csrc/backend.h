/* The op table: everything the model asks of a device, specified once.
 *
 * "real" is the element type of activations, vectors (norm weights, biases), trainable parameters,
 * gradients and the KV cache: float on cpu, float or double in the reference. Its size is
 * glm_backend.real_size. Weights are glm_mat in any stored dtype; arithmetic is in real. Index and
 * id arrays are int32 and checked before an op sees them. Ops cannot fail and allocate nothing.
 * Unless "+=" is written, an output is overwritten and aliases no input. Shapes: N tokens, C
 * channels, I/O input/output features, M rows, V vocabulary, HD head size. An element's value may
 * not depend on N, on the other rows, or on the number of threads, bit for bit. */
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
 * query head h reads key head h / (NH / KVH). No value depends on `longest`. */
struct glm_heads {
    int NH, KVH, HD;
    int longest; /* tokens of the longest segment, where the caller knows; 0: not known */
};

/* What a dropout mask is a function of: Philox4x32-10 with key (seed low, seed high ^ step) and
 * counter (element / 4, position[n], stream[n], site); word element % 4 of its result, as a
 * fraction u of 2^32, drops the element when u < p; kept ones are scaled by 1 / (1 - p). So a mask
 * does not depend on how rows are packed. */
struct glm_dropout {
    uint64_t seed;
    uint32_t step, site;
    double p;
    const int32_t *stream, *position; /* (N) each, >= 0 */
};

/* How a row's next token is chosen of its scores x (V). Of the columns touched[first ..], distinct
 * in each of two runs, the first `penalised` get x < 0 ? x * penalty : x / penalty, the next
 * `banned` ones -infinity. Columns whose scores are all -infinity, or one of which is infinity or
 * NaN, allow no choice. temperature 0, or so small that the largest score overflows: the first
 * largest is chosen. Otherwise, with s = x / temperature and the mass of a column
 * floor(2^40 exp(s - max s)):
 * top_k > 0: those below the top_k-th largest s are dropped, those equal to it stay;
 * top_p < 1: in the order of falling s, then rising column, the fewest stay whose mass is all but
 *   at most the fraction 1 - top_p, and at least one;
 * with r the first word of Philox4x32-10 of key (seed low, seed high) and counter (index, stream,
 *   "samp", 0), u = (r + 1/2) / 2^32: the first column is chosen up to which those that stay have
 *   more than u of their mass. */
struct glm_choice {
    double top_p;
    uint64_t seed;
    uint32_t stream, index;
    float temperature, penalty;
    int32_t top_k, first, penalised, banned;
};

/* name: every entry of struct glm_ops, for tests and checks */
/* clang-format off */
#define GLM_OPS(X) \
    X(embedding_forward) X(embedding_backward) \
    X(rmsnorm_forward) X(add_rmsnorm_forward) X(rmsnorm_backward) \
    X(linear_forward) X(linear_backward_input) X(linear_backward_weight) \
    X(adapted_forward) X(linear_swiglu_forward) \
    X(rope_forward) X(rope_backward) \
    X(attention_forward) X(attention_backward) \
    X(kv_append) X(rope_append) \
    X(prefix_forward) X(prefix_backward) \
    X(swiglu_forward) X(swiglu_backward) \
    X(tanh_forward) X(tanh_backward) \
    X(dropout_forward) X(dropout_backward) \
    X(gather_forward) X(gather_backward) \
    X(cross_entropy_forward) X(cross_entropy_backward) \
    X(add) X(sum_squares) X(first_nonfinite) X(choose) X(adamw) X(merge) X(convert) X(quantize)
/* clang-format on */

struct glm_ops {
    /* out[n] = weight[ids[n]]        out (N, C)  weight (V, C)  ids (N)
     * backward: dweight[ids[n]] += dout[n], n ascending */
    void (*embedding_forward)(void *cx, void *out, const struct glm_mat *weight, const int32_t *ids,
                              int N);
    void (*embedding_backward)(void *cx, void *dweight, const void *dout, const int32_t *ids, int N,
                               int C);

    /* out = inp * rstd * weight,  rstd = (mean_C(inp^2) + eps)^-1/2      (Zhang & Sennrich 2019,
     * eq. 4) out, inp (N, C)   weight (C) real   rstd (N), kept for backward backward, with g =
     * dout * weight: dinp    += rstd * g - inp * rstd^3 * mean_C(g * inp) dweight += sum_N(dout *
     * inp * rstd)      skipped when NULL: a frozen norm costs nothing */
    void (*rmsnorm_forward)(void *cx, void *out, void *rstd, const void *inp, const void *weight,
                            int N, int C, double eps);
    /* sum = a + b, out = rmsnorm(sum), bit for bit as `add` and `rmsnorm_forward` give them
     * sum, a, b (N, C); sum may be a or b */
    void (*add_rmsnorm_forward)(void *cx, void *out, void *rstd, void *sum, const void *a,
                                const void *b, const void *weight, int N, int C, double eps);
    void (*rmsnorm_backward)(void *cx, void *dinp, void *dweight, const void *dout, const void *inp,
                             const void *weight, const void *rstd, int N, int C);

    /* out = scale * inp W^T + bias (+ out when accumulate)    out (N, O)  inp (N, I)  W (O, I) bias
     * (O) real or NULL backward_input:   dinp = scale * dout W (+ dinp when accumulate)
     * backward_weight:  dweight (O, I) += scale * dout^T inp;  dbias (O) += sum_N dout; either may
     * be NULL The reduction over I (forward), O (input) or N (weight) is never split over threads.
     */
    void (*linear_forward)(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                           const void *bias, int N, double scale, int accumulate);
    void (*linear_backward_input)(void *cx, void *dinp, const void *dout,
                                  const struct glm_mat *weight, int N, double scale,
                                  int accumulate);
    void (*linear_backward_weight)(void *cx, void *dweight, void *dbias, const void *dout,
                                   const void *inp, int N, int O, int I, double scale);

    /* out = inp W^T + bias + scale * xa B^T, as `linear_forward` gives it with W and then, added, B
     * xa (N, R)   B (O, R) real */
    void (*adapted_forward)(void *cx, void *out, const void *inp, const struct glm_mat *weight,
                            const void *bias, const void *xa, const struct glm_mat *B, int N,
                            double scale);
    /* out = swiglu_forward of h = inp W^T + bias    out (N, F)  W (2F, I)  h (N, 2F): its contents
     * are undefined */
    void (*linear_swiglu_forward)(void *cx, void *out, void *h, const void *inp,
                                  const struct glm_mat *weight, const void *bias, int N);

    /* Rotates in place the pairs (2j, 2j+1), j < rotary_dim/2, of the first `heads` heads of each
     * row by the angle of the row's position: x0' = x0 cos - x1 sin, x1' = x1 cos + x0 sin   (Su et
     * al. 2021, eq. 34, pairs adjacent) x (N, stride)   table (positions, rotary_dim/2, 2) real:
     * cos, sin    position (N) backward: the same with -sin (the gradient of a rotation is the
     * inverse rotation) */
    void (*rope_forward)(void *cx, void *x, const void *table, const int32_t *position, int N,
                         int heads, int HD, int stride, int rotary_dim);
    void (*rope_backward)(void *cx, void *dx, const void *table, const int32_t *position, int N,
                          int heads, int HD, int stride, int rotary_dim);

    /* out = softmax(q k^T / sqrt(HD)) v over what each token's segment lets it see (struct
     * glm_segment) out (N, NH*HD)   lse (N, NH) kept for backward: log sum exp of the scaled scores
     *   qkv (N, (NH+2*KVH)*HD), queries and keys rotated   cache: rows named by the segments, NULL
     * pointers if none backward: dqkv = gradient of qkv (overwritten); dcache += gradient of the
     * cache rows of shared ranges (k and v; skipped when dcache is NULL; past rows get none) */
    void (*attention_forward)(void *cx, void *out, void *lse, const void *qkv, struct glm_kv cache,
                              const struct glm_segment *segments, int n_segments,
                              struct glm_heads heads);
    void (*attention_backward)(void *cx, void *dqkv, struct glm_kv dcache, const void *dout,
                               const void *out, const void *lse, const void *qkv,
                               struct glm_kv cache, const struct glm_segment *segments,
                               int n_segments, struct glm_heads heads);

    /* cache row slot[n] = key and value of row n of qkv (N, (NH+2*KVH)*HD) */
    void (*kv_append)(void *cx, struct glm_kv cache, const void *qkv, const int32_t *slot, int N,
                      struct glm_heads heads);
    /* rope_forward of the queries and keys of qkv in place, then kv_append: for generation, where
     * nothing goes back */
    void (*rope_append)(void *cx, struct glm_kv cache, void *qkv, const void *table,
                        const int32_t *position, const int32_t *slot, int N, struct glm_heads heads,
                        int rotary_dim);

    /* P-Tuning v2 (Liu et al. 2021): rows of the prefix encoder become cache rows of every layer,
     * `copies` times inp (P, J, KV), J = 2*layers (key, value, key, ..)   out (J, copies*P, KV):
     * out[j][b*P + p] = inp[p][j] dropout: NULL or the mask of row (b, p): N = copies*P, position
     * and stream index b*P + p, element j*KV + i backward: dinp[p][j] += sum over b of mask *
     * dout[j][b*P + p] */
    void (*prefix_forward)(void *cx, void *out, const void *inp, int P, int J, int KV, int copies,
                           const struct glm_dropout *dropout);
    void (*prefix_backward)(void *cx, void *dinp, const void *dout, int P, int J, int KV,
                            int copies, const struct glm_dropout *dropout);

    /* out = silu(gate) * up     inp (N, 2F) = [gate | up]   out (N, F)     (Shazeer 2020, SwiGLU)
     * backward: dinp (N, 2F) overwritten; dinp may be inp itself */
    void (*swiglu_forward)(void *cx, void *out, const void *inp, int N, int F);
    void (*swiglu_backward)(void *cx, void *dinp, const void *dout, const void *inp, int N, int F);

    /* out = tanh(inp), n elements; backward: dinp = dout * (1 - out^2); in place allowed */
    void (*tanh_forward)(void *cx, void *out, const void *inp, size_t n);
    void (*tanh_backward)(void *cx, void *dinp, const void *dout, const void *out, size_t n);

    /* out = inp * mask / (1 - p)   (N, C); in place allowed.   backward: dinp += dout * mask / (1 -
     * p) */
    void (*dropout_forward)(void *cx, void *out, const void *inp, int N, int C,
                            const struct glm_dropout *dropout);
    void (*dropout_backward)(void *cx, void *dinp, const void *dout, int N, int C,
                             const struct glm_dropout *dropout);

    /* out (M, C) = inp[rows[m]]; rows ascending and distinct.   backward: dinp[rows[m]] += dout[m]
     */
    void (*gather_forward)(void *cx, void *out, const void *inp, const int32_t *rows, int M, int C);
    void (*gather_backward)(void *cx, void *dinp, const void *dout, const int32_t *rows, int M,
                            int C);

    /* loss[m] = lse[m] - logits[m][target[m]],  lse = log sum exp    logits (M, V)  target (M)
     * loss, lse (M) backward: logits = scale * (softmax(logits) - onehot(target)), in place */
    void (*cross_entropy_forward)(void *cx, void *loss, void *lse, const void *logits,
                                  const int32_t *target, int M, int V);
    void (*cross_entropy_backward)(void *cx, void *logits, const void *lse, const int32_t *target,
                                   int M, int V, double scale);

    /* out = a + b, n elements; out may be a or b */
    void (*add)(void *cx, void *out, const void *a, const void *b, size_t n);
    /* *out, on the device, = sum of x^2 in double, over fixed pieces in order: the same for any
     * thread count */
    void (*sum_squares)(void *cx, double *out, const void *x, size_t n);
    /* *row = first row of x (N, C) that holds a NaN or an infinity, or -1 */
    void (*first_nonfinite)(void *cx, int *row, const void *x, int N, int C);
    /* id[m] = column of the first largest element of row m of x (M, V), or -1 where the row holds a
     * NaN or an infinity; id (M) on the device.
     * choices: NULL, or (M) on the device, how it is chosen instead (struct glm_choice), with the
     * columns that `touched` lists; x is changed then, and -2 says that no column may be chosen. */
    void (*choose)(void *cx, int32_t *id, void *x, int M, int V, const struct glm_choice *choices,
                   const int32_t *touched);
    /* Decoupled weight decay (Loshchilov & Hutter 2019, alg. 2), t = step counted from 1, g =
     * gscale * grad: m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= lr wd p;  p -= lr
     * (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps) */
    void (*adamw)(void *cx, void *p, const void *grad, void *m, void *v, size_t n, double lr,
                  double b1, double b2, double eps, double wd, int t, double gscale);
    /* W += scale * B A, rounded to W's dtype: data (O, I) in dtype   B (O, R) real   A (R, I) real
     */
    void (*merge)(void *cx, void *data, enum glm_dtype dtype, const void *B, const void *A, int O,
                  int I, int R, double scale);
    /* out = inp in another dtype, round to nearest even; overflow gives infinity, NaN stays NaN;
     * not in place */
    void (*convert)(void *cx, void *out, enum glm_dtype out_dtype, const void *inp,
                    enum glm_dtype inp_dtype, size_t n);
    /* Integers `data` and float16 `scale` (struct glm_mat) of a float matrix inp (rows, cols).
     * group 0: THUDM's, every operation rounded to float16: scale = max|w| / q, q = 127 or 7,
     *   integer = round to even(w / scale); a row of zeros gets scale 0 and integers 0
     * group > 0, GLM_I4: integers q in -8 .. 7; of the scales m / -(8 + j / 10), j = -9 .. 9, m the
     *   element of largest magnitude, the one whose integers have the smallest squared error under
     *   the scale of least squares, sum(w q) / sum(q^2): that is the scale, rounded to float16, and
     *   the integers are those nearest by it. A row (group) with an element that is not finite, or
     * that float16 cannot hold, gets a scale that is not finite. */
    void (*quantize)(void *cx, void *data, uint16_t *scale, enum glm_dtype dtype, int group,
                     const void *inp, enum glm_dtype inp_dtype, int rows, int cols);
};

/* What calls cost, counted by "plan" without doing them, and by CUDA devices. */
enum glm_op {
#define GLM_OP(op) GLM_OP_##op,
    GLM_OPS(GLM_OP)
#undef GLM_OP
        GLM_N_OPS
};
struct glm_counts {
    size_t live, peak;           /* bytes allocated */
    size_t scratch;              /* of these, what products keep for operands */
    size_t uploaded, downloaded; /* bytes */
    uint64_t uploads, downloads;
    uint64_t syncs; /* times that the host waited for the device */
    uint64_t launches,
        products;              /* kernels of ours; calls of cuBLAS. Fills and copies are neither */
    uint64_t graphs;           /* launches of a recorded sequence: what is in it is not counted */
    uint64_t calls[GLM_N_OPS]; /* "plan" only, as is flops */
    double flops; /* of products and attention: 2 for a multiplication and its addition */
};

struct glm_key {
    uint64_t of[8];
};

struct glm_backend {
    const char *name; /* "cpu:avx2", "cpu:generic", "plan", "ref_f32", "ref_f64" .. */
    const struct glm_ops *ops;
    void *cx; /* handed to every op: threads, scratch, poll; owned by the backend */
    size_t real_size;
    enum glm_dtype real; /* GLM_F32 or GLM_F64 */
    /* In which the inputs of layers to be computed twice are kept: a device that rounds operands to
     * 16 bits keeps no more of them; GLM_F32: as real. kept_h: the same for what dense_h_to_4h
     * yields, from which backward goes on. */
    enum glm_dtype kept, kept_h;
    /* Memory of the device, 64-byte aligned; alloc returns NULL when there is none. `allocated`
     * counts calls of alloc. */
    void *(*alloc)(struct glm_backend *be, size_t bytes);
    void (*free)(struct glm_backend *be, void *p);
    void (*upload)(struct glm_backend *be, void *device, const void *host, size_t bytes);
    void (*download)(struct glm_backend *be, void *host, const void *device, size_t bytes);
    void (*copy)(struct glm_backend *be, void *to, const void *from, size_t bytes);
    void (*zero)(struct glm_backend *be, void *p, size_t bytes);
    void (*set_threads)(struct glm_backend *be, int threads);
    int (*threads)(struct glm_backend *be);
    /* poll(arg) is called from the thread that called the op, about every 50 ms while an op runs;
     * once it returns non-zero the op skips its remaining work, its outputs are undefined, and
     * stopped() is 1 until set_poll. */
    void (*set_poll)(struct glm_backend *be, int (*poll)(void *arg), void *arg);
    int (*stopped)(struct glm_backend *be);
    void (*destroy)(struct glm_backend *be);
    uint64_t allocated;
    /* Device memory cannot be read by the host: weights are uploaded, not used where they lie. */
    int device_memory;
    /* The first error of the device as a sentence, or NULL; from then on ops do nothing and
     * stopped() is 1. The function is NULL where no such errors exist. */
    const char *(*error)(struct glm_backend *be);
    /* A sequence of ops that comes again: replay(key) returns 1 when it has queued what was
     * recorded for an equal key, and the caller leaves the ops out. Otherwise the caller runs them
     * and calls recorded(). The key names all that the ops' arguments follow from, beside the
     * contents of memory. Freeing memory forgets every recording. NULL: there is no such thing. */
    int (*replay)(struct glm_backend *be, const struct glm_key *key);
    void (*recorded)(struct glm_backend *be);
    /* What was counted since the last call; NULL: this backend does not count. */
    void (*take_counts)(struct glm_backend *be, struct glm_counts *out);
    /* Why alloc returned NULL the last time, as a sentence; NULL where there is no more to say. */
    const char *(*refusal)(struct glm_backend *be);
};

/* "cpu[:ISA][/TYPE]": ISA generic, avx2, avx512 or avx512bf16, else the one that the environment
 * variable GLMLORA_ISA names, else the best; TYPE float32, bfloat16 or int8, of the large products
 * (int8 over int8 weights, bfloat16 over others). "plan" (computes nothing), "ref_f32", "ref_f64";
 * "cuda[:N][/float32|/float16|/bfloat16]", device N and the type of its large products, "emu" for
 * "cuda" without a GPU: from the library that the environment variable GLMLORA_CUDA_LIBRARY names,
 * or the one beside this module. "plan:cuda.." counts what a CUDA device would do. GLM_EVALUE when
 * the name is unknown, this processor lacks the instructions or there is no such library or device.
 */
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

/* The whole name that a short one stands for, which is the name of the backend made from it. */
void glm_backend_name(char full[64], const char *name);

/* One constructor per folder; each returns a reason in err. name: whole, see glm_backend_name. */
glm_status glm_cpu_create(struct glm_backend **out, const char *name, struct glm_error *err);
glm_status glm_plan_create(struct glm_backend **out, const char *name, int cuda,
                           enum glm_dtype compute, struct glm_error *err);
glm_status glm_ref_f32_create(struct glm_backend **out, struct glm_error *err);
glm_status glm_ref_f64_create(struct glm_backend **out, struct glm_error *err);

/* Comma-separated names of the cpu variants this processor runs, best first: "avx2,generic". Static
 * storage. */
const char *glm_cpu_variants(void);

#endif
