/* Weights as ggml stores them, to the bit: blocks of 32 values of a row, a scale and integers
 * (quantize_row_q8_0_ref and _q4_0_ref of llama.cpp's ggml-quants.c). Compiled as the kernels of any
 * machine are, without contraction: a product and a sum are rounded apart. */
#include <math.h>
#include <string.h>

#include "glm.h"

enum { BLOCK = GLM_GGML_BLOCK, HALF = BLOCK / 2 };
#define TINY 0x1p-127f /* below, 1 / scale may be infinite; in float16 such a scale is 0 */

/* Whole numbers of y, |y| below 2^22, halves away from zero: what is added is the float before one
 * half, so that a value before a half stays below. */
static inline void round_away(int8_t *q, const float *y)
{
    for (int i = 0; i < BLOCK; i++)
        q[i] = (int8_t)(int32_t)(y[i] + copysignf(0x1.fffffep-2f, y[i]));
}

static float write_q8_0(uint8_t *out, const float *x)
{
    float most = 0, y[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float size = fabsf(x[i]);
        most = size > most ? size : most;
    }
    const float scale = most / 127, inverse = scale > TINY ? 1 / scale : 0;
    for (int i = 0; i < BLOCK; i++)
        y[i] = x[i] * inverse;
    int8_t q[BLOCK];
    round_away(q, y);
    memcpy(out + 2, q, BLOCK);
    return scale;
}

static float write_q4_0(uint8_t *out, const float *x)
{
    float high = x[0], low = x[0];
    for (int i = 1; i < BLOCK; i++) {
        high = x[i] > high ? x[i] : high;
        low = x[i] < low ? x[i] : low;
    }
    float value = high > -low ? high : low;
    for (int i = 0; high == -low && i < BLOCK; i++) /* of equal sizes the first */
        if (fabsf(x[i]) == high) {
            value = x[i];
            break;
        }
    const float scale = value / -8, inverse = fabsf(scale) > TINY ? 1 / scale : 0;
    float y[BLOCK];
    uint8_t q[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        y[i] = x[i] * inverse;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t n = (int32_t)(y[i] + 8.5f); /* from 0 */
        q[i] = (uint8_t)(n < 15 ? n : 15);
    }
    for (int i = 0; i < HALF; i++)
        out[2 + i] = (uint8_t)(q[i] | q[i + HALF] << 4);
    return scale;
}

int glm_ggml_blocks(uint8_t *out, float *scale, const float *x, size_t blocks, int bits)
{
    const size_t bytes = glm_ggml_block_bytes(bits);
    for (size_t b = 0; b < blocks; b++, x += BLOCK, out += bytes) {
        float worst = 0; /* NaN where one is not finite */
        for (int i = 0; i < BLOCK; i++)
            worst += x[i] * 0;
        if (worst != 0)
            return 0;
        scale[b] = bits == 8 ? write_q8_0(out, x) : write_q4_0(out, x);
        if (!(fabsf(scale[b]) < 65520)) /* rounds to infinity in float16 */
            return 0;
    }
    return 1;
}
