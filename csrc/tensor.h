/* Stored number types and the matrix that a weight is. */
#ifndef GLM_TENSOR_H
#define GLM_TENSOR_H

#include <stddef.h>
#include <stdint.h>

enum glm_dtype { GLM_F32, GLM_F16, GLM_BF16, GLM_F64 };

/* Bytes of one element. */
static inline size_t glm_dtype_size(enum glm_dtype dtype)
{
    return dtype == GLM_F64 ? 8 : dtype == GLM_F32 ? 4 : 2;
}

/* A weight matrix as it lies in the file: row-major, dense, never written by an op. */
struct glm_mat {
    const void *data;
    enum glm_dtype dtype;
    int rows, cols;
};

#endif
