/* The model as its files see it: weights in slots, layers that point at them, one step's
 * activations. */
#ifndef GLM_STATE_H
#define GLM_STATE_H

#include "arena.h"
#include "glm.h"

#define GLM_DEFAULT_BUDGET \
    ((size_t)1 << 30) /* activations are kept up to here, beyond it layers are recomputed */

/* One named weight. Vectors (rank 1) are always real and owned; matrices lie where they were mapped
 * until an adapter, a merge or training gives them memory of their own. */
struct glm_weight {
    char name[112];
    enum glm_weight_kind kind;
    int rows, cols, rank;
    int present;        /* LoRA and prefix slots are empty until asked for */
    struct glm_mat mat; /* mat.data NULL: not bound */
    void *owned;        /* freed with the weight; mat.data or NULL */
    void *grad;         /* in the trainable block; NULL: frozen */
    size_t offset;      /* in the trainable block, elements */
};

/* y = x W^T + b + scale (x A^T) B^T; A, B not present: no adapter */
struct glm_linear {
    struct glm_weight *weight, *bias, *A, *B;
    double scale, dropout;
    uint32_t site; /* names the dropout mask */
};

enum { GLM_QKV, GLM_DENSE, GLM_H_TO_4H, GLM_4H_TO_H, GLM_LINEARS };
enum { GLM_LORA_PER_LAYER = 2 * GLM_LINEARS, GLM_PREFIX_WEIGHTS = 5 };

struct glm_layer {
    struct glm_weight *input_layernorm, *post_attention_layernorm;
    struct glm_linear linear[GLM_LINEARS];
};

/* What backward needs of one layer. NR = N rows, except in the last layer, where what follows
 * attention is computed for the M rows that someone reads. Inputs of linears are not here: the
 * norms and the activation yield them again from x, x1 and h, bit for bit and at the memory's
 * speed. The list makes the struct and the memory plan. */
#define BLOCK_ACTS(X) /* name, elements */    \
    X(rstd1, N)                               \
    X(qkv, N *QKV)                            \
    X(att, N *AO)                             \
    X(lse, N *NH)                             \
    X(x1, NR *C)                              \
    X(rstd2, NR)                              \
    X(xa[GLM_QKV], N *rank[GLM_QKV])          \
    X(xa[GLM_DENSE], NR *rank[GLM_DENSE])     \
    X(xa[GLM_H_TO_4H], NR *rank[GLM_H_TO_4H]) \
    X(xa[GLM_4H_TO_H], NR *rank[GLM_4H_TO_H])

struct glm_block_acts {
    void *rstd1, *qkv, *att, *lse, *x1, *rstd2;
    void *h; /* of dense_h_to_4h, (NR, 2 F), as backend.kept_h; NULL: it is in step.h */
    void *xa[GLM_LINEARS]; /* x A^T, kept for dB */
};

/* One call's work: the batch on the device and every buffer, laid out by glm_step_layout. */
struct glm_step {
    int N, S, M, training, gathered, kept_layers;
    int longest; /* tokens of the longest segment */
    int32_t *ids, *position, *stream, *rows, *target, *row_position, *row_stream, *slot;
    int32_t *prefix_position, *prefix_stream; /* (copies * P) */
    struct glm_segment *segments;
    void **x; /* (layers + 1) inputs of the layers, the last their output; on the host */
    void **
        saved; /* (layers) inputs of layers to be computed twice in 16 bits, or NULL; on the host */
    /* (layers), on the host; the last layer and those that are recomputed share one set: in it
     * the last one's are still there when backward begins */
    struct glm_block_acts *acts;
    void *final, *final_rstd; /* after the final norm (MR, C) */
    void *h; /* (N, 2 F) of the layer at work where the layers keep it rounded, else NULL */
    void *logits, *losses, *lse; /* a piece of at most logits_rows rows; all M losses */
    double *squares;             /* behind the losses: of all gradients together */
    int32_t *chosen;             /* (M) ids, generation */
    /* generation, where the likeliest is not chosen: (M), and the ids whose scores change */
    const struct glm_sampling *how; /* NULL elsewhere */
    struct glm_choice *choices;
    int32_t *touched;
    size_t touched_room;
    int logits_rows;
    void *prefix_hidden, *prefix_rows, *prefix_kv; /* (P, H), (P, J*KV), (J, copies*P, KV) */
    /* Inputs of linears, and in their place the gradients on the way up, which are written once the
     * input was read. act spans ln, dqkv and, unless the linear that reads it is adapted, lora_x:
     * those are used when it is not. */
    void *ln, *act, *att_rows, *x_rows; /* (N, C), (N, F), (M, AO), (M, C) */
    void *dnorm, *dact, *datt, *datt_rows, *dx_rows, *dqkv;
    void *dx; /* of the residual stream */
    void *dprefix_rows, *dprefix_hidden, *dprefix_kv;
    void *lora_u, *lora_x; /* (N, max rank), (N, max in) */
    int prefix_copies;
    int use_dropout;
    uint64_t dropout_seed;
    void *host_losses;       /* (M) real and what lies up to squares, staging */
    struct glm_cache *cache; /* generation: where keys and values go; NULL elsewhere */
};

struct glm_model {
    struct glm_arch arch;
    struct glm_backend *be;
    struct glm_weight *weights; /* base, then 8 LoRA slots a layer, then 5 prefix slots */
    int n_base, n_weights;
    struct glm_layer *layers;
    struct glm_weight *word_embeddings, *final_layernorm, *output_layer;
    struct glm_weight
        *prefix; /* embedding, trans.0.weight, trans.0.bias, trans.2.weight, trans.2.bias */
    int prefix_length;
    double prefix_dropout;
    int lora_on;
    void *rope_table; /* (max_positions, rotary_dim / 2, 2) real; rope_rows of them are there */
    int rope_rows;
    int *trainable, n_trainable;
    char *block; /* values, gradients, first and second moments, block_size elements each, and a
                  * double */
    size_t block_size, decaying; /* matrices come first: to so many elements weight decay applies */
    struct glm_progress progress;
    double squares; /* sum of squares of all gradients, where it is known */
    int squares_known;
    uint64_t version; /* grows when weights change, so a cache knows it is stale */
    size_t budget; /* bytes of activations to keep rather than recompute; 0: GLM_DEFAULT_BUDGET */
    struct glm_arena arena;
    char *host; /* staging for index arrays and losses */
    size_t host_size;
    struct glm_step step;
};

static inline int glm_present(const struct glm_weight *w) { return w && w->present; }
static inline int glm_trains(const struct glm_weight *w) { return w && w->grad; }
static inline size_t glm_count(const struct glm_weight *w) { return (size_t)w->rows * w->cols; }
static inline struct glm_linear *glm_linear_at(const struct glm_model *m, int i)
{
    return &m->layers[i / GLM_LINEARS].linear[i % GLM_LINEARS];
}
static inline void *glm_at(const struct glm_model *m, const void *p, size_t element)
{
    return (char *)p + element * m->be->real_size;
}

/* model/linear.c; xa = x A^T, of the dropped x where there is dropout */
void glm_adapter_forward(struct glm_model *m, const struct glm_linear *lin, const void *inp,
                         void *xa, int N, int rows);
void glm_linear_forward(struct glm_model *m, const struct glm_linear *lin, void *out,
                        const void *inp, void *xa, int N, int rows);
void glm_linear_backward(struct glm_model *m, const struct glm_linear *lin, void *dinp,
                         const void *dout, const void *inp, const void *xa, int N, int rows);
int glm_adapted(const struct glm_model *m, const struct glm_linear *lin);
int glm_reads_input(const struct glm_model *m, const struct glm_linear *lin);

/* model/block.c. With x_out the layers run in order: each leaves its output's norm to the next one.
 * x_out NULL: a layer alone, only what the backward pass reads, so not the last product */
void glm_block_forward(struct glm_model *m, int l, void *x_out);
void glm_block_backward(struct glm_model *m, int l, int need_dx);

/* Where generation puts its tokens: segment i continues row rows[i] of the cache, or its shared
 * prefix. */
struct glm_place {
    struct glm_cache *cache;
    const int32_t *rows; /* NULL: the shared prefix */
    const struct glm_sampling *how;
};

/* model/step.c: checks and uploads the batch, takes the memory, runs it. */
glm_status glm_step_begin(struct glm_model *m, const struct glm_input *in, int training, int gather,
                          const struct glm_place *place, struct glm_error *err);
/* Embedding, layers, final norm. hidden: host (layers + 1, N, C) or NULL. */
glm_status glm_step_forward(struct glm_model *m, void *hidden, struct glm_error *err);
/* Logits of `count` rows from `begin` into step.logits. */
void glm_step_logits(struct glm_model *m, int begin, int count);
/* Runs the step again layer by layer and says where numbers stop being finite. */
glm_status glm_step_diagnose(struct glm_model *m, struct glm_error *err);
/* Keys and values that layer l reads besides its own tokens', and their gradients in training. */
struct glm_kv glm_step_kv(const struct glm_model *m, int l);
struct glm_kv glm_step_dkv(const struct glm_model *m, int l);
/* The lowest layer whose gradients are needed; `layers` when only what follows them trains. */
int glm_lowest_layer(const struct glm_model *m);

/* model/arch.c */
glm_status glm_check_arch(const struct glm_arch *a, struct glm_error *err);
void glm_add_weights(struct glm_model *m);

/* model/weights.c */
glm_status glm_weights_complete(struct glm_model *m, struct glm_error *err);
void glm_weight_set(struct glm_weight *w, const void *data, enum glm_dtype dtype);
void glm_weight_release(struct glm_model *m, struct glm_weight *w);
/* An owned real copy of n host elements of a dtype. */
glm_status glm_weight_own(struct glm_model *m, struct glm_weight *w, const void *host,
                          enum glm_dtype dtype, struct glm_error *err);
glm_status glm_refuse_trainable(const struct glm_weight *w, struct glm_error *err);
glm_status glm_refuse_quantized(const struct glm_weight *w, const char *what,
                                struct glm_error *err);

/* model/rope.c */
glm_status glm_make_rope_table(struct glm_model *m, struct glm_error *err);
/* The rotary table has so many positions, or all. */
glm_status glm_rope_reach(struct glm_model *m, int64_t positions, struct glm_error *err);

/* model/batch.c */
size_t glm_host_bytes(const struct glm_model *m, const struct glm_step *s);
glm_status glm_check_input(const struct glm_model *m, const struct glm_input *in,
                           struct glm_error *err);
glm_status glm_upload_batch(struct glm_model *m, const struct glm_input *in,
                            const struct glm_place *place, struct glm_error *err);
void glm_upload_choices(struct glm_model *m, char *staging);

/* model/prefix.c */
void glm_prefix_forward(struct glm_model *m);
void glm_prefix_backward(struct glm_model *m);

/* model/kvcache.c */
struct glm_cache {
    struct glm_model *model;
    struct glm_backend *be; /* outlives the model, so a cache can always be freed */
    int rows, capacity, shared_capacity, shared_length, prefix_length;
    int32_t *lengths; /* (rows) own tokens */
    int slots;        /* prefix, shared prefix, then capacity per row */
    char *kv;         /* (2 * layers, slots, KV) real */
    size_t bytes;
    uint64_t version; /* of the model's weights when it was last empty */
};

#endif
