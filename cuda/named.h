/* Kernels by name: the flavour of the library whose kernels come from NVRTC (cuda/nvrtc.py). Its
 * host part is plain C++, so a kernel's address there is where its name lies, and the code is
 * loaded from the cubin that fits the GPU, or from PTX. */
#ifndef GLM_CUDA_NAMED_H
#define GLM_CUDA_NAMED_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Code of all files for one target: sm 75 .. or, with is_ptx, what a driver compiles for any GPU
 * from there on. */
struct glm_image {
    int sm, is_ptx;
    const unsigned char *code;
};
extern const struct glm_image glm_images[];
extern const int glm_n_images;

struct cuda;

int glm_cuda_has_image(int capability);
/* Loads what fits the compute capability (10 * major + minor); 0, or the error of the call. The
 * code is loaded by the driver when a kernel is first launched. */
int glm_cuda_load_images(struct cuda *cx, int capability);
void glm_cuda_unload_images(struct cuda *cx);
/* after: by GLM_LAUNCH_AFTER */
void glm_cuda_launch_named(struct cuda *cx, const char *op, int after, const char *kernel,
                           dim3 grid, dim3 block, size_t shared, void **arguments);

#ifdef __cplusplus
}

#include <tuple>
#include <utility>

template <class... P, std::size_t... I>
static inline void glm_launch_tuple(struct cuda *cx, const char *op, int after, const void *kernel,
                                    dim3 grid, dim3 block, size_t shared, std::tuple<P...> values,
                                    std::index_sequence<I...>)
{
    void *pointers[] = {&std::get<I>(values)...};
    glm_cuda_launch_named(cx, op, after, static_cast<const char *>(kernel), grid, block, shared,
                          pointers);
}

/* The arguments become what the kernel takes, as in a call. */
template <class... P, class... A>
static inline void glm_launch(struct cuda *cx, const char *op, int after, void (*kernel)(P...),
                              dim3 grid, dim3 block, size_t shared, A... arguments)
{
    glm_launch_tuple(cx, op, after, reinterpret_cast<const void *>(kernel), grid, block, shared,
                     std::tuple<P...>(static_cast<P>(arguments)...),
                     std::index_sequence_for<P...>());
}
#endif

#endif
