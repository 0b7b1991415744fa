/* aarch64 with SDOT besides: Cortex-A76, Neoverse N1, Apple M1 and later. */
#define NAME neon_dotprod
#define DOTPROD
#include "kernels_neon.c"
