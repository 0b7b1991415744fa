/* The op table: everything the model asks of a device, each op once. To be included, any number of
 * times, with a macro of your own:
 *
 *   OP(name, extent, parameters)     where extent is 0 there is nothing to do
 *
 * struct glm_ops (backend.h) is made of it, every backend's table, what "plan" counts, and the
 * functions that the tests call. Every op takes `void *cx` before its parameters.
 *
 * "real" is the element type of activations, vectors (norm weights, biases), trainable parameters,
 * gradients and the KV cache: float on cpu, float or double in the reference. Its size is
 * glm_backend.real_size. A `void *` is an array of it; a `glm_stored *` is one of the dtype that is
 * given beside it. Weights are glm_mat in any stored dtype; arithmetic is in real. Index and id
 * arrays are int32 and checked before an op sees them. Ops cannot fail and allocate nothing.
 *
 * Unless "+=" is written, an output is overwritten and aliases no input. An element's value may not
 * depend on N, on the other rows, or on the number of threads, bit for bit.
 *
 *   N tokens    C channels    I, O input and output features    F half the outputs of h_to_4h
 *   M rows      V vocabulary  HD head size, NH and KVH heads    R rank of an adapter */
/* clang-format off */

/* ---- embedding */

/* out[n] = weight[ids[n]]
 *   out (N, C)   weight (V, C)   ids (N) */
OP(embedding_forward, N,
   void *out, const struct glm_mat *weight, const int32_t *ids, int N)
/* dweight[ids[n]] += dout[n], n ascending */
OP(embedding_backward, N,
   void *dweight, const void *dout, const int32_t *ids, int N, int C)

/* ---- norms: Zhang & Sennrich 2019, eq. 4; Ba et al. 2016 */

/* out = inp * rstd * weight,  rstd = (mean_C(inp^2) + eps)^-1/2
 *   out, inp (N, C)   weight (C)   rstd (N), kept for backward */
OP(rmsnorm_forward, N,
   void *out, void *rstd, const void *inp, const void *weight, int N, int C, double eps)
/* sum = a + b,  out = rmsnorm(sum): bit for bit as `add` and `rmsnorm_forward` give them
 *   sum, a, b (N, C); sum may be a or b */
OP(add_rmsnorm_forward, N,
   void *out, void *rstd, void *sum, const void *a, const void *b, const void *weight,
   int N, int C, double eps)
/* With g = dout * weight:
 *   dinp    += rstd * g - inp * rstd^3 * mean_C(g * inp)
 *   dweight += sum_N(dout * inp * rstd)      skipped when NULL: a frozen norm costs nothing */
OP(rmsnorm_backward, N,
   void *dinp, void *dweight, const void *dout, const void *inp, const void *weight,
   const void *rstd, int N, int C)

/* out = (inp - mean) * rstd * weight + bias,  rstd = (mean_C((inp - mean)^2) + eps)^-1/2
 *   out, inp (N, C)   weight, bias (C)   mean, rstd (N), kept for backward */
OP(layernorm_forward, N,
   void *out, void *mean, void *rstd, const void *inp, const void *weight, const void *bias,
   int N, int C, double eps)
/* With xhat = (inp - mean) * rstd and g = dout * weight:
 *   dinp    += rstd * (g - mean_C(g) - xhat * mean_C(g * xhat))
 *   dweight += sum_N(dout * xhat)      either may be NULL
 *   dbias   += sum_N(dout) */
OP(layernorm_backward, N,
   void *dinp, void *dweight, void *dbias, const void *dout, const void *inp, const void *weight,
   const void *mean, const void *rstd, int N, int C)

/* ---- linear. The sum over I (forward), O (input) or N (weight) is never split over threads. */

/* out = scale * inp W^T + bias  (+ out when accumulate)
 *   out (N, O)   inp (N, I)   W (O, I)   bias (O) or NULL */
OP(linear_forward, N,
   void *out, const void *inp, const struct glm_mat *weight, const void *bias,
   int N, double scale, int accumulate)
/* dinp = scale * dout W  (+ dinp when accumulate) */
OP(linear_backward_input, N,
   void *dinp, const void *dout, const struct glm_mat *weight,
   int N, double scale, int accumulate)
/* dweight += scale * dout^T inp            either may be NULL
 * dbias   += scale * sum_N(dout)
 *   dweight (O, I)   dbias (O) */
OP(linear_backward_weight, N,
   void *dweight, void *dbias, const void *dout, const void *inp, int N, int O, int I, double scale)

/* out = inp W^T + bias + scale * xa B^T: as `linear_forward` gives it with W and then, added, B
 *   xa (N, R)   B (O, R) real */
OP(adapted_forward, N,
   void *out, const void *inp, const struct glm_mat *weight, const void *bias,
   const void *xa, const struct glm_mat *B, int N, double scale)
/* out = swiglu_forward of h = inp W^T + bias
 *   out (N, F)   W (2F, I)   h (N, 2F): its contents are undefined */
OP(linear_swiglu_forward, N,
   void *out, void *h, const void *inp, const struct glm_mat *weight, const void *bias, int N)

/* The same of inp's norm: h = rmsnorm_forward(inp) W^T + bias
 *   norm (I)   ln (N, I), rstd (N): their contents are undefined */
OP(rmsnorm_swiglu_forward, N,
   void *out, void *h, void *ln, void *rstd, const void *inp, const void *norm,
   const struct glm_mat *weight, const void *bias, int N, double eps)

/* ---- DoRA: Liu et al. 2024, eq. 5. An output of a linear layer with an adapter is divided by the
 * norm of its row of weights, a constant to the gradient (section 4.3), and gets a magnitude that is
 * trained. */

/* rnorm[o] = 1 / sqrt(sum_I((W + scale * B A)[o]^2))
 *   rnorm (O)   W (O, I)   B (O, R)   A (R, I), real */
OP(dora_norm, weight->rows,
   void *rnorm, const struct glm_mat *weight, const void *B, const void *A, int R, double scale)
/* out = magnitude * rnorm * inp + bias
 *   out, inp (N, O); out may be inp   magnitude, rnorm (O)   bias (O) or NULL */
OP(dora_forward, N,
   void *out, const void *inp, const void *magnitude, const void *rnorm, const void *bias,
   int N, int O)
/* dmagnitude += rnorm * sum_N(dout * inp)      skipped when NULL, and inp is not read then
 * dinp        = magnitude * rnorm * dout       may be inp */
OP(dora_backward, N,
   void *dinp, void *dmagnitude, const void *dout, const void *inp, const void *magnitude,
   const void *rnorm, int N, int O)

/* ---- rotary embedding: Su et al. 2021, eq. 34, pairs adjacent */

/* Of the first `heads` heads of each row the pairs (2j, 2j+1), j < rotary_dim/2, are rotated in
 * place by the angle of the row's position:
 *   x0' = x0 cos - x1 sin,  x1' = x1 cos + x0 sin
 *   x (N, stride)   table (positions, rotary_dim/2, 2): cos, sin   position (N) */
OP(rope_forward, N,
   void *x, const void *table, const int32_t *position,
   int N, int heads, int HD, int stride, int rotary_dim)
/* The same with -sin: the gradient of a rotation is the inverse rotation. */
OP(rope_backward, N,
   void *dx, const void *table, const int32_t *position,
   int N, int heads, int HD, int stride, int rotary_dim)

/* In two dimensions (ChatGLM-6B): of the first `heads` heads of each row the pairs (j, j + HD/4),
 * j < HD/4, are rotated in place by the angle of position[n], the pairs (HD/2 + j, HD/2 + j + HD/4)
 * by that of block[n]; HD is a multiple of 4
 *   x (N, stride)   table (positions, HD/4, 2): cos, sin   position, block (N) */
OP(rope_2d_forward, N,
   void *x, const void *table, const int32_t *position, const int32_t *block,
   int N, int heads, int HD, int stride)
/* The same with -sin. */
OP(rope_2d_backward, N,
   void *dx, const void *table, const int32_t *position, const int32_t *block,
   int N, int heads, int HD, int stride)

/* ---- attention */

/* out = softmax(q k^T / sqrt(HD)) v over what each token's segment lets it see (glm_segment)
 *   out (N, NH*HD)   lse (N, NH): log sum exp of the scaled scores, kept for backward
 *   qkv (N, (NH+2*KVH)*HD), queries and keys rotated
 *   cache: rows named by the segments; NULL pointers if none */
OP(attention_forward, n_segments,
   void *out, void *lse, const void *qkv, struct glm_kv cache,
   const struct glm_segment *segments, int n_segments, struct glm_heads heads)
/* dqkv    = gradient of qkv
 * dcache += gradient of the cache rows (k and v) of shared ranges; past rows get none
 *           skipped when its pointers are NULL */
OP(attention_backward, n_segments,
   void *dqkv, struct glm_kv dcache, const void *dout, const void *out, const void *lse,
   const void *qkv, struct glm_kv cache,
   const struct glm_segment *segments, int n_segments, struct glm_heads heads)

/* qkv[n] = [q[n] | k[n] | v[n]], where queries, keys and values are products apart
 *   qkv (N, (NH+2*KVH)*HD)   q (N, NH*HD)   k, v (N, KVH*HD) */
OP(qkv_forward, N,
   void *qkv, const void *q, const void *k, const void *v, int N, struct glm_heads heads)
/* dq, dk, dv = their columns of dqkv */
OP(qkv_backward, N,
   void *dq, void *dk, void *dv, const void *dqkv, int N, struct glm_heads heads)

/* qkv[n] = [all q | all k | all v] of a row that holds [q | k | v] of one head after the other
 *   qkv, inp (N, 3*NH*HD)   KVH == NH */
OP(qkv_by_head_forward, N,
   void *qkv, const void *inp, int N, struct glm_heads heads)
/* dinp = the columns of dqkv, each where inp had it */
OP(qkv_by_head_backward, N,
   void *dinp, const void *dqkv, int N, struct glm_heads heads)

/* cache row slot[n] = key and value of row n of qkv
 *   qkv (N, (NH+2*KVH)*HD)   slot (N) */
OP(kv_append, N,
   struct glm_kv cache, const void *qkv, const int32_t *slot, int N, struct glm_heads heads)
/* rope_forward of the queries and keys of qkv in place, then kv_append: for generation, where
 * nothing goes back */
OP(rope_append, N,
   struct glm_kv cache, void *qkv, const void *table, const int32_t *position,
   const int32_t *slot, int N, struct glm_heads heads, int rotary_dim)

/* qkv = inp W^T + bias as `linear_forward` gives it, then rope_append of it
 *   inp (N, I)   W ((NH+2*KVH)*HD, I)   bias or NULL */
OP(linear_rope_append, N,
   struct glm_kv cache, void *qkv, const void *inp, const struct glm_mat *weight, const void *bias,
   const void *table, const int32_t *position, const int32_t *slot, int N, struct glm_heads heads,
   int rotary_dim)

/* The same of inp's norm
 *   norm (I)   ln (N, I), rstd (N): their contents are undefined */
OP(rmsnorm_rope_append, N,
   struct glm_kv cache, void *qkv, void *ln, void *rstd, const void *inp, const void *norm,
   const struct glm_mat *weight, const void *bias, const void *table, const int32_t *position,
   const int32_t *slot, int N, struct glm_heads heads, int rotary_dim, double eps)

/* The half of a layer before MLP (struct glm_self_attention), over N tokens.
 * sum += b (NULL: nothing),  ln = rmsnorm(sum)
 *   ln, sum, b (N, C)   rstd (N) */
OP(self_attention_norm, N,
   void *ln, void *rstd, void *sum, const void *b, const struct glm_self_attention *of, int N)
/* x = ln * mask / (1 - p),  xa = x A^T,  qkv = ln qkv^T + bias + scale * xa B^T, its queries and keys
 * rotated, its keys and values in the cache where slots are given,  att = attention of it,
 * out = att dense^T + bias;  qkv and att: in so many rows as the backend's self_attention_rows says
 *   out, ln (N, C)   att (N, NH*HD)   lse (N, NH)   qkv (N, (NH+2*KVH)*HD)   xa (N, R) */
OP(self_attention_forward, N,
   void *out, void *att, void *lse, void *qkv, void *xa, const void *ln,
   const struct glm_self_attention *of, int N)
/* Of dout, the gradient of out:
 *   dinp    = that of ln, by way of x times the mask, too; NULL: it is not made
 *   dA, dB += those of the adapter, either may be NULL;  dcache as in `attention_backward`
 *   att, lse, qkv, xa: of the forward of these N tokens   x, rstd: sum and rstd of its norm
 *   dinp, dout, x (N, C)   work (N, max(C, NH*HD)), may be dinp's memory, dqkv (N, (NH+2*KVH)*HD),
 *   u (N, R): their contents are undefined */
OP(self_attention_backward, N,
   void *dinp, void *dA, void *dB, void *work, void *dqkv, void *u, void *rstd, const void *dout,
   const void *att, const void *lse, const void *qkv, const void *xa, const void *x,
   const struct glm_self_attention *of, int N)

/* ---- P-Tuning v2: Liu et al. 2021. Rows of the prefix encoder become cache rows of every layer,
 * `copies` times. */

/* out[j][b*P + p] = inp[p][j]
 *   out (J, copies*P, KV)   inp (P, J, KV)   J = 2*layers: key, value, key, ..
 *   dropout: NULL, or the mask of row (b, p): N = copies*P, position and stream of index b*P + p,
 *            element j*KV + i */
OP(prefix_forward, copies,
   void *out, const void *inp, int P, int J, int KV, int copies, const struct glm_dropout *dropout)
/* dinp[p][j] += sum_b(mask * dout[j][b*P + p]) */
OP(prefix_backward, P,
   void *dinp, const void *dout, int P, int J, int KV, int copies,
   const struct glm_dropout *dropout)

/* ---- activations and dropout */

/* out = silu(gate) * up      (Shazeer 2020, SwiGLU)
 *   out (N, F)   inp (N, 2F) = [gate | up] */
OP(swiglu_forward, N,
   void *out, const void *inp, int N, int F)
/* dinp = [dout * up * silu'(gate) | dout * silu(gate)]
 *   dinp (N, 2F) may be inp itself */
OP(swiglu_backward, N,
   void *dinp, const void *dout, const void *inp, int N, int F)

/* out = a W^T + bias as `linear_forward` gives it of a, the swiglu_forward of h
 *   out (N, O)   h (N, 2F)   W (O, F)   bias (O) or NULL   act (N, F): its contents are undefined */
OP(swiglu_linear_forward, N,
   void *out, void *act, const void *h, const struct glm_mat *weight, const void *bias, int N)
/* dinp = dh W as `linear_backward_input` gives it of dh, the swiglu_backward of dact and h
 *   dinp (N, I), may be dact's memory   dact (N, F)   h (N, 2F): its contents are undefined
 *   W (2F, I), I at most F */
OP(swiglu_linear_backward, N,
   void *dinp, const void *dact, void *h, const struct glm_mat *weight, int N)

/* The half of a layer after attention:
 *   sum += b,  h = rmsnorm(sum) up^T,  out = swiglu_forward(h) down^T + bias; out NULL: without out
 *   out (N, C), may be b   rstd (N)   sum, b (N, C)   weight (C)   up (2F, C)   down (C, F)
 *   work (N, F), C at most F: its contents are undefined
 *   h (N, 2F): for the backward alone, as a backend likes it, in so many rows as its mlp_rows says;
 *   reals where its kept_h are not */
OP(swiglu_mlp_forward, N,
   void *out, void *rstd, void *sum, void *work, void *h, const void *b, const void *weight,
   const struct glm_mat *up, const struct glm_mat *down, const void *bias, int N, double eps)
/* dinp = dh up, the gradient of rmsnorm(sum), of dout, that of out
 *   dinp (N, C) in memory for (N, F)   h: of the forward of these N rows, undefined then */
OP(swiglu_mlp_backward, N,
   void *dinp, void *h, const void *dout, const struct glm_mat *up, const struct glm_mat *down,
   int N)

/* out = 0.5 inp (1 + tanh(sqrt(2/pi) (inp + 0.044715 inp^3))), n elements; in place allowed
 *                                                             Hendrycks & Gimpel 2016 */
OP(gelu_forward, n,
   void *out, const void *inp, size_t n)
/* dinp = dout * gelu'(inp); dinp may be inp or dout */
OP(gelu_backward, n,
   void *dinp, const void *dout, const void *inp, size_t n)

/* out = tanh(inp), n elements; in place allowed */
OP(tanh_forward, n,
   void *out, const void *inp, size_t n)
/* dinp = dout * (1 - out^2); in place allowed */
OP(tanh_backward, n,
   void *dinp, const void *dout, const void *out, size_t n)

/* out = inp * mask / (1 - p); in place allowed
 *   out, inp (N, C)   mask: struct glm_dropout */
OP(dropout_forward, N,
   void *out, const void *inp, int N, int C, const struct glm_dropout *dropout)
/* dinp += dout * mask / (1 - p) */
OP(dropout_backward, N,
   void *dinp, const void *dout, int N, int C, const struct glm_dropout *dropout)

/* x += size * noise, uniform in [-1, 1): NEFTune, Jain et al. 2023
 *   x (N, C)   noise of an element whose word for the mask is w: 2 floor(w / 256) / 2^24 - 1 */
OP(noise, N,
   void *x, int N, int C, double size, const struct glm_dropout *draw)

/* ---- rows that someone reads, and their loss */

/* out[m] = inp[rows[m]]
 *   out (M, C)   inp (N, C)   rows (M), ascending and distinct */
OP(gather_forward, M,
   void *out, const void *inp, const int32_t *rows, int M, int C)
/* dinp[rows[m]] += dout[m] */
OP(gather_backward, M,
   void *dinp, const void *dout, const int32_t *rows, int M, int C)

/* loss[m] = lse[m] - logits[m][target[m]],  lse = log sum exp
 *   loss, lse (M)   logits (M, V)   target (M) */
OP(cross_entropy_forward, M,
   void *loss, void *lse, const void *logits, const int32_t *target, int M, int V)
/* logits = scale * (softmax(logits) - onehot(target)), in place */
OP(cross_entropy_backward, M,
   void *logits, const void *lse, const int32_t *target, int M, int V, double scale)

/* ---- sums and searches */

/* out = a + b, n elements; out may be a or b */
OP(add, n,
   void *out, const void *a, const void *b, size_t n)
/* out = scale * a + b, n elements; out may be a or b */
OP(scaled_add, n,
   void *out, const void *a, const void *b, size_t n, double scale)
/* *out, on the device, = sum of x^2 in double, over fixed parts in order: the same for any thread
 * count */
OP(sum_squares, n,
   double *out, const void *x, size_t n)
/* *row = first row of x (N, C) that holds a NaN or an infinity, or -1 */
OP(first_nonfinite, N,
   int *row, const void *x, int N, int C)

/* ---- the next token */

/* id[m] = column of the first largest element of row m, or -1 where the row holds a NaN or an
 * infinity
 *   id (M), on the device   x (M, V)
 *   choices: NULL, or (M) on the device: how it is chosen instead (glm_choice), with the columns
 *            that `touched` lists; x is changed then, and -2 says that no column may be chosen */
OP(choose, M,
   int32_t *id, void *x, int M, int V, const struct glm_choice *choices, const int32_t *touched)

/* ---- the optimiser: decoupled weight decay, Loshchilov & Hutter 2019, alg. 2 */

/* With g = gscale * grad and t the step, counted from 1:
 *   m  = b1 m + (1 - b1) g
 *   v  = b2 v + (1 - b2) g^2
 *   p -= lr wd p
 *   p -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) */
OP(adamw, n,
   void *p, const void *grad, void *m, void *v, size_t n,
   double lr, double b1, double b2, double eps, double wd, int t, double gscale)

/* ---- stored dtypes */

/* W = magnitude * rnorm * (W + scale * B A), rounded to W's dtype; NULL, both: ones (dora_norm)
 *   data (O, I)   B (O, R)   A (R, I)   magnitude, rnorm (O) */
OP(merge, O,
   glm_stored *data, enum glm_dtype dtype, const void *B, const void *A,
   const void *magnitude, const void *rnorm, int O, int I, int R, double scale)
/* out = inp in another dtype, n elements, rounded to nearest even: overflow gives infinity, NaN
 * stays NaN; not in place */
OP(convert, n,
   glm_stored *out, enum glm_dtype out_dtype,
   const glm_stored *inp, enum glm_dtype inp_dtype, size_t n)
/* Integers `data` and float16 `scale` (glm_mat) of a float matrix inp (rows, cols).
 *   group 0:  THUDM's, every operation rounded to float16
 *             scale = max|w| / q,  q = 127 or 7;  integer = round to even(w / scale)
 *             a row of zeros gets scale 0 and integers 0
 *   group > 0, GLM_I4:  integers q in -8 .. 7
 *             of the scales m / -(8 + j / 10), j = -9 .. 9, m the element of largest magnitude, the
 *             one whose integers have the smallest squared error under the scale of least squares,
 *             sum(w q) / sum(q^2): that is the scale, rounded to float16, and the integers are
 *             those nearest by it
 * A row (group) with an element that is not finite, or that float16 cannot hold, gets a scale that
 * is not finite. */
OP(quantize, rows,
   glm_stored *data, uint16_t *scale, enum glm_dtype dtype, int group,
   const glm_stored *inp, enum glm_dtype inp_dtype, int rows, int cols)

/* clang-format on */
#undef OP
