/* aarch64: what each of its processors has; kernels_neon_dotprod.c, _i8mm.c and _bf16.c add to it,
 * by DOTPROD, I8MM and BF16, since a compiler may have more by default. */
#ifdef __aarch64__
#ifndef __clang__ /* gcc 12 would load far ahead, and spill sums */
#pragma GCC optimize("no-schedule-insns")
#endif
#include <arm_neon.h>

#define VL 4
#define REGISTERS 32
#ifndef NAME
#define NAME neon
#endif
#define HALF_TO_FLOAT(p) ((vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define BYTES_TO_INT(p) ((vi)bytes_to_int_neon(p))
#define INT_TO_FLOAT(v) ((vf)vcvtq_f32_s32((int32x4_t)(v)))
#define MADD(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(vf)(a), (float32x4_t)(vf)(b)))
#define VMAX(a, b) larger_neon(a, b)
#define VMIN(a, b) smaller_neon(a, b)
#define MULTIPLY_EVEN(x, m) ((vw)vmull_u32(vmovn_u64((uint64x2_t)(x)), vdup_n_u32((uint32_t)(m))))

static inline int32x4_t bytes_to_int_neon(const void *p)
{
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))));
}

/* b where either is NaN, which vmaxq and vminq are not */
#define larger_neon(a, b)                                                           \
    ((vf)vbslq_f32(vcgtq_f32((float32x4_t)(a), (float32x4_t)(b)), (float32x4_t)(a), \
                   (float32x4_t)(b)))
#define smaller_neon(a, b)                                                          \
    ((vf)vbslq_f32(vcltq_f32((float32x4_t)(a), (float32x4_t)(b)), (float32x4_t)(a), \
                   (float32x4_t)(b)))

/* lane sums of four vectors, adjacent lanes first */
#define SUM4(a, b, c, d)                                            \
    ((v4)vpaddq_f32(vpaddq_f32((float32x4_t)(a), (float32x4_t)(b)), \
                    vpaddq_f32((float32x4_t)(c), (float32x4_t)(d))))
#define SUM4_INT(a, b, c, d)                                    \
    ((v4)vpaddq_s32(vpaddq_s32((int32x4_t)(a), (int32x4_t)(b)), \
                    vpaddq_s32((int32x4_t)(c), (int32x4_t)(d))))

/* acc + the instruction's products of a and b; gcc 12 copies the sums of its intrinsics */
#define SUM_OF(name, type_a, type_b, acc, a, b)          \
    ({                                                   \
        vf sum_ = (acc);                                 \
        __asm__(name " %0.4s, %1." type_a ", %2." type_b \
                : "+w"(sum_)                             \
                : "w"((vf)(a)), "w"((vf)(b)));           \
        sum_;                                            \
    })

/* f with a lane of a as its last operand; the lane is a constant once the loop is unrolled */
#define BY_LANE(f, acc, b, a, lane)  \
    ((lane) == 0   ? f(acc, b, a, 0) \
     : (lane) == 1 ? f(acc, b, a, 1) \
     : (lane) == 2 ? f(acc, b, a, 2) \
                   : f(acc, b, a, 3))
#define MADD_LANE(acc, b, a, lane) \
    ((vf)BY_LANE(vfmaq_laneq_f32, (float32x4_t)(acc), (float32x4_t)(b), (float32x4_t)(a), lane))

#ifdef BF16
#define HAS_PAIRS(kind) ((kind) == GLM_I8 || (kind) == GLM_BF16)
#define PAIRS_IN_PLACE(kind) ((kind) == GLM_BF16)
#define MULTIPLY_PAIRS(kind, acc, x, w)                           \
    ((kind) == GLM_BF16 ? SUM_OF("bfmmla", "8h", "8h", acc, x, w) \
                        : SUM_OF("smmla", "16b", "16b", acc, x, w))
#define DOT_BF16(acc, x, w) SUM_OF("bfdot", "8h", "8h", acc, w, x)
#define DOT_BF16_LANE(acc, b, a, lane) BY_LANE(BFDOT_LANE, acc, b, a, lane)
#define BFDOT_LANE(acc, b, a, lane) SUM_OF("bfdot", "8h", "2h[" #lane "]", acc, b, a)
/* 8 bfloat16: of `low`, then of `high`; rounded to nearest even */
#define TO_BF16(low, high) ((vf)floats_to_bf16((float32x4_t)(low), (float32x4_t)(high)))
#define BYTES_TO_BF16(v, p) bytes_to_bf16(v, p)
/* two's complement numbers in the low four bits of each 16 as bfloat16 */
#define INTEGERS_TO_BF16(v) ((vf)integers_to_bf16((uint16x8_t)(v)))
#define SCALES_TO_LANES(p) ((vf)vld1q_dup_f32(p)) /* a chunk is a group */
#define SCALE_BF16(v, lanes) ((vf)scale_bf16((uint16x8_t)(v), (float32x4_t)(lanes)))
/* 4 and 4 bfloat16 as pairs (first half, second half); of a and b, columns 0 .. 3, 4 .. 7 */
#define HALVES_TO_PAIRS(v) ((vf)halves_to_pairs((uint16x8_t)(v)))
#define PAIRS_LOW(a, b) ((vf)vzip1q_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#define PAIRS_HIGH(a, b) ((vf)vzip2q_u16((uint16x8_t)(a), (uint16x8_t)(b)))

static inline bfloat16x8_t floats_to_bf16(float32x4_t low, float32x4_t high)
{
    return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high);
}

static inline bfloat16x8_t words_to_bf16(int16x8_t v)
{
    return floats_to_bf16(vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))),
                          vcvtq_f32_s32(vmovl_high_s16(v)));
}

static inline void bytes_to_bf16(void *v, const void *p)
{
    const int8x16_t b = vld1q_s8(p);
    bfloat16x8_t *to = v;
    to[0] = words_to_bf16(vmovl_s8(vget_low_s8(b)));
    to[1] = words_to_bf16(vmovl_high_s8(b));
}

/* both bytes of a number are looked up: in the first half of the table the low one */
static inline uint8x16_t integers_to_bf16(uint16x8_t v)
{
    static const uint8_t table[32] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,
                                      0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80,
                                      0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40,
                                      0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf};
    const uint16x8_t low = vandq_u16(v, vdupq_n_u16(15));
    const uint16x8_t both = vorrq_u16(vsliq_n_u16(low, low, 8), vdupq_n_u16(0x1000));
    const uint8x16x2_t tables = {{vld1q_u8(table), vld1q_u8(table + 16)}};
    return vqtbl2q_u8(tables, (uint8x16_t)both);
}

static inline bfloat16x8_t scale_bf16(uint16x8_t v, float32x4_t scale)
{
    const float32x4_t low = (float32x4_t)vshll_n_u16(vget_low_u16(v), 16);
    const float32x4_t high = (float32x4_t)vshll_high_n_u16(v, 16);
    return floats_to_bf16(vmulq_f32(low, scale), vmulq_f32(high, scale));
}

static inline uint16x8_t halves_to_pairs(uint16x8_t v) { return vzip1q_u16(v, vextq_u16(v, v, 4)); }
#elif defined(I8MM)
#define HAS_PAIRS(kind) ((kind) == GLM_I8)
#define PAIRS_IN_PLACE(kind) 0
#define MULTIPLY_PAIRS(kind, acc, x, w) SUM_OF("smmla", "16b", "16b", acc, x, w)
#endif
#define BYTE_BIAS 0
#define BYTES_OF_W(v) (v)
#ifdef DOTPROD
#define DOT_I8(acc, w, x) SUM_OF("sdot", "16b", "16b", acc, w, x)
#define DOT_I8_LANE(acc, b, a, lane) BY_LANE(SDOT_LANE, acc, b, a, lane)
#define SDOT_LANE(acc, b, a, lane) SUM_OF("sdot", "16b", "4b[" #lane "]", acc, b, a)
#else
#define DOT_I8(acc, w, x) \
    ((vf)dot_i8_neon((int32x4_t)(acc), (int8x16_t)(vf)(w), (int8x16_t)(vf)(x)))
#define DOT_I8_LANE(acc, b, a, lane) DOT_I8(acc, b, BY_LANE(SAME_LANE, acc, b, a, lane))
#define SAME_LANE(acc, b, a, lane) ((vf)vdupq_laneq_s32((int32x4_t)(a), lane))
#define DOT_NIBBLES(acc, w, x) \
    ((vf)dot_nibbles_neon((int32x4_t)(acc), (int8x16_t)(vf)(w), (int8x16_t)(vf)(x)))

/* two products are 2 * 128 * 127 at most, which 16 bits hold: x is not -128 */
static inline int32x4_t dot_i8_neon(int32x4_t acc, int8x16_t w, int8x16_t x)
{
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
}
/* lanes of other quads, whose sum is the same */
static inline int32x4_t dot_nibbles_neon(int32x4_t acc, int8x16_t w, int8x16_t x)
{
    return vpadalq_s16(acc, vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x));
}
#endif
#define DOT_I16(acc, a, b) ((vf)dot_i16_neon((int32x4_t)(acc), (int16x8_t)(a), (int16x8_t)(b)))
static inline int32x4_t dot_i16_neon(int32x4_t acc, int16x8_t a, int16x8_t b)
{
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return vaddq_s32(acc, vpaddq_s32(low, high));
}
#define QUADS(v, rows) quads((int8x16_t *)(v), rows)

/* four rows of 16 bytes as quads of a column */
static inline void quads(int8x16_t *v, const void *rows)
{
    const int8x16_t *r = rows;
    const int16x8_t a = (int16x8_t)vzip1q_s8(r[0], r[1]), b = (int16x8_t)vzip2q_s8(r[0], r[1]);
    const int16x8_t c = (int16x8_t)vzip1q_s8(r[2], r[3]), d = (int16x8_t)vzip2q_s8(r[2], r[3]);
    v[0] = (int8x16_t)vzip1q_s16(a, c);
    v[1] = (int8x16_t)vzip2q_s16(a, c);
    v[2] = (int8x16_t)vzip1q_s16(b, d);
    v[3] = (int8x16_t)vzip2q_s16(b, d);
}
#include "kernels_tmpl.h"
#endif
