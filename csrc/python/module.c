/* Module definition, state, and the functions that need no model. */
#define GLM_IMPORTS_NUMPY
#include "convert.h"
#include "mapped.h"

#include <stddef.h>

static PyObject *set_num_threads(PyObject *module, PyObject *arg)
{
    struct module_state *state = PyModule_GetState(module);
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 1 || n > 1024)
        return PyErr_Format(PyExc_ValueError, "n: expected 1 to 1024 threads, got %ld", n);
    glm_lock_backends();
    state->threads = (int)n;
    for (int i = 0; i < state->n_backends; i++)
        state->backends[i]->set_threads(state->backends[i], (int)n);
    glm_unlock_backends();
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    struct module_state *state = PyModule_GetState(module);
    glm_lock_backends();
    const int threads = state->threads;
    glm_unlock_backends();
    if (threads)
        return PyLong_FromLong(threads);
    struct glm_backend *be = glm_module_backend(state, "cpu");
    return be ? PyLong_FromLong(be->threads(be)) : NULL;
}

static PyObject *cpu_variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    char sets[64];
    return PyUnicode_FromString(glm_cpu_variants(sets));
}

static PyObject *cpu_kernels(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *dict = PyDict_New();
    struct glm_cpu_variant set;
    for (int i = 0; dict && glm_cpu_variant(i, &set); i++) {
        PyObject *pair =
            PyTuple_Pack(2, set.compiled ? Py_True : Py_False, set.runs ? Py_True : Py_False);
        if (!pair || PyDict_SetItemString(dict, set.name, pair) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(pair);
    }
    return dict;
}

static PyObject *op_table(PyObject *module, PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (!name)
        return NULL;
    struct glm_backend *be = glm_module_backend(PyModule_GetState(module), name);
    if (!be)
        return NULL;
    PyObject *table = PyDict_New();
    if (!table)
        return NULL;
    const struct {
        const char *name;
        size_t address;
    } entries[] = {
#define OP(op, extent, ...) {#op, (size_t)(void *)be->ops->op},
#include "ops.h"
        {"cx", (size_t)be->cx},
        {"real_size", be->real_size},
        {"be", (size_t)be},
        {"device_memory", (size_t)be->device_memory},
        {"alloc", (size_t)(void *)be->alloc},
        {"free", (size_t)(void *)be->free},
        {"upload", (size_t)(void *)be->upload},
        {"download", (size_t)(void *)be->download},
        {"error", (size_t)(void *)be->error},
    };
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        PyObject *value = PyLong_FromSize_t(entries[i].address);
        if (!value || PyDict_SetItemString(table, entries[i].name, value) < 0) {
            Py_XDECREF(value);
            Py_DECREF(table);
            return NULL;
        }
        Py_DECREF(value);
    }
    return table;
}

/* Every op's parameters as ops.h has them. */
static PyObject *op_signatures(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return Py_BuildValue("{"
#define OP(op, extent, ...) "ss"
#include "ops.h"
                         "}"
#define OP(op, extent, ...) , #op, #__VA_ARGS__
#include "ops.h"
    );
}

static PyObject *backend_name(PyObject *Py_UNUSED(module), PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    char full[64];
    if (!name)
        return NULL;
    glm_backend_name(full, name);
    return PyUnicode_FromString(full);
}

/* {"count": 0, "why": ..} or what struct glm_device holds */
static PyObject *device_info(PyObject *Py_UNUSED(module), PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    struct glm_device d;
    struct glm_error err;
    if (!name)
        return NULL;
    const glm_status status = glm_device_info(name, &d, &err);
    if (status != GLM_OK)
        return glm_raise(status, &err);
    return Py_BuildValue("{s:i,s:s,s:s,s:(ii),s:i,s:i,s:i,s:n,s:n}", "count", d.count, "why", d.why,
                         "name", d.name, "capability", d.major, d.minor, "multiprocessors",
                         d.multiprocessors, "driver", d.driver, "runtime", d.runtime, "free",
                         (Py_ssize_t)d.free_bytes, "total", (Py_ssize_t)d.total_bytes);
}

static PyObject *device_library(PyObject *Py_UNUSED(module), PyObject *arg)
{
    struct glm_error err;
    struct glm_library library;
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (!name)
        return NULL;
    const glm_status status = glm_device_library(name, &library, &err);
    if (status != GLM_OK)
        return glm_raise(status, &err);
    return Py_BuildValue("{s:N,s:s,s:N}", "path", PyUnicode_DecodeFSDefault(library.path), "built",
                         library.built, "cublas", PyUnicode_DecodeFSDefault(library.cublas));
}

static PyObject *memory_available(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(glm_memory_available());
}

static PyObject *lr_factor(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"kind", "step", "warmup_steps", "total_steps", "learning_rate", NULL};
    const char *kind;
    long long step, warmup, total;
    double lr = 5e-5;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sLLL|d", names, &kind, &step, &warmup, &total,
                                     &lr))
        return NULL;
    const double factor = glm_lr_factor(kind, step, warmup, total, lr);
    if (factor < 0)
        return PyErr_Format(PyExc_ValueError,
                            "lr_scheduler_type: expected linear, cosine, cosine_with_restarts, "
                            "polynomial, constant, "
                            "constant_with_warmup or inverse_sqrt, got '%s'",
                            kind);
    return PyFloat_FromDouble(factor);
}

static PyObject *convert(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "from_dtype", "to_dtype", NULL};
    PyObject *object;
    const char *from_name, *to_name;
    enum glm_dtype from, to;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oss", names, &object, &from_name, &to_name) ||
        glm_dtype_from_name(from_name, &from) < 0 || glm_dtype_from_name(to_name, &to) < 0)
        return NULL;
    if (glm_is_quantized(from) || glm_is_quantized(to))
        return PyErr_Format(PyExc_ValueError, "dtype: %s to %s is no conversion of numbers",
                            from_name, to_name);
    struct glm_backend *be = glm_module_backend(PyModule_GetState(module), "cpu");
    PyArrayObject *in = be ? glm_array_arg(object, "array", glm_dtype_numpy(from), -1) : NULL;
    PyObject *out =
        in ? PyArray_SimpleNew(PyArray_NDIM(in), PyArray_DIMS(in), glm_dtype_numpy(to)) : NULL;
    if (out) {
        glm_guard_begin();
        be->ops->convert(be->cx, PyArray_DATA((PyArrayObject *)out), to, PyArray_DATA(in), from,
                         (size_t)PyArray_SIZE(in));
        glm_guard_end();
        if (glm_check_array(in) < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(in);
    return out;
}

/* quantize(array, dtype, bits, group=0) -> (integers, scale) */
static PyObject *quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "dtype", "bits", "group", NULL};
    PyObject *object;
    const char *dtype_name;
    enum glm_dtype dtype;
    int bits, group = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Osi|i", names, &object, &dtype_name, &bits,
                                     &group) ||
        glm_dtype_from_name(dtype_name, &dtype) < 0)
        return NULL;
    if (glm_is_quantized(dtype))
        return PyErr_Format(PyExc_ValueError, "array: expected numbers, got %s", dtype_name);
    if (bits != 8 && bits != 4)
        return PyErr_Format(PyExc_ValueError, "bits: expected 8 or 4, got %d", bits);
    if (group && (bits != 4 || group < 32 || group % 32))
        return PyErr_Format(PyExc_ValueError,
                            "group: expected a multiple of 32 with 4 bits, or 0, got %d", group);
    struct glm_backend *be = glm_module_backend(PyModule_GetState(module), "cpu");
    PyArrayObject *in = be ? glm_array_arg(object, "array", glm_dtype_numpy(dtype), 2) : NULL;
    if (!in)
        return NULL;
    if (PyArray_DIM(in, 0) > INT_MAX || PyArray_DIM(in, 1) > INT_MAX - group ||
        PyArray_DIM(in, 1) < 1 || (bits == 4 && PyArray_DIM(in, 1) % 2)) {
        PyErr_Format(PyExc_ValueError,
                     "array: expected columns, an even number of them for 4 bits, got (%zd, %zd)",
                     (Py_ssize_t)PyArray_DIM(in, 0), (Py_ssize_t)PyArray_DIM(in, 1));
        Py_DECREF(in);
        return NULL;
    }
    const struct glm_mat mat = {.dtype = bits == 8 ? GLM_I8 : GLM_I4,
                                .rows = (int)PyArray_DIM(in, 0),
                                .cols = (int)PyArray_DIM(in, 1),
                                .group = group};
    npy_intp shape[2] = {mat.rows, bits == 8 ? mat.cols : mat.cols / 2};
    npy_intp scale_shape[2] = {mat.rows, glm_scale_cols(&mat)};
    PyObject *data = PyArray_SimpleNew(2, shape, NPY_INT8),
             *scale = PyArray_SimpleNew(group ? 2 : 1, scale_shape, NPY_FLOAT16);
    if (data && scale) {
        glm_guard_begin();
        be->ops->quantize(be->cx, PyArray_DATA((PyArrayObject *)data),
                          PyArray_DATA((PyArrayObject *)scale), mat.dtype, group, PyArray_DATA(in),
                          dtype, mat.rows, mat.cols);
        glm_guard_end();
        if (glm_check_array(in) < 0)
            Py_CLEAR(data);
    }
    Py_DECREF(in);
    if (data && scale)
        return Py_BuildValue("NN", data, scale);
    Py_XDECREF(data);
    Py_XDECREF(scale);
    return NULL;
}

static PyMethodDef functions[] = {
    {"memory_available", memory_available, METH_NOARGS, "Bytes this process could still get."},
    {"backend_name", backend_name, METH_O, "The whole name that a short one stands for."},
    {"device_info", device_info, METH_O, "A CUDA device, and how many there are."},
    {"device_library", device_library, METH_O, "The CUDA library, and the cuBLAS that it finds."},
    {"lr_factor", (PyCFunction)(void *)lr_factor, METH_VARARGS | METH_KEYWORDS,
     "Factor on the learning rate after `step` finished updates."},
    {"quantize", (PyCFunction)(void *)quantize, METH_VARARGS | METH_KEYWORDS,
     "quantize(array, dtype, bits, group=0): (integers int8, scale float16)"},
    {"convert", (PyCFunction)(void *)convert, METH_VARARGS | METH_KEYWORDS,
     "A copy in another dtype."},
    {"adjust_logits", (PyCFunction)(void *)glm_py_adjust_logits, METH_VARARGS | METH_KEYWORDS,
     "In place: repetition penalty, n-gram bans, suppressed ids."},
    {"warp_logits", (PyCFunction)(void *)glm_py_warp_logits, METH_VARARGS | METH_KEYWORDS,
     "Probabilities after temperature, top-k, top-p and softmax."},
    {"sample", (PyCFunction)(void *)glm_py_sample, METH_VARARGS | METH_KEYWORDS, "One token id."},
    {"open_checked", glm_py_open_checked, METH_VARARGS,
     "The number of a file that passed a check."},
    {"map_file", glm_py_map_file, METH_VARARGS, "All of an open file as a read-only array."},
    {"guard", glm_py_guard, METH_O, "Begin or end reads of mapped files in this thread."},
    {"check_mapped", glm_py_check_mapped, METH_O,
     "Whether an array lies in a mapped file; OSError where that changed."},
    {"drop_pages", glm_py_drop_pages, METH_O, "Give back the memory of an array in a mapped file."},
    {"set_num_threads", set_num_threads, METH_O, "Threads of every model; n >= 1."},
    {"get_num_threads", get_num_threads, METH_NOARGS, "Threads that ops use."},
    {"cpu_variants", cpu_variants, METH_NOARGS,
     "Instruction sets this processor runs, best first."},
    {"cpu_kernels", cpu_kernels, METH_NOARGS,
     "Every instruction set: whether it is compiled, whether this processor runs it."},
    {"op_table", op_table, METH_O, "Addresses of a backend's functions, for tests."},
    {"op_signatures", op_signatures, METH_NOARGS, "Parameters of every op, for tests."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0 || glm_locks_create() < 0)
        return -1;
    struct module_state *state = PyModule_GetState(module);
    state->model_type = glm_model_type(module);
    state->cache_type = glm_cache_type(module);
    state->descriptor_type = glm_descriptor_type(module);
    PyTypeObject *types[] = {state->model_type, state->cache_type, state->descriptor_type};
    for (int i = 0; i < 3; i++)
        if (!types[i] || PyModule_AddType(module, types[i]) < 0)
            return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->cache_type);
    Py_VISIT(state->descriptor_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->cache_type);
    Py_CLEAR(state->descriptor_type);
    return 0;
}

static void module_free(void *module)
{
    struct module_state *state = PyModule_GetState(module);
    module_clear(module);
    for (int i = 0; i < state->n_backends; i++)
        state->backends[i]->destroy(state->backends[i]);
    state->n_backends = 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "glmlora._core",
    .m_doc = "The C core of glmlora.",
    .m_size = sizeof(struct module_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_def); }
