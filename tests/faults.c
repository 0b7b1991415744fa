/* Test equipment: the runtime and cuBLAS calls of the CUDA library, each of which fails at a chosen
 * call. Loaded before everything else (LD_PRELOAD); what does not fail goes on to the emulator that
 * FAULTS_RUNTIME names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define CALLS(X)                                                                              \
    X(cudaMalloc) X(cudaFree) X(cudaMemcpyAsync) X(cudaMemsetAsync)                           \
    X(cudaStreamCreateWithFlags) X(cudaStreamSynchronize) X(cudaStreamBeginCapture)           \
    X(cudaStreamEndCapture) X(cudaGraphInstantiateWithFlags) X(cudaGraphLaunch) X(cudaGraphDestroy)    \
    X(cudaGraphExecDestroy) X(cudaGetLastError) X(cudaGetDeviceCount) X(cudaSetDevice)        \
    X(cudaGetDeviceProperties) X(cudaMemGetInfo) X(cublasCreate_v2) X(cublasSetStream_v2)     \
    X(cublasSetPointerMode_v2) X(cublasGemmEx) X(cublasSetWorkspace_v2) X(cudaGetDevice)

enum {
#define INDEX(name) AT_##name,
    CALLS(INDEX) N
};
static const char *const names[N] = {
#define NAME(name) #name,
    CALLS(NAME)};
static int seen[N], chosen = -1, when, code;

/* Call number `at` (from 1) of `name` returns `with`; at 0: none fails. Counting starts anew. */
void faults_set(const char *name, int at, int with)
{
    memset(seen, 0, sizeof seen);
    chosen = -1;
    for (int i = 0; i < N; i++)
        if (at && strcmp(names[i], name) == 0)
            chosen = i;
    when = at;
    code = with;
}

int faults_seen(const char *name)
{
    for (int i = 0; i < N; i++)
        if (strcmp(names[i], name) == 0)
            return seen[i];
    return -1;
}

/* All arguments of these functions are integers and pointers: so many cover the longest. */
#define PARAMETERS                                                                              \
    long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k,     \
        long l, long m, long n, long o, long p, long q, long r, long s
#define ARGUMENTS a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s

#define WRAPPER(name)                                                                        \
    int name(PARAMETERS)                                                                     \
    {                                                                                        \
        static int (*real)(PARAMETERS);                                                      \
        if (++seen[AT_##name] == when && chosen == AT_##name)                                \
            return code;                                                                     \
        if (!real)                                                                           \
            real = (int (*)(PARAMETERS))dlsym(                                               \
                dlopen(getenv("FAULTS_RUNTIME"), RTLD_NOW | RTLD_NOLOAD), #name);            \
        return real(ARGUMENTS);                                                              \
    }
CALLS(WRAPPER)
