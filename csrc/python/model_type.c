/* Types Model and Cache: argument checks, the GIL, exceptions; no arithmetic.
 *
 * A computation takes the model's busy flag (a second thread gets a RuntimeError), drops the GIL,
 * and takes the module's lock, since models share one pool of threads. While it runs, the backend
 * polls for signals through poll(). */
#include "module.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>
#include <time.h>
#include <unistd.h>

struct model_object {
    PyObject_HEAD struct glm_model *m;
    struct module_state *state;
    PyObject *module; /* keeps state alive */
    PyObject *arrays; /* dict: weight name -> array in use by the core */
    int busy;
};

struct cache_object {
    PyObject_HEAD struct glm_cache *c;
    struct model_object *model;
};

/* ---- computing without the GIL */

struct run {
    struct model_object *self;
    PyThreadState *thread;
    struct glm_backend *be;
};

static int poll(void *arg)
{
    struct run *run = arg;
    PyEval_RestoreThread(run->thread);
    const int stop = PyErr_CheckSignals() < 0;
    run->thread = PyEval_SaveThread();
    return stop;
}

static int begin_run(struct run *run, struct model_object *self)
{
    struct module_state *state = self->state;
    if (self->busy) {
        PyErr_SetString(
            PyExc_RuntimeError,
            "this model is busy in another thread: use one model from one thread at a time");
        return -1;
    }
    if (state->computing_pid != (long)getpid()) {
        pthread_mutex_init(&state->computing, NULL);
        state->computing_pid = (long)getpid();
    }
    self->busy = 1;
    Py_INCREF(self);
    *run = (struct run){self, PyEval_SaveThread(), glm_model_backend(self->m)};
    while (pthread_mutex_trylock(&state->computing) != 0) {
        /* Ctrl-C must work while another model computes */
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 100000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_mutex_timedlock(&state->computing, &until) == 0)
            break;
        if (poll(run)) {
            PyEval_RestoreThread(run->thread);
            self->busy = 0;
            Py_DECREF(self);
            return -1;
        }
    }
    run->be->set_poll(run->be, poll, run);
    return 0;
}

static void end_run(struct run *run)
{
    run->be->set_poll(run->be, NULL, NULL);
    pthread_mutex_unlock(&run->self->state->computing);
    PyEval_RestoreThread(run->thread);
    run->self->busy = 0;
    Py_DECREF(run->self);
}

/* An error of the device is what went wrong, whatever the call made of it. */
static glm_status device_error(struct glm_backend *be, glm_status status, struct glm_error *err)
{
    const char *text = be->error ? be->error(be) : NULL;
    const char *more = be->refusal && status == GLM_EMEMORY ? be->refusal(be) : NULL;
    if (more) {
        const size_t n = strlen(err->text);
        snprintf(err->text + n, sizeof err->text - n, ": %s", more);
    }
    return text ? glm_fail(err, GLM_ESTATE, "%s", text) : status;
}

/* status = call, run that way; on failure the exception is set and `failed` evaluated */
#define RUN(self, call, failed) RUN_ON(self, glm_model_backend((self)->m), call, failed)

/* whatever goes wrong goes wrong on the backend `be_` */
#define RUN_ON(self, be_, call, failed)             \
    do {                                            \
        struct run run_;                            \
        struct glm_error err;                       \
        if (begin_run(&run_, self) < 0)             \
            failed;                                 \
        glm_status status_ = call;                  \
        status_ = device_error(be_, status_, &err); \
        end_run(&run_);                             \
        if (status_ != GLM_OK) {                    \
            glm_raise(status_, &err);               \
            failed;                                 \
        }                                           \
    } while (0)

static int real_type(const struct model_object *self)
{
    return glm_model_backend(self->m)->real == GLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
}

/* A contiguous array of the backend's real type from a float32 or float64 one. */
static PyArrayObject *real_arg(struct model_object *self, PyObject *object, const char *name,
                               int rank)
{
    if (!PyArray_Check(object) || (PyArray_TYPE((PyArrayObject *)object) != NPY_FLOAT32 &&
                                   PyArray_TYPE((PyArrayObject *)object) != NPY_FLOAT64)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a float32 array, got %R", name,
                     (PyObject *)Py_TYPE(object));
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)PyArray_FROMANY(object, real_type(self), 0, 0,
                                                        NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (a && rank >= 0 && PyArray_NDIM(a) != rank) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimension(s), got %d", name, rank,
                     PyArray_NDIM(a));
        Py_CLEAR(a);
    }
    return a;
}

static int dims_of(PyArrayObject *a, const char *name, int *rows, int *cols)
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

static int find_weight(struct model_object *self, PyObject *name_object)
{
    const char *name = PyUnicode_AsUTF8(name_object);
    if (!name)
        return -1;
    const int i = glm_model_find(self->m, name);
    if (i < 0)
        PyErr_Format(PyExc_ValueError, "name: this model has no weight '%s'", name);
    return i;
}

/* ---- making a model */

static int arch_int(PyObject *arch, const char *key, int *out)
{
    PyObject *value = PyDict_GetItemString(arch, key);
    if (!value) {
        PyErr_Format(PyExc_ValueError, "arch: key '%s' is missing", key);
        return -1;
    }
    const long number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < INT_MIN || number > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "arch: %s %ld does not fit an int", key, number);
        return -1;
    }
    *out = (int)number;
    return 0;
}

static int arch_double(PyObject *arch, const char *key, double *out)
{
    PyObject *value = PyDict_GetItemString(arch, key);
    if (!value) {
        PyErr_Format(PyExc_ValueError, "arch: key '%s' is missing", key);
        return -1;
    }
    *out = PyFloat_AsDouble(value);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"arch", "backend", NULL};
    PyObject *arch_dict;
    const char *backend = "cpu";
    struct glm_arch a = {0};
    struct glm_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|s", names, &PyDict_Type, &arch_dict,
                                     &backend))
        return NULL;
    const struct {
        const char *key;
        int *out;
    } ints[] = {
        {"layers", &a.layers},
        {"hidden", &a.hidden},
        {"ffn", &a.ffn},
        {"heads", &a.heads},
        {"kv_heads", &a.kv_heads},
        {"head_dim", &a.head_dim},
        {"vocab", &a.vocab},
        {"max_positions", &a.max_positions},
        {"rotary_dim", &a.rotary_dim},
        {"qkv_bias", &a.qkv_bias},
        {"half_rope_table", &a.half_rope_table},
    };
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        if (arch_int(arch_dict, ints[i].key, ints[i].out) < 0)
            return NULL;
    if (arch_double(arch_dict, "eps", &a.eps) < 0 ||
        arch_double(arch_dict, "rope_base", &a.rope_base) < 0 ||
        arch_double(arch_dict, "rope_divisor", &a.rope_divisor) < 0)
        return NULL;
    PyObject *module = PyType_GetModule(type);
    if (!module)
        return NULL;
    struct module_state *state = PyModule_GetState(module);
    struct glm_backend *be = glm_module_backend(state, backend);
    if (!be)
        return NULL;
    struct model_object *self = (struct model_object *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->state = state;
    self->module = Py_NewRef(module);
    self->arrays = PyDict_New();
    const glm_status status = device_error(be, glm_model_create(&self->m, &a, be, &err), &err);
    if (status != GLM_OK || !self->arrays) {
        Py_DECREF(self);
        return status != GLM_OK ? glm_raise(status, &err) : NULL;
    }
    return (PyObject *)self;
}

static int model_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct model_object *self = (struct model_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->module);
    Py_VISIT(self->arrays);
    return 0;
}

static int model_clear(PyObject *object)
{
    struct model_object *self = (struct model_object *)object;
    glm_model_free(self->m);
    self->m = NULL;
    Py_CLEAR(self->arrays);
    Py_CLEAR(self->module);
    return 0;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    model_clear(object);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- weights */

static PyObject *shape_tuple(const struct glm_weight_info *info)
{
    return info->rank == 1 ? Py_BuildValue("(i)", info->rows)
                           : Py_BuildValue("(ii)", info->rows, info->cols);
}

static int idle(struct model_object *self)
{
    if (!self->busy)
        return 0;
    PyErr_SetString(
        PyExc_RuntimeError,
        "this model is busy in another thread: use one model from one thread at a time");
    return -1;
}

static PyObject *model_shapes(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *dict = PyDict_New();
    struct glm_weight_info info;
    for (int i = 0, more; dict && (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        if (more < 0 || info.kind != GLM_BASE)
            continue;
        PyObject *shape = shape_tuple(&info);
        if (!shape || PyDict_SetItemString(dict, info.name, shape) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(shape);
    }
    return dict;
}

/* Names of the weights for which (bound, kind) passes: 0 all present, 1 base ones not bound. */
static PyObject *names_where(struct model_object *self, int missing)
{
    PyObject *list = PyList_New(0);
    struct glm_weight_info info;
    for (int i = 0, more; list && (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        if (more < 0 || (missing && info.bound))
            continue;
        PyObject *name = PyUnicode_FromString(info.name);
        if (!name || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *model_missing(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    return names_where(self, 1);
}
static PyObject *model_names(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    return names_where(self, 0);
}

static PyObject *model_bind(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "array", "dtype", "scale", "group", NULL};
    PyObject *name_object, *object, *scale_object = Py_None, *pair;
    const char *dtype_name;
    struct glm_mat mat = {0};
    struct glm_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UOs|Oi", names, &name_object, &object,
                                     &dtype_name, &scale_object, &mat.group) ||
        idle(self) < 0 || glm_dtype_from_name(dtype_name, &mat.dtype) < 0)
        return NULL;
    const char *name = PyUnicode_AsUTF8(name_object);
    PyArrayObject *a = glm_array_arg(object, name, glm_dtype_numpy(mat.dtype), -1), *scale = NULL;
    if (!a || dims_of(a, name, &mat.rows, &mat.cols) < 0)
        goto failed;
    mat.data = PyArray_DATA(a);
    if (mat.dtype == GLM_I4 && mat.cols > INT_MAX / 2) {
        PyErr_Format(PyExc_ValueError, "%s: %d bytes a row", name, mat.cols);
        goto failed;
    }
    if (mat.dtype == GLM_I4)
        mat.cols *= 2;
    if (scale_object != Py_None) {
        scale = glm_array_arg(scale_object, name, NPY_FLOAT16, mat.group > 0 ? 2 : 1);
        if (!scale)
            goto failed;
        if (PyArray_DIM(scale, 0) != mat.rows ||
            (mat.group > 0 && PyArray_DIM(scale, 1) != glm_scale_cols(&mat))) {
            PyErr_Format(PyExc_ValueError, "%s: scale: expected %d rows of %d, got %zd elements",
                         name, mat.rows, mat.group > 0 ? glm_scale_cols(&mat) : 1,
                         (Py_ssize_t)PyArray_SIZE(scale));
            goto failed;
        }
        mat.scale = PyArray_DATA(scale);
    }
    glm_status status = glm_model_bind(self->m, name, &mat, PyArray_NDIM(a), &err);
    status = device_error(glm_model_backend(self->m), status, &err);
    if (status != GLM_OK) {
        glm_raise(status, &err);
        goto failed;
    }
    pair = PyTuple_Pack(2, (PyObject *)a, scale ? (PyObject *)scale : Py_None);
    const int kept = pair ? PyDict_SetItem(self->arrays, name_object, pair) : -1;
    Py_XDECREF(pair);
    Py_DECREF(a);
    Py_XDECREF(scale);
    if (kept < 0)
        return NULL;
    Py_RETURN_NONE;
failed:
    Py_XDECREF(a);
    Py_XDECREF(scale);
    return NULL;
}

/* move(backend, left): left, names of weights that the caller binds anew */
static PyObject *model_move(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"backend", "left", NULL};
    const char *backend;
    PyObject *left, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO", names, &backend, &left) || idle(self) < 0)
        return NULL;
    struct glm_backend *to = glm_module_backend(self->state, backend);
    PyObject *list = to ? PySequence_Fast(left, "left: expected names of weights") : NULL;
    if (!list)
        return NULL;
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(list);
    int *weights = PyMem_New(int, n ? n : 1);
    for (Py_ssize_t i = 0; weights && i < n; i++)
        if ((weights[i] = find_weight(self, PySequence_Fast_GET_ITEM(list, i))) < 0)
            goto done;
    if (!weights)
        PyErr_NoMemory();
    else
        RUN_ON(self, to, glm_model_move(self->m, to, weights, (int)n, &err), goto done);
    if (weights) {
        PyDict_Clear(self->arrays);
        result = Py_NewRef(Py_None);
    }
done:
    PyMem_Free(weights);
    Py_DECREF(list);
    return result;
}

static PyObject *model_shape(struct model_object *self, PyObject *name)
{
    struct glm_weight_info info;
    const int i = find_weight(self, name);
    if (i < 0)
        return NULL;
    glm_model_weight(self->m, i, &info);
    return shape_tuple(&info);
}

static PyObject *model_dtype(struct model_object *self, PyObject *name)
{
    struct glm_weight_info info;
    const int i = find_weight(self, name);
    if (i < 0)
        return NULL;
    glm_model_weight(self->m, i, &info);
    return PyUnicode_FromString(glm_dtype_name(info.dtype));
}

static PyObject *model_add_lora(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"module", "A", "B", "scale", "dropout", NULL};
    const char *module;
    PyObject *A_object, *B_object;
    double scale, dropout;
    struct glm_error err;
    int A_rows, A_cols, B_rows, B_cols;
    glm_status status = GLM_OK;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOOdd", names, &module, &A_object, &B_object,
                                     &scale, &dropout) ||
        idle(self) < 0)
        return NULL;
    PyArrayObject *A = real_arg(self, A_object, "A", 2);
    PyArrayObject *B = A ? real_arg(self, B_object, "B", 2) : NULL;
    const int ok =
        B && dims_of(A, "A", &A_rows, &A_cols) == 0 && dims_of(B, "B", &B_rows, &B_cols) == 0;
    if (ok)
        status = glm_model_add_lora(self->m, module, PyArray_DATA(A), A_rows, A_cols,
                                    PyArray_DATA(B), B_rows, B_cols, scale, dropout, &err);
    if (ok)
        status = device_error(glm_model_backend(self->m), status, &err);
    Py_XDECREF(A);
    Py_XDECREF(B);
    if (!ok)
        return NULL;
    if (status != GLM_OK)
        return glm_raise(status, &err);
    Py_RETURN_NONE;
}

static PyObject *model_remove_lora(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    if (idle(self) < 0)
        return NULL;
    glm_model_remove_lora(self->m);
    Py_RETURN_NONE;
}

static PyObject *model_enable_lora(struct model_object *self, PyObject *arg)
{
    const int on = PyObject_IsTrue(arg);
    if (on < 0 || idle(self) < 0)
        return NULL;
    glm_model_enable_lora(self->m, on);
    Py_RETURN_NONE;
}

static PyObject *model_merge_lora(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    RUN(self, glm_model_merge_lora(self->m, &err), return NULL);
    Py_RETURN_NONE;
}

static PyObject *model_set_prefix(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"arrays", "dropout", NULL};
    static const char *const keys[5] = {"embedding.weight", "trans.0.weight", "trans.0.bias",
                                        "trans.2.weight", "trans.2.bias"};
    PyObject *dict;
    double dropout;
    struct glm_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!d", names, &PyDict_Type, &dict, &dropout) ||
        idle(self) < 0)
        return NULL;
    const struct glm_arch *arch = glm_model_arch(self->m);
    const int H = arch->hidden, width = 2 * arch->layers * arch->kv_heads * arch->head_dim;
    const npy_intp shapes[5][2] = {{-1, width}, {H, width}, {H, 0}, {width, H}, {width, 0}};
    PyArrayObject *a[5] = {NULL};
    PyObject *result = NULL;
    Py_ssize_t used = 0;
    for (int i = 0; i < 5; i++) {
        char key[64];
        snprintf(key, sizeof key, "transformer.prefix_encoder.%s", keys[i]);
        PyObject *value = PyDict_GetItemString(dict, key);
        if (!value)
            continue;
        used++;
        const int rank = shapes[i][1] ? 2 : 1;
        if (!(a[i] = real_arg(self, value, key, rank)))
            goto done;
        if ((shapes[i][0] >= 0 && PyArray_DIM(a[i], 0) != shapes[i][0]) ||
            (rank == 2 && PyArray_DIM(a[i], 1) != shapes[i][1])) {
            PyErr_Format(PyExc_ValueError, "%s: expected shape (%s%zd%s%zd), got (%zd, %zd)", key,
                         shapes[i][0] < 0 ? "pre_seq_len " : "", (Py_ssize_t)shapes[i][0],
                         rank == 2 ? ", " : "; vector ", (Py_ssize_t)shapes[i][1],
                         (Py_ssize_t)PyArray_DIM(a[i], 0),
                         rank == 2 ? (Py_ssize_t)PyArray_DIM(a[i], 1) : (Py_ssize_t)0);
            goto done;
        }
    }
    if (!a[0] || used != PyDict_GET_SIZE(dict)) {
        PyErr_SetString(
            PyExc_ValueError,
            "prefix: expected transformer.prefix_encoder.embedding.weight and, with "
            "projection, .trans.0.weight, .trans.0.bias, .trans.2.weight, .trans.2.bias");
        goto done;
    }
    const void *data[5];
    for (int i = 0; i < 5; i++)
        data[i] = a[i] ? PyArray_DATA(a[i]) : NULL;
    glm_status status = glm_model_set_prefix(self->m, (int)PyArray_DIM(a[0], 0), data[0], data[1],
                                             data[2], data[3], data[4], dropout, &err);
    status = device_error(glm_model_backend(self->m), status, &err);
    if (status != GLM_OK)
        glm_raise(status, &err);
    else
        result = Py_NewRef(Py_None);
done:
    for (int i = 0; i < 5; i++)
        Py_XDECREF(a[i]);
    return result;
}

static PyObject *model_remove_prefix(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    if (idle(self) < 0)
        return NULL;
    glm_model_remove_prefix(self->m);
    Py_RETURN_NONE;
}

static PyObject *model_prefix_kv(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const struct glm_arch *arch = glm_model_arch(self->m);
    npy_intp dims[3] = {2 * arch->layers, glm_model_prefix_length(self->m),
                        arch->kv_heads * arch->head_dim};
    PyObject *out = PyArray_SimpleNew(3, dims, real_type(self));
    if (!out)
        return NULL;
    RUN(self, glm_model_prefix_kv(self->m, PyArray_DATA((PyArrayObject *)out), &err), {
        Py_DECREF(out);
        return NULL;
    });
    return out;
}

static PyObject *model_set_trainable(struct model_object *self, PyObject *arg)
{
    PyObject *list = PySequence_Fast(arg, "names: expected a sequence of weight names");
    if (!list)
        return NULL;
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(list);
    int *weights = PyMem_Calloc((size_t)n + 1, sizeof *weights);
    PyObject *result = NULL;
    if (!weights) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if ((weights[i] = find_weight(self, PySequence_Fast_GET_ITEM(list, i))) < 0)
            goto done;
    RUN(self, glm_model_set_trainable(self->m, weights, (int)n, &err), goto done);
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(weights);
    Py_DECREF(list);
    return result;
}

static PyObject *model_trainable(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const int *weights;
    const int n = glm_model_trainable(self->m, &weights);
    PyObject *list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        struct glm_weight_info info;
        glm_model_weight(self->m, weights[i], &info);
        PyObject *name = PyUnicode_FromString(info.name);
        if (!name) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, name);
    }
    return list;
}

static int part_from_name(const char *what, enum glm_part *part)
{
    static const char *const names[] = {"value", "grad", "exp_avg", "exp_avg_sq"};
    for (int i = 0; i < 4; i++)
        if (strcmp(what, names[i]) == 0) {
            *part = (enum glm_part)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "what: expected value, grad, exp_avg or exp_avg_sq, got '%s'",
                 what);
    return -1;
}

static PyObject *model_read(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "what", NULL};
    PyObject *name;
    const char *what = "value";
    enum glm_part part;
    struct glm_weight_info info;
    int i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "U|s", names, &name, &what) ||
        part_from_name(what, &part) < 0 || (i = find_weight(self, name)) < 0)
        return NULL;
    glm_model_weight(self->m, i, &info);
    npy_intp dims[2] = {info.rows, info.cols};
    PyObject *out = PyArray_SimpleNew(info.rank, dims, real_type(self));
    if (!out)
        return NULL;
    RUN(self, glm_model_read(self->m, i, part, PyArray_DATA((PyArrayObject *)out), &err), {
        Py_DECREF(out);
        return NULL;
    });
    return out;
}

static PyObject *model_write(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "array", "what", NULL};
    PyObject *name, *object;
    const char *what = "value";
    enum glm_part part;
    struct glm_weight_info info;
    int i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UO|s", names, &name, &object, &what) ||
        part_from_name(what, &part) < 0 || (i = find_weight(self, name)) < 0)
        return NULL;
    glm_model_weight(self->m, i, &info);
    PyArrayObject *a = real_arg(self, object, PyUnicode_AsUTF8(name), info.rank);
    if (!a)
        return NULL;
    int rows, cols;
    if (dims_of(a, PyUnicode_AsUTF8(name), &rows, &cols) < 0 || rows != info.rows ||
        cols != info.cols) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%U: expected shape (%d, %d), got (%d, %d)", name,
                         info.rows, info.cols, rows, cols);
        Py_DECREF(a);
        return NULL;
    }
    RUN(self, glm_model_write(self->m, i, part, PyArray_DATA(a), &err), {
        Py_DECREF(a);
        return NULL;
    });
    Py_DECREF(a);
    Py_RETURN_NONE;
}

/* ---- running */

/* The index arrays of a batch, converted and counted; free with drop_batch. */
struct batch_args {
    PyArrayObject *ids, *lengths, *positions, *rows, *targets;
    struct glm_input in;
};

static void drop_batch(struct batch_args *b)
{
    Py_XDECREF(b->ids);
    Py_XDECREF(b->lengths);
    Py_XDECREF(b->positions);
    Py_XDECREF(b->rows);
    Py_XDECREF(b->targets);
}

static int index_arg(PyObject *object, const char *name, PyArrayObject **out, const int32_t **data,
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

static int batch_args(struct batch_args *b, PyObject *ids, PyObject *lengths, PyObject *positions,
                      PyObject *rows, PyObject *targets)
{
    int n_positions = -1, n_targets = -1;
    *b = (struct batch_args){0};
    if (index_arg(ids, "ids", &b->ids, &b->in.ids, &b->in.N) < 0 ||
        index_arg(lengths, "lengths", &b->lengths, &b->in.lengths, &b->in.S) < 0 ||
        index_arg(positions, "positions", &b->positions, &b->in.positions, &n_positions) < 0 ||
        index_arg(rows, "rows", &b->rows, &b->in.rows, &b->in.M) < 0 ||
        index_arg(targets, "targets", &b->targets, &b->in.targets, &n_targets) < 0)
        goto fail;
    if (n_positions >= 0 && n_positions != b->in.N) {
        PyErr_Format(PyExc_ValueError, "positions: expected %d, one for each id, got %d", b->in.N,
                     n_positions);
        goto fail;
    }
    if (n_targets >= 0 && n_targets != b->in.M) {
        PyErr_Format(PyExc_ValueError, "targets: expected %d, one for each of rows, got %d",
                     b->in.M, n_targets);
        goto fail;
    }
    return 0;
fail:
    drop_batch(b);
    return -1;
}

static PyObject *model_plan(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_tokens", "n_segments", "n_rows", "training", "budget", NULL};
    int N, S, M, training;
    Py_ssize_t budget = 0;
    struct glm_plan p;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiip|n", names, &N, &S, &M, &training, &budget))
        return NULL;
    RUN(self, glm_model_plan(self->m, N, S, M, training, (size_t)budget, &p, &err), return NULL);
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n,s:i}", "weights", (Py_ssize_t)p.weights, "owned",
                         (Py_ssize_t)p.owned, "trainable", (Py_ssize_t)p.trainable, "activations",
                         (Py_ssize_t)p.activations, "held", (Py_ssize_t)p.held, "total",
                         (Py_ssize_t)p.total, "kept_layers", p.kept_layers);
}

static PyObject *model_counts(struct model_object *self, PyObject *unused)
{
    static const char *const names[] = {
#define OP(op, extent, ...) #op,
#include "ops.h"
    };
    struct glm_counts c;
    (void)unused;
    struct glm_backend *be = glm_model_backend(self->m);
    if (!be->take_counts) {
        PyErr_Format(PyExc_ValueError,
                     "counts: expected a model on the backend 'plan' or on a device, got '%s'",
                     be->name);
        return NULL;
    }
    be->take_counts(be, &c);
    PyObject *calls = PyDict_New();
    for (int i = 0; calls && i < GLM_N_OPS; i++) {
        PyObject *n = PyLong_FromUnsignedLongLong(c.calls[i]);
        if (!n || (c.calls[i] && PyDict_SetItemString(calls, names[i], n) < 0))
            Py_CLEAR(calls);
        Py_XDECREF(n);
    }
    if (!calls)
        return NULL;
    typedef unsigned long long u;
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:K,s:K,s:K,s:K,s:K,s:K,s:d,s:N}", "scratch",
                         (Py_ssize_t)c.scratch, "live", (Py_ssize_t)c.live, "peak",
                         (Py_ssize_t)c.peak, "uploaded", (Py_ssize_t)c.uploaded, "downloaded",
                         (Py_ssize_t)c.downloaded, "uploads", (u)c.uploads, "downloads",
                         (u)c.downloads, "syncs", (u)c.syncs, "launches", (u)c.launches, "products",
                         (u)c.products, "graphs", (u)c.graphs, "flops", c.flops, "calls", calls);
}

static PyObject *model_reserve(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_tokens", "n_segments", "n_rows", "training", "budget", NULL};
    int N, S, M, training;
    Py_ssize_t budget = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiip|n", names, &N, &S, &M, &training, &budget))
        return NULL;
    RUN(self, glm_model_reserve(self->m, N, S, M, training, (size_t)budget, &err), return NULL);
    Py_RETURN_NONE;
}

static PyObject *model_forward(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "lengths", "positions", "rows", "hidden_states", NULL};
    PyObject *ids, *lengths, *positions = NULL, *rows = NULL, *logits = NULL, *hidden = NULL,
                             *result = NULL;
    int want_hidden = 0;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOp", names, &ids, &lengths, &positions,
                                     &rows, &want_hidden) ||
        batch_args(&b, ids, lengths, positions, rows, NULL) < 0)
        return NULL;
    if (want_hidden && b.rows) {
        PyErr_SetString(PyExc_ValueError,
                        "rows: hidden_states are those of all tokens; leave rows out");
        goto done;
    }
    const struct glm_arch *arch = glm_model_arch(self->m);
    npy_intp dims[2] = {b.rows ? b.in.M : b.in.N, arch->vocab};
    npy_intp hidden_dims[3] = {arch->layers + 1, b.in.N, arch->hidden};
    logits = PyArray_SimpleNew(2, dims, real_type(self));
    hidden = want_hidden ? PyArray_SimpleNew(3, hidden_dims, real_type(self)) : Py_NewRef(Py_None);
    if (!logits || !hidden)
        goto done;
    RUN(self,
        glm_model_forward(self->m, &b.in, PyArray_DATA((PyArrayObject *)logits),
                          want_hidden ? PyArray_DATA((PyArrayObject *)hidden) : NULL, &err),
        goto done);
    result = PyTuple_Pack(2, logits, hidden);
done:
    Py_XDECREF(logits);
    Py_XDECREF(hidden);
    drop_batch(&b);
    return result;
}

static PyObject *model_loss(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "lengths", "rows", "targets", "positions", NULL};
    PyObject *ids, *lengths, *rows, *targets, *positions = NULL;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|O", names, &ids, &lengths, &rows, &targets,
                                     &positions) ||
        batch_args(&b, ids, lengths, positions, rows, targets) < 0)
        return NULL;
    npy_intp dims[1] = {b.in.M};
    PyObject *losses = PyArray_SimpleNew(1, dims, real_type(self));
    if (losses)
        RUN(self, glm_model_loss(self->m, &b.in, PyArray_DATA((PyArrayObject *)losses), &err), {
            Py_CLEAR(losses);
            break;
        });
    drop_batch(&b);
    return losses;
}

static PyObject *model_backward(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids",       "lengths",      "rows",    "targets",
                            "positions", "dropout_seed", "dropout", NULL};
    PyObject *ids, *lengths, *rows, *targets, *positions = NULL, *result = NULL;
    unsigned long long seed = 0;
    int dropout = 1;
    double loss;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OKp", names, &ids, &lengths, &rows,
                                     &targets, &positions, &seed, &dropout) ||
        batch_args(&b, ids, lengths, positions, rows, targets) < 0)
        return NULL;
    RUN(self, glm_model_backward(self->m, &b.in, seed, dropout, &loss, &err), goto done);
    result = PyFloat_FromDouble(loss);
done:
    drop_batch(&b);
    return result;
}

static PyObject *model_zero_grad(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    if (idle(self) < 0)
        return NULL;
    glm_model_zero_grad(self->m);
    Py_RETURN_NONE;
}

static PyObject *model_grad_norm(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    double norm;
    RUN(self, glm_model_grad_norm(self->m, &norm, &err), return NULL);
    return PyFloat_FromDouble(norm);
}

static PyObject *model_step(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lr", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm", NULL};
    struct glm_adamw opt;
    double norm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "dddddd", names, &opt.lr, &opt.beta1, &opt.beta2,
                                     &opt.eps, &opt.weight_decay, &opt.max_grad_norm))
        return NULL;
    RUN(self, glm_model_step(self->m, &opt, &norm, &err), return NULL);
    return PyFloat_FromDouble(norm);
}

/* ---- Cache */

static PyObject *cache_new(struct model_object *model, int rows, int capacity, int shared_capacity)
{
    PyTypeObject *type = model->state->cache_type;
    struct cache_object *self = (struct cache_object *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->model = (struct model_object *)Py_NewRef((PyObject *)model);
    RUN(model, glm_cache_create(&self->c, model->m, rows, capacity, shared_capacity, &err), {
        Py_DECREF(self);
        return NULL;
    });
    return (PyObject *)self;
}

static int cache_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)((struct cache_object *)object)->model);
    return 0;
}

static int cache_clear(PyObject *object)
{
    struct cache_object *self = (struct cache_object *)object;
    if (self->model && self->model->m)
        glm_cache_free(self->c);
    self->c = NULL;
    Py_CLEAR(self->model);
    return 0;
}

static void cache_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    cache_clear(object);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *cache_get(PyObject *object, void *which)
{
    struct cache_object *self = (struct cache_object *)object;
    struct glm_cache_info info;
    glm_cache_get(self->c, &info);
    switch ((intptr_t)which) {
    case 0:
        return PyLong_FromLong(info.rows);
    case 1:
        return PyLong_FromLong(info.capacity);
    case 2:
        return PyLong_FromLong(info.shared_length);
    case 3:
        return PyLong_FromSize_t(info.bytes);
    case 5:
        return PyBool_FromLong(info.current);
    }
    PyObject *list = PyList_New(info.rows);
    for (int i = 0; list && i < info.rows; i++)
        PyList_SET_ITEM(list, i, PyLong_FromLong(info.lengths[i]));
    return list;
}

static PyObject *cache_rewind(struct cache_object *self, PyObject *args)
{
    int row, length;
    struct glm_error err;
    if (!PyArg_ParseTuple(args, "ii", &row, &length) || idle(self->model) < 0)
        return NULL;
    const glm_status status = glm_cache_rewind(self->c, row, length, &err);
    if (status != GLM_OK)
        return glm_raise(status, &err);
    Py_RETURN_NONE;
}

static PyObject *cache_reorder(struct cache_object *self, PyObject *arg)
{
    struct glm_cache_info info;
    PyArrayObject *parents = glm_array_arg(arg, "parents", NPY_INT32, 1);
    if (!parents)
        return NULL;
    glm_cache_get(self->c, &info);
    if (PyArray_SIZE(parents) != info.rows) {
        PyErr_Format(PyExc_ValueError, "parents: expected %d, one for each row, got %zd", info.rows,
                     (Py_ssize_t)PyArray_SIZE(parents));
        Py_DECREF(parents);
        return NULL;
    }
    RUN(self->model, glm_cache_reorder(self->c, PyArray_DATA(parents), &err), {
        Py_DECREF(parents);
        return NULL;
    });
    Py_DECREF(parents);
    Py_RETURN_NONE;
}

static PyObject *cache_grow(struct cache_object *self, PyObject *args)
{
    int capacity;
    if (!PyArg_ParseTuple(args, "i", &capacity))
        return NULL;
    RUN(self->model, glm_cache_grow(self->c, capacity, &err), return NULL);
    Py_RETURN_NONE;
}

static PyObject *model_cache(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rows", "capacity", "shared_capacity", NULL};
    int rows, capacity, shared = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii|i", names, &rows, &capacity, &shared))
        return NULL;
    return cache_new(self, rows, capacity, shared);
}

static int own_cache(struct model_object *self, PyObject *object)
{
    if (!PyObject_TypeCheck(object, self->state->cache_type) ||
        ((struct cache_object *)object)->model != self) {
        PyErr_SetString(PyExc_ValueError, "cache: expected one made by this model's cache()");
        return -1;
    }
    return 0;
}

/* cache, rows, ids, lengths: what continues rows of a cache; choice: NULL where there is no such
 * argument, else a dict or left alone. -1 with an exception set */
static int rows_args(struct model_object *self, struct batch_args *b, PyObject **cache,
                     PyObject **choice, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"cache", "rows", "ids", "lengths", choice ? "choice" : NULL, NULL};
    PyObject *rows, *ids, *lengths;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, choice ? "OOOO|O!" : "OOOO", names, cache, &rows,
                                     &ids, &lengths, &PyDict_Type, choice) ||
        own_cache(self, *cache) < 0 || batch_args(b, ids, lengths, NULL, rows, NULL) < 0)
        return -1;
    int64_t sum = 0;
    for (int i = 0; i < b->in.S; i++)
        sum += b->in.lengths[i] > 0 ? b->in.lengths[i] : 0;
    if (b->in.M == b->in.S && sum == b->in.N)
        return 0;
    PyErr_Format(
        PyExc_ValueError,
        "lengths: expected %d, one for each row, that add up to the %d ids; got %d, sum %lld",
        b->in.M, b->in.N, b->in.S, (long long)sum);
    drop_batch(b);
    return -1;
}

static PyObject *model_extend(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    PyObject *cache, *logits = NULL;
    struct batch_args b;
    if (rows_args(self, &b, &cache, NULL, args, kwargs) < 0)
        return NULL;
    npy_intp dims[2] = {b.in.S, glm_model_arch(self->m)->vocab};
    logits = PyArray_SimpleNew(2, dims, real_type(self));
    if (logits)
        RUN(self,
            glm_cache_extend(((struct cache_object *)cache)->c, b.in.rows, b.in.S, b.in.ids,
                             b.in.lengths, PyArray_DATA((PyArrayObject *)logits), &err),
            {
                Py_CLEAR(logits);
                break;
            });
    drop_batch(&b);
    return logits;
}

/* Arrays of how tokens are chosen; free with drop_sampling. */
struct sampling_args {
    PyArrayObject *draws, *context, *context_lengths, *suppress;
    struct glm_sampling how;
};

static void drop_sampling(struct sampling_args *s)
{
    Py_XDECREF(s->draws);
    Py_XDECREF(s->context);
    Py_XDECREF(s->context_lengths);
    Py_XDECREF(s->suppress);
}

/* choice: a dict, the keywords of glmlora/_core.pyi; n: rows. -1 with an exception set */
static int sampling_args(struct sampling_args *s, PyObject *choice, int n)
{
    static char *names[] = {"draws",
                            "temperature",
                            "top_k",
                            "top_p",
                            "context",
                            "context_lengths",
                            "repetition_penalty",
                            "no_repeat_ngram_size",
                            "suppress",
                            "min_length",
                            NULL};
    PyObject *draws, *context = NULL, *lengths = NULL, *suppress = NULL;
    int n_context = 0, n_lengths = 0;
    int64_t sum = 0;
    struct glm_sampling *how = &s->how;
    *s = (struct sampling_args){.how = {.top_p = 1, .repetition_penalty = 1}};
    PyObject *none = PyTuple_New(0);
    const int parsed =
        none && PyArg_ParseTupleAndKeywords(none, choice, "O|$didOOdiOi", names, &draws,
                                            &how->temperature, &how->top_k, &how->top_p, &context,
                                            &lengths, &how->repetition_penalty,
                                            &how->no_repeat_ngram, &suppress, &how->min_length);
    Py_XDECREF(none);
    if (!parsed)
        return -1;
    s->draws = glm_array_arg(draws, "draws", NPY_UINT64, 2);
    if (!s->draws || index_arg(context, "context", &s->context, &how->context, &n_context) < 0 ||
        index_arg(lengths, "context_lengths", &s->context_lengths, &how->context_lengths,
                  &n_lengths) < 0 ||
        index_arg(suppress, "suppress", &s->suppress, &how->suppress, &how->n_suppress) < 0)
        return -1;
    how->draws = PyArray_DATA(s->draws);
    for (int i = 0; i < n_lengths; i++)
        sum += how->context_lengths[i] < 0 ? INT_MAX : how->context_lengths[i];
    if (PyArray_DIM(s->draws, 0) == n && PyArray_DIM(s->draws, 1) == 3 &&
        (!how->context || (n_lengths == n && sum == n_context)))
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "draws, context_lengths: expected (%d, 3) and %d lengths that add up to the %d "
                 "ids of context; got (%zd, %zd) and %d, sum %lld",
                 n, n, n_context, (Py_ssize_t)PyArray_DIM(s->draws, 0),
                 (Py_ssize_t)PyArray_DIM(s->draws, 1), n_lengths, (long long)sum);
    return -1;
}

/* The ids that are chosen after the rows: where `choice` is not given, what model_extend and argmax
 * would give. */
static PyObject *model_next(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    PyObject *next = NULL, *choice = NULL;
    struct batch_args b;
    struct sampling_args s = {0};
    PyObject *cache;
    if (rows_args(self, &b, &cache, &choice, args, kwargs) < 0)
        return NULL;
    npy_intp n = b.in.S;
    if (!choice || sampling_args(&s, choice, b.in.S) == 0)
        next = PyArray_ZEROS(1, &n, NPY_INT32, 0);
    if (next)
        RUN(self,
            glm_cache_next(((struct cache_object *)cache)->c, b.in.rows, b.in.S, b.in.ids,
                           b.in.lengths, choice ? &s.how : NULL,
                           PyArray_DATA((PyArrayObject *)next), &err),
            {
                Py_CLEAR(next);
                break;
            });
    drop_sampling(&s);
    drop_batch(&b);
    return next;
}

static PyObject *model_extend_shared(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cache", "ids", NULL};
    PyObject *cache, *ids_object;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &cache, &ids_object) ||
        own_cache(self, cache) < 0)
        return NULL;
    PyArrayObject *ids = glm_array_arg(ids_object, "ids", NPY_INT32, 1);
    if (!ids)
        return NULL;
    RUN(self,
        glm_cache_extend_shared(((struct cache_object *)cache)->c, PyArray_DATA(ids),
                                (int)PyArray_SIZE(ids), &err),
        {
            Py_DECREF(ids);
            return NULL;
        });
    Py_DECREF(ids);
    Py_RETURN_NONE;
}

/* ---- attributes and tables */

static PyObject *model_get(PyObject *object, void *which)
{
    struct model_object *self = (struct model_object *)object;
    const struct glm_progress *p = glm_model_progress(self->m);
    switch ((intptr_t)which) {
    case 0:
        return PyUnicode_FromString(glm_model_backend(self->m)->name);
    case 1:
        return PyLong_FromUnsignedLongLong(glm_model_backend(self->m)->allocated);
    case 2:
        return PyLong_FromLongLong(p->tokens);
    case 3:
        return PyLong_FromLongLong(p->rows);
    default:
        return PyLong_FromLong(p->steps);
    }
}

static int model_set_steps(PyObject *object, PyObject *value, void *Py_UNUSED(closure))
{
    const long steps = value ? PyLong_AsLong(value) : -1;
    if (steps == -1 && PyErr_Occurred())
        return -1;
    if (steps < 0 || steps > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "steps: expected a number of updates from 0 on, got %ld",
                     steps);
        return -1;
    }
    glm_model_progress(((struct model_object *)object)->m)->steps = (int)steps;
    return 0;
}

#define METHOD(name, flags, doc) {#name, (PyCFunction)(void *)model_##name, flags, doc}
#define KEYWORDS (METH_VARARGS | METH_KEYWORDS)

static PyMethodDef model_methods[] = {
    METHOD(shapes, METH_NOARGS, "Every base weight that must be bound, with its shape."),
    METHOD(missing, METH_NOARGS, "Base weights not bound yet."),
    METHOD(names, METH_NOARGS, "All weights present: base, LoRA, prefix."),
    METHOD(shape, METH_O, "Shape of a weight."),
    METHOD(dtype, METH_O, "Number type of a weight: F32, F16, BF16 or F64."),
    METHOD(bind, KEYWORDS, "Use an array in place as a base weight."),
    METHOD(move, KEYWORDS, "To another backend."),
    METHOD(add_lora, KEYWORDS, "Adapt one linear layer."),
    METHOD(remove_lora, METH_NOARGS, "Drop the adapter."),
    METHOD(enable_lora, METH_O, "Whether forward applies the adapter."),
    METHOD(merge_lora, METH_NOARGS, "W += scale * B A in the dtype of W, then drop the adapter."),
    METHOD(set_prefix, KEYWORDS, "P-Tuning v2 prefix encoder."),
    METHOD(remove_prefix, METH_NOARGS, "Drop the prefix."),
    METHOD(prefix_kv, METH_NOARGS, "Keys and values the prefix encoder yields (2*L, P, KV)."),
    METHOD(set_trainable, METH_O, "Weights to train from now on."),
    METHOD(trainable, METH_NOARGS, "Names of the weights being trained."),
    METHOD(read, KEYWORDS, "A copy of a weight, its gradient or a moment."),
    METHOD(write, KEYWORDS, "Set a trainable weight or a moment."),
    METHOD(plan, KEYWORDS, "Bytes a step would need."),
    METHOD(counts, METH_NOARGS, "What calls on the plan backend cost."),
    METHOD(reserve, KEYWORDS, "Take the memory of a step now."),
    METHOD(forward, KEYWORDS, "Logits, and hidden states."),
    METHOD(loss, KEYWORDS, "Negative log-likelihoods."),
    METHOD(backward, KEYWORDS, "Loss, adding gradients."),
    METHOD(zero_grad, METH_NOARGS, "Forget accumulated gradients."),
    METHOD(grad_norm, METH_NOARGS, "Global norm of the token-mean gradient."),
    METHOD(step, KEYWORDS, "Clip, AdamW, zero_grad."),
    METHOD(cache, KEYWORDS, "Keys and values for generation."),
    METHOD(extend, KEYWORDS, "Append tokens to rows of a cache; logits after the last of each."),
    METHOD(next, KEYWORDS, "Append tokens to rows of a cache; the id chosen after each."),
    METHOD(extend_shared, KEYWORDS, "Append tokens to the prefix common to all rows."),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"backend", model_get, NULL, "Name of the backend.", (void *)0},
    {"allocations", model_get, NULL, "Calls of the backend's allocator so far.", (void *)1},
    {"accumulated_tokens", model_get, NULL, "Labelled tokens since zero_grad.", (void *)2},
    {"accumulated_rows", model_get, NULL, "Segments since zero_grad.", (void *)3},
    {"steps", model_get, model_set_steps, "Finished updates.", (void *)4},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_new, model_new},           {Py_tp_dealloc, model_dealloc},
    {Py_tp_traverse, model_traverse}, {Py_tp_clear, model_clear},
    {Py_tp_methods, model_methods},   {Py_tp_getset, model_getset},
    {Py_tp_doc, "One GLM model."},    {0, NULL},
};

static PyType_Spec model_spec = {
    .name = "glmlora._core.Model",
    .basicsize = sizeof(struct model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = model_slots,
};

static PyMethodDef cache_methods[] = {
    {"rewind", (PyCFunction)(void *)cache_rewind, METH_VARARGS,
     "Forget a row's tokens after the first `length`."},
    {"grow", (PyCFunction)(void *)cache_grow, METH_VARARGS,
     "Room for `capacity` tokens in each row; what is held stays."},
    {"reorder", (PyCFunction)(void *)cache_reorder, METH_O,
     "Row i becomes a copy of what row parents[i] was."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef cache_getset[] = {
    {"rows", cache_get, NULL, "Sequences.", (void *)0},
    {"capacity", cache_get, NULL, "Tokens a row can hold.", (void *)1},
    {"shared_length", cache_get, NULL, "Tokens of the prefix common to all rows.", (void *)2},
    {"nbytes", cache_get, NULL, "Bytes of keys and values.", (void *)3},
    {"lengths", cache_get, NULL, "Own tokens of each row.", (void *)4},
    {"current", cache_get, NULL, "Whether it was filled with the weights as they are now.",
     (void *)5},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_traverse, cache_traverse},
    {Py_tp_clear, cache_clear},
    {Py_tp_methods, cache_methods},
    {Py_tp_getset, cache_getset},
    {Py_tp_doc, "Keys and values of some sequences; made by Model.cache."},
    {0, NULL},
};

static PyType_Spec cache_spec = {
    .name = "glmlora._core.Cache",
    .basicsize = sizeof(struct cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = cache_slots,
};

int glm_add_model_types(PyObject *module, struct module_state *state)
{
    state->model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    state->cache_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &cache_spec, NULL);
    if (!state->model_type || !state->cache_type)
        return -1;
    return PyModule_AddType(module, state->model_type) < 0 ||
                   PyModule_AddType(module, state->cache_type) < 0
               ? -1
               : 0;
}
