/* x86-64 with AVX2, FMA and F16C. */
#ifdef __AVX2__
#include <immintrin.h>

#define VL 8
#define NAME avx2
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
#include "kernels_tmpl.h"
#endif
