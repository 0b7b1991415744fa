/* The CUDA backend's context: device, stream, memory, scratch, errors, the table.
 *
 * Everything runs on one stream in order. An op cannot return an error, so the first one is kept as
 * a sentence; from then on ops do nothing, stopped() is 1 and error() gives the sentence. Compiles
 * as C and, for the emulator, as C++. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "device.h"
#include "products.h"
#ifdef GLM_NAMED
#include "named.h"
#endif

#include <assert.h>
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

static_assert(sizeof(struct glm_small) == GLM_CUDA_SMALL, "products.h says how large it is");

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
#ifdef __CUDA_EMU__ /* nothing passes from one op to the next but what the table says */
    struct glm_small *small = cx->small;
    emu_forget(small, offsetof(struct glm_small, zero), cx->stream);
    emu_forget(small->found, sizeof small->found, cx->stream);
    for (int i = 0; i < SCRATCHES; i++)
        emu_forget(cx->scratch[i], cx->scratch_bytes[i], cx->stream);
#endif
    return !cx->stopped && !cx->error[0] &&
           !glm_cuda_failed(cx, cudaSetDevice(cx->device), "cudaSetDevice");
}

void glm_cuda_launched(struct cuda *cx, const char *op)
{
    cx->counts.launches += !cx->capturing;
    glm_cuda_failed(cx, cudaGetLastError(), op);
}

void glm_cuda_blas_failed(struct cuda *cx, int status, int m, int n, int k)
{
    if (!cx->error[0])
        snprintf(cx->error, sizeof cx->error, "%s (%s): cublasGemmEx of %d x %d x %d: status %d",
                 cx->name, cx->device_name, m, n, k, status);
}

/* ---- memory. What is live is kept in a list, so that its bytes can be counted. */

/* NULL with cx->refusal set */
static void *take(struct cuda *cx, size_t bytes)
{
    void *p = NULL;
    struct block *block = (struct block *)malloc(sizeof *block);
    cx->be.allocated++;
    int code = cudaSetDevice(cx->device);
    if (code == cudaSuccess)
        code = block ? cudaMalloc(&p, bytes ? bytes : 1) : cudaErrorMemoryAllocation;
    if (code == cudaSuccess) {
        block->p = p;
        block->bytes = bytes;
        block->next = cx->blocks;
        cx->blocks = block;
        cx->counts.live += bytes;
        if (cx->counts.peak < cx->counts.live)
            cx->counts.peak = cx->counts.live;
        return p;
    }
    size_t free_bytes = 0, total = 0;
    free(block);
    cudaGetLastError(); /* it is reported here, not by the next launch */
    cudaMemGetInfo(&free_bytes, &total);
    cudaGetLastError();
    snprintf(cx->refusal, sizeof cx->refusal,
             "cudaMalloc of %zu bytes on %s (%s): %s (error %d); %zu of its %zu bytes are free",
             bytes, cx->name, cx->device_name, cudaGetErrorString((cudaError_t)code), code,
             free_bytes, total);
    return NULL;
}

/* No recording outlives memory that it may use. */
static void forget_recordings(struct cuda *cx)
{
    for (int i = 0; i < RECORDINGS; i++) {
        if (cx->recordings[i].graph)
            glm_cuda_failed(cx, cudaGraphExecDestroy(cx->recordings[i].graph),
                            "cudaGraphExecDestroy");
        cx->recordings[i].graph = NULL;
    }
    memset(&cx->last, 0, sizeof cx->last);
}

static void give(struct cuda *cx, void *p)
{
    if (!p)
        return;
    forget_recordings(cx);
    for (struct block **at = &cx->blocks; *at; at = &(*at)->next)
        if ((*at)->p == p) {
            struct block *block = *at;
            *at = block->next;
            cx->counts.live -= block->bytes;
            free(block);
            break;
        }
    cudaSetDevice(cx->device);
    glm_cuda_failed(cx, cudaFree(p), "cudaFree");
}

void *glm_cuda_scratch(struct cuda *cx, enum glm_scratch which, size_t bytes)
{
    if (bytes <= cx->scratch_bytes[which])
        return cx->scratch[which];
    if (cx->scratch[which]) { /* it may be in use */
        glm_cuda_failed(cx, cudaStreamSynchronize(cx->stream), "cudaStreamSynchronize");
        cx->counts.syncs++;
    }
    give(cx, cx->scratch[which]);
    cx->counts.scratch -= cx->scratch_bytes[which];
    cx->scratch_bytes[which] = 0;
    cx->scratch[which] = take(cx, bytes);
    if (cx->scratch[which]) {
        cx->scratch_bytes[which] = bytes;
        cx->counts.scratch += bytes;
    } else if (!cx->error[0]) {
        snprintf(cx->error, sizeof cx->error, "scratch: %.240s", cx->refusal);
        cx->transient = 1;
    }
    return cx->scratch[which];
}

int glm_cuda_fetch(struct cuda *cx, void *host, const void *device, size_t bytes, const char *op)
{
    cx->counts.downloads++;
    cx->counts.downloaded += bytes;
    cx->counts.syncs++;
    return !glm_cuda_failed(
               cx, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cx->stream), op) &&
           !glm_cuda_failed(cx, cudaStreamSynchronize(cx->stream), op);
}

/* ---- struct glm_backend */

static void *backend_alloc(struct glm_backend *be, size_t bytes) { return take(of(be), bytes); }

static void backend_free(struct glm_backend *be, void *p) { give(of(be), p); }

static const char *backend_refusal(struct glm_backend *be)
{
    return of(be)->refusal[0] ? of(be)->refusal : NULL;
}

static void move(struct glm_backend *be, void *to, const void *from, size_t bytes,
                 enum cudaMemcpyKind kind, const char *what)
{
    struct cuda *cx = of(be);
    if (!bytes || cx->error[0])
        return;
    if (glm_cuda_failed(cx, cudaSetDevice(cx->device), "cudaSetDevice"))
        return;
    glm_cuda_failed(cx, cudaMemcpyAsync(to, from, bytes, kind, cx->stream), what);
}

static void backend_upload(struct glm_backend *be, void *device, const void *host, size_t bytes)
{
    /* the host's memory is pageable: it has been read when the call returns */
    move(be, device, host, bytes, cudaMemcpyHostToDevice, "upload (cudaMemcpyAsync)");
    of(be)->counts.uploads += bytes != 0;
    of(be)->counts.uploaded += bytes;
}

static void backend_download(struct glm_backend *be, void *host, const void *device, size_t bytes)
{
    struct cuda *cx = of(be);
    if (bytes && !cx->error[0] && !glm_cuda_failed(cx, cudaSetDevice(cx->device), "cudaSetDevice"))
        glm_cuda_fetch(cx, host, device, bytes, "download (cudaMemcpyAsync)");
    if (cx->error[0])
        memset(host, 0, bytes); /* the caller's array is not left as it was found */
}

static void backend_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    move(be, to, from, bytes, cudaMemcpyDeviceToDevice, "copy (cudaMemcpyAsync)");
}

static void backend_zero(struct glm_backend *be, void *p, size_t bytes)
{
    struct cuda *cx = of(be);
    if (!bytes || cx->error[0])
        return;
    if (!glm_cuda_failed(cx, cudaSetDevice(cx->device), "cudaSetDevice"))
        glm_cuda_failed(cx, cudaMemsetAsync(p, 0, bytes, cx->stream), "cudaMemsetAsync");
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
    if (cx->transient && poll) { /* a new call */
        cx->error[0] = 0;
        cx->transient = 0;
    }
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

/* ---- recordings */

static int backend_replay(struct glm_backend *be, const struct glm_key *key)
{
    struct cuda *cx = of(be);
    if (!glm_cuda_begin(cx))
        return 1; /* nothing is to be done: the caller asks for errors */
    for (int i = 0; i < RECORDINGS; i++)
        if (cx->recordings[i].graph && memcmp(&cx->recordings[i].key, key, sizeof *key) == 0) {
            cx->counts.graphs++;
            glm_cuda_failed(cx, cudaGraphLaunch(cx->recordings[i].graph, cx->stream),
                            "cudaGraphLaunch");
            return 1;
        }
    /* the first time runs as it is, which also takes the scratch; it is recorded the second time */
    if (memcmp(&cx->last, key, sizeof *key) == 0)
        cx->capturing = !glm_cuda_failed(
            cx, cudaStreamBeginCapture(cx->stream, cudaStreamCaptureModeThreadLocal),
            "cudaStreamBeginCapture");
    cx->last = *key;
    return 0;
}

static void backend_recorded(struct glm_backend *be)
{
    struct cuda *cx = of(be);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t ready = NULL;
    if (!cx->capturing)
        return;
    cx->capturing = 0;
    if (glm_cuda_failed(cx, cudaStreamEndCapture(cx->stream, &graph), "cudaStreamEndCapture") ||
        !graph)
        return;
    if (!cx->stopped && !cx->error[0] &&
        !glm_cuda_failed(cx, cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate")) {
        struct recording *r = &cx->recordings[cx->next_recording];
        cx->next_recording = (cx->next_recording + 1) % RECORDINGS;
        if (r->graph)
            glm_cuda_failed(cx, cudaGraphExecDestroy(r->graph), "cudaGraphExecDestroy");
        r->key = cx->last;
        r->graph = ready;
        cx->counts.graphs++;
        glm_cuda_failed(cx, cudaGraphLaunch(ready, cx->stream), "cudaGraphLaunch");
    }
    glm_cuda_failed(cx, cudaGraphDestroy(graph), "cudaGraphDestroy");
}

static void backend_take_counts(struct glm_backend *be, struct glm_counts *out)
{
    struct glm_counts *c = &of(be)->counts, rest = {};
    *out = *c;
    rest.live = rest.peak = c->live;
    rest.scratch = c->scratch;
    *c = rest;
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
    if (cudaSetDevice(cx->device) != cudaSuccess)
        cudaGetLastError(); /* nothing was opened; it is not the next launch that failed */
    glm_blas_close(&cx->blas);
    for (int i = 0; i < SCRATCHES; i++)
        give(cx, cx->scratch[i]);
    give(cx, cx->workspace);
    give(cx, cx->small);
    if (cx->stream)
        cudaStreamDestroy(cx->stream);
#ifdef GLM_NAMED
    glm_cuda_unload_images(cx);
#endif
    while (cx->blocks) { /* models and caches that outlive the backend free nothing after it */
        struct block *block = cx->blocks;
        cx->blocks = block->next;
        free(block);
    }
    free(cx);
}

static const struct glm_ops cuda_ops = {
#define OP(op, extent, ...) .op = glm_cuda_##op,
#include "ops.h"
};

int glm_cuda_abi(void) { return GLM_CUDA_ABI; }

const char *glm_cuda_kind(void) { return LIBRARY; }

glm_status glm_cuda_info(int device, struct glm_device *out, struct glm_error *err)
{
    struct cudaDeviceProp properties;
    memset(out, 0, sizeof *out);
    cudaDriverGetVersion(&out->driver); /* 0 without a driver */
    cudaRuntimeGetVersion(&out->runtime);
    int code = cudaGetDeviceCount(&out->count);
    if (code != cudaSuccess || out->count < 1) {
        cudaGetLastError();
        out->count = 0;
        snprintf(out->why, sizeof out->why, "no GPU can be used: %s (error %d)",
                 code ? cudaGetErrorString((cudaError_t)code) : "there is none", code);
        return GLM_OK;
    }
    if (device < 0 || device >= out->count)
        return glm_fail(err, GLM_EVALUE, LIBRARY ":%d: this machine has %d CUDA devices", device,
                        out->count);
    if ((code = cudaSetDevice(device)) != cudaSuccess ||
        (code = cudaGetDeviceProperties(&properties, device)) != cudaSuccess ||
        (code = cudaMemGetInfo(&out->free_bytes, &out->total_bytes)) != cudaSuccess) {
        cudaGetLastError();
        return glm_fail(err, GLM_ESTATE, LIBRARY ":%d: the device cannot be asked: %s (error %d)",
                        device, cudaGetErrorString((cudaError_t)code), code);
    }
    snprintf(out->name, sizeof out->name, "%.63s", properties.name);
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    return GLM_OK;
}

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
    int driver = 0, runtime = 0; /* recordings hold such launches from 12.3 on */
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cx->overlaps = capability >= 90 && driver >= 12030 && runtime >= 12030;
    if (cx->compute != GLM_F32 && capability < (cx->compute == GLM_BF16 ? 80 : 75))
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': %s has compute capability %d.%d, %s needs %s", cx->name,
                        cx->device_name, properties.major, properties.minor,
                        dtype_name(cx->compute), cx->compute == GLM_BF16 ? "8.0" : "7.5");
#ifdef GLM_NAMED
    if ((code = glm_cuda_load_images(cx, capability)) != cudaSuccess)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': this library has no code for %s, capability %d.%d: %s "
                        "(error %d)",
                        cx->name, cx->device_name, properties.major, properties.minor,
                        cudaGetErrorString((cudaError_t)code), code);
#endif
    cx->small = (struct glm_small *)take(cx, sizeof *cx->small);
    cx->workspace = cx->small ? take(cx, GLM_BLAS_BYTES) : NULL;
    if (!cx->workspace)
        return glm_fail(err, GLM_EMEMORY, "backend '%s': %s", cx->name, cx->refusal);
    const float constants[4] = {1, 1, 0, 1}; /* factor, alpha, zero, one */
    backend_zero(&cx->be, cx->small, sizeof *cx->small);
    backend_upload(&cx->be, &cx->small->factor, constants, sizeof constants);
    if (cx->error[0])
        return glm_fail(err, GLM_EVALUE, "%s", cx->error);
    GLM_TRY(glm_blas_open(&cx->blas, cx->stream, err));
    code = cx->blas.set_workspace
               ? cx->blas.set_workspace(cx->blas.handle, cx->workspace, GLM_BLAS_BYTES)
               : 0;
    if (code)
        return glm_fail(err, GLM_EVALUE, "backend '%s': cublasSetWorkspace: status %d", cx->name,
                        code);
    return GLM_OK;
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
    cx->piece = GLM_PIECE;
#ifdef __CUDA_EMU__ /* so that small tests meet more than one piece */
    const char *piece = getenv("EMU_PIECE");
    cx->piece = piece ? strtoul(piece, NULL, 10) : 1 << 12;
#endif
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
    be->replay = backend_replay;
    be->recorded = backend_recorded;
    be->take_counts = backend_take_counts;
    be->refusal = backend_refusal;
    be->kept = compute;
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
