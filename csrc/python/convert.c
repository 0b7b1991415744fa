/* Between Python and the core: see convert.h. */
#include "convert.h"

PyObject *glm_raise(glm_status status, const struct glm_error *err)
{
    if (status == GLM_EINTERRUPTED) {
        if (!PyErr_Occurred())
            PyErr_SetNone(PyExc_KeyboardInterrupt);
        return NULL;
    }
    PyObject *type = status == GLM_EVALUE     ? PyExc_ValueError
                     : status == GLM_EMEMORY  ? PyExc_MemoryError
                     : status == GLM_ENUMERIC ? PyExc_FloatingPointError
                     : status == GLM_EFILE    ? PyExc_OSError
                                              : PyExc_RuntimeError;
    /* names of files may be any bytes, and a text that was too long ends anywhere */
    PyObject *text =
        PyUnicode_DecodeUTF8(err->text, (Py_ssize_t)strlen(err->text), "surrogateescape");
    if (text)
        PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

glm_status glm_device_status(struct glm_backend *be, glm_status status, struct glm_error *err)
{
    const char *text = be->error ? be->error(be) : NULL;
    const char *more = be->refusal && status == GLM_EMEMORY ? be->refusal(be) : NULL;
    if (more) {
        const size_t n = strlen(err->text);
        snprintf(err->text + n, sizeof err->text - n, ": %s", more);
    }
    return text ? glm_fail(err, GLM_ESTATE, "%s", text) : status;
}

PyObject *glm_dict_get(PyObject *dict, const char *key)
{
    PyObject *name = PyUnicode_FromString(key);
    PyObject *value = name ? PyDict_GetItemWithError(dict, name) : NULL;
    Py_XDECREF(name);
    return value;
}

int glm_check(struct glm_backend *be, glm_status status, struct glm_error *err)
{
    status = glm_device_status(be, status, err);
    if (status == GLM_OK)
        return 0;
    glm_raise(status, err);
    return -1;
}

struct glm_backend *glm_module_backend(struct module_state *state, const char *name)
{
    struct glm_error err;
    struct glm_backend *be = NULL;
    glm_status status = GLM_OK;
    char full[64];
    glm_backend_name(full, name);
    glm_lock_backends();
    for (int i = 0; i < state->n_backends && !be; i++)
        if (strcmp(state->backends[i]->name, full) == 0)
            be = state->backends[i];
    if (!be) {
        status = state->n_backends == GLM_MAX_BACKENDS
                     ? glm_fail(&err, GLM_ESTATE, "too many backends")
                     : glm_backend_create(&be, full, &err);
        if (status == GLM_OK) {
            if (state->threads)
                be->set_threads(be, state->threads);
            state->backends[state->n_backends++] = be;
        }
    }
    glm_unlock_backends();
    if (status == GLM_OK)
        return be;
    glm_raise(status, &err);
    return NULL;
}

int glm_dtype_from_name(const char *name, enum glm_dtype *out)
{
    for (int i = GLM_F32; i <= GLM_I4; i++)
        if (strcmp(name, glm_dtype_name((enum glm_dtype)i)) == 0) {
            *out = (enum glm_dtype)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "dtype: expected F32, F16, BF16, F64, I8 or I4, got '%s'", name);
    return -1;
}

const char *glm_dtype_name(enum glm_dtype dtype)
{
    static const char *const names[] = {"F32", "F16", "BF16", "F64", "I8", "I4"};
    return names[dtype];
}

int glm_dtype_numpy(enum glm_dtype dtype)
{
    static const int types[] = {NPY_FLOAT32, NPY_FLOAT16, NPY_UINT16,
                                NPY_FLOAT64, NPY_INT8,    NPY_INT8};
    return types[dtype];
}

PyObject *glm_type_name(PyObject *object)
{
    return PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
}

PyObject *glm_tuple_arg(PyObject *object, const char *expected)
{
    PyObject *items = PyObject_GetIter(object);
    if (!items && PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_SetString(PyExc_TypeError, expected);
    PyObject *tuple = items ? PySequence_Tuple(items) : NULL;
    Py_XDECREF(items);
    return tuple;
}

/* Integers of another type as int32, of an array that nobody else has; a value that would wrap is
 * refused. */
static PyArrayObject *narrowed(PyObject *any, const char *name)
{
    const int how = NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSUREARRAY;
    PyArrayObject *array = NULL, *wide = (PyArrayObject *)PyArray_FROMANY(
                                     any, NPY_INT64, 0, 0, how | NPY_ARRAY_ENSURECOPY);
    if (!wide)
        return NULL;
    const npy_int64 *values = PyArray_DATA(wide);
    const npy_intp n = PyArray_SIZE(wide);
    npy_intp i = 0;
    while (i < n && values[i] >= INT32_MIN && values[i] <= INT32_MAX)
        i++;
    if (i < n)
        PyErr_Format(PyExc_ValueError, "%s: %lld at flat index %zd does not fit int32", name,
                     (long long)values[i], (Py_ssize_t)i);
    else
        array = (PyArrayObject *)PyArray_FROMANY((PyObject *)wide, NPY_INT32, 0, 0, how);
    Py_DECREF(wide);
    return array;
}

/* Always a copy: it is checked once and used without the GIL, while other threads may write to what
 * came. */
static PyArrayObject *int32_array(PyObject *object, const char *name)
{
    if (PyArray_Check(object) && PyArray_TYPE((PyArrayObject *)object) == NPY_INT32 &&
        PyArray_ISCARRAY_RO((PyArrayObject *)object)) { /* as it should be: most of a small step */
        PyArrayObject *from = (PyArrayObject *)object;
        PyObject *copy = PyArray_SimpleNew(PyArray_NDIM(from), PyArray_DIMS(from), NPY_INT32);
        if (copy)
            memcpy(PyArray_DATA((PyArrayObject *)copy), PyArray_DATA(from),
                   (size_t)PyArray_NBYTES((PyArrayObject *)copy));
        return (PyArrayObject *)copy;
    }
    PyArrayObject *any = (PyArrayObject *)PyArray_FROM_O(object), *array = NULL;
    if (!any)
        return NULL;
    if (PyArray_SIZE(any) > 0 && !PyTypeNum_ISINTEGER(PyArray_TYPE(any)))
        PyErr_Format(PyExc_TypeError, "%s: expected integers (int32), got dtype %S", name,
                     PyArray_DESCR(any));
    else
        array = narrowed((PyObject *)any, name);
    Py_DECREF(any);
    return array;
}

static PyArrayObject *array_as_is(PyObject *object, const char *name, int typenum)
{
    if (!PyArray_Check(object)) {
        PyObject *type = glm_type_name(object);
        if (type)
            PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array, got %U", name, type);
        Py_XDECREF(type);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) == typenum && PyArray_ISCARRAY_RO(array))
        return (PyArrayObject *)Py_NewRef(object);
    PyArray_Descr *want = PyArray_DescrFromType(typenum);
    PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous array of %S, got %S%s", name, want,
                 PyArray_DESCR(array),
                 PyArray_ISCARRAY_RO(array) ? "" : " not contiguous or not aligned");
    Py_XDECREF(want);
    return NULL;
}

/* The array, unless it has another rank (-1: any): then none, with ValueError set. */
static PyArrayObject *of_rank(PyArrayObject *array, const char *name, int rank)
{
    if (array && rank >= 0 && PyArray_NDIM(array) != rank) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimension(s), got %d", name, rank,
                     PyArray_NDIM(array));
        Py_CLEAR(array);
    }
    return array;
}

PyArrayObject *glm_array_arg(PyObject *object, const char *name, int typenum, int rank)
{
    return of_rank(typenum == NPY_INT32 ? int32_array(object, name)
                                        : array_as_is(object, name, typenum),
                   name, rank);
}

PyArrayObject *glm_real_arg(PyObject *object, const char *name, int typenum, int rank)
{
    if (!PyArray_Check(object) || (PyArray_TYPE((PyArrayObject *)object) != NPY_FLOAT32 &&
                                   PyArray_TYPE((PyArrayObject *)object) != NPY_FLOAT64)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a float32 array, got %R", name,
                     (PyObject *)Py_TYPE(object));
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)PyArray_FROMANY(object, typenum, 0, 0,
                                                        NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    return of_rank(a, name, rank);
}

int glm_index_arg(PyObject *object, const char *name, PyArrayObject **out, const int32_t **data,
                  int *count)
{
    if (!object || object == Py_None)
        return 0;
    *out = glm_array_arg(object, name, NPY_INT32, 1);
    if (!*out)
        return -1;
    if (PyArray_SIZE(*out) > INT_MAX / 4) {
        PyErr_Format(PyExc_ValueError, "%s: %zd elements are too many", name,
                     (Py_ssize_t)PyArray_SIZE(*out));
        return -1;
    }
    *data = PyArray_DATA(*out);
    *count = (int)PyArray_SIZE(*out);
    return 0;
}

int glm_dims_of(PyArrayObject *a, const char *name, int *rows, int *cols)
{
    const int rank = PyArray_NDIM(a);
    if (rank < 1 || rank > 2 || PyArray_DIM(a, 0) > INT_MAX ||
        (rank == 2 && PyArray_DIM(a, 1) > INT_MAX)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a vector or a matrix, got %d dimensions", name,
                     rank);
        return -1;
    }
    *rows = (int)PyArray_DIM(a, 0);
    *cols = rank == 2 ? (int)PyArray_DIM(a, 1) : 1;
    return 0;
}
