/* What every kernel file starts from: the launch macro, 16-byte moves, reductions, stored dtypes.
 *
 * One source for three compilers: nvcc, NVRTC (which sees only what is outside GLM_HOST) and, by
 * the emulator's headers, the host's C++ compiler, for which GLM_KERNEL_CALL, GLM_DYN_SHARED and
 * every wrapper of inline PTX have a second body. Kernels are extern "C", so that a loader finds
 * them by name. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifndef __CUDACC_RTC__
#define GLM_HOST 1
#include "device.h"
#else
#include "backend.h"
#endif

#ifdef GLM_NAMED
#include "named.h"
#endif

#ifndef __CUDA_EMU__
#define GLM_DYN_SHARED(T, name)                                  \
    extern __shared__ __align__(16) unsigned char glm_dyn_raw[]; \
    T *name = reinterpret_cast<T *>(glm_dyn_raw)
#define GLM_KERNEL_CALL(k, grid, block, smem, stream, ...) \
    k<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define GLM_EXPECT(condition) ((void)0) /* what callers owe; the emulator looks */
#endif

#define GLM_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
/* For tiles: registers for so many blocks on a multiprocessor, and no spills to get more there. */
#define GLM_TILE_KERNEL(threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks)
#define GLM_INFINITY __int_as_float(0x7f800000)

/* ---- kernels that overlap
 *
 * One that is launched by GLM_LAUNCH_AFTER may begin while the kernel before it ends (capability 9.0
 * and up): that one's blocks have all begun, and multiprocessors are idle. Its first statement is
 * let_next_begin(). Before after_previous(), which every thread passes, it reads only what no kernel
 * of the same call writes, and writes nothing. */
static __device__ __forceinline__ void let_next_begin()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void after_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ---- four floats at a time */

struct f4 {
    float v[4];
};

/* Elements i .. i+3 of p, i < n, zero from n on: one 16-byte load where it is aligned and whole. */
static __device__ __forceinline__ f4 load4(const float *p, size_t i, size_t n)
{
    f4 r;
    GLM_EXPECT(i < n);
    if (i + 4 <= n && ((size_t)(p + i) & 15) == 0) {
        const float4 q = *reinterpret_cast<const float4 *>(p + i);
        r.v[0] = q.x, r.v[1] = q.y, r.v[2] = q.z, r.v[3] = q.w;
        return r;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        r.v[j] = i + j < n ? p[i + j] : 0.0f;
    return r;
}

/* The same where i may lie past the end. */
static __device__ __forceinline__ f4 load4_or_zero(const float *p, size_t i, size_t n)
{
    f4 r;
    if (i < n)
        return load4(p, i, n);
    r.v[0] = r.v[1] = r.v[2] = r.v[3] = 0;
    return r;
}

static __device__ __forceinline__ void store4(float *p, size_t i, size_t n, f4 x)
{
    GLM_EXPECT(i < n);
    if (i + 4 <= n && ((size_t)(p + i) & 15) == 0) {
        float4 q;
        q.x = x.v[0], q.y = x.v[1], q.z = x.v[2], q.w = x.v[3];
        *reinterpret_cast<float4 *>(p + i) = q;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + j < n)
            p[i + j] = x.v[j];
}

/* First of the four elements of a flat array that are this thread's. */
static __device__ __forceinline__ size_t flat4()
{
    return 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
}

/* ---- sums and maxima: over a warp, then over a block of whole warps; every thread gets the
 * result, the order of the sum is fixed */

static __device__ __forceinline__ float warp_sum(float v)
{
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

static __device__ __forceinline__ double warp_sum(double v)
{
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

static __device__ __forceinline__ int warp_min(int v)
{
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v = min(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

/* To be called once by a kernel: a second call would write what the first one's readers read. */
#define GLM_BLOCK_REDUCTION(name, T, warp, none)                    \
    static __device__ T name(T v)                                   \
    {                                                               \
        __shared__ T part[32];                                      \
        const int lane = threadIdx.x & 31, warps = blockDim.x >> 5; \
        v = warp(v);                                                \
        if (lane == 0)                                              \
            part[threadIdx.x >> 5] = v;                             \
        __syncthreads();                                            \
        return warp(lane < warps ? part[lane] : (T)(none));         \
    }

/* ---- stored dtypes */

static __device__ __forceinline__ float half_value(unsigned bits)
{
    const unsigned short s = (unsigned short)bits;
    __half h;
    memcpy(&h, &s, 2);
    return __half2float(h);
}

static __device__ __forceinline__ unsigned half_bits(float x)
{
    const __half h = __float2half_rn(x);
    unsigned short s;
    memcpy(&s, &h, 2);
    return s;
}

static __device__ __forceinline__ float bf16_value(unsigned bits)
{
    return __int_as_float((int)(bits << 16));
}

static __device__ __forceinline__ unsigned bf16_bits(float x)
{
    const __nv_bfloat16 h = __float2bfloat16(x);
    unsigned short s;
    memcpy(&s, &h, 2);
    return s;
}

/* The float beside a double that rounds to any 16-bit type as the double does: cut, with the last
 * bit set where something was cut ("round to odd"). */
static __device__ __forceinline__ float odd_float(double x)
{
    float f = (float)x;
    if (!(x - x == 0) || !(f - f == 0) || (double)f == x)
        return f;
    int bits = __float_as_int(f);
    if (fabs((double)f) > fabs(x))
        bits--;
    return __int_as_float(bits | 1);
}

/* Element i of a row whose first element lies at p; integers without their scale. */
static __device__ __forceinline__ float load1(const void *p, int dtype, size_t i)
{
    switch (dtype) {
    case GLM_F16:
        return half_value(static_cast<const unsigned short *>(p)[i]);
    case GLM_BF16:
        return bf16_value(static_cast<const unsigned short *>(p)[i]);
    case GLM_F64:
        return (float)static_cast<const double *>(p)[i];
    case GLM_I8:
        return (float)static_cast<const signed char *>(p)[i];
    case GLM_I4: {
        const int both = static_cast<const unsigned char *>(p)[i / 2];
        const int nibble = (i & 1 ? both : both >> 4) & 15;
        return (float)(nibble < 8 ? nibble : nibble - 16);
    }
    default:
        return static_cast<const float *>(p)[i];
    }
}

static __device__ __forceinline__ void store1(void *p, int dtype, size_t i, float x)
{
    if (dtype == GLM_F16)
        static_cast<unsigned short *>(p)[i] = (unsigned short)half_bits(x);
    else if (dtype == GLM_BF16)
        static_cast<unsigned short *>(p)[i] = (unsigned short)bf16_bits(x);
    else if (dtype == GLM_F64)
        static_cast<double *>(p)[i] = x;
    else
        static_cast<float *>(p)[i] = x;
}

/* Bytes before element i of a run of a dtype; i is even for GLM_I4. */
static __host__ __device__ __forceinline__ size_t stored_bytes(int dtype, size_t i)
{
    return dtype == GLM_F64   ? 8 * i
           : dtype == GLM_F32 ? 4 * i
           : dtype == GLM_I8  ? i
           : dtype == GLM_I4  ? i / 2
                              : 2 * i;
}

/* Eight elements from 16-byte (I8: 8-byte, I4: 4-byte) words that are aligned. */
static __device__ __forceinline__ void widen8(const uint4 q, int dtype, float *v)
{
    const unsigned w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        v[2 * j] = dtype == GLM_F16 ? half_value(w[j] & 0xffff) : bf16_value(w[j] & 0xffff);
        v[2 * j + 1] = dtype == GLM_F16 ? half_value(w[j] >> 16) : bf16_value(w[j] >> 16);
    }
}

/* Elements i .. i+3 of a run of n of a dtype, i a multiple of 4 and below n, integers without their
 * scale. What is written as float goes by fours: a warp's 16-byte stores are then adjacent. */
static __device__ __forceinline__ f4 load4_stored(const void *p, int dtype, size_t i, size_t n)
{
    f4 r;
    GLM_EXPECT(i < n);
    if (dtype == GLM_F32)
        return load4(static_cast<const float *>(p), i, n);
    const char *at = static_cast<const char *>(p) + stored_bytes(dtype, i);
    if (i + 4 <= n && (dtype == GLM_F16 || dtype == GLM_BF16) && ((size_t)at & 7) == 0) {
        const uint2 q = *reinterpret_cast<const uint2 *>(at);
        const unsigned w[4] = {q.x & 0xffff, q.x >> 16, q.y & 0xffff, q.y >> 16};
#pragma unroll
        for (int j = 0; j < 4; j++)
            r.v[j] = dtype == GLM_F16 ? half_value(w[j]) : bf16_value(w[j]);
    } else if (i + 4 <= n && dtype == GLM_I8 && ((size_t)at & 3) == 0) {
        const unsigned q = *reinterpret_cast<const unsigned *>(at);
#pragma unroll
        for (int j = 0; j < 4; j++)
            r.v[j] = (float)((int)(q << (24 - 8 * j)) >> 24);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
            r.v[j] = i + j < n ? load1(p, dtype, i + j) : 0.0f;
    }
    return r;
}

static __device__ __forceinline__ uint4 narrow8(const float *v, int dtype)
{
    unsigned w[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        w[j] = dtype == GLM_F16 ? half_bits(v[2 * j]) | half_bits(v[2 * j + 1]) << 16
                                : bf16_bits(v[2 * j]) | bf16_bits(v[2 * j + 1]) << 16;
    uint4 q;
    q.x = w[0], q.y = w[1], q.z = w[2], q.w = w[3];
    return q;
}

/* Four, or eight, elements from `to` on in 16 bits. */
static __device__ __forceinline__ void store4_narrow(void *to, int dtype, const f4 x)
{
    unsigned w[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        w[j] = dtype == GLM_F16 ? half_bits(x.v[j]) : bf16_bits(x.v[j]);
    if (((size_t)to & 7) == 0) {
        uint2 q;
        q.x = w[0] | w[1] << 16, q.y = w[2] | w[3] << 16;
        *static_cast<uint2 *>(to) = q;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        static_cast<unsigned short *>(to)[j] = (unsigned short)w[j];
}

static __device__ __forceinline__ void store8_narrow(void *to, int dtype, const float *v)
{
    if (((size_t)to & 15) == 0) {
        *static_cast<uint4 *>(to) = narrow8(v, dtype);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        static_cast<unsigned short *>(to)[j] =
            (unsigned short)(dtype == GLM_F16 ? half_bits(v[j]) : bf16_bits(v[j]));
}

/* Elements i .. i + 7 of an array of float or 16 bits that has them all. */
static __device__ __forceinline__ void load8_of(const void *p, int dtype, size_t i, float *v)
{
    const char *at = static_cast<const char *>(p) + stored_bytes(dtype, i);
    if (dtype == GLM_F32) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            const f4 x = load4(static_cast<const float *>(p), i + half, i + 8);
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[half + j] = x.v[j];
        }
    } else if (((size_t)at & 15) == 0) {
        widen8(*reinterpret_cast<const uint4 *>(at), dtype, v);
    } else {
        const unsigned short *s = reinterpret_cast<const unsigned short *>(at);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = dtype == GLM_F16 ? half_value(s[j]) : bf16_value(s[j]);
    }
}

/* ---- Philox4x32-10: Salmon et al. 2011 */

struct mask_of {
    unsigned key0, key1, site;
    unsigned long long threshold; /* drops a word below it */
    float kept;                   /* 1 / (1 - p) */
    const int *stream, *position;
};

struct words {
    unsigned w[4];
};

static __device__ __forceinline__ words philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3,
                                               unsigned k0, unsigned k1)
{
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (unsigned)(b >> 32) ^ c1 ^ k0;
        c1 = (unsigned)b;
        c2 = (unsigned)(a >> 32) ^ c3 ^ k1;
        c3 = (unsigned)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words r;
    r.w[0] = c0, r.w[1] = c1, r.w[2] = c2, r.w[3] = c3;
    return r;
}

/* The words of elements 4 * quad .. 4 * quad + 3 of row n. */
static __device__ __forceinline__ words mask_words(const mask_of &m, int n, unsigned quad)
{
    return philox(quad, (unsigned)m.position[n], (unsigned)m.stream[n], m.site, m.key0, m.key1);
}

/* The factor of an element whose word this is: 0 or 1 / (1 - p). */
static __device__ __forceinline__ float keep(const mask_of &m, unsigned word)
{
    return word < m.threshold ? 0.0f : m.kept;
}

#ifdef GLM_HOST
static inline struct mask_of mask_from(const struct glm_dropout *d)
{
    struct mask_of m = {(unsigned)d->seed,
                        (unsigned)(d->seed >> 32) ^ d->step,
                        d->site,
                        (unsigned long long)(d->p * 4294967296.0),
                        (float)(1.0 / (1.0 - d->p)),
                        d->stream,
                        d->position};
    return m;
}

static inline struct cuda *cuda_of(void *cx) { return static_cast<struct cuda *>(cx); }
static inline size_t ceil_div(size_t n, size_t by) { return (n + by - 1) / by; }

#if !defined(GLM_NAMED) && !defined(__CUDA_EMU__)
template <class... P, class... A>
static inline void launch_after(struct cuda *cuda, void (*kernel)(P...), unsigned blocks,
                                unsigned threads, size_t shared, A... arguments)
{
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(blocks);
    how.blockDim = dim3(threads);
    how.dynamicSmemBytes = shared;
    how.stream = cuda->stream;
    how.attrs = &overlap;
    how.numAttrs = cuda->overlaps ? 1 : 0;
    cudaLaunchKernelEx(&how, kernel, static_cast<P>(arguments)...);
}
#endif

/* Launch and keep an error; no launch over nothing. */
#ifdef GLM_NAMED
#define GLM_LAUNCH(cuda, op, kernel, blocks, threads, shared, ...)                               \
    do {                                                                                         \
        if ((blocks) > 0)                                                                        \
            glm_launch(cuda, op, 0, kernel, dim3((unsigned)(blocks)), dim3((unsigned)(threads)), \
                       (shared), __VA_ARGS__);                                                   \
    } while (0)
#define GLM_LAUNCH_AFTER(cuda, op, kernel, blocks, threads, shared, ...)                         \
    do {                                                                                         \
        if ((blocks) > 0)                                                                        \
            glm_launch(cuda, op, 1, kernel, dim3((unsigned)(blocks)), dim3((unsigned)(threads)), \
                       (shared), __VA_ARGS__);                                                   \
    } while (0)
#else
#define GLM_LAUNCH(cuda, op, kernel, blocks, threads, shared, ...)                                 \
    do {                                                                                           \
        if ((blocks) > 0) {                                                                        \
            if ((shared) > GLM_SHARED_UNASKED)                                                     \
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,          \
                                     (int)(shared));                                               \
            GLM_KERNEL_CALL(kernel, dim3((unsigned)(blocks)), dim3((unsigned)(threads)), (shared), \
                            (cuda)->stream, __VA_ARGS__);                                          \
            glm_cuda_launched(cuda, op);                                                           \
        }                                                                                          \
    } while (0)
#ifdef __CUDA_EMU__
#define GLM_LAUNCH_AFTER GLM_LAUNCH
#else
#define GLM_LAUNCH_AFTER(cuda, op, kernel, blocks, threads, shared, ...)                  \
    do {                                                                                  \
        if ((blocks) > 0) {                                                               \
            launch_after(cuda, kernel, (unsigned)(blocks), (unsigned)(threads), (shared), \
                         __VA_ARGS__);                                                    \
            glm_cuda_launched(cuda, op);                                                  \
        }                                                                                 \
    } while (0)
#endif
#endif
#endif
