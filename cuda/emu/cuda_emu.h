// cuda_emu.h - runs CUDA C++ kernels on the host, one fiber per CUDA thread.
// Force-included (-include cuda_emu.h) when a .cu file is compiled as plain C++.
// Device language, fp16/bf16 types, wmma and the runtime/cuBLAS subset are declared here;
// everything that touches emulator state lives in cuda_emu.cpp (never instrumented).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <immintrin.h>
#include <string>
#include <type_traits>
#define __CUDA_EMU__ 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// One module's TLS block holds exactly its static shared variables; the runtime finds it by PT_TLS.
#define __shared__ static __thread
// The two spellings a source must use instead of raw CUDA syntax (nvcc side in launch.cuh):
#define GLM_DYN_SHARED(T, name) T *name = (T *)emu_dyn_shared()
#define GLM_KERNEL_CALL(k, grid, block, smem, stream, ...) \
    emu_launch_t(#k, k, (const void *)k, dim3(grid), dim3(block), (smem), (stream), __VA_ARGS__)

// ---------------------------------------------------------------- vector types
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

// ---------------------------------------------------------------- fp16 / bf16
// Aggregates on purpose: g++ guards function-local arrays of types that declare a constructor, and
// a guard would land in the shared-memory block. So a source writes __float2half(x), never
// __half(x).
struct __half {
    uint16_t v;
    operator float() const { return _cvtsh_ss(v); }
};
struct __nv_bfloat16 {
    uint16_t v;
    operator float() const
    {
        uint32_t u = (uint32_t)v << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};
static inline __half __float2half(float f) { return {(uint16_t)_cvtss_sh(f, 0)}; }
static inline __nv_bfloat16 __float2bfloat16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return {(u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)0x7fff
                                            : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;
struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __half2 half2;
#define EMU_H(T, cv, op)                                                       \
    static inline T operator op(T a, T b) { return cv((float)a op(float) b); } \
    static inline T &operator op##=(T & a, T b) { return a = cv((float)a op(float) b); }
EMU_H(__half, __float2half, +)
EMU_H(__half, __float2half, -)
EMU_H(__half, __float2half, *)
EMU_H(__half, __float2half, /)
EMU_H(__nv_bfloat16, __float2bfloat16, +) EMU_H(__nv_bfloat16, __float2bfloat16, -)
    EMU_H(__nv_bfloat16, __float2bfloat16, *) static inline __half __float2half_rn(float f)
{
    return __float2half(f);
}
static inline float __half2float(__half h) { return h; }
static inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
static inline __half2 __floats2half2_rn(float a, float b)
{
    return {__float2half(a), __float2half(b)};
}
static inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c)
{
    return {__float2half(fmaf(a.x, b.x, c.x)), __float2half(fmaf(a.y, b.y, c.y))};
}
static inline float __bfloat162float(__nv_bfloat16 h) { return h; }
#define __expf expf // libm declares its own __expf
#define __logf logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __int_as_float(int i)
{
    float f;
    memcpy(&f, &i, 4);
    return f;
}
static inline int __float_as_int(float f)
{
    int i;
    memcpy(&i, &f, 4);
    return i;
}
template <class T> static inline T __ldg(const T *p) { return *p; }
using std::max;
using std::min;

// ---------------------------------------------------------------- thread state and collectives
struct emu_fiber {
    uint3 t;
    unsigned tid;
    uint8_t state, dev;
    unsigned bep, wep, wmask, kind;
    void *arg;
    void *sp;
    uint8_t *stack;
    const char *file;
    int line, site;
};
extern emu_fiber *emu_cur;
extern uint3 emu_bid;
extern dim3 emu_bdim, emu_gdim;
#define threadIdx (emu_cur->t)
#define blockIdx emu_bid
#define blockDim emu_bdim
#define gridDim emu_gdim
#define warpSize 32
void *emu_dyn_shared();
void emu_syncthreads(const char *, int line, int site);
enum { EMU_SYNC, EMU_SHFL, EMU_BALLOT, EMU_MMA, EMU_MMA16816, EMU_FRAG };
struct emu_warp_op {
    uint64_t v;
    int src;
    uint64_t out;
    const float *a, *b, *c;
    float *d;
    const void *rc;
};
void emu_warp(unsigned mask, unsigned kind, emu_warp_op *, const char *, int);
static inline unsigned emu_mask(unsigned m = 0xffffffffu) { return m; }
#define __syncthreads() emu_syncthreads(__FILE__, __LINE__, __COUNTER__)
#define __syncwarp(...) emu_warp(emu_mask(__VA_ARGS__), EMU_SYNC, nullptr, __FILE__, __LINE__)
template <class T> static inline T emu_shfl(unsigned m, T v, int src, const char *f, int l)
{
    static_assert(sizeof(T) <= 8, "shuffle type");
    emu_warp_op o{};
    memcpy(&o.v, &v, sizeof(T));
    o.src = src;
    emu_warp(m, EMU_SHFL, &o, f, l);
    memcpy(&v, &o.out, sizeof(T));
    return v;
}
static inline int emu_lane() { return emu_cur->tid & 31; }
static inline int emu_up(int d)
{
    int s = emu_lane() - d;
    return s < 0 ? emu_lane() : s;
}
static inline int emu_down(int d)
{
    int s = emu_lane() + d;
    return s > 31 ? emu_lane() : s;
}
#define __shfl_sync(m, v, s) emu_shfl(m, v, (s) & 31, __FILE__, __LINE__)
#define __shfl_xor_sync(m, v, x) emu_shfl(m, v, emu_lane() ^ (x), __FILE__, __LINE__)
#define __shfl_down_sync(m, v, d) emu_shfl(m, v, emu_down(d), __FILE__, __LINE__)
#define __shfl_up_sync(m, v, d) emu_shfl(m, v, emu_up(d), __FILE__, __LINE__)
static inline unsigned emu_ballot(unsigned m, int p, const char *f, int l)
{
    emu_warp_op o{};
    o.v = p != 0;
    emu_warp(m, EMU_BALLOT, &o, f, l);
    return (unsigned)o.out;
}
#define __ballot_sync(m, p) emu_ballot(m, p, __FILE__, __LINE__)
#define __any_sync(m, p) (emu_ballot(m, p, __FILE__, __LINE__) != 0)
#define __all_sync(m, p) (emu_ballot(m, p, __FILE__, __LINE__) == (m))
float atomicAdd(float *, float);
int atomicAdd(int *, int);
unsigned atomicAdd(unsigned *, unsigned);
unsigned atomicInc(unsigned *, unsigned);
int atomicMax(int *, int);
void __threadfence();

// ---------------------------------------------------------------- tensor-core primitives
// wmma fragments: 8 elements per lane, spread by a scrambled bijection so that code which assumes a
// layout fails.
void emu_frag_io(void *x, bool f32, void *mem, unsigned ldm, bool col, bool store, bool half_mem,
                 const char *what);
namespace nvcuda
{
namespace wmma
{
struct matrix_a {
};
struct matrix_b {
};
struct accumulator {
};
struct row_major {
};
struct col_major {
};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class L = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "emulated shape: 16x16x16");
    static const int num_elements = 8;
    T x[8];
};
template <class L> struct is_col {
    static const bool v = false;
};
template <> struct is_col<col_major> {
    static const bool v = true;
};
template <class F, class T> static inline void fill_fragment(F &f, T v)
{
    for (auto &e : f.x)
        e = v;
}
template <class U, class T, class L>
static inline void load_matrix_sync(fragment<U, 16, 16, 16, T, L> &f, const T *p, unsigned ldm)
{
    emu_frag_io(f.x, sizeof(T) == 4, (void *)p, ldm, is_col<L>::v, false, sizeof(T) == 2,
                "load_matrix_sync");
}
template <class T>
static inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, T> &f, const T *p,
                                    unsigned ldm, layout_t l)
{
    emu_frag_io(f.x, sizeof(T) == 4, (void *)p, ldm, l == mem_col_major, false, sizeof(T) == 2,
                "load_matrix_sync");
}
template <class T>
static inline void store_matrix_sync(T *p, const fragment<accumulator, 16, 16, 16, T> &f,
                                     unsigned ldm, layout_t l)
{
    emu_frag_io((void *)f.x, sizeof(T) == 4, p, ldm, l == mem_col_major, true, sizeof(T) == 2,
                "store_matrix_sync");
}
template <class LA, class LB>
static inline void mma_sync(fragment<accumulator, 16, 16, 16, float> &d,
                            const fragment<matrix_a, 16, 16, 16, __half, LA> &a,
                            const fragment<matrix_b, 16, 16, 16, __half, LB> &b,
                            const fragment<accumulator, 16, 16, 16, float> &c)
{
    float fa[8], fb[8];
    for (int i = 0; i < 8; i++)
        fa[i] = a.x[i], fb[i] = b.x[i];
    emu_warp_op o{};
    o.a = fa;
    o.b = fb;
    o.c = c.x;
    o.d = d.x;
    emu_warp(0xffffffffu, EMU_MMA, &o, "mma_sync", 0);
}
} // namespace wmma
} // namespace nvcuda
// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 with the layout the PTX manual gives.
static inline void emu_mma16816(float *d, const unsigned *a, const unsigned *b, const float *c)
{
    float fa[8], fb[4];
    for (int i = 0; i < 8; i++)
        fa[i] = _cvtsh_ss((uint16_t)(a[i / 2] >> (16 * (i & 1))));
    for (int i = 0; i < 4; i++)
        fb[i] = _cvtsh_ss((uint16_t)(b[i / 2] >> (16 * (i & 1))));
    emu_warp_op o{};
    o.a = fa;
    o.b = fb;
    o.c = c;
    o.d = d;
    emu_warp(0xffffffffu, EMU_MMA16816, &o, "mma16816", 0);
}

static inline void emu_mma16816_bf16(float *d, const unsigned *a, const unsigned *b, const float *c)
{
    float fa[8], fb[4];
    for (int i = 0; i < 8; i++) {
        uint32_t u = (i & 1 ? a[i / 2] & 0xffff0000u : a[i / 2] << 16);
        memcpy(&fa[i], &u, 4);
    }
    for (int i = 0; i < 4; i++) {
        uint32_t u = (i & 1 ? b[i / 2] & 0xffff0000u : b[i / 2] << 16);
        memcpy(&fb[i], &u, 4);
    }
    emu_warp_op o{};
    o.a = fa;
    o.b = fb;
    o.c = c;
    o.d = d;
    emu_warp(0xffffffffu, EMU_MMA16816, &o, "mma16816", 0);
}
// cp.async: a copy's bytes are kept until the thread waits for its group. The caller stores them, so
// that the access is checked there: no sooner than emu_copy_landed hands them out, which is nullptr
// when only the last n groups are left. A thread that returns with copies on their way is a report.
void emu_copy(void *to, const uint4 &bytes);
void emu_copies_commit();
void *emu_copy_landed(int n, uint4 *bytes);
// ---------------------------------------------------------------- runtime API subset
typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorECCUncorrectable = 214,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719
} cudaError_t;
typedef struct emu_stream *cudaStream_t;
typedef struct emu_event *cudaEvent_t;
typedef struct emu_graph *cudaGraph_t;
typedef struct emu_graph *cudaGraphExec_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
#define cudaStreamNonBlocking 1
#define cudaEventDisableTiming 2
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin;
};
extern "C" {
cudaError_t cudaMalloc(void **, size_t);
cudaError_t cudaFree(void *);
cudaError_t cudaMallocHost(void **, size_t);
cudaError_t cudaFreeHost(void *);
cudaError_t cudaMemcpy(void *, const void *, size_t, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void *, const void *, size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemset(void *, int, size_t);
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *, cudaGraph_t, unsigned long long);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDeviceCount(int *);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDevice(int *);
int cuDevicePrimaryCtxGetState(int, unsigned *, int *);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *, int);
cudaError_t cudaMemGetInfo(size_t *, size_t *);
cudaError_t cudaDriverGetVersion(int *);
cudaError_t cudaRuntimeGetVersion(int *);
// emulator's own controls and counters
void emu_mode(int dryrun, int lazy, int protect, unsigned seed); // seed 0: thread order as numbered
struct emu_stats {
    uint64_t launches, gemms, errors, cur_bytes, peak_bytes, rd, wr, rd_unique, wr_unique, sectors,
        switches, dram_rd, dram_wr;
    double gemm_flops;
};
void emu_get_stats(emu_stats *);
void emu_reset_stats();
uint64_t emu_reports(char *text, size_t n); // how many so far, and the last one's text
// What an op leaves in a buffer of its own is not for the next op: uninitialised again, in order.
void emu_forget(void *, size_t, cudaStream_t);
int emu_checked();                           // 1: the kernels' library is the checked build
// Per kernel since emu_metrics: launches and barriers of blocks; while on and in the checked build,
// bytes that threads asked for, distinct bytes and 32-byte sectors of each instruction of a warp.
// 0 past the last kernel.
void emu_metrics(int on);
int emu_traffic(int i, char *name, size_t n, uint64_t out[5]);
// From now on (1) or up to here (0) a line for each launch, product and fill of the device, also
// where kernels are left out; what was written since the last call is returned. A launch is its
// kernel, blocks, threads and arguments: a number, a pointer as 0 or 1, a struct as its bytes.
const char *emu_log(int on);
int emu_logging();
// cuda/mutate.py: is mutant k in force; which it is to be (-1 none); was its place reached since
int emu_mutant(int k);
void emu_set_mutant(int k);
int emu_reached(int k);
}
cudaError_t emu_func_attr(const void *, cudaFuncAttribute, int);
template <class F> static inline cudaError_t cudaFuncSetAttribute(F *f, cudaFuncAttribute a, int v)
{
    return emu_func_attr((const void *)f, a, v);
}
void emu_expect_failed(const char *what, const char *file, int line);
#define GLM_EXPECT(condition) \
    ((condition) ? (void)0 : emu_expect_failed(#condition, __FILE__, __LINE__))
void emu_launch(const char *, const void *, dim3, dim3, size_t, cudaStream_t, size_t argbytes,
                std::function<void()>, const std::string &arguments);
template <class T> static std::string emu_told(const T &x)
{
    if constexpr (std::is_arithmetic_v<T>)
        return ' ' + std::to_string(x);
    else if constexpr (std::is_pointer_v<T>)
        return x ? " 1" : " 0";
    std::string bytes = " ";
    for (size_t i = 0; i < sizeof x; i++)
        for (int half = 4; half >= 0; half -= 4)
            bytes += "0123456789abcdef"[((const unsigned char *)&x)[i] >> half & 15];
    return bytes;
}
template <class... P, class... A>
static inline void emu_launch_t(const char *n, void (*k)(P...), const void *id, dim3 g, dim3 b,
                                size_t sm, cudaStream_t s, A... a)
{
    emu_launch(n, id, g, b, sm, s, (sizeof(P) + ... + 0),
               [=]() __attribute__((no_sanitize("thread"))) {
                   emu_cur->dev = 1;
                   k(a...);
                   emu_cur->dev = 0;
               },
               emu_logging() ? (emu_told<P>(a) + ... + std::string()) : std::string());
}

// ---------------------------------------------------------------- cuBLAS subset
typedef struct emu_cublas *cublasHandle_t;
typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE } cublasPointerMode_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum {
    CUDA_R_32F = 0,
    CUDA_R_16F = 2,
    CUDA_R_8I = 3,
    CUDA_R_32I = 10,
    CUDA_R_16BF = 14
} cudaDataType_t,
    cudaDataType;
typedef enum {
    CUBLAS_COMPUTE_16F = 64,
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
} cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 } cublasGemmAlgo_t;
extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t *);
cublasStatus_t cublasDestroy_v2(cublasHandle_t);
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t);
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t);
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                            int k, const void *alpha, const void *A, cudaDataType, int lda,
                            const void *B, cudaDataType, int ldb, const void *beta, void *C,
                            cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t);
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t,
                                          int m, int n, int k, const void *alpha, const void *A,
                                          cudaDataType, int lda, long long sa, const void *B,
                                          cudaDataType, int ldb, long long sb, const void *beta,
                                          void *C, cudaDataType, int ldc, long long sc, int batch,
                                          cublasComputeType_t, cublasGemmAlgo_t);
}
#define cublasCreate cublasCreate_v2
#define cublasDestroy cublasDestroy_v2
#define cublasSetStream cublasSetStream_v2
