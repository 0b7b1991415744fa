/* Type Model: made from numbers and names, run, and its table of methods; no arithmetic. */
#include "run.h"

#include <stdlib.h>
#include <string.h>

static int arch_int(PyObject *arch, const char *key, int *out)
{
    PyObject *value = glm_dict_get(arch, key);
    if (!value) {
        if (!PyErr_Occurred())
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
    PyObject *value = glm_dict_get(arch, key);
    if (!value) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "arch: key '%s' is missing", key);
        return -1;
    }
    *out = PyFloat_AsDouble(value);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}

static int read_arch(PyObject *dict, struct glm_arch *a)
{
    const struct {
        const char *key;
        int *out;
    } ints[] = {
        {"layers", &a->layers},
        {"hidden", &a->hidden},
        {"ffn", &a->ffn},
        {"heads", &a->heads},
        {"kv_heads", &a->kv_heads},
        {"head_dim", &a->head_dim},
        {"vocab", &a->vocab},
        {"max_positions", &a->max_positions},
        {"rotary_dim", &a->rotary_dim},
        {"qkv_bias", &a->qkv_bias},
        {"half_rope_table", &a->half_rope_table},
        {"split_qkv", &a->split_qkv},
        {"branch_norms", &a->branch_norms},
        {"tied_head", &a->tied_head},
        {"linear_bias", &a->linear_bias},
        {"layer_norm", &a->layer_norm},
        {"gelu", &a->gelu},
        {"qkv_by_head", &a->qkv_by_head},
        {"half_rope_frequencies", &a->half_rope_frequencies},
        {"prefix_input", &a->prefix_input},
        {"rope_2d", &a->rope_2d},
        {"sop", &a->sop},
        {"gmask", &a->gmask},
        {"mask", &a->mask},
        {"sop_in_place", &a->sop_in_place},
    };
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        if (arch_int(dict, ints[i].key, ints[i].out) < 0)
            return -1;
    if (arch_double(dict, "eps", &a->eps) < 0 ||
        arch_double(dict, "rope_base", &a->rope_base) < 0 ||
        arch_double(dict, "rope_divisor", &a->rope_divisor) < 0 ||
        arch_double(dict, "residual_scale", &a->residual_scale) < 0)
        return -1;
    return 0;
}

/* A text of the dict, as long as that lives. */
static int name_text(PyObject *names, const char *key, const char **out)
{
    PyObject *value = glm_dict_get(names, key);
    Py_ssize_t length;
    if (!value) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "names: key '%s' is missing", key);
        return -1;
    }
    if (!PyUnicode_Check(value)) {
        PyObject *type = glm_type_name(value);
        if (type)
            PyErr_Format(PyExc_TypeError, "names: %s: expected a str, got %U", key, type);
        Py_XDECREF(type);
        return -1;
    }
    *out = PyUnicode_AsUTF8AndSize(value, &length);
    if (*out && strlen(*out) != (size_t)length) {
        PyErr_Format(PyExc_ValueError, "names: %s: has a null character", key);
        return -1;
    }
    return *out ? 0 : -1;
}

static int read_names(PyObject *dict, struct glm_names *n)
{
    const struct {
        const char *key, **out;
    } texts[] = {
        {"word_embeddings", &n->word_embeddings},
        {"final_layernorm", &n->final_layernorm},
        {"output_layer", &n->output_layer},
        {"layer", &n->layer},
        {"input_layernorm", &n->input_layernorm},
        {"post_attention_layernorm", &n->post_attention_layernorm},
        {"dense", &n->dense},
        {"dense_h_to_4h", &n->dense_h_to_4h},
        {"dense_4h_to_h", &n->dense_4h_to_h},
        {"prefix_encoder", &n->prefix_encoder},
    };
    const struct {
        const char *key, **out;
    } some[] = {
        /* which of them are there the core checks */
        {"query_key_value", &n->query_key_value},
        {"query", &n->query},
        {"key", &n->key},
        {"value", &n->value},
        {"post_self_attn_layernorm", &n->post_self_attn_layernorm},
        {"post_mlp_layernorm", &n->post_mlp_layernorm},
    };
    Py_ssize_t count = sizeof texts / sizeof texts[0];
    for (Py_ssize_t i = 0; i < count; i++)
        if (name_text(dict, texts[i].key, texts[i].out) < 0)
            return -1;
    for (size_t i = 0; i < sizeof some / sizeof some[0]; i++) {
        if (!glm_dict_get(dict, some[i].key)) {
            if (PyErr_Occurred())
                return -1;
            continue;
        }
        if (name_text(dict, some[i].key, some[i].out) < 0)
            return -1;
        count++;
    }
    if (PyDict_Size(dict) == count)
        return 0;
    PyErr_Format(PyExc_ValueError, "names: expected %zd keys, got %zd: %R", count,
                 PyDict_Size(dict), dict);
    return -1;
}

static PyObject *model_of(PyTypeObject *type, PyObject *module, const struct glm_arch *arch,
                          const struct glm_names *names, const char *backend)
{
    struct glm_error err;
    struct module_state *state = PyModule_GetState(module);
    struct glm_backend *be = glm_module_backend(state, backend);
    if (!be)
        return NULL;
    struct model_object *self = (struct model_object *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->state = state;
    self->module = Py_NewRef(module);
    self->arrays = PyDict_New();
    self->n_files = -1;
    int done = -1;
    if (self->arrays) {
        const int claimed = glm_claim(be);
        done = glm_check(be, glm_model_create(&self->m, arch, names, be, &err), &err);
        glm_release(claimed);
    }
    if (done < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"arch", "backend", "names", NULL};
    PyObject *arch_dict, *names_dict = NULL;
    const char *backend = "cpu";
    struct glm_arch arch = {0};
    struct glm_names names = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|s$O!", keywords, &PyDict_Type, &arch_dict,
                                     &backend, &PyDict_Type, &names_dict))
        return NULL;
    if (!names_dict) {
        PyErr_SetString(PyExc_TypeError, "Model() needs the keyword argument names");
        return NULL;
    }
    PyObject *module = PyType_GetModule(type);
    /* converting one value may run code that changes the caller's dicts */
    arch_dict = module ? PyDict_Copy(arch_dict) : NULL;
    names_dict = arch_dict ? PyDict_Copy(names_dict) : NULL;
    PyObject *self = NULL;
    if (names_dict && read_arch(arch_dict, &arch) == 0 && read_names(names_dict, &names) == 0)
        self = model_of(type, module, &arch, &names, backend);
    Py_XDECREF(arch_dict);
    Py_XDECREF(names_dict);
    return self;
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
    if (self->m) {
        const int claimed = glm_claim(glm_model_backend(self->m));
        glm_model_free(self->m);
        glm_release(claimed);
        self->m = NULL;
    }
    glm_forget_files(self);
    free(self->lost);
    self->lost = NULL;
    Py_CLEAR(self->arrays);
    Py_CLEAR(self->module);
    return 0;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    model_clear(object);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

static PyObject *model_plan(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_tokens", "n_segments", "n_rows", "training", "budget", NULL};
    struct run run;
    int N, S, M, training;
    Py_ssize_t budget = 0;
    struct glm_plan p;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiip|n", names, &N, &S, &M, &training, &budget))
        return NULL;
    if (glm_run_begin(&run, self, 0) < 0 ||
        glm_run_end(&run,
                    glm_model_plan(self->m, N, S, M, training, (size_t)budget, &p, &run.err)) < 0)
        return NULL;
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:n,s:n,s:i}", "weights", (Py_ssize_t)p.weights, "owned",
                         (Py_ssize_t)p.owned, "trainable", (Py_ssize_t)p.trainable, "activations",
                         (Py_ssize_t)p.activations, "held", (Py_ssize_t)p.held, "total",
                         (Py_ssize_t)p.total, "kept_layers", p.kept_layers);
}

static PyObject *model_counts(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    static const char *const names[] = {
#define OP(op, extent, ...) #op,
#include "ops.h"
    };
    struct glm_counts c;
    const int claimed = glm_take_all(self);
    if (claimed < 0)
        return NULL;
    struct glm_backend *be = glm_model_backend(self->m);
    if (be->take_counts)
        be->take_counts(be, &c);
    glm_give_all(self, claimed);
    if (!be->take_counts) {
        PyErr_Format(PyExc_ValueError,
                     "counts: expected a model on the backend 'plan' or on a device, got '%s'",
                     be->name);
        return NULL;
    }
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
    struct run run;
    int N, S, M, training;
    Py_ssize_t budget = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiip|n", names, &N, &S, &M, &training, &budget))
        return NULL;
    if (glm_run_begin(&run, self, 0) < 0 ||
        glm_run_end(&run, glm_model_reserve(self->m, N, S, M, training, (size_t)budget, &run.err)) <
            0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *model_forward(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "lengths", "positions", "rows", "hidden_states", NULL};
    struct run run;
    PyObject *ids, *lengths, *positions = NULL, *rows = NULL, *logits = NULL, *hidden = NULL,
                             *result = NULL;
    int want_hidden = 0;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOp", names, &ids, &lengths, &positions,
                                     &rows, &want_hidden) ||
        glm_batch_args(&b, ids, lengths, positions, rows, NULL) < 0)
        return NULL;
    if (want_hidden && b.rows) {
        PyErr_SetString(PyExc_ValueError,
                        "rows: hidden_states are those of all tokens; leave rows out");
        goto done;
    }
    const struct glm_arch *arch = glm_model_arch(self->m);
    npy_intp dims[2] = {b.rows ? b.in.M : b.in.N, arch->vocab};
    npy_intp hidden_dims[3] = {arch->layers + 1, b.in.N, arch->hidden};
    logits = PyArray_SimpleNew(2, dims, glm_real_type(self));
    hidden =
        want_hidden ? PyArray_SimpleNew(3, hidden_dims, glm_real_type(self)) : Py_NewRef(Py_None);
    if (!logits || !hidden)
        goto done;
    if (glm_run_begin(&run, self, GLM_READS) < 0 ||
        glm_run_end(&run,
                    glm_model_forward(self->m, &b.in, PyArray_DATA((PyArrayObject *)logits),
                                      want_hidden ? PyArray_DATA((PyArrayObject *)hidden) : NULL,
                                      &run.err)) < 0)
        goto done;
    result = PyTuple_Pack(2, logits, hidden);
done:
    Py_XDECREF(logits);
    Py_XDECREF(hidden);
    glm_drop_batch(&b);
    return result;
}

static PyObject *model_hidden_states(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "lengths", "layers", NULL};
    struct run run;
    PyObject *ids, *lengths, *layers, *out = NULL;
    PyArrayObject *numbers = NULL;
    const int32_t *of = NULL;
    int n = 0;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &ids, &lengths, &layers) ||
        glm_batch_args(&b, ids, lengths, NULL, NULL, NULL) < 0)
        return NULL;
    if (glm_index_arg(layers, "layers", &numbers, &of, &n) < 0)
        goto done;
    npy_intp dims[3] = {n, b.in.N, glm_model_arch(self->m)->hidden};
    out = PyArray_SimpleNew(3, dims, glm_real_type(self));
    if (out && (glm_run_begin(&run, self, GLM_READS) < 0 ||
                glm_run_end(&run, glm_model_hidden_states(self->m, &b.in, of, n,
                                                          PyArray_DATA((PyArrayObject *)out),
                                                          &run.err)) < 0))
        Py_CLEAR(out);
done:
    Py_XDECREF(numbers);
    glm_drop_batch(&b);
    return out;
}

static PyObject *model_loss(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "lengths", "rows", "targets", "positions", NULL};
    struct run run;
    PyObject *ids, *lengths, *rows, *targets, *positions = NULL;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|O", names, &ids, &lengths, &rows, &targets,
                                     &positions) ||
        glm_batch_args(&b, ids, lengths, positions, rows, targets) < 0)
        return NULL;
    npy_intp dims[1] = {b.in.M};
    PyObject *losses = PyArray_SimpleNew(1, dims, glm_real_type(self));
    if (losses &&
        (glm_run_begin(&run, self, GLM_READS) < 0 ||
         glm_run_end(&run, glm_model_loss(self->m, &b.in, PyArray_DATA((PyArrayObject *)losses),
                                          &run.err)) < 0))
        Py_CLEAR(losses);
    glm_drop_batch(&b);
    return losses;
}

static PyObject *model_backward(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids",          "lengths", "rows",  "targets", "positions",
                            "dropout_seed", "dropout", "noise", "numbers", NULL};
    struct run run;
    PyObject *ids, *lengths, *rows, *targets, *positions = NULL, *numbers = NULL, *result = NULL;
    unsigned long long seed = 0;
    int dropout = 1;
    double loss, noise = 0;
    struct batch_args b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OKpdO", names, &ids, &lengths, &rows,
                                     &targets, &positions, &seed, &dropout, &noise, &numbers) ||
        glm_batch_args(&b, ids, lengths, positions, rows, targets) < 0 ||
        glm_number_args(&b, numbers) < 0)
        return NULL;
    if (glm_run_begin(&run, self, GLM_READS) < 0 ||
        glm_run_end(&run,
                    glm_model_backward(self->m, &b.in, seed, dropout, noise, &loss, &run.err)) < 0)
        goto done;
    result = PyFloat_FromDouble(loss);
done:
    glm_drop_batch(&b);
    return result;
}

static PyObject *model_zero_grad(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    const int claimed = glm_take_all(self);
    if (claimed < 0)
        return NULL;
    glm_model_zero_grad(self->m);
    glm_give_all(self, claimed);
    Py_RETURN_NONE;
}

static PyObject *model_grad_norm(struct model_object *self, PyObject *Py_UNUSED(ignored))
{
    struct run run;
    double norm;
    if (glm_run_begin(&run, self, 0) < 0 ||
        glm_run_end(&run, glm_model_grad_norm(self->m, &norm, &run.err)) < 0)
        return NULL;
    return PyFloat_FromDouble(norm);
}

static PyObject *model_step(struct model_object *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lr",           "beta1",         "beta2",        "eps",
                            "weight_decay", "max_grad_norm", "lora_B_ratio", NULL};
    struct run run;
    struct glm_adamw opt = {.lora_B_ratio = 1};
    double norm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "dddddd|d", names, &opt.lr, &opt.beta1,
                                     &opt.beta2, &opt.eps, &opt.weight_decay, &opt.max_grad_norm,
                                     &opt.lora_B_ratio))
        return NULL;
    if (glm_run_begin(&run, self, GLM_WHOLE) < 0 ||
        glm_run_end(&run, glm_model_step(self->m, &opt, &norm, &run.err)) < 0)
        return NULL;
    return PyFloat_FromDouble(norm);
}

static PyObject *model_get(PyObject *object, void *which)
{
    struct model_object *self = (struct model_object *)object;
    if (!glm_there(self))
        return NULL;
    const struct glm_progress *p = glm_model_progress(self->m);
    switch ((intptr_t)which) {
    case 0:
        return PyUnicode_FromString(glm_model_backend(self->m)->name);
    case 1:
        return PyLong_FromUnsignedLongLong(
            __atomic_load_n(&glm_model_backend(self->m)->allocated, __ATOMIC_RELAXED));
    case 2:
        return PyLong_FromLongLong(p->tokens);
    case 3:
        return PyLong_FromLongLong(p->rows);
    case 4:
        return PyLong_FromLong(p->steps);
    default:
        return PyLong_FromSize_t(glm_model_gradient_size(self->m));
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
    struct model_object *self = (struct model_object *)object;
    if (glm_take(self) < 0)
        return -1;
    glm_model_progress(self->m)->steps = (int)steps;
    glm_give(self);
    return 0;
}

/* Labelled tokens that the gradients are of, rows that have been counted. */
static int model_set_accumulated(PyObject *object, PyObject *value, void *which)
{
    const long long count = value ? PyLong_AsLongLong(value) : -1;
    if (count == -1 && PyErr_Occurred())
        return -1;
    const char *name = (intptr_t)which == 2 ? "accumulated_tokens" : "accumulated_rows";
    if (count < 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected 0 or more, got %lld", name, count);
        return -1;
    }
    struct model_object *self = (struct model_object *)object;
    if (glm_take(self) < 0)
        return -1;
    struct glm_progress *p = glm_model_progress(self->m);
    *((intptr_t)which == 2 ? &p->tokens : &p->rows) = count;
    glm_give(self);
    return 0;
}

#define METHOD(prefix, name, flags, doc) {#name, (PyCFunction)(void *)prefix##name, flags, doc}
#define KEYWORDS (METH_VARARGS | METH_KEYWORDS)

static PyMethodDef model_methods[] = {
    METHOD(glm_py_, shapes, METH_NOARGS, "Every base weight that must be bound, with its shape."),
    METHOD(glm_py_, missing, METH_NOARGS, "Base weights not bound yet."),
    METHOD(glm_py_, names, METH_NOARGS, "All weights present: base, LoRA, prefix."),
    METHOD(glm_py_, shape, METH_O, "Shape of a weight."),
    METHOD(glm_py_, dtype, METH_O, "Number type of a weight: F32, F16, BF16 or F64."),
    METHOD(glm_py_, bind, KEYWORDS, "Use an array in place as a base weight."),
    METHOD(glm_py_, move, KEYWORDS, "To another backend."),
    METHOD(glm_py_, add_lora, KEYWORDS, "Adapt one linear layer."),
    METHOD(glm_py_, remove_lora, METH_NOARGS, "Drop the adapter."),
    METHOD(glm_py_, enable_lora, METH_O, "Whether forward applies the adapter."),
    METHOD(glm_py_, keep_lora, METH_NOARGS,
           "Put the adapter aside under a number, for rows of caches."),
    METHOD(glm_py_, merge_lora, METH_NOARGS,
           "W += scale * B A in the dtype of W, then drop the adapter."),
    METHOD(glm_py_, set_prefix, KEYWORDS, "P-Tuning v2 prefix encoder."),
    METHOD(glm_py_, remove_prefix, METH_NOARGS, "Drop the prefix."),
    METHOD(glm_py_, prefix_kv, METH_NOARGS,
           "Keys and values the prefix encoder yields (2*L, P, KV)."),
    METHOD(glm_py_, set_trainable, METH_O, "Weights to train from now on."),
    METHOD(glm_py_, trainable, METH_NOARGS, "Names of the weights being trained."),
    METHOD(glm_py_, read, KEYWORDS, "A copy of a weight, its gradient or a moment."),
    METHOD(glm_py_, write, KEYWORDS, "Set a trainable weight or a moment."),
    METHOD(model_, plan, KEYWORDS, "Bytes a step would need."),
    METHOD(model_, counts, METH_NOARGS, "What calls on the plan backend cost."),
    METHOD(model_, reserve, KEYWORDS, "Take the memory of a step now."),
    METHOD(model_, forward, KEYWORDS, "Logits, and hidden states."),
    METHOD(model_, hidden_states, KEYWORDS, "Inputs of some layers; no later layer runs."),
    METHOD(model_, loss, KEYWORDS, "Negative log-likelihoods."),
    METHOD(model_, backward, KEYWORDS, "Loss, adding gradients."),
    METHOD(glm_py_, read_gradients, KEYWORDS, "Sums of gradients, into an array."),
    METHOD(glm_py_, write_gradients, KEYWORDS, "Sums of gradients, from an array."),
    METHOD(model_, zero_grad, METH_NOARGS, "Forget accumulated gradients."),
    METHOD(model_, grad_norm, METH_NOARGS, "Global norm of the token-mean gradient."),
    METHOD(model_, step, KEYWORDS, "Clip, AdamW, zero_grad."),
    METHOD(glm_py_, cache, KEYWORDS, "Keys and values for generation."),
    METHOD(glm_py_, extend, KEYWORDS,
           "Append tokens to rows of a cache; logits after the last of each."),
    METHOD(glm_py_, next, KEYWORDS, "Append tokens to rows of a cache; the id chosen after each."),
    METHOD(glm_py_, go_on, KEYWORDS, "The same of a token a row, and of those that were chosen."),
    METHOD(glm_py_, extend_shared, KEYWORDS, "Append tokens to the prefix common to all rows."),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"backend", model_get, NULL, "Name of the backend.", (void *)0},
    {"allocations", model_get, NULL, "Calls of the backend's allocator so far.", (void *)1},
    {"accumulated_tokens", model_get, model_set_accumulated, "Labelled tokens since zero_grad.",
     (void *)2},
    {"accumulated_rows", model_get, model_set_accumulated, "Segments since zero_grad.", (void *)3},
    {"steps", model_get, model_set_steps, "Finished updates.", (void *)4},
    {"gradient_size", model_get, NULL, "How many numbers all gradients are.", (void *)5},
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

PyTypeObject *glm_model_type(PyObject *module)
{
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
}
