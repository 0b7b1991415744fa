/* Stored number types and the matrix that a weight is. */
#ifndef GLM_TENSOR_H
#define GLM_TENSOR_H

#include <stddef.h>
#include <stdint.h>

/* GLM_I8, GLM_I4: integers that scales go with; only matrices of linear layers have them. */
enum glm_dtype { GLM_F32, GLM_F16, GLM_BF16, GLM_F64, GLM_I8, GLM_I4 };

static inline int glm_is_quantized(enum glm_dtype dtype) { return dtype >= GLM_I8; }

/* Bytes of n elements; n is even for GLM_I4. */
static inline size_t glm_bytes(enum glm_dtype dtype, size_t n)
{
    return dtype == GLM_F64   ? 8 * n
           : dtype == GLM_F32 ? 4 * n
           : dtype == GLM_I8  ? n
           : dtype == GLM_I4  ? n / 2
                              : 2 * n;
}

/* A weight matrix as it lies in the file: row-major, dense, never written by an op.
 *
 * Quantized: value = integer * scale. GLM_I4 has two columns in a byte, two's complement, the even
 * one in the high nibble. scale is float16: one a row where group is 0 (THUDM's layout), else one
 * for each `group` columns of a row, (rows, ceil(cols / group)); group is a multiple of 32. */
struct glm_mat {
    const void *data;
    enum glm_dtype dtype;
    int rows, cols;
    const uint16_t *scale; /* NULL unless quantized */
    int group;
};

static inline int glm_scale_cols(const struct glm_mat *mat)
{
    return mat->group ? (mat->cols + mat->group - 1) / mat->group : 1;
}

/* Bytes of the elements and the scales. */
static inline size_t glm_mat_bytes(const struct glm_mat *mat)
{
    const size_t scales = glm_is_quantized(mat->dtype) ? 2 * (size_t)glm_scale_cols(mat) : 0;
    return (size_t)mat->rows * (glm_bytes(mat->dtype, (size_t)mat->cols) + scales);
}

#endif
