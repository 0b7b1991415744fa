/* What the host side of the CUDA files shares: the context, scratch memory, errors, products. */
#ifndef GLM_CUDA_DEVICE_H
#define GLM_CUDA_DEVICE_H

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "glm_cuda.h"
#include "products.h"

/* cuBLAS by function pointers, so that the library loads where cuBLAS is absent; enumerators have
 * the values of cublas_api.h and library_types.h. */
typedef int (*glm_gemm_fn)(void *handle, int transa, int transb, int m, int n, int k,
                           const void *alpha, const void *A, int a_type, int lda, const void *B,
                           int b_type, int ldb, const void *beta, void *C, int c_type, int ldc,
                           int compute, int algorithm);
struct glm_blas {
    void *handle;
    glm_gemm_fn gemm;
    int (*set_stream)(void *handle, cudaStream_t stream);
    int (*set_pointer_mode)(void *handle, int mode);
    int (*set_workspace)(void *handle, void *workspace, size_t bytes);
    int (*destroy)(void *handle);
};
enum { BLAS_N = 0, BLAS_T = 1, BLAS_HOST = 0, BLAS_DEVICE = 1 };
enum { BLAS_R_32F = 0, BLAS_R_16F = 2, BLAS_R_16BF = 14, BLAS_COMPUTE_32F = 68, BLAS_DEFAULT = -1 };

glm_status glm_blas_open(struct glm_blas *blas, cudaStream_t stream, struct glm_error *err);
void glm_blas_close(struct glm_blas *blas);
/* The file and version that glm_blas_open would use, or what to do. */
void glm_blas_about(char *out, size_t bytes);

/* Scratch grows to the largest size asked for and stays: a repeated step allocates nothing. */
enum glm_scratch { SCRATCH_WEIGHT, SCRATCH_A, SCRATCH_B, SCRATCHES };

enum { PARTIALS = 1024 };
/* Dynamic shared memory that a block gets without the launch asking for it. */
enum { GLM_SHARED_UNASKED = 48 << 10 };

/* On the device, written and read by kernels of one op. */
struct glm_small {
    double partial[PARTIALS];
    float largest[PARTIALS];
    float factor, alpha, zero, one; /* glm_cuda_factor; constants of products */
    int found[PARTIALS];
    /* Blocks that have come by (adapter_backward.cu): zeros between launches */
    unsigned strips[GLM_ADAPTER_STRIPS], chunks[GLM_ADAPTER_CHUNKS];
};

/* A sequence of launches that comes again (glm_backend.replay). */
enum { RECORDINGS = 4 };
struct recording {
    struct glm_key key;
    cudaGraphExec_t graph; /* NULL: none */
};

/* With GLMLORA_CUDA_CHECK: how often a call has launched what bears this name. */
enum { LAUNCHED = 64 };
struct launched {
    const char *op; /* NULL: no more of them */
    int count;
};

struct block {
    void *p;
    size_t bytes;
    struct block *next;
};

struct cuda {
    struct glm_backend be;
    struct block *blocks; /* live memory */
    int device, multiprocessors;
    int overlaps;  /* kernels may begin while the one before ends (launch.cuh) */
    size_t shared; /* bytes that a block may ask for */
    size_t piece;  /* GLM_PIECE */
    struct glm_counts counts;
    enum glm_dtype compute;
    cudaStream_t stream;
    struct glm_blas blas;
    struct glm_small *small;
    void *scratch[SCRATCHES];
    size_t scratch_bytes[SCRATCHES];
    int (*poll)(void *arg);
    void *poll_arg;
    int stopped;
    double polled; /* seconds */
    struct recording recordings[RECORDINGS];
    struct glm_key last;          /* of the call before */
    int next_recording;           /* the oldest, to be replaced */
    int capturing;                /* ops are being recorded, under the key `last` */
    int transient;                /* the error does not outlast the call: memory was short */
    struct glm_images_of *images; /* named.h; NULL where nvcc made the library */
    void *workspace;              /* of cuBLAS */
    int checked;                  /* GLMLORA_CUDA_CHECK=1 */
    struct launched launched[LAUNCHED];
    char name[32], device_name[64], error[320], refusal[256];
};

/* 0 when the op is to be skipped: an error came before, or poll asked to stop. */
int glm_cuda_begin(struct cuda *cx);
/* Keeps the first error: `what` is the call or the op. Returns 1 when code is one. */
int glm_cuda_failed(struct cuda *cx, int code, const char *what);
/* After a launch: keeps its error. */
void glm_cuda_launched(struct cuda *cx, const char *op);
/* The same after a call of cuBLAS. */
void glm_cuda_multiplied(struct cuda *cx, int status, int m, int n, int k);
/* The factor, a power of two on the device, by which n gradients x become float16: the largest of
 * them comes near 2^exponent. scale / factor is left in small->alpha. NULL: none is needed. */
const float *glm_cuda_factor(struct cuda *cuda, const void *x, size_t n, enum glm_dtype type,
                             int exponent, double scale);
/* The same of so many elements of small->largest. */
const float *glm_cuda_factor_of(struct cuda *cuda, int n, int exponent, double scale);
/* elementwise.cu: swiglu of h (N, 2F) in a 16-bit type, out (N, F); and the gradient of h, of dact
 * (N, F), times the factor that is returned, at the beginning of each row of h, or where h is of that
 * type in its place. from: the type of h, or there of dact. */
void glm_cuda_swiglu_narrow(struct cuda *cuda, const char *op, void *out, enum glm_dtype type,
                            const void *h, enum glm_dtype from, int N, int F);
const float *glm_cuda_swiglu_backward_narrow(struct cuda *cuda, void *h, enum glm_dtype type,
                                             const void *dact, int N, int F);
const float *glm_cuda_swiglu_backward_16(struct cuda *cuda, void *h, enum glm_dtype type,
                                         const void *dact, enum glm_dtype from, int N, int F);
/* norm.cu: sum += b, unless that is NULL; out = rmsnorm(sum) in a 16-bit type. */
void glm_cuda_add_rmsnorm_narrow(struct cuda *cuda, const char *op, void *out, enum glm_dtype type,
                                 void *rstd, void *sum, const void *b, const void *weight, int N,
                                 int C, double eps);
/* rope.cu: qkv (N, ..) of a 16-bit type, which is a product, gets what the product had to be added,
 * is rotated and goes into the cache, as `of` says; and gradients of queries and keys are turned
 * back. */
void glm_cuda_turn(struct cuda *cuda, void *qkv, enum glm_dtype type, const void *xa,
                   const struct glm_self_attention *of, int N);
void glm_cuda_turn_back(struct cuda *cuda, void *dqkv, enum glm_dtype type,
                        const struct glm_self_attention *of, int N);
/* At least `bytes` of a scratch buffer, or NULL after keeping the error. */
void *glm_cuda_scratch(struct cuda *cx, enum glm_scratch which, size_t bytes);
/* Products of an adapter's matrix W (adapter.cu): out = scale * inp W^T, or inp W where it is
 * transposed, + bias (+ out); and dweight += scale * dout^T inp. type: of inp, in 16 bits where it
 * has the wide side of a W with more columns than rows. drop: NULL, or the mask of such an inp. */
void glm_cuda_thin(struct cuda *cuda, const char *op, void *out, const void *inp,
                   enum glm_dtype type, const struct glm_mat *W, const void *bias, int N,
                   double scale, int accumulate, int transposed, const struct glm_dropout *drop);
void glm_cuda_thin_gradient(struct cuda *cuda, const char *op, void *dweight, const void *dout,
                            const void *inp, int N, int O, int I, double scale);
/* The same of an adapter of query_key_value, backward (adapter_backward.cu): what B does with dqkv, of
 * float or bfloat16: u = scale * dqkv B and dB; and what A does with the norm of inp in a 16-bit type:
 * dA, and dinp = u A, 0 after an error. What is NULL is not made, but u always. */
void glm_cuda_adapter_b(struct cuda *cuda, void *dB, void *u, const void *dqkv, enum glm_dtype type,
                        const void *xa, const struct glm_self_attention *of, int N);
int glm_cuda_adapter_a(struct cuda *cuda, void *dA, void *dinp, const void *u, const void *inp,
                       const void *rstd, enum glm_dtype type, const struct glm_self_attention *of,
                       int N);
/* Products of a weight with operands of its type (linear.cu): out (N, O) = x W^T + bias, which only
 * floats have; 0 after an error. dinp (N, I) = d W (+ dinp). And dinp = dout W of float gradients. */
int glm_cuda_product(struct cuda *cuda, void *out, enum glm_dtype to, const void *x,
                     const struct glm_mat *W, const void *bias, enum glm_dtype type, int N);
void glm_cuda_product_back(struct cuda *cuda, void *dinp, const void *d, const struct glm_mat *W,
                           enum glm_dtype type, int N, int accumulate);
void glm_cuda_input_gradient(struct cuda *cuda, void *dinp, enum glm_dtype to, const void *dout,
                             const struct glm_mat *W, int N, double scale, int accumulate);
/* Device to host, after everything queued; 0 on an error. */
int glm_cuda_fetch(struct cuda *cx, void *host, const void *device, size_t bytes, const char *op);

#define OP(op, extent, ...) void glm_cuda_##op(void *cx, __VA_ARGS__);
#include "ops.h"

#ifdef __cplusplus
}
#endif

#endif
