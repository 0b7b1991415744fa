/* x86-64 with AVX-512 VNNI besides, and no BF16: Cascade Lake, Ice Lake. */
#ifdef __AVX512VNNI__
#define NAME avx512vnni
#include "kernels_avx512.c"
#endif
