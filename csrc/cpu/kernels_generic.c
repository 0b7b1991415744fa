/* Any machine: vectors of 4 floats, which baseline x86-64 (SSE2) and aarch64 (NEON) both have. */
#define VL 4
#define NAME generic
#ifdef __SSE2__
#include <emmintrin.h>
#define DOT_I16(acc, a, b) \
    ((vf)_mm_add_epi32((__m128i)(acc), _mm_madd_epi16((__m128i)(a), (__m128i)(b))))
#endif
#include "kernels_tmpl.h"
