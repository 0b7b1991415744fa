/* Methods of Model on its weights: base ones, adapters, and what trains. */
#include "run.h"

/* Of a model that is taken: a slot is empty, or has another shape, when adapters come and go. */
static int find_weight(struct model_object *self, PyObject *name_object)
{
    const char *name = PyUnicode_AsUTF8AndSize(name_object, NULL);
    if (!name)
        return -1;
    const int i = glm_model_find(self->m, name);
    if (i < 0)
        PyErr_Format(PyExc_ValueError, "name: this model has no weight '%s'", name);
    return i;
}

/* Its number, and the model is taken then; -1 with an exception set, and it is not. */
static int take_weight(struct model_object *self, PyObject *name, struct glm_weight_info *info)
{
    if (glm_take(self) < 0)
        return -1;
    const int i = find_weight(self, name);
    if (i >= 0)
        glm_model_weight(self->m, i, info);
    else
        glm_give(self);
    return i;
}

/* -1 with an exception set; info is what was so a moment ago */
static int look_up(struct model_object *self, PyObject *name, struct glm_weight_info *info)
{
    const int i = take_weight(self, name, info);
    if (i >= 0)
        glm_give(self);
    return i;
}

/* The weights of a tuple of names, of a model that is taken then; NULL with an exception set, and it
 * is not. PyMem_Free */
static int *take_and_find(struct model_object *self, PyObject *names)
{
    const Py_ssize_t n = PyTuple_Size(names);
    int *weights = PyMem_Calloc((size_t)n + 1, sizeof *weights);
    if (!weights)
        PyErr_Format(PyExc_MemoryError, "names: %zd weights: %zu bytes could not be taken", n,
                     (size_t)n * sizeof *weights);
    if (!weights || glm_take(self) < 0)
        goto failed;
    for (Py_ssize_t i = 0; i < n; i++)
        if ((weights[i] = find_weight(self, PyTuple_GetItem(names, i))) < 0) {
            glm_give(self);
            goto failed;
        }
    return weights;
failed:
    PyMem_Free(weights);
    return NULL;
}

static PyObject *shape_tuple(const struct glm_weight_info *info)
{
    return info->rank == 1 ? Py_BuildValue("(i)", info->rows)
                           : Py_BuildValue("(ii)", info->rows, info->cols);
}

PyObject *glm_py_shapes(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *dict = PyDict_New();
    struct glm_weight_info info;
    if (!dict || glm_take(self) < 0) {
        Py_XDECREF(dict);
        return NULL;
    }
    for (int i = 0, more; dict && (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        if (more < 0 || info.kind != GLM_BASE)
            continue;
        PyObject *shape = shape_tuple(&info);
        if (!shape || PyDict_SetItemString(dict, info.name, shape) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(shape);
    }
    glm_give(self);
    return dict;
}

/* Names of the weights that are there, or of those among them that are not bound yet. */
static PyObject *names_of(struct model_object *self, int only_missing)
{
    PyObject *list = PyList_New(0);
    struct glm_weight_info info;
    if (!list || glm_take(self) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    for (int i = 0, more; list && (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        if (more < 0 || (only_missing && info.bound))
            continue;
        PyObject *name = PyUnicode_FromString(info.name);
        if (!name || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    glm_give(self);
    return list;
}

PyObject *glm_py_missing(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    return names_of(self, 1);
}

PyObject *glm_py_names(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    return names_of(self, 0);
}

PyObject *glm_py_shape(struct model_object *self, PyObject *name)
{
    struct glm_weight_info info;
    return look_up(self, name, &info) < 0 ? NULL : shape_tuple(&info);
}

PyObject *glm_py_dtype(struct model_object *self, PyObject *name)
{
    struct glm_weight_info info;
    return look_up(self, name, &info) < 0 ? NULL : PyUnicode_FromString(glm_dtype_name(info.dtype));
}

static glm_status check_array(PyObject *array, struct glm_error *err)
{
    struct glm_mapped *file = array ? glm_mapped_find(PyArray_DATA((PyArrayObject *)array)) : NULL;
    return file ? glm_mapped_check(file, err) : GLM_OK;
}

/* The core uses the arrays in place, so what holds them comes first: no failure leaves it without.
 * Those used before go last, since that may run code of the caller. */
static int bind_and_keep(struct model_object *self, const char *name, const struct glm_mat *mat,
                         int rank, PyObject *array, PyObject *scale)
{
    struct glm_error err;
    int done = -1;
    PyObject *key = PyUnicode_FromString(name); /* of a subclass might compare as it likes */
    PyObject *pair = key ? PyTuple_Pack(2, array, scale ? scale : Py_None) : NULL;
    const int claimed = pair ? glm_take_all(self) : -1;
    PyObject *before = claimed < 0 ? NULL : PyDict_GetItemWithError(self->arrays, key);
    Py_XINCREF(before);
    if (claimed >= 0 && !PyErr_Occurred() && PyDict_SetItem(self->arrays, key, pair) == 0) {
        struct glm_backend *be = glm_model_backend(self->m);
        const int device_before = be->enter ? be->enter(be) : -1;
        glm_guard_begin(); /* vectors are copied, and all that a device gets */
        const glm_status status = glm_model_bind(self->m, name, mat, rank, &err);
        glm_guard_end();
        if (be->leave)
            be->leave(be, device_before);
        glm_forget_files(self);
        done = glm_check(be, status, &err);
        if (done == 0 &&
            (check_array(array, &err) != GLM_OK || check_array(scale, &err) != GLM_OK)) {
            glm_lose(self, &err); /* what was copied may be zeros */
            glm_raise(GLM_EFILE, &err);
            done = -1;
        } else if (done < 0) { /* in a place that is there: nothing is allocated */
            PyObject *type, *value, *trace;
            PyErr_Fetch(&type, &value, &trace);
            if (before)
                PyDict_SetItem(self->arrays, key, before);
            else
                PyDict_DelItem(self->arrays, key);
            PyErr_Restore(type, value, trace);
        }
    }
    if (claimed >= 0)
        glm_give_all(self, claimed);
    Py_XDECREF(before);
    Py_XDECREF(pair);
    Py_XDECREF(key);
    return done;
}

PyObject *glm_py_bind(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "array", "dtype", "scale", "group", NULL};
    PyObject *name_object, *object, *scale_object = Py_None;
    const char *dtype_name;
    struct glm_mat mat = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UOs|Oi", names, &name_object, &object,
                                     &dtype_name, &scale_object, &mat.group) ||
        !glm_there(self) || glm_dtype_from_name(dtype_name, &mat.dtype) < 0)
        return NULL;
    const char *name = PyUnicode_AsUTF8AndSize(name_object, NULL);
    if (!name)
        return NULL;
    PyArrayObject *a = glm_array_arg(object, name, glm_dtype_numpy(mat.dtype), -1), *scale = NULL;
    if (!a || glm_dims_of(a, name, &mat.rows, &mat.cols) < 0)
        goto failed;
    if (glm_check_array(a) < 0)
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
    if (bind_and_keep(self, name, &mat, PyArray_NDIM(a), (PyObject *)a, (PyObject *)scale) < 0)
        goto failed;
    Py_DECREF(a);
    Py_XDECREF(scale);
    Py_RETURN_NONE;
failed:
    Py_XDECREF(a);
    Py_XDECREF(scale);
    return NULL;
}

/* move(backend, left): left, names of weights that the caller binds anew */
PyObject *glm_py_move(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"backend", "left", NULL};
    struct run run;
    const char *backend;
    PyObject *left, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO", names, &backend, &left) ||
        !glm_there(self))
        return NULL;
    struct glm_backend *to = glm_module_backend(self->state, backend);
    PyObject *list = to ? glm_tuple_arg(left, "left: expected names of weights") : NULL;
    PyObject *arrays = list ? PyDict_New() : NULL;
    int *weights = arrays ? take_and_find(self, list) : NULL;
    if (weights && glm_run_begin_taken(&run, self, 0) == 0) {
        const int n = (int)PyTuple_Size(list), moves = to != run.be;
        run.blame = to;
        if (glm_run_end_taken(&run, glm_model_move(self->m, to, weights, n, &run.err)) == 0) {
            glm_forget_files(self);
            if (moves) { /* what was not left lies there now, in memory of the core */
                PyObject *before = self->arrays;
                self->arrays = arrays;
                arrays = before;
            }
            result = Py_NewRef(Py_None);
        }
        glm_give(self);
    }
    PyMem_Free(weights);
    Py_XDECREF(arrays); /* may run code of the caller */
    Py_XDECREF(list);
    return result;
}

PyObject *glm_py_add_lora(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"module", "A", "B", "scale", "dropout", "B_bias", "magnitude", NULL};
    const char *module;
    enum { A, B, B_BIAS, MAGNITUDE, ARRAYS };
    PyObject *objects[ARRAYS] = {NULL, NULL, Py_None, Py_None};
    PyArrayObject *arrays[ARRAYS] = {NULL};
    struct glm_lora lora;
    struct glm_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOOdd|OO", names, &module, &objects[A],
                                     &objects[B], &lora.scale, &lora.dropout, &objects[B_BIAS],
                                     &objects[MAGNITUDE]) ||
        !glm_there(self))
        return NULL;
    int done = 0, claimed = -1, good = 1;
    for (int i = 0; i < ARRAYS && good; i++) {
        const char *name = names[i < B_BIAS ? i + 1 : i + 3];
        if (objects[i] == Py_None && i >= B_BIAS)
            continue;
        arrays[i] = glm_real_arg(objects[i], name, glm_real_type(self), i < B_BIAS ? 2 : 1);
        good = arrays[i] != NULL;
        if (good && i >= B_BIAS && PyArray_DIM(arrays[i], 0) != PyArray_DIM(arrays[B], 0)) {
            PyErr_Format(PyExc_ValueError, "%s: %s: expected (%zd,) as B has rows, got (%zd,)",
                         module, name, (Py_ssize_t)PyArray_DIM(arrays[B], 0),
                         (Py_ssize_t)PyArray_DIM(arrays[i], 0));
            good = 0;
        }
    }
    if (good && glm_dims_of(arrays[A], "A", &lora.A_rows, &lora.A_cols) == 0 &&
        glm_dims_of(arrays[B], "B", &lora.B_rows, &lora.B_cols) == 0)
        claimed = glm_take_all(self); /* not before: a conversion may run code of the caller */
    if (claimed >= 0) {
        lora.A = PyArray_DATA(arrays[A]);
        lora.B = PyArray_DATA(arrays[B]);
        lora.B_bias = arrays[B_BIAS] ? PyArray_DATA(arrays[B_BIAS]) : NULL;
        lora.magnitude = arrays[MAGNITUDE] ? PyArray_DATA(arrays[MAGNITUDE]) : NULL;
        done = glm_check(glm_model_backend(self->m),
                         glm_model_add_lora(self->m, module, &lora, &err), &err) == 0;
        glm_give_all(self, claimed);
    }
    for (int i = 0; i < ARRAYS; i++)
        Py_XDECREF(arrays[i]);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *glm_py_remove_lora(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const int claimed = glm_take_all(self);
    if (claimed < 0)
        return NULL;
    glm_model_remove_lora(self->m);
    glm_give_all(self, claimed);
    Py_RETURN_NONE;
}

PyObject *glm_py_enable_lora(struct model_object *self, PyObject *arg)
{
    const int on = PyObject_IsTrue(arg);
    if (on < 0 || glm_take(self) < 0)
        return NULL;
    glm_model_enable_lora(self->m, on);
    glm_give(self);
    Py_RETURN_NONE;
}

PyObject *glm_py_merge_lora(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    struct run run;
    if (glm_run_begin(&run, self, GLM_READS | GLM_WHOLE) < 0)
        return NULL;
    const int done = glm_run_end_taken(&run, glm_model_merge_lora(self->m, &run.err));
    glm_forget_files(self);
    glm_give(self);
    if (done < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *glm_py_set_prefix(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"arrays", "dropout", NULL};
    PyObject *dict;
    double dropout;
    struct glm_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!d", names, &PyDict_Type, &dict, &dropout) ||
        !glm_there(self))
        return NULL;
    const struct glm_arch *arch = glm_model_arch(self->m);
    const int H = arch->hidden, KV = 2 * arch->layers * arch->kv_heads * arch->head_dim;
    PyArrayObject *a[GLM_PREFIX_WEIGHTS] = {NULL};
    const void *data[GLM_PREFIX_WEIGHTS] = {NULL};
    PyObject *result = NULL;
    Py_ssize_t used = 0;
    dict = PyDict_Copy(dict); /* a conversion may run code that changes the caller's */
    if (!dict)
        return NULL;
    const int projection = glm_dict_get(dict, glm_model_prefix_name(self->m, 1)) != NULL;
    const int width = projection ? arch->prefix_input : KV;
    const npy_intp shapes[GLM_PREFIX_WEIGHTS][2] = {
        {-1, width}, {H, width}, {H, 0}, {KV, H}, {KV, 0}};
    if (PyErr_Occurred())
        goto done;
    for (int i = 0; i < GLM_PREFIX_WEIGHTS; i++) {
        const char *key = glm_model_prefix_name(self->m, i);
        PyObject *value = glm_dict_get(dict, key);
        if (!value && PyErr_Occurred())
            goto done;
        if (!value)
            continue;
        used++;
        const int rank = shapes[i][1] ? 2 : 1;
        if (!(a[i] = glm_real_arg(value, key, glm_real_type(self), rank)))
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
        data[i] = PyArray_DATA(a[i]);
    }
    if (!a[0] || used != PyDict_Size(dict)) {
        PyErr_Format(PyExc_ValueError,
                     "prefix: expected %s and, with projection, .trans.0.weight, .trans.0.bias, "
                     ".trans.2.weight, .trans.2.bias",
                     glm_model_prefix_name(self->m, 0));
        goto done;
    }
    const int claimed = glm_take_all(self);
    if (claimed < 0)
        goto done;
    glm_status status = glm_model_set_prefix(self->m, (int)PyArray_DIM(a[0], 0), data[0], data[1],
                                             data[2], data[3], data[4], dropout, &err);
    if (glm_check(glm_model_backend(self->m), status, &err) == 0)
        result = Py_NewRef(Py_None);
    glm_give_all(self, claimed);
done:
    for (int i = 0; i < GLM_PREFIX_WEIGHTS; i++)
        Py_XDECREF(a[i]);
    Py_DECREF(dict);
    return result;
}

PyObject *glm_py_remove_prefix(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const int claimed = glm_take_all(self);
    if (claimed < 0)
        return NULL;
    glm_model_remove_prefix(self->m);
    glm_give_all(self, claimed);
    Py_RETURN_NONE;
}

PyObject *glm_py_prefix_kv(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    struct run run;
    if (glm_take(self) < 0)
        return NULL;
    const struct glm_arch *arch = glm_model_arch(self->m);
    npy_intp dims[3] = {2 * arch->layers, glm_model_prefix_length(self->m),
                        arch->kv_heads * arch->head_dim};
    PyObject *out = PyArray_SimpleNew(3, dims, glm_real_type(self));
    if (!out) {
        glm_give(self);
        return NULL;
    }
    if (glm_run_begin_taken(&run, self, 0) < 0 ||
        glm_run_end(&run,
                    glm_model_prefix_kv(self->m, PyArray_DATA((PyArrayObject *)out), &run.err)) < 0)
        Py_CLEAR(out);
    return out;
}

PyObject *glm_py_set_trainable(struct model_object *self, PyObject *arg)
{
    struct run run;
    PyObject *list = glm_tuple_arg(arg, "names: expected a sequence of weight names");
    int *weights = list ? take_and_find(self, list) : NULL;
    PyObject *result = NULL;
    if (weights && glm_run_begin_taken(&run, self, GLM_READS) == 0) {
        const int n = (int)PyTuple_Size(list);
        const glm_status status = glm_model_set_trainable(self->m, weights, n, &run.err);
        if (glm_run_end_taken(&run, status) == 0)
            result = Py_NewRef(Py_None);
        glm_forget_files(self);
        glm_give(self);
    }
    PyMem_Free(weights);
    Py_XDECREF(list);
    return result;
}

PyObject *glm_py_trainable(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const int *weights;
    if (glm_take(self) < 0)
        return NULL;
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
        PyList_SetItem(list, i, name);
    }
    glm_give(self);
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

PyObject *glm_py_read(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "what", NULL};
    struct run run;
    PyObject *name;
    const char *what = "value";
    enum glm_part part;
    struct glm_weight_info info;
    int i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "U|s", names, &name, &what) ||
        part_from_name(what, &part) < 0 || (i = take_weight(self, name, &info)) < 0)
        return NULL;
    npy_intp dims[2] = {info.rows, info.cols};
    PyObject *out = PyArray_SimpleNew(info.rank, dims, glm_real_type(self));
    if (!out) {
        glm_give(self);
        return NULL;
    }
    const int lies_there = info.kind == GLM_BASE && (self->lost || glm_mapped_find(info.data));
    if (glm_run_begin_taken(&run, self, lies_there ? GLM_READS : 0) < 0 ||
        glm_run_end(&run, glm_model_read(self->m, i, part, PyArray_DATA((PyArrayObject *)out),
                                         &run.err)) < 0)
        Py_CLEAR(out);
    return out;
}

PyObject *glm_py_write(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "array", "what", NULL};
    struct run run;
    PyObject *name, *object;
    const char *what = "value";
    enum glm_part part;
    struct glm_weight_info info;
    int i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UO|s", names, &name, &object, &what) ||
        part_from_name(what, &part) < 0 || look_up(self, name, &info) < 0)
        return NULL;
    PyArrayObject *a =
        glm_real_arg(object, PyUnicode_AsUTF8AndSize(name, NULL), glm_real_type(self), info.rank);
    int rows, cols, done = 0;
    /* looked up again, since a conversion may run code of the caller */
    if (a && glm_dims_of(a, PyUnicode_AsUTF8AndSize(name, NULL), &rows, &cols) == 0 &&
        (i = take_weight(self, name, &info)) >= 0) {
        if (rows == info.rows && cols == info.cols) {
            done = glm_run_begin_taken(&run, self, GLM_WHOLE) == 0 &&
                   glm_run_end(&run,
                               glm_model_write(self->m, i, part, PyArray_DATA(a), &run.err)) == 0;
        } else {
            glm_give(self);
            PyErr_Format(PyExc_ValueError, "%U: expected shape (%d, %d), got (%d, %d)", name,
                         info.rows, info.cols, rows, cols);
        }
    }
    Py_XDECREF(a);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}
