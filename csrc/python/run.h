/* Computing on a model without the GIL, one computation at a time, and a batch's arguments: what
 * the methods of Model and Cache share. */
#ifndef GLM_RUN_H
#define GLM_RUN_H

#include "convert.h"
#include "mapped.h"

#include <stdatomic.h>

struct model_object {
    PyObject ob_base; /* PyObject_HEAD */
    struct glm_model *m;
    struct module_state *state;
    PyObject *module;          /* keeps state alive */
    PyObject *arrays;          /* dict: weight name -> array in use by the core */
    atomic_int busy;           /* computing, or taken */
    struct glm_mapped **files; /* that weights lie in */
    int n_files;               /* -1: to be looked up again */
    char *lost;                /* why its weights can be trusted no more, else NULL */
};

/* One computation. Between begin and end there is no GIL, so only the core may be called:
 *
 *     if (glm_run_begin(&run, self, how) < 0 || glm_run_end(&run, glm_model_..(.., &run.err)) < 0)
 *         return NULL;
 */
struct run {
    struct model_object *self;
    PyThreadState *thread;
    struct glm_backend *be;    /* that polls for signals */
    struct glm_backend *blame; /* whose device's error a failure is; begin sets it to be */
    struct glm_error err;
    int before; /* be->leave's */
    int reads;  /* weights, which may lie in mapped files */
};

/* how: base weights are read: OSError, now or at the end, if a file that they lie in is not as it
 * was; weights are changed in place: signals are heard when it has ended */
enum { GLM_READS = 1, GLM_WHOLE = 2 };
/* -1 with an exception set, and then nothing is to be ended. */
int glm_run_begin(struct run *run, struct model_object *self, int how);
/* The same of a model that this thread has taken, which it has no more afterwards. */
int glm_run_begin_taken(struct run *run, struct model_object *self, int how);
/* 0, or -1 with the exception of the status set. */
int glm_run_end(struct run *run, glm_status status);
/* The same, and this thread has taken the model, whatever it returns. */
int glm_run_end_taken(struct run *run, glm_status status);

/* 0, with RuntimeError set, where the garbage collector has taken the model apart already. */
int glm_there(const struct model_object *self);

/* The model for this thread alone, for a moment without a computation: to look at its tables or to
 * change them. -1 with RuntimeError set where it is not there or while another thread computes on it;
 * for others that have taken it the call waits. */
int glm_take(struct model_object *self);
void glm_give(struct model_object *self);
/* The same where its backend is called; what it returns, unless -1, goes to give_all. */
int glm_take_all(struct model_object *self);
void glm_give_all(struct model_object *self, int claimed);

/* A backend is for one thread at a time; only the cpu's may be called while a model computes in
 * another one. What claim returns goes to release. */
int glm_claim(struct glm_backend *be);
void glm_release(int claimed);

/* From now on the model's weights are refused with this error: a file changed as it was read. */
void glm_lose(struct model_object *self, const struct glm_error *err);
/* Weights may lie elsewhere from now on. */
void glm_forget_files(struct model_object *self);

/* NumPy type number of what the model computes in */
int glm_real_type(const struct model_object *self);

/* The index arrays of a batch, converted and counted; free with glm_drop_batch. */
struct batch_args {
    PyArrayObject *ids, *lengths, *positions, *rows, *targets, *numbers;
    struct glm_input in;
};

int glm_batch_args(struct batch_args *b, PyObject *ids, PyObject *lengths, PyObject *positions,
                   PyObject *rows, PyObject *targets);
/* And which rows of the update they are: `numbers`, which may be NULL or None. 0, or -1 with an
 * exception set and all freed. */
int glm_number_args(struct batch_args *b, PyObject *numbers);
void glm_drop_batch(struct batch_args *b);

/* Methods of Model that are not in model_type.c, which has the table. */
typedef PyObject *glm_method(struct model_object *self, PyObject *arg);
typedef PyObject *glm_keywords_method(struct model_object *self, PyObject *args, PyObject *kwargs);

/* model_weights.c */
glm_method glm_py_shapes, glm_py_missing, glm_py_names, glm_py_shape, glm_py_dtype;
glm_method glm_py_remove_lora, glm_py_enable_lora, glm_py_keep_lora, glm_py_merge_lora;
glm_method glm_py_remove_prefix, glm_py_prefix_kv, glm_py_set_trainable, glm_py_trainable;
glm_keywords_method glm_py_bind, glm_py_move, glm_py_add_lora, glm_py_set_prefix;
glm_keywords_method glm_py_read, glm_py_write, glm_py_read_gradients, glm_py_write_gradients;

/* cache_type.c */
glm_keywords_method glm_py_cache, glm_py_extend, glm_py_next, glm_py_go_on;
glm_keywords_method glm_py_extend_shared;

#endif
