/* The module: its state, and Python's and NumPy's headers as every file here includes them. */
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

#include "glm.h"

#define GLM_MAX_BACKENDS 32

struct module_state {
    /* under glm_lock_backends */
    struct glm_backend *backends[GLM_MAX_BACKENDS];
    int n_backends;
    int threads; /* 0 until set_num_threads */
    PyTypeObject *model_type, *cache_type, *descriptor_type;
};

/* sampling.c */
PyObject *glm_py_adjust_logits(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *glm_py_warp_logits(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *glm_py_sample(PyObject *module, PyObject *args, PyObject *kwargs);

/* map_file.c */
PyObject *glm_py_map_file(PyObject *module, PyObject *args);
PyObject *glm_py_guard(PyObject *module, PyObject *on);
PyObject *glm_py_check_mapped(PyObject *module, PyObject *array);
PyObject *glm_py_drop_pages(PyObject *module, PyObject *array);
/* Whether it lies in a mapped file; -1 with OSError set where that is not as it was. */
int glm_check_array(PyArrayObject *array);

/* run.c. What threads share is locked, not left to the GIL, which a free-threaded Python has not. A
 * thread that waits lets the others run Python. */
int glm_locks_create(void); /* -1 with an exception set */
void glm_lock_backends(void);
void glm_unlock_backends(void);

/* descriptor.c */
PyObject *glm_py_open_checked(PyObject *module, PyObject *args);

/* model_type.c, cache_type.c, descriptor.c: a new reference, or NULL */
PyTypeObject *glm_model_type(PyObject *module);
PyTypeObject *glm_cache_type(PyObject *module);
PyTypeObject *glm_descriptor_type(PyObject *module);

#endif
