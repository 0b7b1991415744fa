/* The CUDA library: one shared object that csrc/backend.c opens when a CUDA device is asked for. */
#ifndef GLM_CUDA_H
#define GLM_CUDA_H

#include "backend.h"

/* Changes with the number of ops; the first number is to change with struct glm_backend, an op's
 * parameters or a struct that ops take. */
#define GLM_CUDA_ABI (6 * 1000 + GLM_N_OPS)

#if defined(__GNUC__)
#define GLM_CUDA_EXPORT __attribute__((visibility("default")))
#else
#define GLM_CUDA_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* compute: GLM_F32 (every product in float), GLM_F16 or GLM_BF16 (large products and attention on
 * tensor cores, sums in float). Activations and trainables are float32 in all three. */
GLM_CUDA_EXPORT glm_status glm_cuda_create(struct glm_backend **out, int device,
                                           enum glm_dtype compute, struct glm_error *err);
GLM_CUDA_EXPORT int glm_cuda_abi(void);
/* "cuda" or "emu" */
GLM_CUDA_EXPORT const char *glm_cuda_kind(void);
/* How the library was built; in `cublas` which one it finds. Asks no driver. */
GLM_CUDA_EXPORT const char *glm_cuda_about(char *cublas, size_t bytes);
/* Makes no context where there is no device; free_bytes are of the moment. */
GLM_CUDA_EXPORT glm_status glm_cuda_info(int device, struct glm_device *out, struct glm_error *err);

#ifdef __cplusplus
}
#endif

#endif
