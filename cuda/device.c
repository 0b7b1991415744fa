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
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDA_EMU__
#define LIBRARY "emu"
static const char glm_cuda_built[] = "by g++ on the emulator";
#else
#define LIBRARY "cuda"
extern const char glm_cuda_built[]; /* in a file that build.py writes */
#endif

static_assert(sizeof(struct glm_small) == GLM_CUDA_SMALL, "products.h says how large it is");

static struct cuda *of(struct glm_backend *be) { return (struct cuda *)be->cx; }

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* What a kernel does wrong while it runs (memory that is not there or not aligned, a trap, a fault
 * of the hardware) is told by whichever call is next. */
static int is_of_earlier_work(int code)
{
    return code == cudaErrorECCUncorrectable ||
           (code >= cudaErrorIllegalAddress && code <= cudaErrorLaunchFailure);
}

int glm_cuda_failed(struct cuda *cx, int code, const char *what)
{
    if (code == cudaSuccess)
        return 0;
    if (!cx->error[0])
        snprintf(cx->error, sizeof cx->error, "%s (%s): %s: %s (error %d)%s", cx->name,
                 cx->device_name, what, cudaGetErrorString((cudaError_t)code), code,
                 is_of_earlier_work(code) && !cx->checked
                     ? "; an op before it may be at fault: GLMLORA_CUDA_CHECK=1 names it"
                     : "");
    return 1;
}

/* GLMLORA_CUDA_CHECK=1: waits for each launch, so that its fault is not another's, and says which
 * one of its op in this call it was: of a model's layers each has the same ops. */
static void check_launch(struct cuda *cx, const char *op)
{
    struct launched *of = cx->launched;
    char what[96];
    if (!cx->checked)
        return;
    while (of->op && strcmp(of->op, op) != 0 && of < cx->launched + LAUNCHED - 1)
        of++;
    of->op = op;
    snprintf(what, sizeof what, "%s, launch %d of it in this call", op, ++of->count);
    glm_cuda_failed(cx, cudaStreamSynchronize(cx->stream), what);
}

/* ---- the thread's current device: ours during a call, afterwards what it was */

/* cudaSetDevice makes a context, of some 300 MB, on a device that has none. */
static int has_context(int device)
{
    unsigned flags;
    int active = 0;
    int (*state)(int, unsigned *, int *) = NULL;
#ifdef __CUDA_EMU__
    state = cuDevicePrimaryCtxGetState;
#else
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (driver)
        *(void **)&state = dlsym(driver, "cuDevicePrimaryCtxGetState");
    if (driver)
        dlclose(driver); /* the runtime keeps it */
#endif
    return state && state(device, &flags, &active) == 0 && active;
}

static int enter(int device, int *before)
{
    *before = -1;
    if (cudaGetDevice(before) != cudaSuccess)
        cudaGetLastError(); /* it is not the next launch that failed */
    if (*before != device)
        return cudaSetDevice(device);
    *before = -1; /* leave() has nothing to do */
    return cudaSuccess;
}

/* A device that nothing in the process uses is left alone: it was current because it is the first. */
static void leave(int before)
{
    if (before >= 0 && has_context(before) && cudaSetDevice(before) != cudaSuccess)
        cudaGetLastError();
}

/* 0 after an error. What follows is to end with leave(), whatever this returns. */
static int enter_kept(struct cuda *cx, int *before)
{
    return !glm_cuda_failed(cx, enter(cx->device, before), "cudaSetDevice") && !cx->error[0];
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
    check_launch(cx, op);
}

void glm_cuda_multiplied(struct cuda *cx, int status, int m, int n, int k)
{
    cx->counts.products += !cx->capturing;
    check_launch(cx, "cublasGemmEx");
    if (status && !cx->error[0])
        snprintf(cx->error, sizeof cx->error, "%s (%s): cublasGemmEx of %d x %d x %d: status %d",
                 cx->name, cx->device_name, m, n, k, status);
}

/* ---- memory. What is live is kept in a list, so that its bytes can be counted. */

/* NULL with cx->refusal set */
static void *take(struct cuda *cx, size_t bytes)
{
    void *p = NULL;
    struct block *block = (struct block *)malloc(sizeof *block);
    int before, code = enter(cx->device, &before);
    cx->be.allocated++;
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
        leave(before);
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
    leave(before);
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
    int before;
    if (!p)
        return;
    glm_cuda_failed(cx, enter(cx->device, &before), "cudaSetDevice");
    forget_recordings(cx);
    for (struct block **at = &cx->blocks; *at; at = &(*at)->next)
        if ((*at)->p == p) {
            struct block *block = *at;
            *at = block->next;
            cx->counts.live -= block->bytes;
            free(block);
            break;
        }
    glm_cuda_failed(cx, cudaFree(p), "cudaFree");
    leave(before);
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

/* The host's memory is pageable: it has been read when the call returns. Two pinned buffers in turn
 * were no faster on an H100's machine (10 GB/s either way: one core's copy). */
static void backend_upload(struct glm_backend *be, void *device, const void *host, size_t bytes)
{
    struct cuda *cx = of(be);
    int before = -1;
    cx->counts.uploads += bytes != 0;
    cx->counts.uploaded += bytes;
    if (bytes && enter_kept(cx, &before))
        glm_cuda_failed(cx,
                        cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, cx->stream),
                        "upload (cudaMemcpyAsync)");
    leave(before);
}

static void backend_download(struct glm_backend *be, void *host, const void *device, size_t bytes)
{
    struct cuda *cx = of(be);
    int before = -1;
    if (bytes && enter_kept(cx, &before))
        glm_cuda_fetch(cx, host, device, bytes, "download (cudaMemcpyAsync)");
    leave(before);
    if (cx->error[0])
        memset(host, 0, bytes); /* the caller's array is not left as it was found */
}

static void backend_copy(struct glm_backend *be, void *to, const void *from, size_t bytes)
{
    struct cuda *cx = of(be);
    int before = -1;
    if (bytes && enter_kept(cx, &before))
        glm_cuda_failed(cx, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cx->stream),
                        "copy (cudaMemcpyAsync)");
    leave(before);
}

static void backend_zero(struct glm_backend *be, void *p, size_t bytes)
{
    struct cuda *cx = of(be);
    int before = -1;
    if (bytes && enter_kept(cx, &before))
        glm_cuda_failed(cx, cudaMemsetAsync(p, 0, bytes, cx->stream), "cudaMemsetAsync");
    leave(before);
}

/* Between them ops may be called, which find their device and leave it. */
static int backend_enter(struct glm_backend *be)
{
    int before = -1;
    enter_kept(of(be), &before);
    return before;
}

static void backend_leave(struct glm_backend *be, int before)
{
    (void)be;
    leave(before);
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

static size_t backend_mlp_rows(struct glm_backend *be, const struct glm_mat *up,
                               const struct glm_mat *down, int N)
{
    return glm_mlp_rows(((struct cuda *)be->cx)->compute, up, down, N);
}
static size_t backend_self_attention_rows(struct glm_backend *be,
                                          const struct glm_self_attention *of, int N)
{
    return glm_self_attention_rows(((struct cuda *)be->cx)->compute, of, N);
}

static void backend_set_poll(struct glm_backend *be, int (*poll)(void *arg), void *arg)
{
    struct cuda *cx = of(be);
    cx->poll = poll;
    cx->poll_arg = arg;
    cx->stopped = 0;
    memset(cx->launched, 0, sizeof cx->launched);
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
    if (!cx->checked && memcmp(&cx->last, key, sizeof *key) == 0)
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
        !glm_cuda_failed(cx, cudaGraphInstantiateWithFlags(&ready, graph, 0),
                         "cudaGraphInstantiateWithFlags")) {
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
    int before;
    if (!cx)
        return;
    if (enter(cx->device, &before) != cudaSuccess)
        cudaGetLastError(); /* nothing was opened; it is not the next launch that failed */
    glm_blas_close(&cx->blas);
    for (int i = 0; i < SCRATCHES; i++)
        give(cx, cx->scratch[i]);
    if (cx->workspace)
        cudaFree(cx->workspace);
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
    leave(before);
    free(cx);
}

static const struct glm_ops cuda_ops = {
#define OP(op, extent, ...) .op = glm_cuda_##op,
#include "ops.h"
};

int glm_cuda_abi(void) { return GLM_CUDA_ABI; }

const char *glm_cuda_kind(void) { return LIBRARY; }

const char *glm_cuda_about(char *cublas, size_t bytes)
{
    glm_blas_about(cublas, bytes);
    return glm_cuda_built;
}

/* 0, or the error that the first launch would be: a GPU is older or newer than all code in here. */
static int code_for(int capability)
{
#ifdef __CUDA_EMU__
    return capability < 70 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
#elif defined GLM_NAMED
    return glm_cuda_has_image(capability) ? cudaSuccess : cudaErrorNoKernelImageForDevice;
#else
    extern void k_convert(void); /* any kernel's stub */
    struct cudaFuncAttributes attributes;
    (void)capability;
    return cudaFuncGetAttributes(&attributes, (const void *)k_convert);
#endif
}

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
    int before, no_code = cudaSuccess;
    if ((code = enter(device, &before)) == cudaSuccess &&
        (code = cudaGetDeviceProperties(&properties, device)) == cudaSuccess &&
        (code = cudaMemGetInfo(&out->free_bytes, &out->total_bytes)) == cudaSuccess) {
        no_code = code_for(10 * properties.major + properties.minor);
        cudaGetLastError();
    }
    leave(before);
    if (code != cudaSuccess) {
        cudaGetLastError();
        return glm_fail(err, GLM_ESTATE, LIBRARY ":%d: the device cannot be asked: %s (error %d)",
                        device, cudaGetErrorString((cudaError_t)code), code);
    }
    snprintf(out->name, sizeof out->name, "%.63s", properties.name);
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    if (no_code != cudaSuccess) {
        out->count = 0;
        snprintf(out->why, sizeof out->why, "%.40s of capability %d.%d is not among %.90s",
                 out->name, out->major, out->minor, glm_cuda_built);
    }
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
    cx->shared = properties.sharedMemPerBlockOptin;
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
    if ((code = code_for(capability)) != cudaSuccess)
        return glm_fail(err, GLM_EVALUE, "backend '%s': %s of capability %d.%d is not among %s: %s",
                        cx->name, cx->device_name, properties.major, properties.minor,
                        glm_cuda_built, cudaGetErrorString((cudaError_t)code));
#ifdef GLM_NAMED
    if ((code = glm_cuda_load_images(cx, capability)) != cudaSuccess)
        return glm_fail(err, GLM_EVALUE, "backend '%s': its code cannot be loaded: %s (error %d)",
                        cx->name, cudaGetErrorString((cudaError_t)code), code);
#endif
    cx->small = (struct glm_small *)take(cx, sizeof *cx->small);
    if (!cx->small)
        return glm_fail(err, GLM_EMEMORY, "backend '%s': %s", cx->name, cx->refusal);
    const float constants[4] = {1, 1, 0, 1}; /* factor, alpha, zero, one */
    backend_zero(&cx->be, cx->small, sizeof *cx->small);
    backend_upload(&cx->be, &cx->small->factor, constants, sizeof constants);
    if (cx->error[0])
        return glm_fail(err, GLM_EVALUE, "%s", cx->error);
    GLM_TRY(glm_blas_open(&cx->blas, cx->stream, err));
    /* as NVIDIA recommends (no faster for our products on an H100); in the reserve that plans leave
     * for the context (tools/plan.py) */
    const size_t bytes = (size_t)(capability >= 90 ? 32 : 8) << 20;
    if ((code = cudaMalloc(&cx->workspace, bytes)) != cudaSuccess)
        return glm_fail(err, GLM_EMEMORY, "backend '%s': cuBLAS's %zu bytes: %s", cx->name, bytes,
                        cudaGetErrorString((cudaError_t)code));
    if ((code = cx->blas.set_workspace(cx->blas.handle, cx->workspace, bytes)) != 0)
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
    const char *check = getenv("GLMLORA_CUDA_CHECK");
    cx->checked = check && strcmp(check, "1") == 0;
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
    be->enter = backend_enter;
    be->leave = backend_leave;
    be->mlp_rows = backend_mlp_rows;
    be->self_attention_rows = backend_self_attention_rows;
    be->set_poll = backend_set_poll;
    be->stopped = backend_stopped;
    be->error = backend_error;
    be->replay = backend_replay;
    be->recorded = backend_recorded;
    be->take_counts = backend_take_counts;
    be->refusal = backend_refusal;
    be->kept = compute;
    be->destroy = backend_destroy;
    int before = -1;
    if (cudaGetDevice(&before) != cudaSuccess)
        cudaGetLastError();
    const glm_status status = open_device(cx, err);
    leave(before == device ? -1 : before);
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
