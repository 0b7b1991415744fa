/* x86-64 with AVX-512 F, BW, VL, DQ; kernels_avx512bf16.c adds to it. */
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
#include "kernels_tmpl.h"
#endif
