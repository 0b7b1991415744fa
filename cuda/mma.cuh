/* Tensor cores: the three instructions of mma.sync that attention needs, and copies that go on
 * beside them, each with a body for the emulator. mma's has the lane layout of the PTX manual
 * (section "Matrix multiply-accumulate"): lane l is in row group l / 4 and has columns 2 (l % 4)
 * and 2 (l % 4) + 1 of an 8-wide fragment.
 *
 * BF16: bfloat16 (capability 8.0 and up), else float16 (7.5 and up). Below that the bodies are
 * empty and the host never launches their kernels. */
#pragma once
#include "launch.cuh"

/* d (16, 8) += a (16, 16) b (16, 8) */
template <bool BF16>
static __device__ __forceinline__ void mma(float *d, const unsigned *a, unsigned b0, unsigned b1)
{
#if defined(__CUDA_EMU__)
    const unsigned b[2] = {b0, b1};
    if (BF16)
        emu_mma16816_bf16(d, a, b, d);
    else
        emu_mma16816(d, a, b, d);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                     "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
                     "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    if (!BF16) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, "
                     "{%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b0));
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, "
                     "{%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2]), "r"(a[3]), "r"(b1));
    }
#endif
}

/* Four 8 x 8 fragments of 16-bit elements: lane l gives the address of row l % 8 of fragment l / 8
 * and gets in r[i] its two elements of row l / 4 of fragment i; transposed: of column l / 4. */
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_fragments(unsigned *r, const unsigned short *row)
{
#if defined(__CUDA_EMU__)
    const int lane = threadIdx.x & 31;
    for (int i = 0; i < 4; i++) {
        const int from = 8 * i + (TRANSPOSED ? 2 * (lane % 4) : lane / 4);
        const int next = TRANSPOSED ? from + 1 : from;
        const size_t a = __shfl_sync(0xffffffffu, (size_t)row, from),
                     b = __shfl_sync(0xffffffffu, (size_t)row, next);
        const int at = TRANSPOSED ? lane / 4 : 2 * (lane % 4);
        r[i] = (unsigned)reinterpret_cast<const unsigned short *>(a)[at] |
               (unsigned)reinterpret_cast<const unsigned short *>(b)[TRANSPOSED ? at : at + 1]
                   << 16;
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
#else
    r[0] = r[1] = r[2] = r[3] = 0;
#endif
}

/* ---- copies from global to shared memory that go on beside other work (cp.async; plain ones below
 * capability 8.0). What a thread copied is there for itself after copies_wait, for others after a
 * barrier behind that. */

/* 16 aligned bytes, or zeros where not `real`: `from` is not read then. */
static __device__ __forceinline__ void copy16(void *to, const void *from, bool real)
{
#if defined(__CUDA_EMU__)
    const uint4 zeros = {0, 0, 0, 0}, early = {~0u, ~0u, ~0u, ~0u};
    *static_cast<uint4 *>(to) = early; /* it may land at any time from now on */
    emu_copy(to, real ? *static_cast<const uint4 *>(from) : zeros);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
#else
    uint4 q;
    q.x = q.y = q.z = q.w = 0;
    if (real)
        q = *static_cast<const uint4 *>(from);
    *static_cast<uint4 *>(to) = q;
#endif
}

/* This thread's copies since the last call are a group. */
static __device__ __forceinline__ void copies_commit()
{
#if defined(__CUDA_EMU__)
    emu_copies_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* All groups of this thread but the last N are there. */
template <int N> static __device__ __forceinline__ void copies_wait()
{
#if defined(__CUDA_EMU__)
    uint4 landed;
    while (void *to = emu_copy_landed(N, &landed))
        *static_cast<uint4 *>(to) = landed;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

template <bool BF16> static __device__ __forceinline__ unsigned pack2(float low, float high)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(__CUDA_EMU__)
    unsigned both; /* one instruction, where two conversions and a shift would be four */
    if (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return BF16 ? bf16_bits(low) | bf16_bits(high) << 16 : half_bits(low) | half_bits(high) << 16;
#endif
}

/* 2^x in one instruction, to 2^-22 of it; below 2^-126 it is 0 */
static __device__ __forceinline__ float exp2_of(float x)
{
#if defined(__CUDA_ARCH__) && !defined(__CUDA_EMU__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

/* Element where 16 bytes, the c-th of a row of a tile, begin: rows of D 16-bit elements without
 * padding, turned so that eight rows below each other are in eight different groups of banks. */
static __device__ __forceinline__ int turned(int c, int turn)
{
    return 8 * ((c & ~7) + ((c & 7) ^ turn));
}
template <int D> static __device__ __forceinline__ int swizzled(int row, int c)
{
    return row * D + turned(c, row & 7);
}

/* Eight columns from c on of a 16-bit tile's row, times factor, from HD floats or of zeros */
template <bool BF16>
static __device__ __forceinline__ void narrow8_row(unsigned short *to, const float *from, int HD,
                                                   int c, float factor)
{
    float v[8];
    f4 a, b;
    a.v[0] = a.v[1] = a.v[2] = a.v[3] = 0;
    b = a;
    if (from) {
        a = load4_or_zero(from, c, HD);
        b = load4_or_zero(from, c + 4, HD);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] = a.v[j] * factor, v[4 + j] = b.v[j] * factor;
    *reinterpret_cast<uint4 *>(to + c) = narrow8(v, BF16 ? GLM_BF16 : GLM_F16);
}

/* Two operands b (16, 8) side by side of a product, from a tile of 16-bit rows, LD apart, at its
 * element `tile`: their columns are the tile's rows, or the tile's columns. */
template <int LD>
static __device__ __forceinline__ void load_b(unsigned *b, const unsigned short *tile)
{
    const int lane = threadIdx.x & 31;
    load_fragments<false>(b, tile + (8 * (lane / 16) + lane % 8) * LD + 8 * (lane / 8 % 2));
}

template <int LD>
static __device__ __forceinline__ void load_b_columns(unsigned *b, const unsigned short *tile)
{
    const int lane = threadIdx.x & 31;
    load_fragments<true>(b, tile + lane % 16 * LD + 8 * (lane / 16));
}

/* d[0], d[1] (16, 8) += a times two b */
template <bool BF16>
static __device__ __forceinline__ void mma_pair(float (*d)[4], const unsigned *a, const unsigned *b)
{
    mma<BF16>(d[0], a, b[0], b[1]);
    mma<BF16>(d[1], a, b[2], b[3]);
}

/* Two results (16, 8) side by side, as an operand a */
template <bool BF16> static __device__ __forceinline__ void pack_a(unsigned *a, const float (*d)[4])
{
    a[0] = pack2<BF16>(d[0][0], d[0][1]);
    a[1] = pack2<BF16>(d[0][2], d[0][3]);
    a[2] = pack2<BF16>(d[1][0], d[1][1]);
    a[3] = pack2<BF16>(d[1][2], d[1][3]);
}

template <int N> static __device__ __forceinline__ void clear(float (*d)[4])
{
#pragma unroll
    for (int n = 0; n < N; n++)
        d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
}

/* Columns c and c + 1, c even, of a row of HD floats */
static __device__ __forceinline__ void put2(float *row, int c, int HD, float x, float y)
{
    if (c + 1 < HD && ((size_t)(row + c) & 7) == 0) {
        float2 both;
        both.x = x, both.y = y;
        *reinterpret_cast<float2 *>(row + c) = both;
        return;
    }
    if (c < HD)
        row[c] = x;
    if (c + 1 < HD)
        row[c + 1] = y;
}

/* The same of element `at` of an array on, of floats, or of 16 bits where there is one: HD is even
 * then. */
template <bool BF16>
static __device__ __forceinline__ void put_pair(float *to, unsigned short *to_16, size_t at, int c,
                                                int HD, float x, float y)
{
    if (!to_16)
        put2(to + at, c, HD, x, y);
    else if (c < HD)
        *reinterpret_cast<unsigned *>(to_16 + at + c) = pack2<BF16>(x, y);
}
