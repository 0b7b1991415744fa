/* x86-64 with AVX-VNNI besides AVX2, and no AVX-512: Alder Lake and later of its kind. */
#ifdef __AVXVNNI__
#define NAME avxvnni
#include "kernels_avx2.c"
#endif
