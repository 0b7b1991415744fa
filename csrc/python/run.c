/* The GIL, the module's lock and signals around a computation, and a batch's arguments.
 *
 * A computation takes the model's busy flag (a second thread gets a RuntimeError), drops the GIL,
 * and takes the module's lock, since models share one pool of threads. While it runs, the backend
 * polls for signals through poll(). */
#include "run.h"

#include <stdlib.h>
#include <string.h>
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

void glm_lose(struct model_object *self, const struct glm_error *err)
{
    if (!self->lost && (self->lost = malloc(sizeof err->text)))
        memcpy(self->lost, err->text, sizeof err->text);
}

void glm_forget_files(struct model_object *self)
{
    PyMem_Free(self->files);
    self->files = NULL;
    self->n_files = -1;
}

static int find_files(struct model_object *self)
{
    struct glm_weight_info info;
    int n = 0;
    glm_forget_files(self);
    for (int i = 0, more; (more = glm_model_weight(self->m, i, &info)) != 0; i++) {
        const void *const places[] = {info.data, info.scale};
        for (int j = 0; more > 0 && j < 2; j++) {
            struct glm_mapped *file = places[j] ? glm_mapped_find(places[j]) : NULL;
            int known = 0;
            for (int k = 0; k < n; k++)
                known |= self->files[k] == file;
            if (!file || known)
                continue;
            void *more_room = PyMem_Realloc(self->files, (size_t)(n + 1) * sizeof *self->files);
            if (!more_room) {
                glm_forget_files(self);
                PyErr_Format(PyExc_MemoryError, "files of weights: %zu bytes could not be taken",
                             (size_t)(n + 1) * sizeof *self->files);
                return -1;
            }
            self->files = more_room;
            self->files[n++] = file;
        }
    }
    self->n_files = n;
    return 0;
}

static glm_status check_files(struct model_object *self, struct glm_error *err)
{
    if (self->lost)
        return glm_fail(err, GLM_EFILE, "%s", self->lost);
    for (int i = 0; i < self->n_files; i++)
        GLM_TRY(glm_mapped_check(self->files[i], err));
    return GLM_OK;
}

static int poll(void *arg)
{
    struct run *run = arg;
    PyEval_RestoreThread(run->thread);
    const int stop = PyErr_CheckSignals() < 0;
    run->thread = PyEval_SaveThread();
    return stop;
}

static int begin(struct run *run, struct model_object *self, int reads, int whole)
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
    if (reads && self->n_files < 0 && find_files(self) < 0)
        return -1;
    if (reads && check_files(self, &run->err) != GLM_OK) {
        glm_raise(GLM_EFILE, &run->err);
        return -1;
    }
    run->reads = reads;
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
    if (reads && self->n_files)
        glm_guard_begin();
    run->before = run->be->enter ? run->be->enter(run->be) : -1;
    run->be->set_poll(run->be, whole ? NULL : poll, run);
    return 0;
}

int glm_run_begin(struct run *run, struct model_object *self) { return begin(run, self, 0, 0); }

int glm_run_begin_reading(struct run *run, struct model_object *self)
{
    return begin(run, self, 1, 0);
}

int glm_run_begin_whole(struct run *run, struct model_object *self, int reads)
{
    return begin(run, self, reads, 1);
}

/* What was computed meanwhile is of no use, and neither is what it was added to. */
static glm_status end_of_reading(struct run *run, glm_status status)
{
    struct model_object *self = run->self;
    struct glm_error err;
    if (self->n_files)
        glm_guard_end();
    if (check_files(self, &err) == GLM_OK)
        return status;
    run->err = err;
    glm_lose(self, &err);
    return GLM_EFILE;
}

int glm_run_end(struct run *run, glm_status status)
{
    status = glm_device_status(run->blame, status, &run->err);
    run->be->set_poll(run->be, NULL, NULL);
    if (run->be->leave)
        run->be->leave(run->be, run->before);
    if (run->reads)
        status = end_of_reading(run, status);
    computing_here = 0;
    pthread_mutex_unlock(&run->self->state->computing);
    PyEval_RestoreThread(run->thread);
    run->self->busy = 0;
    Py_DECREF(run->self);
    if (status == GLM_OK)
        return PyErr_Occurred() ? -1 : 0; /* poll's, after which tasks were skipped */
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
