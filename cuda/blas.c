/* cuBLAS, found when a device is opened. Looked for in this order: what the process has loaded, the
 * nvidia packages beside this one in site-packages, what the system's loader knows. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDA_EMU__

glm_status glm_blas_open(struct glm_blas *blas, cudaStream_t stream, struct glm_error *err)
{
    cublasHandle_t handle;
    if (cublasCreate_v2(&handle) != 0)
        return glm_fail(err, GLM_EMEMORY, "the emulated cuBLAS cannot be opened");
    blas->handle = handle;
    blas->gemm = (glm_gemm_fn)cublasGemmEx;
    blas->set_stream = (int (*)(void *, cudaStream_t))cublasSetStream_v2;
    blas->set_pointer_mode = (int (*)(void *, int))cublasSetPointerMode_v2;
    blas->set_workspace = (int (*)(void *, void *, size_t))cublasSetWorkspace_v2;
    blas->destroy = (int (*)(void *))cublasDestroy_v2;
    if (blas->set_stream(handle, stream))
        return glm_fail(err, GLM_EMEMORY, "the emulated cuBLAS cannot be started");
    return GLM_OK;
}

void glm_blas_about(char *out, size_t bytes) { snprintf(out, bytes, "the emulator's"); }

#else

/* Own major version first: it is the one the driver surely runs. */
static const int MAJORS[2] = {CUDART_VERSION / 1000, CUDART_VERSION / 1000 == 13 ? 12 : 13};

static void *open_beside(int major)
{
    Dl_info self;
    char path[4096];
    if (!dladdr((void *)glm_blas_open, &self) || !self.dli_fname)
        return NULL;
    /* site-packages/glmlora/lib/<this>, or site-packages/glmlora/<this> */
    size_t n = strlen(self.dli_fname);
    for (int up = 0; up < 3; up++) {
        while (n && self.dli_fname[n - 1] != '/')
            n--;
        if (!n)
            return NULL;
        snprintf(path, sizeof path, "%.*snvidia/%s/lib/libcublas.so.%d", (int)n, self.dli_fname,
                 major == 13 ? "cu13" : "cublas", major);
        void *found = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (found)
            return found;
        n--;
    }
    return NULL;
}

static void *open_library(void)
{
    char name[32];
    for (int pass = 0; pass < 3; pass++)
        for (int i = 0; i < 2; i++) {
            snprintf(name, sizeof name, "libcublas.so.%d", MAJORS[i]);
            void *found = pass == 0   ? dlopen(name, RTLD_NOW | RTLD_NOLOAD)
                          : pass == 1 ? open_beside(MAJORS[i])
                                      : dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (found)
                return found;
        }
    return NULL;
}

void glm_blas_about(char *out, size_t bytes)
{
    void *library = open_library(), *gemm = library ? dlsym(library, "cublasGemmEx") : NULL;
    int (*property)(int which, int *value) = NULL;
    int version[3] = {0, 0, 0};
    Dl_info file;
    if (!gemm || !dladdr(gemm, &file)) {
        snprintf(out, bytes,
                 "libcublas.so.%d is not found: install nvidia-cublas%s, or the CUDA toolkit",
                 MAJORS[0], MAJORS[0] == 12 ? "-cu12" : "");
        return;
    }
    *(void **)&property = dlsym(library, "cublasGetProperty");
    for (int i = 0; property && i < 3; i++) /* of libraryPropertyType */
        property(i, &version[i]);
    snprintf(out, bytes, "%s, version %d.%d.%d", file.dli_fname, version[0], version[1],
             version[2]);
}

glm_status glm_blas_open(struct glm_blas *blas, cudaStream_t stream, struct glm_error *err)
{
    void *library = open_library();
    char about[160];
    if (!library) {
        glm_blas_about(about, sizeof about);
        return glm_fail(err, GLM_EVALUE, "%s", about);
    }
    int (*create)(void **) = NULL;
    *(void **)&create = dlsym(library, "cublasCreate_v2");
    *(void **)&blas->gemm = dlsym(library, "cublasGemmEx");
    *(void **)&blas->set_stream = dlsym(library, "cublasSetStream_v2");
    *(void **)&blas->set_pointer_mode = dlsym(library, "cublasSetPointerMode_v2");
    *(void **)&blas->set_workspace = dlsym(library, "cublasSetWorkspace_v2");
    *(void **)&blas->destroy = dlsym(library, "cublasDestroy_v2");
    if (!create || !blas->gemm || !blas->set_stream || !blas->set_pointer_mode ||
        !blas->set_workspace || !blas->destroy)
        return glm_fail(err, GLM_EVALUE, "libcublas lacks functions that are needed");
    int code = create(&blas->handle);
    if (code == 0)
        code = blas->set_stream(blas->handle, stream);
    if (code)
        return glm_fail(err, GLM_EMEMORY, "cuBLAS cannot be started (status %d)", code);
    return GLM_OK;
}

#endif

void glm_blas_close(struct glm_blas *blas)
{
    if (blas->handle)
        blas->destroy(blas->handle);
    blas->handle = NULL;
}

#ifdef __cplusplus
}
#endif
