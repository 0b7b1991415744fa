/* Scores to tokens, on NumPy arrays. */
#include "convert.h" /* Python.h before any header of the system */

#include <stdlib.h>
#include <string.h>

#include "choice.h"

static PyArrayObject *scores_arg(PyObject *object)
{
    PyArrayObject *a = glm_array_arg(object, "logits", NPY_FLOAT32, 1);
    if (a && PyArray_SIZE(a) < 1) {
        PyErr_SetString(PyExc_ValueError, "logits: expected at least one score");
        Py_CLEAR(a);
    }
    return a;
}

PyObject *glm_py_adjust_logits(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits",   "context", "repetition_penalty", "no_repeat_ngram_size",
                            "suppress", NULL};
    PyObject *logits_object, *context_object, *suppress_object = NULL;
    double penalty = 1;
    int ngram = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|diO", names, &logits_object, &context_object,
                                     &penalty, &ngram, &suppress_object))
        return NULL;
    if (!(penalty > 0))
        return PyErr_Format(PyExc_ValueError,
                            "repetition_penalty: expected a positive number, got %S",
                            PyTuple_Size(args) > 2 ? PyTuple_GetItem(args, 2) : Py_None);
    PyArrayObject *logits = scores_arg(logits_object), *suppress = NULL, *context = NULL;
    PyObject *result = NULL;
    unsigned char *seen = NULL;
    int32_t *ids = NULL;
    if (!logits)
        return NULL;
    if (!PyArray_ISWRITEABLE(logits)) {
        PyErr_SetString(PyExc_ValueError, "logits: the array is read-only");
        goto done;
    }
    context = glm_array_arg(context_object, "context", NPY_INT32, 1);
    if (!context)
        goto done;
    if (suppress_object) {
        suppress = glm_array_arg(suppress_object, "suppress", NPY_INT32, 1);
        if (!suppress)
            goto done;
    }
    const int n = (int)PyArray_SIZE(logits), n_context = (int)PyArray_SIZE(context);
    const int n_suppress = suppress ? (int)PyArray_SIZE(suppress) : 0;
    int penalised, banned;
    seen = malloc((size_t)n);
    ids = malloc((2 * (size_t)n_context + (size_t)n_suppress + 1) * sizeof *ids);
    if (!seen || !ids) {
        PyErr_Format(PyExc_MemoryError, "adjust_logits: %d bytes could not be taken", n);
        goto done;
    }
    glm_touched_ids(ids, &penalised, &banned, n, PyArray_DATA(context), n_context, penalty, ngram,
                    suppress ? PyArray_DATA(suppress) : NULL, n_suppress, seen);
    glm_adjust_logits(PyArray_DATA(logits), ids, penalised, banned, (float)penalty);
    result = Py_NewRef(Py_None);
done:
    free(seen);
    free(ids);
    Py_XDECREF(logits);
    Py_XDECREF(context);
    Py_XDECREF(suppress);
    return result;
}

static int check_warp(double temperature, int top_k, double top_p)
{
    PyObject *value = NULL;
    if (!(temperature >= 0)) {
        value = PyFloat_FromDouble(temperature);
        PyErr_Format(PyExc_ValueError,
                     "temperature: expected 0 (greedy) or a positive number, got %S", value);
    } else if (top_k < 0) {
        PyErr_Format(PyExc_ValueError, "top_k: expected 0 (off) or a positive number, got %d",
                     top_k);
    } else if (!(top_p >= 0 && top_p <= 1)) {
        value = PyFloat_FromDouble(top_p);
        PyErr_Format(PyExc_ValueError, "top_p: expected 0 to 1, got %S", value);
    } else {
        return 0;
    }
    Py_XDECREF(value);
    return -1;
}

PyObject *glm_py_warp_logits(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "min_keep", NULL};
    PyObject *logits_object;
    double temperature, top_p;
    int top_k, min_keep = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Odid|i", names, &logits_object, &temperature,
                                     &top_k, &top_p, &min_keep) ||
        check_warp(temperature, top_k, top_p) < 0)
        return NULL;
    if (temperature == 0) {
        PyErr_SetString(PyExc_ValueError, "temperature: 0 is greedy and has no distribution");
        return NULL;
    }
    PyArrayObject *logits = scores_arg(logits_object);
    if (!logits)
        return NULL;
    PyObject *probs = PyArray_SimpleNew(1, PyArray_DIMS(logits), NPY_FLOAT32);
    const size_t n = (size_t)PyArray_SIZE(logits);
    struct glm_scored *scratch = malloc(n * sizeof *scratch);
    if (probs && scratch)
        glm_warp_logits(PyArray_DATA((PyArrayObject *)probs), PyArray_DATA(logits), (int)n,
                        temperature, top_k, top_p, min_keep < 1 ? 1 : min_keep, scratch);
    else if (!scratch) {
        Py_CLEAR(probs);
        PyErr_Format(PyExc_MemoryError, "warp_logits: %zu bytes could not be taken",
                     n * sizeof *scratch);
    }
    free(scratch);
    Py_DECREF(logits);
    return probs;
}

PyObject *glm_py_sample(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p",
                            "seed",   "stream",      "index", NULL};
    PyObject *logits_object;
    double temperature, top_p;
    int top_k;
    unsigned long long seed;
    unsigned long stream, index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OdidKkk", names, &logits_object, &temperature,
                                     &top_k, &top_p, &seed, &stream, &index) ||
        check_warp(temperature, top_k, top_p) < 0)
        return NULL;
    PyArrayObject *logits = scores_arg(logits_object);
    if (!logits)
        return NULL;
    const int n = (int)PyArray_SIZE(logits);
    int id = -1;
    if (temperature == 0) {
        id = glm_argmax(PyArray_DATA(logits), n);
    } else {
        float *probs = malloc((size_t)n * sizeof *probs);
        struct glm_scored *scratch = malloc((size_t)n * sizeof *scratch);
        if (probs && scratch) {
            glm_warp_logits(probs, PyArray_DATA(logits), n, temperature, top_k, top_p, 1, scratch);
            id = glm_draw(probs, n, seed, (uint32_t)stream, (uint32_t)index);
        }
        free(probs);
        free(scratch);
    }
    Py_DECREF(logits);
    return id < 0 ? PyErr_Format(PyExc_MemoryError, "sample: %zu bytes could not be taken",
                                 (size_t)n * (sizeof(float) + sizeof(struct glm_scored)))
                  : PyLong_FromLong(id);
}
