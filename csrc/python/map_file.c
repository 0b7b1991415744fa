/* Mapped files as arrays, and the guard around what reads them: see mapped.h. */
#include "run.h"

#include <string.h>

#include "mapped.h"

static const char *const CAPSULE = "glmlora._core.mapped";

static void unmap(PyObject *capsule) { glm_mapped_close(PyCapsule_GetPointer(capsule, CAPSULE)); }

/* map_file(fd, path) -> uint8 array */
PyObject *glm_py_map_file(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    PyObject *path, *array = NULL;
    struct glm_mapped *file;
    struct glm_error err;
    size_t size;
    if (!PyArg_ParseTuple(args, "iO&", &fd, PyUnicode_FSConverter, &path))
        return NULL;
    const char *name = PyBytes_AsString(path);
    const glm_status status = name ? glm_mapped_open(&file, fd, name, &err) : GLM_EVALUE;
    Py_DECREF(path);
    if (status != GLM_OK)
        return name ? glm_raise(status, &err) : NULL;
    void *data = (void *)glm_mapped_data(file, &size);
    PyObject *capsule = PyCapsule_New(file, CAPSULE, unmap);
    if (!capsule) {
        glm_mapped_close(file);
        return NULL;
    }
    npy_intp n = (npy_intp)size;
    array = PyArray_New(&PyArray_Type, 1, &n, NPY_UINT8, NULL, data, 0, NPY_ARRAY_CARRAY_RO, NULL);
    if (!array) {
        Py_DECREF(capsule);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, capsule) < 0) /* takes the capsule */
        Py_CLEAR(array);
    return array;
}

/* guard(on): of this thread; they nest */
PyObject *glm_py_guard(PyObject *Py_UNUSED(module), PyObject *on)
{
    const int begins = PyObject_IsTrue(on);
    if (begins < 0)
        return NULL;
    if (begins)
        glm_guard_begin();
    else
        glm_guard_end();
    Py_RETURN_NONE;
}

static PyArrayObject *any_array(PyObject *object)
{
    if (PyArray_Check(object))
        return (PyArrayObject *)object;
    PyErr_SetString(PyExc_TypeError, "array: expected a NumPy array");
    return NULL;
}

int glm_check_array(PyArrayObject *array)
{
    struct glm_error err;
    struct glm_mapped *file = glm_mapped_find(PyArray_DATA(array));
    if (!file)
        return 0;
    const glm_status status = glm_mapped_check(file, &err);
    if (status == GLM_OK)
        return 1;
    glm_raise(status, &err);
    return -1;
}

/* check_mapped(array) -> bool */
PyObject *glm_py_check_mapped(PyObject *Py_UNUSED(module), PyObject *object)
{
    PyArrayObject *array = any_array(object);
    const int mapped = array ? glm_check_array(array) : -1;
    return mapped < 0 ? NULL : PyBool_FromLong(mapped);
}

/* drop_pages(array) */
PyObject *glm_py_drop_pages(PyObject *Py_UNUSED(module), PyObject *object)
{
    PyArrayObject *array = any_array(object);
    if (!array)
        return NULL;
    if (PyArray_ISCARRAY_RO(array))
        glm_mapped_drop(PyArray_DATA(array), (size_t)PyArray_NBYTES(array));
    Py_RETURN_NONE;
}
