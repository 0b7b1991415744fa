/* The GIL, the module's lock and signals around a computation, and a batch's arguments.
 *
 * A computation takes the model's busy flag (a second thread gets a RuntimeError), drops the GIL,
 * and takes the module's lock, since models share one pool of threads. While it runs, the backend
 * polls for signals through poll(). */
#include "run.h"

#include <time.h>
#include <unistd.h>

/* Code that Python runs from within a poll would wait for the lock that its own thread has. */
static _Thread_local int computing_here;

int glm_there(const struct model_object *self)
{
    if (self->m)
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "this model is gone");
    return 0;
}

int glm_idle(const struct model_object *self)
{
    if (!glm_there(self))
        return -1;
    if (!self->busy)
        return 0;
    PyErr_SetString(
        PyExc_RuntimeError,
        "this model is busy in another thread: use one model from one thread at a time");
    return -1;
}

int glm_real_type(const struct model_object *self)
{
    return glm_model_backend(self->m)->real == GLM_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
}

static int poll(void *arg)
{
    struct run *run = arg;
    PyEval_RestoreThread(run->thread);
    const int stop = PyErr_CheckSignals() < 0;
    run->thread = PyEval_SaveThread();
    return stop;
}

int glm_run_begin(struct run *run, struct model_object *self)
{
    struct module_state *state = self->state;
    if (glm_idle(self) < 0)
        return -1;
    if (state->computing_pid != (long)getpid()) {
        pthread_mutex_init(&state->computing, NULL);
        state->computing_pid = (long)getpid();
    }
    if (computing_here) {
        PyErr_SetString(PyExc_RuntimeError,
                        "a model computes in this thread: a signal handler or a destructor that "
                        "runs meanwhile cannot use a model");
        return -1;
    }
    self->busy = 1;
    Py_INCREF(self);
    run->self = self;
    run->be = run->blame = glm_model_backend(self->m);
    run->thread = PyEval_SaveThread();
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
    computing_here = 1;
    run->be->set_poll(run->be, poll, run);
    return 0;
}

int glm_run_end(struct run *run, glm_status status)
{
    status = glm_device_status(run->blame, status, &run->err);
    run->be->set_poll(run->be, NULL, NULL);
    computing_here = 0;
    pthread_mutex_unlock(&run->self->state->computing);
    PyEval_RestoreThread(run->thread);
    run->self->busy = 0;
    Py_DECREF(run->self);
    if (status == GLM_OK)
        return 0;
    glm_raise(status, &run->err);
    return -1;
}

void glm_drop_batch(struct batch_args *b)
{
    Py_XDECREF(b->ids);
    Py_XDECREF(b->lengths);
    Py_XDECREF(b->positions);
    Py_XDECREF(b->rows);
    Py_XDECREF(b->targets);
}

int glm_batch_args(struct batch_args *b, PyObject *ids, PyObject *lengths, PyObject *positions,
                   PyObject *rows, PyObject *targets)
{
    int n_positions = -1, n_targets = -1;
    *b = (struct batch_args){0};
    if (glm_index_arg(ids, "ids", &b->ids, &b->in.ids, &b->in.N) < 0 ||
        glm_index_arg(lengths, "lengths", &b->lengths, &b->in.lengths, &b->in.S) < 0 ||
        glm_index_arg(positions, "positions", &b->positions, &b->in.positions, &n_positions) < 0 ||
        glm_index_arg(rows, "rows", &b->rows, &b->in.rows, &b->in.M) < 0 ||
        glm_index_arg(targets, "targets", &b->targets, &b->in.targets, &n_targets) < 0)
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
    glm_drop_batch(b);
    return -1;
}
