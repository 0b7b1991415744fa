/* The state of a model as the files of model/ see it: weights in slots, layers that point at them,
 * and one step's batch and activations. Functions follow at the end, file by file, in the order in
 * which a step uses them; a file calls only those above it. */
#ifndef GLM_STATE_H
#define GLM_STATE_H

#include "arena.h"
#include "glm.h"

/* Activations are kept up to so many bytes; beyond them layers are recomputed. */
#define GLM_DEFAULT_BUDGET ((size_t)1 << 30)

/* ---- weights */

enum { GLM_MAX_NAME = 112 }; /* bytes of a weight's name and its end */

/* One named weight. Vectors (rank 1) are always real and owned; matrices lie where they were mapped
 * until an adapter, a merge or training gives them memory of their own. */
struct glm_weight {
    char name[GLM_MAX_NAME];
    enum glm_weight_kind kind;
    int rows, cols, rank;
    int present;        /* LoRA and prefix slots are empty until asked for */
    struct glm_mat mat; /* mat.data NULL: not bound */
    void *owned;        /* freed with the weight; mat.data or NULL */
    void *grad;         /* in the trainable block; NULL: frozen */
    size_t offset;      /* in the trainable block, elements */
};

/* y = x W^T + b + scale (x A^T) B^T; A, B not present: no adapter. With lora_bias scale * B_bias is
 * added, with DoRA all but b is divided by the norm of its row of W + scale B A, and multiplied by
 * the magnitude. derived: (out + 1), b + scale * B_bias or 1 / norm, then a one; as new as the
 * model's derived_version. */
struct glm_linear {
    struct glm_weight *weight, *bias, *A, *B, *B_bias, *magnitude, *derived;
    double scale, dropout;
    uint32_t site; /* names the dropout mask */
};

/* A, B, B_bias, magnitude, derived */
enum { GLM_LORA_SLOTS = 5 };

/* out = norm of inp: RMSNorm, or with a bias LayerNorm */
struct glm_norm {
    struct glm_weight *weight, *bias;
};

/* GLM_QKV: query_key_value, or the queries' where keys and values have linears of their own. */
enum { GLM_QKV, GLM_DENSE, GLM_H_TO_4H, GLM_4H_TO_H, GLM_K, GLM_V, GLM_LINEARS };

/* What is added to the residual stream, and may be normed before. */
enum { GLM_ATTENTION, GLM_MLP, GLM_BRANCHES };

struct glm_layer {
    struct glm_norm input_layernorm, post_attention_layernorm;
    struct glm_norm branch_norm[GLM_BRANCHES]; /* weight NULL: without */
    struct glm_linear linear[GLM_LINEARS];     /* weight NULL: not of this model */
};

/* ---- one step */

/* Rows of an activation, and what the dropout masks of each are functions of: the position of its
 * token, and the number of its sequence in the update. */
struct glm_rows {
    int n;
    int32_t *position, *sequence; /* (n) each */
};

/* What backward needs of one layer. NR = N rows, except in the last layer, where what follows
 * attention is computed for the M rows that someone reads; NB = NR, or 0 where branches have no
 * norm; NM, NRM and NBM = N, NR and NB with LayerNorm, else 0; UP: columns of h; NA: rows of reals
 * with room for N of qkv and att (glm_attention_room). Inputs of linears are not here: the norms and
 * the activation yield them again from x, x1 and h, bit for bit and at the memory's speed. The list
 * makes the struct and the memory plan. */
/* clang-format off */
#define BLOCK_ACTS(X) /* name, elements */     \
    X(mean1, NM)                               \
    X(rstd1, N)                                \
    X(qkv, NA * QKV)                           \
    X(att, NA * AO)                            \
    X(lse, N * NH)                             \
    X(x1, NR * C)                              \
    X(mean2, NRM)                              \
    X(rstd2, NR)                               \
    X(xa[GLM_QKV], N * rank[GLM_QKV])          \
    X(xa[GLM_DENSE], NR * rank[GLM_DENSE])     \
    X(xa[GLM_H_TO_4H], NR * rank[GLM_H_TO_4H]) \
    X(xa[GLM_4H_TO_H], NR * rank[GLM_4H_TO_H]) \
    X(xa[GLM_K], N * rank[GLM_K])              \
    X(xa[GLM_V], N * rank[GLM_V])              \
    X(branch[GLM_ATTENTION], NB * C)           \
    X(branch_mean[GLM_ATTENTION], NBM)         \
    X(branch_rstd[GLM_ATTENTION], NB)          \
    X(branch[GLM_MLP], NB * C)                 \
    X(branch_mean[GLM_MLP], NBM)               \
    X(branch_rstd[GLM_MLP], NB)
/* clang-format on */

struct glm_block_acts {
    void *mean1, *rstd1, *qkv, *att, *lse, *x1, *mean2, *rstd2;
    void *h; /* of dense_h_to_4h, (NR, UP), as backend.kept_h; NULL: it is in step.h */
    void *xa[GLM_LINEARS]; /* x A^T, kept for dB */
    void *branch[GLM_BRANCHES], *branch_mean[GLM_BRANCHES], *branch_rstd[GLM_BRANCHES];
};

/* The arrays of a batch, in the order in which they lie on the device and, at the same distances, on
 * the host: one upload copies them. Targets are last: not every call has them. */
/* clang-format off */
#define BATCH(X)                   /* name, elements */ \
    X(segments, s->S)                                   \
    X(ids, s->N)                                        \
    X(all.position, s->N)                               \
    X(all.sequence, s->N)                               \
    X(at, s->in_blocks ? s->N : 0)                      \
    X(block, s->in_blocks ? s->N : 0)                   \
    X(slot, s->call.cache ? s->N : 0)                   \
    X(gather, s->M)                                     \
    X(read.position, s->M)                              \
    X(read.sequence, s->M)                              \
    X(prefix.position, s->prefix.n)                     \
    X(prefix.sequence, s->prefix.n)                     \
    X(choices, s->call.sampling ? s->M : 0)             \
    X(target, s->M)
/* clang-format on */

/* What the host prepares for a step, and what it reads back: the host's half of struct glm_step,
 * under the same names, in one block that batch.c lays out as step.c does the device's. */
struct glm_staging {
    struct glm_segment *segments; /* (S) */
    struct glm_rows all, read, prefix;
    int32_t *ids, *at, *block, *slot, *gather, *target;
    double *squares; /* results, see glm_results_layout */
    void *losses;
    struct glm_choice *choices;
    int32_t *touched;
    unsigned char *seen; /* (V) scratch of glm_touched_ids */
};

/* What a step is for. */
struct glm_call {
    int training;          /* backward follows */
    int gather;            /* only rows that someone reads go through the end of the last layer */
    int dropout;           /* training only */
    uint64_t dropout_seed; /* and of the noise */
    double noise;          /* NEFTune's alpha; 0: none */
    /* Generation, else NULL: segment i continues row cache_rows[i] of the cache, or, where that is
     * NULL, its shared prefix. */
    struct glm_cache *cache;
    const int32_t *cache_rows;
    const struct glm_sampling *sampling; /* NULL: argmax, or logits are wanted */
};

/* One call's work: the batch on the device and every buffer, laid out by step.c. */
struct glm_step {
    int N, S, M;
    struct glm_call call;
    int gathered;  /* M < N rows go through the end of the last layer */
    int in_blocks; /* rope_2d */
    int kept_layers;
    int longest, shortest; /* tokens of the longest segment and of the shortest */
    int prefix_copies;
    int several; /* some rows have adapters that are kept (model/kept.c) */

    /* the batch */
    int32_t *ids, *slot;      /* (N); slot: cache row of each token's key and value */
    int32_t *at, *block;      /* (N) with rope_2d: its two positions; of all, below, its place */
    struct glm_rows all;      /* the N tokens */
    struct glm_rows read;     /* the M rows whose logits someone reads */
    int32_t *gather, *target; /* (M) their places in the batch, and labels */
    struct glm_rows prefix;   /* of the prefix encoder, copies * P */
    struct glm_segment *segments;

    /* forward */
    void **x; /* (layers + 1) inputs of the layers, the last their output; on the host */
    /* (layers) inputs of layers to be recomputed in 16 bits, or NULL; on the host */
    void **saved;
    /* (layers), on the host; the last layer and those that are recomputed share one set: in it
     * the last one's are still there when backward begins */
    struct glm_block_acts *acts;
    void *final, *final_mean, *final_rstd; /* after the final norm (MR, C) */
    void *h; /* (N, UP) of the layer at work where the layers keep it rounded, else NULL */
    void *logits, *lse; /* a chunk of at most logits_rows rows; (M) */
    double *squares;    /* results: of all gradients together .. */
    void *losses;       /* .. and (M), see glm_results_layout */
    int logits_rows;
    void *head_xa; /* x A^T of the chunk, where the head has an adapter */
    void *prefix_hidden, *prefix_rows, *prefix_kv; /* (P, H), (P, J*KV), (J, copies*P, KV) */
    /* Inputs of linears, and in their place the gradients on the way up: step.c draws when. */
    void *ln, *act, *att_rows, *x_rows; /* (N, C), (N, F), (M, AO), (M, C) */
    /* split_qkv: (N, AO), (N, KV) twice; qkv_by_head: q (N, QKV); and in their place gradients */
    void *q, *k, *v;
    int fused_swiglu; /* ln lies apart from act, so dense_h_to_4h and the activation are one op */

    /* backward; dx: of the residual stream; dprefix_kv NULL: the prefix is frozen */
    void *dnorm, *dact, *datt, *datt_rows, *dx_rows, *dqkv, *dx;
    void *dln1;    /* of the first norm's output: dnorm, or where it adds up of q, k and v */
    void *dbranch; /* (N, C), where branches have norms */
    void *dprefix_rows, *dprefix_hidden, *dprefix_kv;
    void *lora_u, *lora_x; /* (N, max rank), (N, max in) */
    void *dora;            /* (N, max out) of the linears with a magnitude */

    /* the choice of tokens: (M) ids, and where it is not argmax (M) choices and the ids whose
     * scores change */
    int32_t *chosen;
    struct glm_choice *choices;
    int32_t *touched;
    size_t touched_room;

    struct glm_staging host;
};

/* ---- the model */

struct glm_model {
    struct glm_arch arch;
    struct glm_backend *be;
    /* base, then GLM_LORA_SLOTS a linear, then 5 prefix slots */
    struct glm_weight *weights;
    int n_base, n_weights;
    struct glm_layer *layers; /* and one more, whose first linear is the head */
    struct glm_weight *word_embeddings;
    struct glm_norm final_layernorm;
    struct glm_linear *head;   /* output_layer, or where it is tied word_embeddings; its adapter */
    struct glm_weight *prefix; /* GLM_PREFIX_WEIGHTS */
    int prefix_length;
    double prefix_dropout;
    int lora_on;
    struct glm_kept *kept; /* (n_kept); number k of glm_model_keep_lora is kept[k - 1] */
    int n_kept;
    void *rope_table; /* (max_positions, rotary_dim / 2, 2) real; rope_rows of them are there */
    int rope_rows;
    int *trainable, n_trainable;
    /* values, gradients, first and second moments, block_size elements each, and a double */
    char *block;
    size_t block_size, decaying; /* matrices come first: to so many elements weight decay applies */
    struct glm_progress progress;
    double squares; /* sum of squares of all gradients, where it is known */
    int squares_known;
    uint64_t version;         /* grows when weights change, so a cache knows it is stale */
    uint64_t derived_version; /* of the weights from which the adapters' `derived` were made */
    size_t budget; /* bytes of activations to keep rather than recompute; 0: GLM_DEFAULT_BUDGET */
    struct glm_arena arena, host; /* of the step: activations on the device, staging on the host */
    struct glm_step step;
};

/* An adapter that is not attached: its linears, as numbered by glm_linear_at, and their slots. */
struct glm_kept {
    struct glm_linear *linears;
    struct glm_weight *slots;
};

struct glm_cache {
    struct glm_model *model;
    struct glm_backend *be; /* outlives the model, so a cache can always be freed */
    int rows, capacity, shared_capacity, shared_length, prefix_length;
    int32_t
        *lengths; /* (rows) own tokens; contexts, masks, adapters, one block with it, go along */
    /* With rope_2d, of each row that holds any: tokens of its context, and the position of what
     * follows. */
    int32_t *contexts, *masks;
    int32_t *adapters;  /* of each row, 0: the one that is attached, if any .. */
    int shared_adapter; /* .. and of the shared prefix */
    int slots;          /* prefix, shared prefix, then capacity per row */
    char *kv;           /* (2 * layers, slots, KV) real */
    size_t bytes;
    uint64_t version; /* of the model's weights when it was last empty */
};

static inline int glm_present(const struct glm_weight *w) { return w && w->present; }
static inline int glm_trains(const struct glm_weight *w) { return w && w->grad; }
/* Columns that dense_h_to_4h yields */
static inline int glm_up_columns(const struct glm_arch *a) { return a->gelu ? a->ffn : 2 * a->ffn; }
static inline size_t glm_count(const struct glm_weight *w) { return (size_t)w->rows * w->cols; }
/* The places of linears that may have an adapter: in the layers, where some have no weight, and the
 * head as the last. */
static inline int glm_n_linears(const struct glm_model *m)
{
    return m->arch.layers * GLM_LINEARS + 1;
}
static inline struct glm_linear *glm_linear_at(const struct glm_model *m, int i)
{
    return &m->layers[i / GLM_LINEARS].linear[i % GLM_LINEARS];
}
/* Numbers of dropout masks, which say what is trained: those of the first four linears of every
 * layer, of the prefix encoder, of the head, then of keys and values that are apart. */
enum { GLM_NOISE_SITE = -1 }; /* far from them: of the noise on the embeddings */
static inline uint32_t glm_prefix_site(const struct glm_arch *a) { return 4 * (uint32_t)a->layers; }
static inline uint32_t glm_site(const struct glm_arch *a, int l, int which)
{
    return which < GLM_K ? (uint32_t)(4 * l + which)
                         : glm_prefix_site(a) + 2 + (uint32_t)(2 * l + which - GLM_K);
}
static inline void *glm_at(const struct glm_model *m, const void *p, size_t element)
{
    return (char *)p + element * m->be->real_size;
}

/* model/rope.c: the rotary table. It has so many positions, or all, afterwards. */
glm_status glm_rope_create(struct glm_model *m, struct glm_error *err);
glm_status glm_rope_reach(struct glm_model *m, int64_t positions, struct glm_error *err);

/* model/weights.c */
glm_status glm_weights_complete(struct glm_model *m, struct glm_error *err);
/* An owned real copy of n host elements of a dtype. */
glm_status glm_weight_own(struct glm_model *m, struct glm_weight *w, const void *host,
                          enum glm_dtype dtype, struct glm_error *err);
void glm_weight_set(struct glm_weight *w, const void *data, enum glm_dtype dtype);
void glm_weight_release(struct glm_model *m, struct glm_weight *w);
glm_status glm_refuse_trainable(const struct glm_weight *w, struct glm_error *err);
glm_status glm_refuse_quantized(const struct glm_weight *w, const char *what,
                                struct glm_error *err);

/* model/arch.c: checks numbers and names; how many slots of weights; fills them and the layers */
glm_status glm_arch_check(const struct glm_arch *a, const struct glm_names *names,
                          struct glm_error *err);
size_t glm_arch_slots(const struct glm_arch *a);
void glm_arch_add_weights(struct glm_model *m, const struct glm_names *names);

/* model/batch.c */
glm_status glm_batch_check(const struct glm_model *m, const struct glm_input *in,
                           struct glm_error *err);
/* The sum of squares and, right behind it, M losses: one download brings both. */
void glm_results_layout(struct glm_arena *arena, double **squares, void **losses, size_t M,
                        size_t real_size);
void glm_staging_layout(const struct glm_model *m, struct glm_arena *host, struct glm_step *s);
/* Fills the host's arrays for the step's call and uploads them. */
glm_status glm_batch_upload(struct glm_model *m, const struct glm_input *in, struct glm_error *err);

/* model/step.c: checks and uploads the batch, takes the memory. */
glm_status glm_step_begin(struct glm_model *m, const struct glm_input *in,
                          const struct glm_call *call, struct glm_error *err);
/* The lowest layer whose gradients are needed; `layers` when only what follows them trains. */
int glm_lowest_layer(const struct glm_model *m);

/* model/prefix.c */
void glm_prefix_forward(struct glm_model *m);
void glm_prefix_backward(struct glm_model *m);

/* model/norm.c; mean NULL but for LayerNorm. Backward adds to dinp. */
void glm_norm_forward(struct glm_model *m, const struct glm_norm *norm, void *out, void *mean,
                      void *rstd, const void *inp, int N);
void glm_norm_backward(struct glm_model *m, const struct glm_norm *norm, void *dinp,
                       const void *dout, const void *inp, const void *mean, const void *rstd,
                       int N);
int glm_norm_trains(const struct glm_norm *norm);
/* sum, which holds what a branch yields, plus the residual, and the norm of that. The residual is
 * what went into the branch's norm, or with residual_scale what that yielded. */
void glm_residual_forward(struct glm_model *m, const struct glm_norm *norm, void *out, void *mean,
                          void *rstd, void *sum, const void *residual, int N);
/* Of dout, the gradient of that sum, into the gradient dinp of the branch's norm's input, which is
 * dout's memory; dnorm: that of what the norm yields, by way of the branch. */
void glm_residual_backward(struct glm_model *m, const struct glm_norm *norm, void *dout,
                           void *dnorm, const void *inp, const void *mean, const void *rstd, int N);

/* model/kept.c: adapters of rows. The linear with the adapter of a number in place of its own. */
void glm_kept_free(struct glm_model *m);
const struct glm_linear *glm_kept_linear(const struct glm_model *m, const struct glm_linear *lin,
                                         int number);
/* Whether a call has rows of adapters that are kept. */
int glm_several_adapters(const struct glm_step *s);
/* Rows `begin` .. + count of one adapter; from {0} on the next such run of `rows`, 0 past the end. */
struct glm_run_of_rows {
    int begin, count, adapter, next;
};
int glm_next_run(const struct glm_model *m, const struct glm_rows *rows, struct glm_run_of_rows *r);

/* model/linear.c; xa = x A^T, of the dropped x where there is dropout, whose mask is glm_mask_of */
struct glm_dropout glm_mask_of(const struct glm_model *m, const struct glm_linear *lin,
                               const struct glm_rows *rows);
void glm_adapter_forward(struct glm_model *m, const struct glm_linear *lin, const void *inp,
                         void *xa, const struct glm_rows *rows);
void glm_linear_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                        const void *inp, void *xa, const struct glm_rows *rows);
void glm_linear_backward(struct glm_model *m, const struct glm_linear *lin, void *dinp,
                         const void *dout, const void *inp, const void *xa,
                         const struct glm_rows *rows, int accumulate);
int glm_adapted(const struct glm_model *m, const struct glm_linear *lin);
/* Whether backward is the product with the weight alone. */
int glm_is_frozen(const struct glm_model *m, const struct glm_linear *lin);
/* Whether backward reads xa. */
int glm_reads_xa(const struct glm_linear *lin);
/* Makes `derived` of every adapter anew where weights have changed. */
void glm_adapters_derive(struct glm_model *m);
int glm_reads_input(const struct glm_model *m, const struct glm_linear *lin);

/* model/block.c. Forward runs the layers in order: each leaves its output in x[l + 1], and that
 * one's norm to the next. Recompute runs one alone, only what backward reads. */
void glm_block_forward(struct glm_model *m, int l);
void glm_block_recompute(struct glm_model *m, int l);
void glm_block_backward(struct glm_model *m, int l, int need_dx);
/* Rows of reals that a step of n rows needs for h of layer l, and for its qkv and att. */
size_t glm_mlp_room(const struct glm_model *m, const struct glm_step *s, int l, int n);
size_t glm_attention_room(const struct glm_model *m, const struct glm_step *s, int l, int n);

/* model/model.c. Embedding, layers, final norm. */
glm_status glm_layers_forward(struct glm_model *m, struct glm_error *err);
/* Runs them again and says after which numbers stop being finite. */
glm_status glm_layers_diagnose(struct glm_model *m, struct glm_error *err);
/* Logits of `count` rows from `begin` into step.logits. */
void glm_logits_forward(struct glm_model *m, int begin, int count);

#endif
