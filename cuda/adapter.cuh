/* What kernels with a rank on one side share: ranks at a time, and the dropout mask of the wide one. */
#pragma once
#include "launch.cuh"

enum { RANKS = 8 };

/* Bit i: the mask keeps column c + i of row n; four columns are one counter's. */
static __device__ __forceinline__ unsigned kept_of(const mask_of &mask, int n, int c)
{
    const words w = mask_words(mask, n, (unsigned)c / 4);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        bits |= (unsigned)(keep(mask, w.w[i]) != 0) << i;
    return bits;
}

static __device__ __forceinline__ f4 dropped(const mask_of &mask, f4 x, unsigned bits)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        x.v[i] *= bits >> i & 1 ? mask.kept : 0.0f;
    return x;
}
