#include "named.h"

#include <stdlib.h>
#include <string.h>

#include "device.h"

enum { FILES = 32, SLOTS = 1024 }; /* SLOTS: several times the number of kernels */

struct glm_images_of {
    cudaLibrary_t libraries[FILES];
    int n;
    struct {
        const char *name; /* by address: each kernel has one */
        cudaKernel_t kernel;
    } slots[SLOTS];
};

/* A cubin runs on GPUs of its major version from its minor version on. The best is the one nearest
 * below; PTX where there is none. -1: nothing runs there. */
static int best_target(int capability, int *is_ptx)
{
    int best = -1;
    *is_ptx = 0;
    for (int i = 0; i < glm_n_images; i++) {
        const struct glm_image *image = &glm_images[i];
        if (!image->is_ptx && image->sm / 10 == capability / 10 && image->sm <= capability &&
            image->sm > best)
            best = image->sm;
    }
    for (int i = 0; best < 0 && i < glm_n_images; i++)
        if (glm_images[i].is_ptx && glm_images[i].sm <= capability) {
            best = glm_images[i].sm;
            *is_ptx = 1;
        }
    return best;
}

int glm_cuda_has_image(int capability)
{
    int is_ptx;
    return best_target(capability, &is_ptx) >= 0;
}

int glm_cuda_load_images(struct cuda *cx, int capability)
{
    int is_ptx, code = cudaErrorNoKernelImageForDevice;
    const int target = best_target(capability, &is_ptx);
    cx->images = (struct glm_images_of *)calloc(1, sizeof *cx->images);
    if (!cx->images)
        return cudaErrorMemoryAllocation;
    for (int i = 0; i < glm_n_images; i++) {
        if (glm_images[i].sm != target || glm_images[i].is_ptx != is_ptx)
            continue;
        code = cudaLibraryLoadData(&cx->images->libraries[cx->images->n], glm_images[i].code, NULL,
                                   NULL, 0, NULL, NULL, 0);
        if (code != cudaSuccess)
            return code;
        if (++cx->images->n == FILES)
            break;
    }
    return code;
}

void glm_cuda_unload_images(struct cuda *cx)
{
    for (int i = 0; cx->images && i < cx->images->n; i++)
        cudaLibraryUnload(cx->images->libraries[i]);
    free(cx->images);
    cx->images = NULL;
}

static int find(struct glm_images_of *images, const char *name, cudaKernel_t *out)
{
    const size_t start = (size_t)name / 2 % SLOTS;
    size_t at = start;
    while (images->slots[at].name && images->slots[at].name != name)
        at = (at + 1) % SLOTS;
    int code = cudaSuccess;
    if (!images->slots[at].name) {
        code = cudaErrorInvalidDeviceFunction;
        for (int i = 0; i < images->n && code != cudaSuccess; i++)
            code = cudaLibraryGetKernel(&images->slots[at].kernel, images->libraries[i], name);
        cudaGetLastError(); /* of the files that do not have it */
        if (code == cudaSuccess)
            images->slots[at].name = name;
    }
    *out = images->slots[at].kernel;
    return code;
}

void glm_cuda_launch_named(struct cuda *cx, const char *op, int after, const char *kernel,
                           dim3 grid, dim3 block, size_t shared, void **arguments)
{
    cudaKernel_t found;
    const int code = find(cx->images, kernel, &found);
    if (glm_cuda_failed(cx, code, kernel))
        return;
    if (shared > GLM_SHARED_UNASKED)
        cudaFuncSetAttribute((const void *)found, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)shared);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = grid;
    how.blockDim = block;
    how.dynamicSmemBytes = shared;
    how.stream = cx->stream;
    how.attrs = &overlap;
    how.numAttrs = after && cx->overlaps;
    cudaLaunchKernelExC(&how, (const void *)found, arguments);
    glm_cuda_launched(cx, op);
}
