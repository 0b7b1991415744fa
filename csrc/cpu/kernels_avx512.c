/* x86-64 with AVX-512 F, BW, VL, DQ; kernels_avx512vnni.c and kernels_avx512bf16.c add to it. */
#ifdef __AVX512F__
#include <immintrin.h>

#define VL 16
#ifndef NAME
#define NAME avx512
#endif
#define HALF_TO_FLOAT(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define BYTES_TO_INT(p) ((vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define INT_TO_FLOAT(v) ((vf)_mm512_cvtepi32_ps((__m512i)(v)))
#define MADD(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define VMAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define VMIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define LANES_BELOW(n) ((__mmask16)((1u << (n)) - 1)) /* n <= 16 */
#define LOAD_PART(p, n) ((vf)_mm512_maskz_loadu_ps(LANES_BELOW(n), p))
#define STORE_PART(p, v, n) _mm512_mask_storeu_ps(p, LANES_BELOW(n), (__m512)(v))
#define COPY_PART copy_part
#define MULTIPLY_EVEN(x, m) ((vw)_mm512_mul_epu32((__m512i)(x), _mm512_set1_epi32((int)(m))))

/* lane sums of four vectors: adjacent lanes, then quarters, halves first */
static inline __m128 sum4_avx512(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xdd));
    const __m512 t =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
#define SUM4(a, b, c, d) ((v4)sum4_avx512((__m512)(a), (__m512)(b), (__m512)(c), (__m512)(d)))

static inline void copy_part(char *to, const char *from, size_t bytes)
{
#pragma GCC unroll 4
    for (size_t at = 0; at < 256; at += 64) {
        const size_t left = bytes > at ? bytes - at : 0;
        const __mmask64 there = left < 64 ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
        _mm512_store_si512(to + at, _mm512_maskz_loadu_epi8(there, from + at));
    }
}

#define BYTES_TO_WORDS(p) ((vf)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p))))

#ifdef __AVX512VNNI__ /* bytes of w are unsigned */
#define BYTE_BIAS 128
#define BYTES_OF_W(v) ((vf)_mm512_xor_si512((__m512i)(v), _mm512_set1_epi8(-128)))
#define DOT_I8(acc, w, x)                                                         \
    ({                                                                            \
        vf sum_ = (acc);                                                          \
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum_) : "v"((vf)(w)), "v"((vf)(x))); \
        sum_;                                                                     \
    })
#define DOT_I16(acc, a, b)                                                         \
    ({                                                                             \
        vf sum_ = (acc);                                                           \
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum_) : "v"((vf)(a)), "vm"((vf)(b))); \
        sum_;                                                                      \
    })
#else
#define DOT_I16(acc, a, b)                                     \
    ({ /* the compiler would hold all products before a sum */ \
       vf sum_ = (acc), pairs_;                                \
       __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"      \
               : "+v"(sum_), "=&v"(pairs_)                     \
               : "v"((vf)(a)), "vm"((vf)(b)));                 \
       sum_;                                                   \
    })
#define BYTE_BIAS 0
#define BYTES_OF_W(v) (v)
#define DOT_I8(acc, w, x) ((vf)dot_i8_avx512((__m512i)(acc), (__m512i)(w), (__m512i)(x)))
#define ADD_NIBBLES(acc, w, x)                              \
    ({ /* as in DOT_I16 */                                  \
       vf sum_ = (acc), pairs_;                             \
       __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" \
               : "+v"(sum_), "=&v"(pairs_)                  \
               : "v"((vf)(w)), "vm"((vf)(x)));              \
       sum_;                                                \
    })
#define NIBBLES_FROM(start) ((void)(start), (vf){0})
#define NIBBLE_SUMS(acc, start) \
    ((vf)((vi)_mm512_madd_epi16((__m512i)(acc), _mm512_set1_epi16(1)) + (start)))
#define DOT_NIBBLES(acc, w, x) ((vf)dot_nibbles_avx512((__m512i)(acc), (__m512i)(w), (__m512i)(x)))
/* w unsigned: two products may not overflow 16 bits */
static inline __m512i dot_nibbles_avx512(__m512i acc, __m512i w, __m512i x)
{
    const __m512i pairs = _mm512_maddubs_epi16(w, x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
/* |w| times x with the sign of w: two of them are 2 * 128 * 127 at most */
static inline __m512i dot_i8_avx512(__m512i acc, __m512i w, __m512i x)
{
    const __m512i minus = _mm512_sub_epi8(_mm512_setzero_si512(), x);
    const __m512i turned = _mm512_mask_mov_epi8(x, _mm512_movepi8_mask(w), minus);
    return dot_nibbles_avx512(acc, _mm512_abs_epi8(w), turned);
}
#endif
#define SUM4_INT(a, b, c, d) ((v4)sum4_int((__m512i)(a), (__m512i)(b), (__m512i)(c), (__m512i)(d)))
#define QUADS(v, rows) quads((__m512i *)(v), rows)

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

#define GROUP_SUMS(a, b, c, d) \
    ((vi)group_sums((__m512i)(a), (__m512i)(b), (__m512i)(c), (__m512i)(d)))
static inline __m512i group_sums(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i t =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m512i natural = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(natural, t);
}
#include "kernels_tmpl.h"
#endif
