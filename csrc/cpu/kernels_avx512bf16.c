/* x86-64 with AVX-512 BF16, VNNI and VBMI besides: products of bfloat16 pairs and of bytes. */
#ifdef __AVX512BF16__
#include <immintrin.h>
#include <stdint.h>

#define NAME avx512bf16
#define DOT_BF16(acc, x, w) \
    ((vf)_mm512_dpbf16_ps((__m512)(acc), (__m512bh)(__m512)(x), (__m512bh)(__m512)(w)))
/* acc + quads of unsigned u times signed s, in int32 lanes */
#define DOT_I8(acc, u, s)                                                         \
    ({                                                                            \
        vf sum_ = (acc);                                                          \
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum_) : "v"((vf)(u)), "v"((vf)(s))); \
        sum_;                                                                     \
    })
/* 32 bfloat16: of `low`, then of `high`; rounded to nearest even */
#define TO_BF16(low, high) ((vf)(__m512)_mm512_cvtne2ps_pbh((__m512)(high), (__m512)(low)))
#define FLIP_SIGNS(v) ((vf)_mm512_xor_si512((__m512i)(v), _mm512_set1_epi8(-128)))
/* floats: the first, the last eight of a, then of b */
#define FIRST_HALVES(a, b) ((vf)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), 0x44))
#define LAST_HALVES(a, b) ((vf)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), 0xee))
/* 64 bytes as bfloat16: of each 16 the first 8 to v[0], the last 8 to v[1] */
#define BYTES_TO_BF16(v, p) bytes_to_bf16((__m512i *)(v), p)
/* two's complement numbers in the low four bits of each 16 as bfloat16 */
#define INTEGERS_TO_BF16(v) ((vf)integers_to_bf16((__m512i)(v)))
#define SCALES_TO_LANES(p) ((vf)scales_to_lanes(p))
#define SCALE_BF16(v, lanes) ((vf)scale_bf16((__m512i)(v), (__m512)(lanes)))
/* 16 and 16 bfloat16 as pairs (first half, second half); of a and b, columns 0 .. 15, 16 .. 31 */
#define HALVES_TO_PAIRS(v) ((vf)_mm512_permutexvar_epi16(pairs(0, 16), (__m512i)(v)))
#define PAIRS_LOW(a, b) ((vf)_mm512_permutex2var_epi16((__m512i)(a), pairs(0, 32), (__m512i)(b)))
#define PAIRS_HIGH(a, b) ((vf)_mm512_permutex2var_epi16((__m512i)(a), pairs(16, 48), (__m512i)(b)))
/* v[0], v[1]: bytes of four rows of 32 columns as quads */
#define QUADS(v, rows) quads((__m512i *)(v), rows)
#define SUM4_INT(a, b, c, d) ((v4)sum4_int((__m512i)(a), (__m512i)(b), (__m512i)(c), (__m512i)(d)))

/* words first, second, first + 1, second + 1, .. */
static inline __m512i pairs(int first, int second)
{
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(_mm512_mullo_epi32(step, _mm512_set1_epi32(0x10001)),
                            _mm512_set1_epi32(second << 16 | first));
}

static inline __m512i integers_to_bf16(__m512i v)
{
    const __m512i low = _mm512_castsi256_si512(_mm256_set_epi16(
        (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0,
        (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0));
    const __m512i table = _mm512_shuffle_i64x2(low, low, 0x44); /* bit 4 of an index is noise */
    return _mm512_permutexvar_epi16(v, table);
}

/* Sign and magnitude: the two bytes of a bfloat16 are looked up by the magnitude. */
static inline void bytes_to_bf16(__m512i *v, const char *p)
{
    static const uint8_t high[128] = {
        0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41,
        0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41,
        0x41, 0x41, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42,
        0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42, 0x42};
    static const uint8_t low[128] = {
        0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0, 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60,
        0x70, 0x80, 0x88, 0x90, 0x98, 0xa0, 0xa8, 0xb0, 0xb8, 0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8,
        0xf0, 0xf8, 0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x28, 0x2c, 0x30,
        0x34, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c, 0x50, 0x54, 0x58, 0x5c, 0x60, 0x64, 0x68, 0x6c,
        0x70, 0x74, 0x78, 0x7c, 0x80, 0x82, 0x84, 0x86, 0x88, 0x8a, 0x8c, 0x8e, 0x90, 0x92, 0x94,
        0x96, 0x98, 0x9a, 0x9c, 0x9e, 0xa0, 0xa2, 0xa4, 0xa6, 0xa8, 0xaa, 0xac, 0xae, 0xb0, 0xb2,
        0xb4, 0xb6, 0xb8, 0xba, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6, 0xc8, 0xca, 0xcc, 0xce, 0xd0,
        0xd2, 0xd4, 0xd6, 0xd8, 0xda, 0xdc, 0xde, 0xe0, 0xe2, 0xe4, 0xe6, 0xe8, 0xea, 0xec, 0xee,
        0xf0, 0xf2, 0xf4, 0xf6, 0xf8, 0xfa, 0xfc, 0xfe};
    const __m512i b = _mm512_loadu_si512(p), size = _mm512_abs_epi8(b);
    __m512i h =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(high), size, _mm512_loadu_si512(high + 64));
    const __m512i l =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(low), size, _mm512_loadu_si512(low + 64));
    h = _mm512_mask_mov_epi8(h, _mm512_movepi8_mask(size), _mm512_set1_epi8(0x43)); /* of -128 */
    h = _mm512_ternarylogic_epi64(h, b, _mm512_set1_epi8(-128), 0xf8); /* h | (b & 0x80) */
    v[0] = _mm512_unpacklo_epi8(l, h);
    v[1] = _mm512_unpackhi_epi8(l, h);
}

/* four scales, one for each quarter of the lanes */
static inline __m512 scales_to_lanes(const float *p)
{
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

static inline __m512i scale_bf16(__m512i v, __m512 scale)
{
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    const __m512 high =
        _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
    return _mm512_permutexvar_epi16(pairs(0, 16), (__m512i)both);
}

static inline void quads(__m512i *v, const char *rows)
{
    const __m256i *r = (const __m256i *)rows;
    const __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpackhi_epi8(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi8(r[2], r[3]), d = _mm256_unpackhi_epi8(r[2], r[3]);
    const __m256i e = _mm256_unpacklo_epi16(a, c), f = _mm256_unpackhi_epi16(a, c);
    const __m256i g = _mm256_unpacklo_epi16(b, d), h = _mm256_unpackhi_epi16(b, d);
    const __m256i ef = _mm256_permute2x128_si256(e, f, 0x20),
                  gh = _mm256_permute2x128_si256(g, h, 0x20);
    const __m256i ef2 = _mm256_permute2x128_si256(e, f, 0x31),
                  gh2 = _mm256_permute2x128_si256(g, h, 0x31);
    v[0] = _mm512_inserti64x4(_mm512_castsi256_si512(ef), gh, 1);
    v[1] = _mm512_inserti64x4(_mm512_castsi256_si512(ef2), gh2, 1);
}

static inline __m128 sum4_int(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i t =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(t), _mm512_extracti64x4_epi64(t, 1));
    return _mm_castsi128_ps(
        _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
#include "kernels_avx512.c"
#endif
