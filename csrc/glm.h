/* Everything a binding may call. Opaque handles, status codes; no file is ever read here.
 * A model belongs to one caller at a time; the binding enforces it. */
#ifndef GLM_H
#define GLM_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One family as numbers. A family that differs in kind (norm, MLP, residual) adds a field here and
 * one branch in model/norm.c or model/block.c. */
struct glm_arch {
    int layers, hidden, ffn, heads, kv_heads, head_dim, vocab;
    int max_positions, rotary_dim;
    double eps, rope_base, rope_divisor;
    int qkv_bias;
    int half_rope_table;       /* cos and sin as ChatGLM2's float16 code gets them */
    int split_qkv;             /* queries, keys and values are linears of their own */
    int branch_norms;          /* norms of what attention and MLP yield, before it is added */
    int tied_head;             /* the output layer's weight is that of the embeddings */
    int linear_bias;           /* dense, dense_h_to_4h and dense_4h_to_h have biases */
    int layer_norm;            /* LayerNorm with bias, not RMSNorm */
    int gelu;                  /* of ffn columns of dense_h_to_4h, not SwiGLU of 2 ffn */
    int qkv_by_head;           /* query_key_value yields [q | k | v] of one head after the other */
    int half_rope_frequencies; /* the rotary table is exact but for frequencies in float16 */
    /* What a branch is added to: so many times what the norm before it yields; 0: what went into
     * that norm, as it was. */
    double residual_scale;
    int prefix_input; /* columns of P-Tuning's embedding where a projection reads it */
    /* Positions in two dimensions, which follow from a row's ids. The context, all before the first
     * `sop`, is seen from everywhere and has positions 0, 1, .. in block 0; what follows stands at
     * the position of the first `gmask`, or where there is none of the first `mask`, in blocks 1,
     * 2, ..; sop_in_place: but for the first sop after a gmask, whose position is its own. */
    int rope_2d;
    int sop, gmask, mask, sop_in_place;
};

/* What a family's checkpoints call its modules; the names of tensors are made of them, as those of
 * PyTorch are: ".weight", ".bias", ".lora_A.weight" and ".lora_B.weight" follow. */
struct glm_names {
    const char *word_embeddings, *final_layernorm, *output_layer;
    const char *layer; /* with one "{}" where a layer's number stands */
    /* below the layer */
    const char *input_layernorm, *post_attention_layernorm;
    const char *post_self_attn_layernorm, *post_mlp_layernorm; /* NULL but for branch_norms */
    const char *query_key_value;                               /* NULL for split_qkv .. */
    const char *query, *key, *value;                           /* .. which has these */
    const char *dense, *dense_h_to_4h, *dense_4h_to_h;
    const char *prefix_encoder;
};

struct glm_model;
struct glm_cache;

/* names are copied. */
glm_status glm_model_create(struct glm_model **out, const struct glm_arch *arch,
                            const struct glm_names *names, struct glm_backend *be,
                            struct glm_error *err);
void glm_model_free(struct glm_model *m);
struct glm_backend *glm_model_backend(struct glm_model *m);
/* The model to another backend that computes in the same type. The n_left weights `left` are
 * unbound there; every weight that lies with the caller must be among them. Caches made before are
 * of no more use. On failure the model is where it was, as it was. */
glm_status glm_model_move(struct glm_model *m, struct glm_backend *to, const int *left, int n_left,
                          struct glm_error *err);
const struct glm_arch *glm_model_arch(const struct glm_model *m);

/* ---- weights: base ones exist from the start, LoRA and prefix ones come and go */

/* GLM_DERIVED: of the core alone, under no name */
enum glm_weight_kind { GLM_BASE, GLM_LORA, GLM_PREFIX, GLM_DERIVED };

struct glm_weight_info {
    const char *name;
    enum glm_weight_kind kind;
    int rows, cols, rank; /* rank 1: (rows) */
    enum glm_dtype dtype;
    int bound;
    const void *data, *scale; /* where they lie, of memory that may be the caller's */
};

/* i counts all slots; returns 0 past the end, -1 for a slot that is empty now, 1 with info filled.
 */
int glm_model_weight(struct glm_model *m, int i, struct glm_weight_info *info);
/* -1 when there is none of this name. */
int glm_model_find(struct glm_model *m, const char *name);

/* data and scale stay with the caller, alive until the weight is bound again or the model is freed;
 * vectors are copied. */
glm_status glm_model_bind(struct glm_model *m, const char *name, const struct glm_mat *mat,
                          int rank, struct glm_error *err);
/* A (R, in), B (out, R), and NULL or (out), one of them at most: B_bias of lora_bias, the magnitude
 * of DoRA. Real of the backend, copied. */
struct glm_lora {
    const void *A, *B, *B_bias, *magnitude;
    int A_rows, A_cols, B_rows, B_cols;
    double scale, dropout;
};

glm_status glm_model_add_lora(struct glm_model *m, const char *module, const struct glm_lora *lora,
                              struct glm_error *err);
void glm_model_remove_lora(struct glm_model *m);
void glm_model_enable_lora(struct glm_model *m, int on);
/* What is attached goes aside, for rows of caches that are given its number, from 1 on. The model
 * stays on its backend from then on. */
glm_status glm_model_keep_lora(struct glm_model *m, int *number, struct glm_error *err);
glm_status glm_model_merge_lora(struct glm_model *m, struct glm_error *err);

enum { GLM_PREFIX_WEIGHTS = 5 }; /* embedding, weight and bias of trans.0 and of trans.2 */

/* P-Tuning v2, real, copied. w0, b0, w2, b2: NULL without projection. */
glm_status glm_model_set_prefix(struct glm_model *m, int P, const void *embedding, const void *w0,
                                const void *b0, const void *w2, const void *b2, double dropout,
                                struct glm_error *err);
void glm_model_remove_prefix(struct glm_model *m);
/* The name of weight i of GLM_PREFIX_WEIGHTS, whether it is there or not. */
const char *glm_model_prefix_name(const struct glm_model *m, int i);
int glm_model_prefix_length(struct glm_model *m);
/* out (2 * layers, P, kv_heads * head_dim) real */
glm_status glm_model_prefix_kv(struct glm_model *m, void *out, struct glm_error *err);

glm_status glm_model_set_trainable(struct glm_model *m, const int *weights, int n,
                                   struct glm_error *err);
/* Slot numbers in the order in which they were named; returns how many. */
int glm_model_trainable(struct glm_model *m, const int **weights);

enum glm_part { GLM_VALUE, GLM_GRAD, GLM_EXP_AVG, GLM_EXP_AVG_SQ };
/* rows * cols real values to or from the host; GLM_GRAD cannot be written. */
glm_status glm_model_read(struct glm_model *m, int weight, enum glm_part part, void *out,
                          struct glm_error *err);
glm_status glm_model_write(struct glm_model *m, int weight, enum glm_part part, const void *values,
                           struct glm_error *err);

/* ---- running. Flat ids (N), lengths (S); NULL positions: 0.. in each segment, and always with
 * rope_2d; rows (M) ascending flat indices. */

struct glm_input {
    const int32_t *ids, *lengths, *positions, *rows, *targets;
    const int32_t *numbers; /* (S) which row of the update each sequence is; NULL: the next ones */
    int N, S, M;
};

struct glm_plan {
    size_t weights, owned, trainable, activations, total;
    size_t held; /* of the activations: taken already */
    int kept_layers;
};

glm_status glm_model_plan(struct glm_model *m, int N, int S, int M, int training, size_t budget,
                          struct glm_plan *plan, struct glm_error *err);
/* Takes the memory. A training budget also holds for later steps, so that none of at most these
 * sizes takes more. */
glm_status glm_model_reserve(struct glm_model *m, int N, int S, int M, int training, size_t budget,
                             struct glm_error *err);

/* logits (M, V) real, hidden (layers + 1, N, hidden) real or NULL; both on the host. */
glm_status glm_model_forward(struct glm_model *m, const struct glm_input *in, void *logits,
                             void *hidden, struct glm_error *err);
/* out (n, N, hidden) real on the host: what goes into the layers `layers`, ascending numbers;
 * `arch.layers`: what comes out of the last. No layer runs that none of these needs. */
glm_status glm_model_hidden_states(struct glm_model *m, const struct glm_input *in,
                                   const int32_t *layers, int n, void *out, struct glm_error *err);
/* losses (M) real on the host, of targets; no gradient, no dropout */
glm_status glm_model_loss(struct glm_model *m, const struct glm_input *in, void *losses,
                          struct glm_error *err);
/* Adds gradients of the summed loss; *mean_loss of this call. noise: NEFTune's alpha, 0: none. On a device that fails for a loss
 * that is not finite only after the gradients were added. */
glm_status glm_model_backward(struct glm_model *m, const struct glm_input *in,
                              uint64_t dropout_seed, int dropout, double noise, double *mean_loss,
                              struct glm_error *err);

struct glm_adamw {
    double lr, beta1, beta2, eps, weight_decay, max_grad_norm;
    double lora_B_ratio; /* of the rates of lora_B and of all else: LoRA+, Hayou et al. 2024 */
};
struct glm_progress {
    int64_t tokens, rows; /* labelled tokens and segments since zero_grad */
    int steps;            /* finished updates */
};
struct glm_progress *glm_model_progress(struct glm_model *m);
void glm_model_zero_grad(struct glm_model *m);
/* The gradients since zero_grad as one run of reals: sums over the labelled tokens, of which
 * progress.tokens tells the number. All trained weights in the core's own order, with zeros between
 * them: the same in models that train the same weights. n reals from `first` on, to the host and
 * back. */
size_t glm_model_gradient_size(const struct glm_model *m);
glm_status glm_model_read_gradients(struct glm_model *m, size_t first, size_t n, void *out,
                                    struct glm_error *err);
glm_status glm_model_write_gradients(struct glm_model *m, size_t first, size_t n,
                                     const void *values, struct glm_error *err);
glm_status glm_model_grad_norm(struct glm_model *m, double *norm, struct glm_error *err);
glm_status glm_model_step(struct glm_model *m, const struct glm_adamw *opt, double *norm,
                          struct glm_error *err);

/* Factor on the learning rate after k finished updates; negative for an unknown kind. */
double glm_lr_factor(const char *kind, int64_t k, int64_t warmup, int64_t total,
                     double learning_rate);

/* ---- generation */

glm_status glm_cache_create(struct glm_cache **out, struct glm_model *m, int rows, int capacity,
                            int shared_capacity, struct glm_error *err);
void glm_cache_free(struct glm_cache *c);
struct glm_cache_info {
    int rows, capacity, shared_length;
    const int32_t *lengths; /* (rows) */
    size_t bytes;
    int current; /* 0: it holds tokens of weights that changed since */
};
void glm_cache_get(struct glm_cache *c, struct glm_cache_info *info);
struct glm_backend *glm_cache_backend(const struct glm_cache *c); /* whose memory it has */
glm_status glm_cache_rewind(struct glm_cache *c, int row, int length, struct glm_error *err);
glm_status glm_cache_reorder(struct glm_cache *c, const int32_t *parents, struct glm_error *err);
/* Row `to` begins with the first `length` tokens of row `from`, and has no others. */
glm_status glm_cache_copy(struct glm_cache *c, int from, int to, int length, struct glm_error *err);
/* An empty row, or with -1 all rows and the shared prefix, computes with an adapter that was kept; 0:
 * with what is attached. */
glm_status glm_cache_adapt(struct glm_cache *c, int row, int number, struct glm_error *err);
/* Room for more tokens in each row; what the cache holds stays. */
glm_status glm_cache_grow(struct glm_cache *c, int capacity, struct glm_error *err);
/* logits (n, V) real on the host: after the last token of each of the n rows, which are distinct.
 * With rope_2d the first call for a row has its whole context, and a row cannot be rewound into it;
 * nothing can be shared. */
glm_status glm_cache_extend(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                            const int32_t *lengths, void *logits, struct glm_error *err);
/* How the next tokens of n rows are chosen (struct glm_choice in backend.h): the same draw for any
 * thread count, and for a row whatever the other rows do. */
struct glm_sampling {
    double temperature, top_p; /* temperature 0: argmax */
    int top_k;
    const uint64_t *draws; /* (n, 3): seed, stream and index of each row's random number */
    /* of each row the ids before its next one, one run after another; NULL: scores stay as they are
     */
    const int32_t *context, *context_lengths;
    double repetition_penalty;
    int no_repeat_ngram;
    const int32_t *suppress; /* (n_suppress): not chosen before min_length ids of context */
    int n_suppress, min_length;
};
/* As extend, and only the ids that are chosen after each of the n rows come back: next (n). how
 * NULL: argmax. */
glm_status glm_cache_next(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                          const int32_t *lengths, const struct glm_sampling *how, int32_t *next,
                          struct glm_error *err);
/* As next of one token a row (lengths: ones) with how NULL, then of those that were chosen, again and
 * again: next (most, n), of which *count, 0 before, rows are found. It ends after `most` times, after
 * one in which an id is one of `ends`, and when the clock of glm_milliseconds has moved on. */
glm_status glm_cache_go_on(struct glm_cache *c, const int32_t *rows, int n, const int32_t *ids,
                           const int32_t *ones, int most, const int32_t *ends, int n_ends,
                           int32_t *next, int *count, struct glm_error *err);
glm_status glm_cache_extend_shared(struct glm_cache *c, const int32_t *ids, int n,
                                   struct glm_error *err);

/* ---- scores to tokens; float on the host, scratch (n) pairs from the caller */

struct glm_scored {
    float score;
    int32_t id;
};
/* The ids below n whose scores change: of the context (none when the penalty is 1), then those that
 * may not come, each once in its run. ids: room for 2 * n_context + n_suppress; seen: (n) bytes of
 * scratch. */
void glm_touched_ids(int32_t *ids, int *penalised, int *banned, int n, const int32_t *context,
                     int n_context, double repetition_penalty, int no_repeat_ngram,
                     const int32_t *suppress, int n_suppress, unsigned char *seen);
void glm_warp_logits(float *probs, const float *logits, int n, double temperature, int top_k,
                     double top_p, int min_keep, struct glm_scored *scratch);
int glm_draw(const float *probs, int n, uint64_t seed, uint32_t stream, uint32_t index);
int glm_argmax(const float *logits, int n);

/* ---- weights as ggml stores them: blocks of 32 values, a float16 scale and integers */

#define GLM_GGML_BLOCK 32
/* Of a block in 8 bits (Q8_0) or 4 (Q4_0). */
static inline size_t glm_ggml_block_bytes(int bits) { return (size_t)(2 + 4 * bits); }
/* out (blocks, glm_ggml_block_bytes), x (blocks, 32). The first two bytes of a block, its scale in
 * float16, stay as they are: scale (blocks) has them. 0 where a value is not finite or a scale is
 * beyond float16: out is then not whole. */
int glm_ggml_blocks(uint8_t *out, float *scale, const float *x, size_t blocks, int bits);

#ifdef __cplusplus
}
#endif
#endif
