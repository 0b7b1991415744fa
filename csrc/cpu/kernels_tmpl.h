/* Every op of the CPU backend, once, over vectors of VL floats (GCC vector extensions). The
 * including file sets VL, NAME, and, where the set has them, HALF_TO_FLOAT(p): VL halves at p as a
 * vector; BYTES_TO_INT(p): VL signed bytes; INT_TO_FLOAT(v); SUM4(a, b, c, d): lane sums;
 * MADD(a, b, c).
 *
 * Sums over lanes are made in one order, adjacent lanes first, then halves: an element's bits must
 * not depend on the tile it fell into. Every function is static: nothing compiled for a newer
 * processor may be reached from an older. */

#include "tmpl_vector.h"
#include "tmpl_convert.h"
#include "tmpl_elements.h"
#include "tmpl_rows.h"
#include "tmpl_copy.h"
#include "tmpl_dropout.h"
#include "tmpl_dora.h"
#include "tmpl_attention.h"
#include "tmpl_bytes.h"
#include "tmpl_linear.h"
#include "tmpl_few.h"
#include "tmpl_linear_bytes.h"
#include "tmpl_short.h"
#include "tmpl_linear_backward.h"
#include "tmpl_words.h"
#include "tmpl_few_words.h"
#include "tmpl_products.h"

#define ON(op) op
#define MADE(op) op
#include "self_attention.h"

#define TABLE2(name) glm_cpu_ops_##name
#define TABLE(name) TABLE2(name)

const struct glm_ops TABLE(NAME) = {
#define OP(op, extent, ...) .op = op,
#include "ops.h"
};
