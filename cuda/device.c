/* The CUDA backend's context: device, stream, memory, scratch, errors, the table.
 *
 * Everything runs on one stream in order. An op cannot return an error, so the first one is kept as
 * a sentence; from then on ops do nothing, stopped() is 1 and error() gives the sentence. Compiles
 * as C and, for the emulator, as C++. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDA_EMU__
#define LIBRARY "emu"
#else
#define LIBRARY "cuda"
#endif

static struct cuda *of(struct glm_backend *be) { return (struct cuda *)be->cx; }

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int glm_cuda_failed(struct cuda *cx, int code, const char *what)
{
    if (code == cudaSuccess)
        return 0;
    if (!cx->error[0])
        snprintf(cx->error, sizeof cx->error, "%s (%s): %s: %s (error %d)", cx->name,
                 cx->device_name, what, cudaGetErrorString((cudaError_t)code), code);
    return 1;
}

int glm_cuda_begin(struct cuda *cx)
{
    return !cx->stopped && !cx->error[0] &&
           !glm_cuda_failed(cx, cudaSetDevice(cx->device), "cudaSetDevice");
}

void glm_cuda_launched(struct cuda *cx, const char *op)
{
    glm_cuda_failed(cx, cudaGetLastError(), op);
}

void glm_cuda_blas_failed(struct cuda *cx, int status, int m, int n, int k)
{
    if (!cx->error[0])
        snprintf(cx->error, sizeof cx->error, "%s (%s): cublasGemmEx of %d x %d x %d: status %d",
                 cx->name, cx->device_name, m, n, k, status);
}

static void *take(struct cuda *cx, size_t bytes, const char *what)
{
    void *p = NULL;
    cx->be.allocated++;
    if (cudaSetDevice(cx->device) == cudaSuccess &&
        cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess)
        return p;
    cudaGetLastError(); /* it is told here, not by the next launch */
    if (what && !cx->error[0]) {
        size_t free_bytes = 0, total = 0;
        cudaMemGetInfo(&free_bytes, &total);
        snprintf(cx->error, sizeof cx->error,
                 "%s (%s): cudaMalloc: %zu bytes of %s could not be taken, %zu of %zu are free",
                 cx->name, cx->device_name, bytes, what, free_bytes, total);
    }
    return NULL;
}

void *glm_cuda_scratch(struct cuda *cx, enum glm_scratch which, size_t bytes)
{
    if (bytes <= cx->scratch_bytes[which])
        return cx->scratch[which];
    cudaStreamSynchronize(cx->stream); /* the old one may be in use */
    cudaFree(cx->scratch[which]);
    cx->scratch_bytes[which] = 0;
    cx->scratch[which] = take(cx, bytes, "scratch");
    if (cx->scratch[which])
        cx->scratch_bytes[which] = bytes;
    return cx->scratch[which];
}

int glm_cuda_fetch(struct cuda *cx, void *host, const void *device, size_t bytes, const char *op)
{
    return !glm_cuda_failed(
               cx, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cx->stream), op) &&
           !glm_cuda_failed(cx, cudaStreamSynchronize(cx->stream), op);
}

/* ---- struct glm_backend */

static void *backend_alloc(struct glm_backend *be, size_t bytes)
{
    return take(of(be), bytes, NULL);
}

static void backend_free(struct glm_backend *be, void *p)
{
    if (!p)
        return;
    cudaSetDevice(of(be)->device);
    glm_cuda_failed(of(be), cudaFree(p), "cudaFree");
}

static void move(struct glm_backend *be, void *to, const void *from, size_t bytes,
                 enum cudaMemcpyKind kind, const char *what)
{
    struct cuda *cx = of(be);
    if (!bytes || cx->error[0])
        return;
    cudaSetDevice(cx->device);
    glm_cuda_failed(cx, cudaMemcpyAsync(to, from, bytes, kind, cx->stream), what);
}

static void backend_upload(struct glm_backend *be, void *device, const void *host, size_t bytes)
{
    /* the host's memory is pageable: it has been read when the call returns */
    move(be, device, host, bytes, cudaMemcpyHostToDevice, "upload");
}

static void backend_download(struct glm_backend *be, void *host, const void *device, size_t bytes)
{
    struct cuda *cx = of(be);
    move(be, host, device, bytes, cudaMemcpyDeviceToHost, "download");
    if (bytes)
        glm_cuda_failed(cx, cudaStreamSynchronize(cx->stream), "download");
    if (cx->error[0])
        memset(host, 0, bytes); /* the caller's array is not left as it was found */
}

static void backend_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    move(be, to, from, bytes, cudaMemcpyDeviceToDevice, "copy");
}

static void backend_zero(struct glm_backend *be, void *p, size_t bytes)
{
    struct cuda *cx = of(be);
    if (!bytes || cx->error[0])
        return;
    cudaSetDevice(cx->device);
    glm_cuda_failed(cx, cudaMemsetAsync(p, 0, bytes, cx->stream), "zero");
}

static void backend_set_threads(struct glm_backend *be, int threads)
{
    (void)be;
    (void)threads;
}

static int backend_threads(struct glm_backend *be)
{
    (void)be;
    return 1;
}

static void backend_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg)
{
    struct cuda *cx = of(be);
    cx->poll = poll;
    cx->poll_arg = arg;
    cx->stopped = 0;
    cx->polled = seconds();
}

/* Ops only queue work, so the question is asked where the model asks, between layers. */
static int backend_stopped(struct glm_backend *be)
{
    struct cuda *cx = of(be);
    if (cx->error[0])
        return 1;
    if (!cx->stopped && cx->poll && seconds() - cx->polled > 0.05) {
        cx->stopped = cx->poll(cx->poll_arg) != 0;
        cx->polled = seconds();
    }
    return cx->stopped;
}

static const char *backend_error(struct glm_backend *be)
{
    return of(be)->error[0] ? of(be)->error : NULL;
}

static void backend_destroy(struct glm_backend *be)
{
    struct cuda *cx = be ? of(be) : NULL;
    if (!cx)
        return;
    cudaSetDevice(cx->device);
    glm_blas_close(&cx->blas);
    for (int i = 0; i < SCRATCHES; i++)
        cudaFree(cx->scratch[i]);
    cudaFree(cx->small);
    if (cx->stream)
        cudaStreamDestroy(cx->stream);
    free(cx);
}

static const struct glm_ops cuda_ops = {
#define ENTRY(op) .op = glm_cuda_##op,
    GLM_OPS(ENTRY)
#undef ENTRY
};

int glm_cuda_abi(void) { return GLM_CUDA_ABI; }

static const char *dtype_name(enum glm_dtype dtype)
{
    return dtype == GLM_F16 ? "float16" : dtype == GLM_BF16 ? "bfloat16" : "float32";
}

static glm_status open_device(struct cuda *cx, struct glm_error *err)
{
    struct cudaDeviceProp properties;
    int code, count = 0;
    if ((code = cudaGetDeviceCount(&count)) != cudaSuccess)
        return glm_fail(err, GLM_EVALUE, "backend '%s': no CUDA device can be used: %s", cx->name,
                        cudaGetErrorString((cudaError_t)code));
    if (cx->device < 0 || cx->device >= count)
        return glm_fail(err, GLM_EVALUE, "backend '%s': this machine has %d CUDA devices", cx->name,
                        count);
    if ((code = cudaSetDevice(cx->device)) != cudaSuccess ||
        (code = cudaGetDeviceProperties(&properties, cx->device)) != cudaSuccess ||
        (code = cudaStreamCreateWithFlags(&cx->stream, cudaStreamNonBlocking)) != cudaSuccess)
        return glm_fail(err, GLM_EVALUE, "backend '%s': the device cannot be opened: %s", cx->name,
                        cudaGetErrorString((cudaError_t)code));
    snprintf(cx->device_name, sizeof cx->device_name, "%.63s", properties.name);
    cx->multiprocessors = properties.multiProcessorCount;
    const int capability = 10 * properties.major + properties.minor;
    if (cx->compute != GLM_F32 && capability < (cx->compute == GLM_BF16 ? 80 : 75))
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': %s has compute capability %d.%d, %s needs %s", cx->name,
                        cx->device_name, properties.major, properties.minor,
                        dtype_name(cx->compute), cx->compute == GLM_BF16 ? "8.0" : "7.5");
    cx->small = (struct glm_small *)take(cx, sizeof *cx->small, NULL);
    if (!cx->small)
        return glm_fail(err, GLM_EMEMORY, "backend '%s': %zu bytes could not be taken on %s",
                        cx->name, sizeof *cx->small, cx->device_name);
    const float constants[4] = {1, 1, 0, 1}; /* factor, alpha, zero, one */
    backend_zero(&cx->be, cx->small, sizeof *cx->small);
    backend_upload(&cx->be, &cx->small->factor, constants, sizeof constants);
    if (cx->error[0])
        return glm_fail(err, GLM_EVALUE, "%s", cx->error);
    return glm_blas_open(&cx->blas, cx->stream, err);
}

glm_status glm_cuda_create(struct glm_backend **out, int device, enum glm_dtype compute,
                           struct glm_error *err)
{
    *out = NULL;
    if (compute != GLM_F32 && compute != GLM_F16 && compute != GLM_BF16)
        return glm_fail(err, GLM_EVALUE, "backend '" LIBRARY "': no products in dtype %d",
                        (int)compute);
    struct cuda *cx = (struct cuda *)calloc(1, sizeof *cx);
    if (!cx)
        return glm_fail(err, GLM_EMEMORY, "backend '" LIBRARY "': %zu bytes", sizeof *cx);
    cx->device = device;
    cx->compute = compute;
    snprintf(cx->name, sizeof cx->name, LIBRARY ":%d/%s", device, dtype_name(compute));
    struct glm_backend *be = &cx->be;
    be->name = cx->name;
    be->ops = &cuda_ops;
    be->cx = cx;
    be->real_size = 4;
    be->real = GLM_F32;
    be->device_memory = 1;
    be->alloc = backend_alloc;
    be->free = backend_free;
    be->upload = backend_upload;
    be->download = backend_download;
    be->copy = backend_copy;
    be->zero = backend_zero;
    be->set_threads = backend_set_threads;
    be->threads = backend_threads;
    be->set_poll = backend_set_poll;
    be->stopped = backend_stopped;
    be->error = backend_error;
    be->destroy = backend_destroy;
    const glm_status status = open_device(cx, err);
    if (status != GLM_OK) {
        backend_destroy(be);
        return status;
    }
    *out = be;
    return GLM_OK;
}

#ifdef __cplusplus
}
#endif
