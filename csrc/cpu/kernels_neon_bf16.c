/* aarch64 with BFDOT and BFMMLA besides: all that have SMMLA, up to now. */
#define NAME neon_bf16
#define DOTPROD
#define I8MM
#define BF16
#include "kernels_neon.c"
