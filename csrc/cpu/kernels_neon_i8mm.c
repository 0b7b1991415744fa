/* aarch64 with SMMLA besides: Neoverse V1 and N2, Apple M2 and later. */
#define NAME neon_i8mm
#define DOTPROD
#define I8MM
#include "kernels_neon.c"
