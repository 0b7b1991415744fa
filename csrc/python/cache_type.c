/* Type Cache, and the methods of Model that fill one and choose tokens. */
#include "run.h"

struct cache_object {
    PyObject ob_base; /* PyObject_HEAD */
    struct glm_cache *c;
    struct model_object *model;
    PyObject *module; /* keeps the backend, which c is freed by, alive where the model goes first */
};

static PyObject *cache_new(struct model_object *model, int rows, int capacity, int shared_capacity)
{
    struct run run;
    PyTypeObject *type = model->state->cache_type;
    struct cache_object *self = (struct cache_object *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->model = (struct model_object *)Py_NewRef((PyObject *)model);
    self->module = Py_NewRef(model->module);
    if (glm_run_begin(&run, model, 0) < 0 ||
        glm_run_end(&run, glm_cache_create(&self->c, model->m, rows, capacity, shared_capacity,
                                           &run.err)) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int cache_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)((struct cache_object *)object)->model);
    Py_VISIT(((struct cache_object *)object)->module);
    return 0;
}

static int cache_clear(PyObject *object)
{
    struct cache_object *self = (struct cache_object *)object;
    if (self->c) {
        const int claimed = glm_claim(glm_cache_backend(self->c));
        glm_cache_free(self->c);
        glm_release(claimed);
        self->c = NULL;
    }
    Py_CLEAR(self->model);
    Py_CLEAR(self->module);
    return 0;
}

static void cache_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    cache_clear(object);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

/* 0, with RuntimeError set, where the garbage collector has taken it apart already. */
static int cache_is_there(const struct cache_object *self)
{
    if (self->c && self->model && self->model->m)
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "this cache or its model is gone");
    return 0;
}

static PyObject *cache_get(PyObject *object, void *which)
{
    struct cache_object *self = (struct cache_object *)object;
    struct glm_cache_info info;
    PyObject *list = NULL;
    if (!cache_is_there(self) || glm_take(self->model) < 0)
        return NULL;
    glm_cache_get(self->c, &info);
    if ((intptr_t)which == 4)
        list = PyList_New(info.rows);
    for (int i = 0; list && i < info.rows; i++)
        PyList_SetItem(list, i, PyLong_FromLong(info.lengths[i]));
    glm_give(self->model);
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
    return list;
}

static PyObject *cache_rewind(struct cache_object *self, PyObject *args)
{
    int row, length;
    struct glm_error err;
    if (!PyArg_ParseTuple(args, "ii", &row, &length) || !cache_is_there(self) ||
        glm_take(self->model) < 0)
        return NULL;
    const glm_status status = glm_cache_rewind(self->c, row, length, &err);
    glm_give(self->model);
    if (status != GLM_OK)
        return glm_raise(status, &err);
    Py_RETURN_NONE;
}

static PyObject *cache_adapt(struct cache_object *self, PyObject *args)
{
    int row, number;
    struct glm_error err;
    if (!PyArg_ParseTuple(args, "ii", &row, &number) || !cache_is_there(self) ||
        glm_take(self->model) < 0)
        return NULL;
    const glm_status status = glm_cache_adapt(self->c, row, number, &err);
    glm_give(self->model);
    if (status != GLM_OK)
        return glm_raise(status, &err);
    Py_RETURN_NONE;
}

static PyObject *cache_copy(struct cache_object *self, PyObject *args)
{
    struct run run;
    int from, to, length;
    if (!PyArg_ParseTuple(args, "iii", &from, &to, &length) || !cache_is_there(self))
        return NULL;
    if (glm_run_begin(&run, self->model, 0) < 0 ||
        glm_run_end(&run, glm_cache_copy(self->c, from, to, length, &run.err)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *cache_reorder(struct cache_object *self, PyObject *arg)
{
    struct run run;
    struct glm_cache_info info;
    PyArrayObject *parents = glm_array_arg(arg, "parents", NPY_INT32, 1);
    if (!parents)
        return NULL;
    if (!cache_is_there(self) || glm_take(self->model) < 0) {
        Py_DECREF(parents);
        return NULL;
    }
    glm_cache_get(self->c, &info);
    if (PyArray_SIZE(parents) != info.rows) {
        glm_give(self->model);
        PyErr_Format(PyExc_ValueError, "parents: expected %d, one for each row, got %zd", info.rows,
                     (Py_ssize_t)PyArray_SIZE(parents));
        Py_DECREF(parents);
        return NULL;
    }
    const int done =
        glm_run_begin_taken(&run, self->model, 0) == 0 &&
        glm_run_end(&run, glm_cache_reorder(self->c, PyArray_DATA(parents), &run.err)) == 0;
    Py_DECREF(parents);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *cache_grow(struct cache_object *self, PyObject *args)
{
    struct run run;
    int capacity;
    if (!PyArg_ParseTuple(args, "i", &capacity) || !cache_is_there(self))
        return NULL;
    if (glm_run_begin(&run, self->model, 0) < 0 ||
        glm_run_end(&run, glm_cache_grow(self->c, capacity, &run.err)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *glm_py_cache(struct model_object *self, PyObject *args, PyObject *kwargs)
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
    return cache_is_there((struct cache_object *)object) ? 0 : -1;
}

/* What continues rows of a cache. -1 with an exception set */
static int rows_batch(struct model_object *self, struct batch_args *b, PyObject *cache,
                      PyObject *rows, PyObject *ids, PyObject *lengths)
{
    if (own_cache(self, cache) < 0 || glm_batch_args(b, ids, lengths, NULL, rows, NULL) < 0)
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
    glm_drop_batch(b);
    return -1;
}

/* cache, rows, ids, lengths; choice: NULL where there is no such argument, else a dict or left alone.
 * -1 with an exception set */
static int rows_args(struct model_object *self, struct batch_args *b, PyObject **cache,
                     PyObject **choice, PyObject *args, PyObject *kwargs)
{
    char *names[] = {"cache", "rows", "ids", "lengths", choice ? "choice" : NULL, NULL};
    PyObject *rows, *ids, *lengths;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, choice ? "OOOO|O!" : "OOOO", names, cache, &rows,
                                     &ids, &lengths, &PyDict_Type, choice))
        return -1;
    return rows_batch(self, b, *cache, rows, ids, lengths);
}

PyObject *glm_py_extend(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    struct run run;
    PyObject *cache, *logits = NULL;
    struct batch_args b;
    if (rows_args(self, &b, &cache, NULL, args, kwargs) < 0)
        return NULL;
    npy_intp dims[2] = {b.in.S, glm_model_arch(self->m)->vocab};
    logits = PyArray_SimpleNew(2, dims, glm_real_type(self));
    if (logits &&
        (glm_run_begin(&run, self, GLM_READS) < 0 ||
         glm_run_end(&run, glm_cache_extend(((struct cache_object *)cache)->c, b.in.rows, b.in.S,
                                            b.in.ids, b.in.lengths,
                                            PyArray_DATA((PyArrayObject *)logits), &run.err)) < 0))
        Py_CLEAR(logits);
    glm_drop_batch(&b);
    return logits;
}

/* Arrays of how tokens are chosen; free with drop_sampling. */
struct sampling_args {
    PyObject *choice;
    PyArrayObject *draws, *context, *context_lengths, *suppress;
    struct glm_sampling how;
};

static void drop_sampling(struct sampling_args *s)
{
    Py_XDECREF(s->choice);
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
    /* converting one value may run code that changes the caller's dict */
    s->choice = PyDict_Copy(choice);
    PyObject *none = s->choice ? PyTuple_New(0) : NULL;
    const int parsed =
        none && PyArg_ParseTupleAndKeywords(none, s->choice, "O|$didOOdiOi", names, &draws,
                                            &how->temperature, &how->top_k, &how->top_p, &context,
                                            &lengths, &how->repetition_penalty,
                                            &how->no_repeat_ngram, &suppress, &how->min_length);
    Py_XDECREF(none);
    if (!parsed)
        return -1;
    s->draws = glm_array_arg(draws, "draws", NPY_UINT64, 2);
    if (!s->draws ||
        glm_index_arg(context, "context", &s->context, &how->context, &n_context) < 0 ||
        glm_index_arg(lengths, "context_lengths", &s->context_lengths, &how->context_lengths,
                      &n_lengths) < 0 ||
        glm_index_arg(suppress, "suppress", &s->suppress, &how->suppress, &how->n_suppress) < 0)
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

/* The ids that are chosen after the rows: where `choice` is not given, the argmax of what extend
 * would give. */
PyObject *glm_py_next(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    struct run run;
    PyObject *next = NULL, *choice = NULL;
    struct batch_args b;
    struct sampling_args s = {0};
    PyObject *cache;
    if (rows_args(self, &b, &cache, &choice, args, kwargs) < 0)
        return NULL;
    npy_intp n = b.in.S;
    if (!choice || sampling_args(&s, choice, b.in.S) == 0)
        next = PyArray_ZEROS(1, &n, NPY_INT32, 0);
    if (next &&
        (glm_run_begin(&run, self, GLM_READS) < 0 ||
         glm_run_end(&run, glm_cache_next(((struct cache_object *)cache)->c, b.in.rows, b.in.S,
                                          b.in.ids, b.in.lengths, choice ? &s.how : NULL,
                                          PyArray_DATA((PyArrayObject *)next), &run.err)) < 0))
        Py_CLEAR(next);
    drop_sampling(&s);
    glm_drop_batch(&b);
    return next;
}

/* The ids that are chosen after the rows, again and again. */
PyObject *glm_py_go_on(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cache", "rows", "ids", "lengths", "most", "ends", NULL};
    struct run run;
    PyObject *cache, *rows, *ids, *lengths, *ends_object, *found = NULL;
    PyArrayObject *ends = NULL;
    struct batch_args b;
    const int32_t *values = NULL;
    int most, n_ends = 0, count = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOiO", names, &cache, &rows, &ids, &lengths,
                                     &most, &ends_object) ||
        rows_batch(self, &b, cache, rows, ids, lengths) < 0)
        return NULL;
    if (most < 1 || b.in.N != b.in.S) {
        PyErr_Format(PyExc_ValueError,
                     "most, ids: expected 1 or more and an id for each of %d rows,"
                     " got %d and %d",
                     b.in.S, most, b.in.N);
        goto done;
    }
    npy_intp dims[2] = {most, b.in.S};
    if (glm_index_arg(ends_object, "ends", &ends, &values, &n_ends) < 0 ||
        !(found = PyArray_SimpleNew(2, dims, NPY_INT32)))
        goto done;
    if (glm_run_begin(&run, self, GLM_READS) < 0 ||
        glm_run_end(&run, glm_cache_go_on(((struct cache_object *)cache)->c, b.in.rows, b.in.S,
                                          b.in.ids, b.in.lengths, most, values, n_ends,
                                          PyArray_DATA((PyArrayObject *)found), &count, &run.err)) <
            0)
        Py_CLEAR(found);
    if (found && count < most) {
        PyObject *all = found;
        found = PySequence_GetSlice(all, 0, count);
        Py_DECREF(all);
    }
done:
    Py_XDECREF(ends);
    glm_drop_batch(&b);
    return found;
}

PyObject *glm_py_extend_shared(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cache", "ids", NULL};
    struct run run;
    PyObject *cache, *ids_object;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &cache, &ids_object) ||
        own_cache(self, cache) < 0)
        return NULL;
    PyArrayObject *ids = NULL;
    const int32_t *values = NULL;
    int n = 0;
    const int done = glm_index_arg(ids_object, "ids", &ids, &values, &n) == 0 &&
                     glm_run_begin(&run, self, GLM_READS) == 0 &&
                     glm_run_end(&run, glm_cache_extend_shared(((struct cache_object *)cache)->c,
                                                               values, n, &run.err)) == 0;
    Py_XDECREF(ids);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef cache_methods[] = {
    {"rewind", (PyCFunction)(void *)cache_rewind, METH_VARARGS,
     "Forget a row's tokens after the first `length`."},
    {"copy", (PyCFunction)(void *)cache_copy, METH_VARARGS,
     "Row `to` begins with the first `length` tokens of row `from`, and has no others."},
    {"adapt", (PyCFunction)(void *)cache_adapt, METH_VARARGS,
     "An empty row (-1: all, and the shared prefix) computes with an adapter that was kept."},
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

PyTypeObject *glm_cache_type(PyObject *module)
{
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, &cache_spec, NULL);
}
