/* Any machine: vectors of 4 floats, which baseline x86-64 (SSE2) and aarch64 (NEON) both have. */
#define VL 4
#define NAME generic
#include "kernels_tmpl.h"
