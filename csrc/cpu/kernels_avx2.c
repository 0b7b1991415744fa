/* x86-64 with AVX2, FMA and F16C; kernels_avxvnni.c adds to it. */
#ifdef __AVX2__
#include <immintrin.h>

#define VL 8
#ifndef NAME
#define NAME avx2
#endif
#define HALF_TO_FLOAT(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define BYTES_TO_INT(p) ((vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define INT_TO_FLOAT(v) ((vf)_mm256_cvtepi32_ps((__m256i)(v)))
#define MADD(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define VMAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define VMIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define MULTIPLY_EVEN(x, m) ((vw)_mm256_mul_epu32((__m256i)(x), _mm256_set1_epi32((int)(m))))

/* lane sums of four vectors, adjacent lanes first */
static inline __m128 sum4_avx2(__m256 a, __m256 b, __m256 c, __m256 d)
{
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}
#define SUM4(a, b, c, d) ((v4)sum4_avx2((__m256)(a), (__m256)(b), (__m256)(c), (__m256)(d)))

#define BYTES_TO_WORDS(p) ((vf)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p))))
#define GROUP_SUMS(a, b, c, d) \
    ((vi)group_sums((__m256i)(a), (__m256i)(b), (__m256i)(c), (__m256i)(d)))
static inline __m256i group_sums(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm256_permutevar8x32_epi32(t, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#ifdef __AVXVNNI__ /* bytes of w are unsigned */
#define BYTE_BIAS 128
#define BYTES_OF_W(v) ((vf)_mm256_xor_si256((__m256i)(v), _mm256_set1_epi8(-128)))
#define DOT_I8(acc, w, x)                                                                 \
    ({ /* gcc 12 leaves the sums of the intrinsic in memory */                            \
       vf sum_ = (acc);                                                                   \
       __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum_) : "x"((vf)(w)), "xm"((vf)(x))); \
       sum_;                                                                              \
    })
#define DOT_I16(acc, a, b)                                                                 \
    ({                                                                                     \
        vf sum_ = (acc);                                                                   \
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum_) : "x"((vf)(a)), "xm"((vf)(b))); \
        sum_;                                                                              \
    })
#else
#define DOT_I16(acc, a, b)                                     \
    ({ /* the compiler would hold all products before a sum */ \
       vf sum_ = (acc), pairs_;                                \
       __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"      \
               : "+x"(sum_), "=&x"(pairs_)                     \
               : "x"((vf)(a)), "xm"((vf)(b)));                 \
       sum_;                                                   \
    })
#define BYTE_BIAS 0
#define BYTES_OF_W(v) (v)
/* |w| times x with the sign of w: two of them are 2 * 128 * 127 at most */
#define DOT_I8(acc, w, x)                                                         \
    ({ /* as in DOT_I16 */                                                        \
       vf sum_ = (acc), pairs_;                                                   \
       __asm__("vpsignb %2, %3, %1\n\tvpmaddubsw %1, %4, %1\n\t"                  \
               "vpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"                         \
               : "+x"(sum_), "=&x"(pairs_)                                        \
               : "xm"((vf)(w)), "x"((vf)(x)), "x"(_mm256_abs_epi8((__m256i)(w))), \
                 "xm"(_mm256_set1_epi16(1)));                                     \
       sum_;                                                                      \
    })
#define ADD_NIBBLES(acc, w, x)                              \
    ({ /* as in DOT_I16 */                                  \
       vf sum_ = (acc), pairs_;                             \
       __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" \
               : "+x"(sum_), "=&x"(pairs_)                  \
               : "x"((vf)(w)), "xm"((vf)(x)));              \
       sum_;                                                \
    })
#define NIBBLES_FROM(start) ((void)(start), (vf){0})
#define NIBBLE_SUMS(acc, start) \
    ((vf)((vi)_mm256_madd_epi16((__m256i)(acc), _mm256_set1_epi16(1)) + (start)))
#define ADD_BOTH(w, x, w2, x2)                                              \
    ((vf)_mm256_add_epi16(_mm256_maddubs_epi16((__m256i)(w), (__m256i)(x)), \
                          _mm256_maddubs_epi16((__m256i)(w2), (__m256i)(x2))))
#define NIBBLE_GROUPS(a, b, c, d) \
    ((vi)nibble_groups((__m256i)(a), (__m256i)(b), (__m256i)(c), (__m256i)(d)))
/* 16 bits hold four lanes of ADD_BOTH: 4 * 4 * 15 * 127 */
static inline __m256i nibble_groups(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i t = _mm256_hadd_epi16(_mm256_hadd_epi16(a, b), _mm256_hadd_epi16(c, d));
    return _mm256_permutevar8x32_epi32(_mm256_madd_epi16(t, _mm256_set1_epi16(1)),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
/* w unsigned: two products may not overflow 16 bits */
#define DOT_NIBBLES(acc, w, x)                                                      \
    ({                                                                              \
        vf sum_ = (acc), pairs_;                                                    \
        __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0" \
                : "+x"(sum_), "=&x"(pairs_)                                         \
                : "x"((vf)(w)), "xm"((vf)(x)), "x"(_mm256_set1_epi16(1)));          \
        sum_;                                                                       \
    })
#endif
#define SUM4_INT(a, b, c, d) ((v4)sum4_int((__m256i)(a), (__m256i)(b), (__m256i)(c), (__m256i)(d)))
#define QUADS(v, rows) quads((__m256i *)(v), rows)

static inline __m128i sum4_int(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
}

static inline void quads(__m256i *v, const char *rows)
{
    const __m128i *r = (const __m128i *)rows;
    const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
    const __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
    v[0] = _mm256_set_m128i(_mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(a, c));
    v[1] = _mm256_set_m128i(_mm_unpackhi_epi16(b, d), _mm_unpacklo_epi16(b, d));
}
#include "kernels_tmpl.h"
#endif
