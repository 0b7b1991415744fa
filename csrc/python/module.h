/* What the files of csrc/python share: module state, conversions between NumPy and the core, status
 * to exception. */
#ifndef GLM_MODULE_H
#define GLM_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL glm_numpy_api
#ifndef GLM_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>
#undef I /* complex.h, which NumPy includes, takes the name of the input features */

#include <pthread.h>

#include "glm.h"

#define GLM_MAX_BACKENDS 16

struct module_state {
    struct glm_backend *backends[GLM_MAX_BACKENDS];
    int n_backends;
    int threads; /* 0 until set_num_threads */
    PyTypeObject *model_type, *cache_type;
    pthread_mutex_t
        computing; /* one computation at a time: models share the pool, and each has its own poll */
    long computing_pid; /* a forked child makes the lock anew: its holder does not exist there */
};

extern struct PyModuleDef glm_module_def;

/* The module's backend of this name, made on first use; NULL with an exception set. */
struct glm_backend *glm_module_backend(struct module_state *state, const char *name);

/* Sets the Python exception of a failed status; always returns NULL. */
PyObject *glm_raise(glm_status status, const struct glm_error *err);

/* dtype by safetensors name; -1 with ValueError set. */
int glm_dtype_from_name(const char *name, enum glm_dtype *out);
const char *glm_dtype_name(enum glm_dtype dtype);
/* NumPy type number that holds the dtype (uint16 for BF16). */
int glm_dtype_numpy(enum glm_dtype dtype);

/* A C-contiguous aligned array of the type number and rank (rank -1: any), or NULL with a
 * TypeError/ValueError that names the argument and says what came. A new reference. Integers are
 * converted when it is safe; others are not. */
PyArrayObject *glm_array_arg(PyObject *object, const char *name, int typenum, int rank);

/* Bytes the process could still get: MemAvailable, and what the control group's limit leaves. */
unsigned long long glm_memory_available(void);

PyObject *glm_py_adjust_logits(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *glm_py_warp_logits(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *glm_py_sample(PyObject *module, PyObject *args, PyObject *kwargs);

int glm_add_model_types(PyObject *module, struct module_state *state);

#endif
