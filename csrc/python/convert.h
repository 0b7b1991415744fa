/* Between Python and the core: status to exception, names to dtypes and backends, arrays to
 * pointers. */
#ifndef GLM_CONVERT_H
#define GLM_CONVERT_H

#include "module.h"

/* Sets the Python exception of a failed status; always returns NULL. */
PyObject *glm_raise(glm_status status, const struct glm_error *err);
/* The status of a call on a backend: an error of its device is what went wrong, whatever the call
 * made of it. */
glm_status glm_device_status(struct glm_backend *be, glm_status status, struct glm_error *err);
/* 0, or -1 with the exception of that status set. */
int glm_check(struct glm_backend *be, glm_status status, struct glm_error *err);

/* The module's backend of this name, made on first use; NULL with an exception set. */
struct glm_backend *glm_module_backend(struct module_state *state, const char *name);

/* A borrowed value, or NULL: with an exception set, unless there is just no such key. */
PyObject *glm_dict_get(PyObject *dict, const char *key);

/* dtype by safetensors name; -1 with ValueError set. */
int glm_dtype_from_name(const char *name, enum glm_dtype *out);
const char *glm_dtype_name(enum glm_dtype dtype);
/* NumPy type number that holds the dtype (uint16 for BF16). */
int glm_dtype_numpy(enum glm_dtype dtype);

/* The name of an object's type, a new reference, for an error; NULL with an exception set. */
PyObject *glm_type_name(PyObject *object);
/* A tuple of the items of an iterable; of anything else NULL with TypeError(expected) set. */
PyObject *glm_tuple_arg(PyObject *object, const char *expected);

/* A C-contiguous aligned array of the type number and rank (rank -1: any), or NULL with a
 * TypeError/ValueError that names the argument and says what came. A new reference. int32 is always
 * a copy, of integers that fit; other types are never converted. */
PyArrayObject *glm_array_arg(PyObject *object, const char *name, int typenum, int rank);
/* The same of the type that a backend computes in, from float32 or float64. */
PyArrayObject *glm_real_arg(PyObject *object, const char *name, int typenum, int rank);
/* A copy as an int32 vector, its elements and how many; None or NULL leaves all as they are. -1 with an
 * exception set. */
int glm_index_arg(PyObject *object, const char *name, PyArrayObject **out, const int32_t **data,
                  int *count);
/* Of a vector (cols 1) or a matrix; -1 with ValueError set. */
int glm_dims_of(PyArrayObject *a, const char *name, int *rows, int *cols);

#endif
