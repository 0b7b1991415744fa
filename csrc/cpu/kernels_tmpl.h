/* Every inner loop of the CPU backend, once, over vectors of VL floats (GCC vector extensions). The
 * including file sets VL, NAME, and, where the set has them, HALF_TO_FLOAT(p): VL halves at p as a
 * vector; BYTES_TO_INT(p): VL signed bytes; INT_TO_FLOAT(v); SUM4(a, b, c, d): lane sums;
 * MADD(a, b, c).
 *
 * Sums over lanes are made in one order, adjacent lanes first, then halves: an element's bits must
 * not depend on the tile it fell into. Every function is static: nothing compiled for a newer
 * processor may be reached from an older. */

#include "tmpl_vector.h"
#include "tmpl_convert.h"
#include "tmpl_linear.h"
#include "tmpl_linear_backward.h"
#include "tmpl_attention.h"
#include "tmpl_rows.h"

#define TABLE2(name) glm_cpu_kernels_##name
#define TABLE(name) TABLE2(name)
#define STRING2(name) #name
#define STRING(name) STRING2(name)

const struct glm_cpu_kernels TABLE(NAME) = {
    .name = STRING(NAME),
    .pack_x = pack_x_task,
    .nt = nt_task,
    .nt_in_place = nt_in_place_task,
    .pack_a = pack_a_task,
    .gemm = gemm_task,
    .x_rows = XR,
    .in_place_rows = {R1, R2},
    .a_rows = MR,
    .most_in_place = IN_PLACE_ROWS,
    .in_place_cols = IN_PLACE_COLS,
    .vector_bytes = VB,
    .packed_vectors = packed_vectors,
#ifdef DOT_BF16
    .fast = 1,
#endif
    .rmsnorm_forward = rmsnorm_forward_task,
    .rmsnorm_backward = rmsnorm_backward_task,
    .rmsnorm_dweight = rmsnorm_dweight_task,
    .rope = rope_task,
    .attention_forward = attention_forward_task,
    .attention_backward = attention_backward_task,
#ifdef DOT_BF16
    .attention_forward_bf16 = attention_forward_bf16_task,
    .attention_backward_bf16 = attention_backward_bf16_task,
#endif
    .swiglu_forward = swiglu_forward_task,
    .swiglu_backward = swiglu_backward_task,
    .dropout_forward = dropout_forward_task,
    .dropout_backward = dropout_backward_task,
    .prefix_forward = prefix_forward_task,
    .prefix_backward = prefix_backward_task,
    .cross_entropy_forward = cross_entropy_forward_task,
    .cross_entropy_backward = cross_entropy_backward_task,
    .add = add_task,
    .sum_squares = sum_squares_task,
    .adamw = adamw_task,
    .tanh_forward = tanh_forward_task,
    .tanh_backward = tanh_backward_task,
    .convert = convert_task,
    .merge = merge_task,
    .nonfinite = nonfinite_task,
    .argmax = argmax_task,
    .quantize = quantize_task,
    .load_row = load_row,
    .add_row = add_row,
};
